"""Stored tensors by name, each read when it is asked for: what every way of storing is turned into, and from."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.model import shards

Lazy = dict[str, Callable[[], Tensor]]


def in_files(file_of: Mapping[str, Path]) -> Lazy:
    """The tensors of safetensors files."""

    def reader(name: str, file: Path) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with shards.opened(file) as handle:
                tensor: Tensor = handle.get_tensor(name)
            return tensor

        return read

    return {name: reader(name, file) for name, file in file_of.items()}


def damaged(name: str, what: str) -> CheckpointError:
    """The error for parts of a tensor that contradict each other."""
    return CheckpointError(f"{name}: {what}; the file is damaged: download or copy it again")


def scattered(values: Tensor, mask: Tensor) -> Tensor:
    """A tensor of the mask's shape that has the values, in order, where the mask is true, and zeros elsewhere."""
    # torch scatters no float8; the bits of a zero are zeros in every type
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    out = torch.zeros(mask.shape, dtype=kind)
    out[mask] = values.contiguous().flatten().view(kind)
    return out.view(values.dtype)
