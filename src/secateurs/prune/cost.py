"""What a layer costs, for a budget: kept weights, bytes as packed, or seconds on this machine."""

from collections.abc import Callable

import torch

from secateurs.base.errors import PlanError
from secateurs.kernels.formats import bitmask_nbytes
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.patterns import count_zeros
from secateurs.prune.plan import Plan

Cost = Callable[[tuple[int, int], torch.dtype, float], float]
"""(shape, dtype, sparsity) -> what a layer costs."""


def kept_weights(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> float:
    """The number of weights kept: with this cost a budget is a number of zeros."""
    numel = shape[0] * shape[1]
    return numel - count_zeros(numel, sparsity)


def _packed_bytes(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> float:
    numel = shape[0] * shape[1]
    return min(numel * dtype.itemsize, bitmask_nbytes(shape, numel - count_zeros(numel, sparsity), dtype))


def cost_of(plan: Plan) -> Cost:
    """The cost that the plan's budget counts: kept weights, bytes as packed, or seconds of decoding one token on this machine."""
    if plan.budget is None:
        return kept_weights
    if plan.budget.startswith("bytes"):
        return _packed_bytes
    profile = DeviceProfile.at_hand()
    if profile is None:
        raise PlanError(
            f"budget {plan.budget} needs a profile of this machine, and there is none; run `secateurs probe` first"
        )

    def seconds(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> float:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
        speedup = profile.speedup(name, sparsity, 1)
        if speedup is None:
            raise PlanError(f"the profile of this machine has no row for {name}; run `secateurs probe --dtype {name}`")
        dense = shape[0] * shape[1] * dtype.itemsize / profile.bytes_per_second
        # a layer is packed only where that is faster
        return dense / max(1.0, speedup if sparsity else 1.0)

    return seconds
