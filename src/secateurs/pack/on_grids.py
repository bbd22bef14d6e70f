"""A folder whose weights lie on grids (grids.safetensors), opened to be written in another format."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import CheckpointError, PackError
from secateurs.kernels.packed_linear import linears
from secateurs.matrix.grids import Scales
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.scales import SCALES_FILE, read_scales


@dataclass(frozen=True)
class OnGrids:
    """model: without weights. scales: by layer. layer_of: stored name -> layer, for those that have scales."""

    checkpoint: Checkpoint
    model: Any
    scales: dict[str, Scales]
    layer_of: dict[str, str]

    @classmethod
    def open(cls, source: str | Path) -> "OnGrids":
        """Raises CheckpointError, and PackError for a layer that has scales and no tensor of its own."""
        checkpoint = Checkpoint(source)
        model = checkpoint.skeleton()
        scales = read_scales(checkpoint.folder / SCALES_FILE)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # a tied weight is stored under one of its names
        key_of = {
            id(parameters[target]): key
            for key, target in checkpoint.target_of.items()
            if key not in checkpoint.converted and target in parameters
        }
        layer_of = {}
        for name in scales:
            key = key_of.get(id(parameters.get(f"{name}.weight")))
            if key is None:
                raise PackError(
                    f"{name} is on a grid and is a part of a larger tensor (fused experts, or query, key and value in one), which "
                    "is not exported; use --to dense"
                )
            layer_of[key] = name
        return cls(checkpoint, model, scales, layer_of)

    @property
    def transposed(self) -> set[str]:
        """The layers that are stored as inputs x outputs."""
        return {name for name, _, transposed in linears(self.model) if transposed}

    def shared(self, name: str) -> bool:
        """Whether a layer's weight has another name too, as that of a head tied to the embedding."""
        weight: Any = self.model.get_submodule(name).weight
        return sum(p is weight for _, p in self.model.named_parameters(remove_duplicate=False)) > 1

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I) of a layer."""
        weight: Any = self.model.get_submodule(name).weight
        rows, columns = weight.shape
        return (columns, rows) if name in self.transposed else (rows, columns)

    def read(self, key: str) -> Tensor:
        """A tensor as stored. Raises PackError for a layer's weight that is not on its grid."""
        tensor = self.checkpoint.read([key])[key]
        name = self.layer_of.get(key)
        if name is not None:
            check(name, self.scales[name], tensor.T if name in self.transposed else tensor)
        return tensor

    def linears(self) -> Iterator[str]:
        """The names of all Linear layers."""
        return (name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))


def check(name: str, scales: Scales, weight_OI: Tensor) -> None:
    """Raises PackError for a layer's weight that is not on its grid."""
    off = scales.off(weight_OI)
    if off:
        raise PackError(f"{name}: {off}; {SCALES_FILE} belongs to other weights: prune again, or take it away")


def exactly(scale_OG: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Scales in another dtype; None if that changes one."""
    cast = scale_OG.to(dtype)
    return cast if torch.equal(cast.float(), scale_OG.float()) else None


def needs_grids(found: OnGrids, to: str) -> None:
    """Raises CheckpointError for a folder without scales."""
    if not found.scales:
        raise CheckpointError(
            f"{found.checkpoint.folder} has no {SCALES_FILE}, so its weights are on no grid and {to} would be unquantized; "
            "prune with --bits, or use --to dense"
        )
