"""What a layer costs, for a budget: kept weights, bits, bytes as packed, or seconds on this machine."""

from collections.abc import Callable

import torch

from secateurs.base.errors import PlanError
from secateurs.kernels.formats import bitmask_nbytes
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import Grid, least_bits
from secateurs.matrix.patterns import count_zeros
from secateurs.prune.plan import Plan

Cost = Callable[[tuple[int, int], torch.dtype, float, Grid | None], float]
"""(shape, dtype, sparsity, grid) -> what a layer costs; grid None: its weights are stored in their dtype."""


def kept_weights(shape: tuple[int, int], dtype: torch.dtype, sparsity: float, grid: Grid | None) -> float:
    """The number of weights kept: with this cost a budget is a number of zeros."""
    numel = shape[0] * shape[1]
    return numel - count_zeros(numel, sparsity)


def stored_bits(shape: tuple[int, int], dtype: torch.dtype, sparsity: float, grid: Grid | None) -> float:
    """The least bits that a layer can be stored in, with scales, as `pack --optimize size` does."""
    numel = shape[0] * shape[1]
    survivors = numel - count_zeros(numel, sparsity)
    if grid is None:
        return 8 * _packed_bytes(shape, dtype, sparsity, grid)
    return least_bits(grid, shape, survivors)


def _packed_bytes(shape: tuple[int, int], dtype: torch.dtype, sparsity: float, grid: Grid | None) -> float:
    if grid is not None:
        return stored_bits(shape, dtype, sparsity, grid) / 8
    numel = shape[0] * shape[1]
    return min(numel * dtype.itemsize, bitmask_nbytes(shape, numel - count_zeros(numel, sparsity), dtype))


def cost_of(plan: Plan) -> Cost:
    """What the plan's budget counts: kept weights, bits, bytes as packed, or seconds of decoding one token on this machine."""
    if plan.budgeted is None:
        return kept_weights
    counted, _ = plan.budgeted
    if counted == "bits":
        return stored_bits
    if counted == "bytes":
        return _packed_bytes
    profile = DeviceProfile.at_hand()
    if profile is None:
        raise PlanError(
            f"budget {plan.budget} needs a profile of this machine, and there is none; run `secateurs probe` first"
        )

    def seconds(shape: tuple[int, int], dtype: torch.dtype, sparsity: float, grid: Grid | None) -> float:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
        ratio = profile.relative(name, grid, sparsity, 1)
        if ratio is None:
            every = ",".join(str(g.bits) for g in plan.layer_grids)
            asked = f"int{grid.bits} beside {name}" if grid else name
            raise PlanError(
                f"the profile of this machine has no row for {asked}; run `secateurs probe --dtype {name}"
                f"{f' --bits {every}' if grid else ''}`"
            )
        dense = shape[0] * shape[1] * dtype.itemsize / profile.bytes_per_second
        return dense * ratio

    return seconds
