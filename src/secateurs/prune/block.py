"""Prunes one block in place: reorders inputs, prunes every layer, tunes the survivors.

O outputs, I inputs.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError
from secateurs.base.processes import ALONE, Ranks
from secateurs.base.progress import Progress, ticker
from secateurs.base.seed import seed_of
from secateurs.matrix import solvers
from secateurs.matrix.grids import Grid, Scales
from secateurs.matrix.patterns import NM, Pattern, parse
from secateurs.matrix.quantize import joint_polished, mask_needs_grid, quantize
from secateurs.matrix.stats import Stats
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.blocks import blocks_of
from secateurs.model.couplings import Couplings
from secateurs.model.layers import EXPERTS, Layer, Other, matches, others_of, survivors
from secateurs.model.walk import Step, layers_at, stream
from secateurs.prune import permute
from secateurs.prune.allocation import Shares
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord
from secateurs.prune.straight_through import OnGrid
from secateurs.prune.tune_block import reconstruct
from secateurs.prune.tuning import Moving, movable

# A row's error counts by this power of its sensitivity, E[g^2]. 1 is what a quadratic model of the loss asks for, 0 is
# plain output error; pruning goes too far for the quadratic model, and 1/2 gave the lowest loss (docs/log.md).
_POWER = 0.5


@dataclass(frozen=True)
class Guide:
    """What is known about the dense model before its first layer is pruned.

    shares: what each layer becomes, or None where all are alike. sensitivity: {layer: E[g^2], [O]}.
    couplings, config: of a Hugging Face model, for what can be reordered.
    """

    shares: Shares | None = None
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    couplings: Couplings = field(default_factory=Couplings)
    config: Any = None

    def share(self, plan: Plan, layer: str) -> tuple[Pattern, float, Grid | None]:
        """A layer's pattern, sparsity and grid."""
        if self.shares is None:
            return plan.layer_patterns[0], plan.target, next(iter(plan.layer_grids), None)
        share = self.shares[layer]
        return parse(share.pattern, plan.scope), share.sparsity, share.on

    def output_scale(self, layer: str) -> Tensor | None:
        """The factors of a layer's rows while it is solved, [O, 1]: the square roots of the weights of their squared errors."""
        found = self.sensitivity.get(layer)
        if found is None or not found.any():
            return None
        return (found / found.mean()).clamp(min=1e-6).pow(_POWER / 2)[:, None]


@dataclass
class Outcome:
    """records: one a layer, in order. tuned: names of other parameters that changed. reconstruction: or None. dense: the weights
    that pruned layers had, inputs in their new order, if tuning comes later. scales: of the layers that are on a grid. passes: how
    often the block was run for statistics.
    """

    records: list[LayerRecord]
    tuned: list[str] = field(default_factory=list)
    reconstruction: dict[str, Any] | None = None
    dense: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Scales] = field(default_factory=dict)
    passes: int = 1


