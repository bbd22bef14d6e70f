"""One matrix as `pack` stores it, and what pack.json says of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import PackError
from secateurs.kernels import formats
from secateurs.kernels.packed_linear import LayerChoice, choose
from secateurs.matrix.grids import Scales
from secateurs.pack.on_grids import check


@dataclass(frozen=True)
class Matrices:
    """Packs matrices as the settings of pack() say. scales: of layers on grids, by name."""

    scales: Mapping[str, Scales]
    profile: Any
    merge_zeros: bool
    optimize: str

    def packed(
        self, name: str, weight_OI: Tensor, transposed: bool, stays: str | None = None, looked_up: bool = False
    ) -> tuple[formats.Packed | Tensor, dict[str, Any]]:
        """A layer's matrix, or it as it is (without negative zeros, where those are merged) if it is not packed; and its record.

        stays: why it is not packed, whatever there is to gain. looked_up: of an embedding. Raises PackError.
        """
        grid = self.scales.get(name)
        if grid is not None:
            check(name, grid, weight_OI)
        zeros_have_signs = not self.merge_zeros and grid is None
        negative_zeros = int(((weight_OI == 0) & weight_OI.signbit()).sum())
        if negative_zeros and not zeros_have_signs:
            weight_OI = weight_OI.masked_fill(weight_OI == 0, 0)
        choice = choose(name, weight_OI, self.profile, grid, looked_up, self.optimize).but(stays)
        record = {
            **_record(choice),
            "transposed": transposed,
            "negative_zeros": negative_zeros if zeros_have_signs else 0,
        }
        if choice.plain:
            return weight_OI, record
        packed = formats.pack(weight_OI, choice.format, grid if choice.grid else None)
        record["nbytes"] = packed.nbytes
        if choice.grid:
            record |= {"dtype": str(weight_OI.dtype).removeprefix("torch."), "length": packed.values.numel()}
        if not torch.equal(_bits(formats.unpack(packed)), _bits(weight_OI)):
            raise PackError(
                f"{name}: unpacking does not give the weights back; this is a bug, keep the model and report it"
            )
        return packed, record


def _record(choice: LayerChoice) -> dict[str, Any]:
    return {
        "name": choice.name, "shape": list(choice.shape), "sparsity": choice.sparsity, "format": choice.format,
        "grid": str(choice.grid) if choice.grid else None, "survivors": choice.survivors, "nbytes": choice.nbytes,
        "dense_nbytes": choice.dense_nbytes, "least_nbytes": choice.least_nbytes, "slower": choice.slower, "reason": choice.reason,
    }  # fmt: skip


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16 if weight.element_size() == 2 else torch.int32)
