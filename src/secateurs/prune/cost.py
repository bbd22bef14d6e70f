"""What a layer costs, for a budget: kept weights, bits, bytes as packed, or seconds on this machine; and what the layers have of a
budget of bytes, which is of the whole model."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateurs.base.errors import PlanError
from secateurs.kernels.formats import bitmask_nbytes
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import Grid, least_bits
from secateurs.matrix.patterns import count_zeros
from secateurs.model.blocks import blocks_of
from secateurs.model.layers import Layer
from secateurs.model.walk import layers_at
from secateurs.prune.block import left_dense
from secateurs.prune.outside import on_grid_outside
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord

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
        ratio = profile.relative(name, grid, sparsity, 1, plan.pattern == "2:4")
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


@dataclass(frozen=True)
class Whole:
    """A budget of bytes of a whole model. asked: what it allows. weights: all weights as they are. layers: of these, those of the
    layers that are pruned. rest: all others as they will be stored, embedding and head on the grids that the plan gives them.
    """

    asked: float
    weights: int
    layers: int
    rest: float

    def of_layers(self, plan: Plan) -> Plan:
        """The plan with its budget as a fraction of the layers' bytes."""
        fraction = min(1.0, (self.asked - self.rest) / self.layers)
        return dataclasses.replace(plan, budget=f"bytes={math.floor(fraction * 1e9) / 1e9:.9f}")

    def as_dict(self, pruned: Sequence[LayerRecord], dtype: torch.dtype) -> dict[str, Any]:
        """For the report: stored, what it came to."""
        spent = sum(_packed_bytes(r.shape, dtype, 1 - r.kept / r.numel, r.on) for r in pruned)
        return {
            "asked": round(self.asked), "weights": self.weights, "rest": round(self.rest), "stored": round(self.rest + spent),
        }  # fmt: skip


def whole_of(plan: Plan, model: nn.Module) -> Whole | None:
    """What a budget of bytes comes to in this model, which needs no weights; None for other plans. Raises PlanError for one that
    cannot be met.
    """
    if plan.budgeted is None or plan.budgeted[0] != "bytes":
        return None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = _pruned(model, plan)
    dense = sum(_dense_bytes(layer) for layer in layers)
    rest = float(weights - dense)
    for found in on_grid_outside(model, plan):
        rest += least_bits(found.grid, found.layer.shape, math.prod(found.layer.shape)) / 8 - _dense_bytes(found.layer)
    asked = plan.budgeted[1] * weights
    least = sum(_least(layer, plan, _packed_bytes) for layer in layers)
    if asked < rest + least:
        raise PlanError(
            f"budget {plan.budget} is {_mb(asked)} of the {_mb(weights)} that all weights take, and {_mb(rest + least)} are "
            f"needed: {_mb(least)} for the layers at their smallest, {_mb(rest)} for embedding, head and what else is not pruned; "
            "raise the budget, or let it choose from fewer bits (--bits, --embedding-bits, --head-bits) or more zeros "
            "(--max-sparsity)"
        )
    return Whole(asked, weights, dense, rest) if layers else None


def _pruned(model: nn.Module, plan: Plan) -> list[Layer]:
    """The layers of its blocks that do not stay dense."""
    return [y for name in blocks_of(model)[0] for y in layers_at(model, name) if left_dense(y, plan) is None]


def _dense_bytes(layer: Layer) -> int:
    return math.prod(layer.shape) * layer.parameter.element_size()


def _least(layer: Layer, plan: Plan, cost: Cost) -> float:
    """Of all that the layer may become."""
    able = [pattern for pattern in plan.layer_patterns if not pattern.refuses(*layer.shape)]
    zeros = [plan.bounds[1] if pattern.fixed_sparsity is None else pattern.fixed_sparsity for pattern in able]
    ways = [(s, grid) for s in (0.0, *zeros) for grid in (None, *plan.layer_grids)]
    return min(cost(layer.shape, layer.parameter.dtype, s, grid) for s, grid in ways)


def check_reachable(plan: Plan, model: nn.Module, cost: Cost) -> None:
    """Raises PlanError for a budget of bits or seconds below the least that the layers can take; it needs no weights. Bytes are
    those of the whole model: whole_of().
    """
    if plan.budgeted is None or plan.budgeted[0] == "bytes":
        return
    counted, amount = plan.budgeted
    layers = _pruned(model, plan)
    dense = sum(
        math.prod(y.shape) if counted == "bits" else cost(y.shape, y.parameter.dtype, 0.0, None) for y in layers
    )
    least = sum(_least(layer, plan, cost) for layer in layers)
    if least > amount * dense:
        needed = f"{counted}={math.ceil(least / dense * 1000) / 1000:g}{'x' if counted == 'seconds' else ''}"
        raise PlanError(
            f"budget {plan.budget} is below {needed}, the least that the layers can take with what it may choose from; raise the "
            "budget, or let it choose from fewer bits (--bits) or more zeros (--max-sparsity)"
        )


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f} MB"