def prune_block(step: Step, plan: Plan, guide: Guide, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Prune every layer of a block in place, then tune the block if the plan says so. tick: once a step of tuning."""
    records = {layer.name: record for layer in step.layers if (record := skip(layer, plan))}
    todo = [layer for layer in step.layers if layer.name not in records]
    needs = plan.solver.needs
    stats: dict[str, Stats] = {}
    apart: Iterator[tuple[list[Layer], dict[str, Stats]]] = iter(())
    if needs != "weights" or plan.permute:
        drift = bool(plan.blend) and step.can_drift
        if step.batches:
            apart = step.observe_in_turn(todo, needs == "gram", drift)
            todo, stats = next(apart)
        unseen = [layer for layer in todo if step.batches and layer.name not in stats]
        records |= {
            y.name: _dense(y, "it is not multiplied with anything on calibration inputs", "kind") for y in unseen
        }
        todo = [layer for layer in todo if layer.name not in records]
    if step.can_tune:
        step.see_targets()
    later = (plan.reconstruct and step.can_tune) or plan.distill
    outcome = Outcome([], passes=0)
    pruned: list[Layer] = []
    # experts that are looked at apart come first: what is upstream of them must still be dense
    for group, seen in itertools.chain(apart, [(todo, stats)]):
        outcome.passes += 1
        pruned += group
        notes, tuned, guide = _reorder(step, group, plan, guide, seen)
        outcome.tuned += tuned
        for layer in group:
            if later:
                outcome.dense[layer.name] = layer.read().clone(memory_format=torch.contiguous_format)
        # each rank solves its own, and all go on with the same block
        solved = {
            layer.name: prune_layer(layer, seen.get(layer.name), plan, guide, notes.get(layer.name))
            for layer in step.mine(group)
        }
        for theirs in step.ranks.gather(solved):
            records.update({name: record for name, (record, _) in theirs.items()})
            outcome.scales.update({name: found for name, (_, found) in theirs.items() if found})
        step.hand_out(group)
    others = [_left_out(other) for other in others_of(step.block, step.name, step.layers)]
    outcome.records = [*(records[layer.name] for layer in step.layers), *others]
    if plan.reconstruct and pruned and step.can_tune:
        _tune(step, pruned, stats, plan, outcome, tick)
    return outcome


def left_outside(model: nn.Module, layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    """Records of what lies outside the blocks: embeddings, head. layers: the records of the blocks."""
    names, _ = blocks_of(model)
    if names == [""]:
        return []
    inside = tuple(f"{name}." for name in names)
    found = [_left_out(other) for other in others_of(model, "", []) if not other.name.startswith(inside)]
    # a weight that a block holds as well has its record there
    known = {record.name for record in layers}
    return [record for record in found if record.name not in known]


def _left_out(other: Other) -> LayerRecord:
    kept = int((other.parameter.detach() != 0).sum())
    return LayerRecord(other.name, other.shape, 0.0, kept, skipped=other.why, skipped_by="kind")


def skip(layer: Layer, plan: Plan) -> LayerRecord | None:
    """The record of a layer that stays dense, or None."""
    found = left_dense(layer, plan)
    return None if found is None else _dense(layer, *found)


def left_dense(layer: Layer, plan: Plan) -> tuple[str, str] | None:
    """Why a layer stays dense and LayerRecord.skipped_by, or None."""
    if glob := matches(layer.name, plan.skip):
        return f"matches --skip {glob}", "plan"
    refusals = [layer.refused or pattern.refuses(*layer.shape) for pattern in plan.layer_patterns]
    return (refusals[0], "shape") if refusals[0] and all(refusals) else None


def _dense(layer: Layer, reason: str | None, by: str) -> LayerRecord:
    kept = int((layer.read() != 0).sum())
    return LayerRecord(layer.name, layer.shape, 0.0, kept, skipped=reason, skipped_by=by, note=_shared(layer))


def _shared(layer: Layer) -> str | None:
    """What a reader should know of a weight that has several names."""
    return f"the weight of {', '.join(layer.also)} too, pruned once for all its uses" if layer.also else None


def prune_layer(
    layer: Layer, stats: Stats | None, plan: Plan, guide: Guide, note: str | None = None
) -> tuple[LayerRecord, Scales | None]:
    """Solve one layer and write its weights: its record, and the scales of weights on a grid. A layer whose inputs were zero for
    every token, or an expert that no token reached, is pruned by magnitude.
    """
    began = time.perf_counter()
    solver = plan.solver
    pattern, sparsity, grid = guide.share(plan, layer.name)
    notes = [note] if note else []
    if stats is not None and not stats.sqnorm_I.any():
        unseen = "its inputs were zero for every calibration token"
        notes.append(f"{unseen if stats.tokens else 'no calibration token reached it'}; pruned by magnitude")
        solver, stats = solvers.find("magnitude"), None
    elif stats is not None and solver.needs == "gram" and stats.tokens < layer.shape[1]:
        notes.append(f"only {stats.tokens} tokens for {layer.shape[1]} inputs")
    if plan.blend and layer.kind in EXPERTS:
        notes.append("an expert aims at its own outputs, blend or not")
    if shared := _shared(layer):
        notes.append(shared)
    if solver.needs == "weights":
        stats = None
    # a copy, because the parameter is overwritten
    weight_OI = layer.read().to(torch.float32, copy=True)
    try:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed() would leave the GPU's generator seeded as well
            torch.default_generator.manual_seed(seed_of(plan.calibration.seed, layer.name))
            new_OI, scales = _solve(
                solver, weight_OI, stats, pattern, sparsity, grid, plan, guide.output_scale(layer.name)
            )
    except ValueError as error:
        raise LayerError(f"{layer.name}: {error}") from None
    layer.write(new_OI)
    kept = _check(
        layer, pattern, sparsity, f"{plan.method} gave weights that {{}} cannot hold; raise --damping", scales
    )
    written_OI = layer.read().float()
    record = LayerRecord(
        layer.name,
        layer.shape,
        sparsity,
        kept,
        solvers.relative_error(weight_OI, written_OI, stats),
        "weights" if stats is None else "norms" if stats.gram_II is None else "gram",
        0 if stats is None else stats.tokens,
        time.perf_counter() - began,
        note="; ".join(notes) or None,
        pattern=str(pattern),
        emptied_rows=_emptied(weight_OI, written_OI),
        emptied_groups=_emptied(*(w.reshape(-1, pattern.m) for w in (weight_OI, written_OI)))
        if isinstance(pattern, NM)
        else 0,
        grid=str(grid) if grid else None,
        rounded_to_zero=max(0, weight_OI.numel() - pattern.zeros(*layer.shape, sparsity) - kept) if grid else 0,
    )
    return record, scales


def _emptied(before_OI: Tensor, after_OI: Tensor) -> int:
    """How many rows had weights and have none."""
    return int((before_OI.any(1) & ~after_OI.any(1)).sum())


def _solve(
    solver: solvers.Solver,
    weight_OI: Tensor,
    stats: Stats | None,
    pattern: Pattern,
    sparsity: float,
    grid: Grid | None,
    plan: Plan,
    scale_O1: Tensor | None,
) -> tuple[Tensor, Scales | None]:
    """Rows weighted by how much the loss depends on them: the objective of W times a scale is a weighted sum of rows."""
    target_OI = weight_OI
    damping = solvers.DAMPING if stats is None else plan.damping_of(stats)
    if plan.blend and stats is not None and stats.drift_II is not None:
        target_OI = solvers.dense_target(weight_OI, stats, damping, plan.blend)
    if grid is not None and stats is not None and solver.joint and mask_needs_grid(grid, sparsity):
        importance_O = None if scale_O1 is None else scale_O1[:, 0].square()
        return joint_polished(target_OI, stats, pattern, sparsity, grid, damping, importance_O)
    scaled_OI = target_OI if scale_O1 is None else target_OI * scale_O1
    new_OI = solver.solve(scaled_OI, stats, pattern, sparsity, damping)
    if scale_O1 is not None:
        new_OI = new_OI / scale_O1
    return (new_OI, None) if grid is None else quantize(target_OI, new_OI, stats, grid, damping)


def _check(layer: Layer, pattern: Pattern, sparsity: float, not_finite: str, scales: Scales | None) -> int:
    """The number of weights that a layer keeps. Raises LayerError if one is not finite, the pattern is broken, or one is not on its
    grid.
    """
    written_OI = layer.read()
    if not torch.isfinite(written_OI).all():
        raise LayerError(f"{layer.name}: {not_finite.format(written_OI.dtype)}")
    broken = pattern.violation(written_OI != 0, sparsity)
    if broken:
        raise LayerError(f"{layer.name} does not hold {pattern}: {broken}")
    if scales is not None and (off := scales.off(written_OI)):
        raise LayerError(f"{layer.name}: {off}")
    return int((written_OI != 0).sum())


def _reorder(
    step: Step, todo: list[Layer], plan: Plan, guide: Guide, stats: dict[str, Stats]
) -> tuple[dict[str, str], list[str], Guide]:
    """Reorder inputs where possible, for layers with an N:M pattern: notes by layer, biases that moved, the guide in the new order.

    `stats` are reordered in place.
    """
    patterns = {layer.name: guide.share(plan, layer.name)[0] for layer in todo}
    wanting = {name for name, pattern in patterns.items() if isinstance(pattern, NM) and name in stats}
    if not plan.permute or not wanting:
        return {}, [], guide
    notes = dict.fromkeys(wanting, "inputs not reordered: they are not known to come from layers of this block alone")
    tuned: list[str] = []
    sensitivity = dict(guide.sensitivity)
    for coupling in guide.couplings.of(step.name, step.block, step.layers, guide.config):
        name = coupling.consumer.name
        pattern = patterns.get(name)
        if name not in wanting or not isinstance(pattern, NM) or stats[name].tokens == 0:
            continue
        blocked = permute.refuses(coupling, pattern)
        if blocked:
            notes[name] = f"inputs not reordered: {blocked}"
            continue
        order_I = permute.choose(coupling, stats[name].sqnorm_I, pattern)
        if order_I is None:
            notes[name] = "inputs already in the best order found"
            continue
        tuned += coupling.reorder(order_I)
        stats[name] = stats[name].reordered(order_I)
        for i, producer in enumerate(coupling.producers):
            if producer.name in sensitivity:
                sensitivity[producer.name] = sensitivity[producer.name][coupling.row_order(i, order_I)]
            # a producer that is left dense has moved rows all the same
            if producer.name not in patterns:
                tuned.append(producer.tensor_name)
        notes[name] = "inputs reordered"
    return notes, tuned, replace(guide, sensitivity=sensitivity)


def survivors_of(model: nn.Module, records: Sequence[LayerRecord], scales: Mapping[str, Scales]) -> list[Moving]:
    """The parameters that tuning all blocks may move: the survivors of pruned layers, and vectors (norms, biases)."""
    names, _ = blocks_of(model)
    pruned = {record.name: record for record in records if record.skipped is None}
    found: list[Moving] = []
    for name in names:
        layers = [layer for layer in layers_at(model, name) if layer.name in pruned]
        # from the middle of their steps: leaning again gains nothing more (docs/log.md)
        found += _moving(model.get_submodule(name), layers, pruned, scales, {})
    return found


def _moving(
    block: nn.Module,
    layers: Sequence[Layer],
    records: Mapping[str, LayerRecord],
    scales: Mapping[str, Scales],
    dense: Mapping[str, Tensor],
) -> list[Moving]:
    """What of a block tuning may move. Where nothing was pruned, weights that a grid rounded to zero may move too.

    dense: the weights before, towards which those on a grid lean.
    """
    whole = [layer for layer in layers if layer.name in scales and records[layer.name].sparsity == 0]
    on_grid = [OnGrid(y, scales[y.name], dense.get(y.name)) for y in layers if y.name in scales]
    return movable(block, survivors(layers, whole), on_grid)


def take_up(
    model: nn.Module,
    plan: Plan,
    records: Sequence[LayerRecord],
    batches: Sequence[Batch],
    dense: Callable[[int], Mapping[str, Tensor]],
    scales: Mapping[str, Scales],
    store: Activations,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> tuple[list[LayerRecord], list[str]]:
    """The records after all blocks were tuned, their errors on the inputs that the tuned blocks give, and the names of the other
    parameters that moved. dense: Outcome.dense of a block. scales: of the layers on a grid. batches: this rank's.
    """
    by_name = {record.name: record for record in records}
    vectors: list[str] = []
    needs = plan.solver.needs
    # a batch goes through each block, and through all but the last once more
    passes = (1 if needs == "weights" else 2) * len(blocks_of(model)[0]) - 1
    tick = ticker(progress, "measuring errors", len(batches) * passes)
    for step in stream(model, batches, store=store, tick=tick, ranks=ranks):
        pruned = [layer for layer in step.layers if by_name[layer.name].skipped is None]
        weights = dense(step.index)
        looks = step.observe_in_turn(pruned, needs == "gram") if needs != "weights" else iter([(pruned, {})])
        for group, stats in looks:
            by_name.update(_all_tuned(step, group, by_name, weights, stats, plan, scales))
        vectors += _vectors(step.name, step.block)
    return list(by_name.values()), vectors


def _all_tuned(
    step: Step,
    pruned: Sequence[Layer],
    records: Mapping[str, LayerRecord],
    dense: Mapping[str, Tensor],
    stats: Mapping[str, Stats],
    plan: Plan,
    scales: Mapping[str, Scales],
) -> dict[str, LayerRecord]:
    """The records of a block's layers whose survivors were tuned, each made by the rank that has its statistics."""
    mine = {
        y.name: _tuned(y, records[y.name], dense[y.name], stats.get(y.name), plan, scales.get(y.name))
        for y in step.mine(pruned)
    }
    return {name: record for theirs in step.ranks.gather(mine) for name, record in theirs.items()}


def _tuned(
    layer: Layer, record: LayerRecord, dense_OI: Tensor, stats: Stats | None, plan: Plan, scales: Scales | None
) -> LayerRecord:
    """The record of a layer whose survivors were tuned. dense_OI: the weights before it was pruned."""
    pattern = parse(record.pattern or "", plan.scope)
    kept = _check(layer, pattern, record.sparsity, "tuning gave {} overflow", scales)
    if record.error_from == "weights" or (stats is not None and not stats.tokens):
        stats = None
    error = solvers.relative_error(dense_OI.float(), layer.read().float(), stats)
    # of experts that were looked at apart no statistics are left
    seen = record.error_from if stats is not None else "weights"
    more = record.rounded_to_zero + record.kept - kept if scales else 0
    return replace(record, kept=kept, error=error, error_from=seen, rounded_to_zero=more)


def _vectors(name: str, block: nn.Module) -> list[str]:
    return [f"{name}.{n}" for n, p in block.named_parameters() if p.dim() == 1]


def _tune(
    step: Step, pruned: list[Layer], stats: Mapping[str, Stats], plan: Plan, outcome: Outcome, tick: Callable[[], None]
) -> None:
    """Tune the block against the dense one and bring the records up to date."""
    records, ranks = {record.name: record for record in outcome.records}, step.ranks
    with step.evaluating():
        found = reconstruct(
            _moving(step.block, pruned, records, outcome.scales, outcome.dense),
            lambda batch, part: step.call(step.inputs(ranks.local(batch))[part], ranks.local(batch), part),
            lambda batch, part: step.targets(ranks.local(batch))[part],
            ranks.merged(step.windows),
            plan.reconstruct or 0,
            seed=seed_of(plan.calibration.seed, step.name),
            tick=tick,
            ranks=ranks,
        )
    outcome.reconstruction = {"block": step.name, "before": found.before, "after": found.after, "steps": found.steps}
    if not found.accepted:
        return
    records.update(_all_tuned(step, pruned, records, outcome.dense, stats, plan, outcome.scales))
    outcome.records = list(records.values())
    outcome.tuned += _vectors(step.name, step.block)
