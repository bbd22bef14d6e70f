"""Masks of torch.nn.utils.prune: NAME_orig and NAME_mask in place of NAME, as a module has them until prune.remove()."""

from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.rescue.tensors import Lazy, damaged

FORMAT = "torch.nn.utils.prune"


def with_masks(stored: Lazy) -> tuple[Lazy, list[str]]:
    """The tensors with masks applied, and the names of those. Raises CheckpointError for a tensor without its mask."""
    names = [key.removesuffix("_mask") for key in stored if key.endswith("_mask") and f"{key[:-5]}_orig" in stored]
    for key in stored:
        if key.endswith("_orig") and key.removesuffix("_orig") not in names:
            raise CheckpointError(
                f"{key} has no {key.removesuffix('_orig')}_mask beside it, so nobody knows which of its weights are 0"
            )
    taken = {f"{name}{part}" for name in names for part in ("_orig", "_mask")}
    out = {key: read for key, read in stored.items() if key not in taken}
    out |= {name: _reader(name, stored[f"{name}_orig"], stored[f"{name}_mask"]) for name in names}
    return out, names


def _reader(name: str, original: Callable[[], Tensor], mask: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor, kept = original(), mask()
        if kept.shape != tensor.shape:
            raise damaged(name, f"it is {list(tensor.shape)}, its mask {list(kept.shape)}")
        if not ((kept == 0) | (kept == 1)).all():
            raise damaged(name, "its mask holds other numbers than 0 and 1")
        # what is pruned may be anything, and negative times 0 is a negative zero
        return torch.where(kept != 0, tensor, 0)

    return read
