"""Puts the input embedding and the output head on grids, once the blocks are done and before they are tuned together.

An embedding's rows are looked up, so they are rounded with the least squared error, all rows alike. A head multiplies what leaves
the last block, so it is solved on the Gram matrix of that, like any layer, after the pruned blocks. Where both are one matrix, both
uses count by their relative error: see RIDGE. V words or other outputs, I inputs.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError, PlanError
from secateurs.base.processes import ALONE, Ranks
from secateurs.matrix.grids import Grid, Scales
from secateurs.matrix.patterns import Unstructured
from secateurs.matrix.quantize import joint_polished, quantize
from secateurs.matrix.solvers import row_loss
from secateurs.matrix.stats import Stats
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader, Stop, blocks_of, leave
from secateurs.model.layers import Layer, matches
from secateurs.model.walk import stream
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord

# The damping of a matrix that is embedding and head, in units of the mean of H's diagonal. A head loses tr(D H D') of tr(E H E'), a
# look-up |D|^2 of |E|^2. Both count alike with H + r 1, r = tr(E H E') / |E|^2: that mean, if E has no preferred directions.
RIDGE = 1.0
# numbers of a matrix that are solved at a time: rows do not depend on each other
_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Outside:
    """A matrix outside the blocks, and the grid it gets. role: 'embedding', 'head' or 'embedding and head'. head: the module that
    multiplies with it, or None.
    """

    layer: Layer
    role: str
    grid: Grid
    head: nn.Module | None


def on_grid_outside(model: Any, plan: Plan) -> list[Outside]:
    """The matrices outside the blocks that a plan puts on grids. Raises PlanError for a model where they cannot be."""
    if plan.head_bits is None and plan.embedding_bits is None:
        return []
    if blocks_of(model)[0] == [""]:
        raise PlanError(
            f"{type(model).__name__} can only be pruned as a whole, so what lies outside its blocks is not known; leave head and "
            "embedding bits out"
        )
    head, embedding = (_found(model, f"get_{which}_embeddings") for which in ("output", "input"))
    if plan.head_bits is not None and not isinstance(head, nn.Linear):
        raise PlanError(_absent(model, "head", "output", head))
    if plan.embedding_bits is not None and not isinstance(embedding, nn.Embedding):
        raise PlanError(_absent(model, "embedding", "input", embedding))
    if head is not None and embedding is not None and head.weight is embedding.weight:
        if None not in (plan.head_bits, plan.embedding_bits) and plan.head_bits != plan.embedding_bits:
            raise PlanError(
                f"embedding and head of {type(model).__name__} are one matrix, and {plan.embedding_bits} and {plan.head_bits} bits "
                "were asked for them; ask for one"
            )
        wanted = [("embedding and head", head, plan.head_bits or plan.embedding_bits, head)]
    else:
        wanted = [("embedding", embedding, plan.embedding_bits, None), ("head", head, plan.head_bits, head)]
    return [
        Outside(_matrix(model, module, plan), role, plan.grid_of(bits), by) for role, module, bits, by in wanted if bits
    ]


def _found(model: Any, method: str) -> Any:
    # a class may say that it has none by raising
    with suppress(AttributeError, NotImplementedError, AssertionError):
        return getattr(model, method)()
    return None


def _absent(model: Any, what: str, which: str, found: Any) -> str:
    has = f"is a {type(found).__name__}" if found is not None else "finds none"
    return f"{type(model).__name__} has no {what} to put on a grid: get_{which}_embeddings() {has}; leave --{what}-bits out"


def _matrix(model: nn.Module, module: Any, plan: Plan) -> Layer:
    name = next(n for n, p in model.named_parameters() if p is module.weight)
    layer = matrix_at(model, name.removesuffix(".weight"))
    inside = next(
        (n for n in (layer.name, *layer.also) for block in blocks_of(model)[0] if n.startswith(f"{block}.")), None
    )
    if inside is not None:
        raise PlanError(
            f"{inside} lies in a block, and is the weight of {layer.name} too; leave head and embedding bits out"
        )
    if glob := matches(layer.name, plan.skip):
        raise PlanError(f"{layer.name} was given bits and matches --skip {glob}; leave one of them out")
    return layer


def matrix_at(model: nn.Module, name: str) -> Layer:
    """The weight of a module outside the blocks, under that name."""
    module: Any = model.get_submodule(name)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is module.weight]
    also = tuple(n.removesuffix(".weight") for n in names if n != f"{name}.weight")
    return Layer(name, module, module.weight, "linear", also=also)


def quantize_outside(
    model: nn.Module,
    plan: Plan,
    loader: Loader,
    batches: Sequence[Batch],
    store: Activations,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> tuple[list[LayerRecord], dict[str, Scales]]:
    """Write embedding and head of a model whose blocks are pruned on their grids, in place: their records and scales.

    model: without weights; loader: of the pruned model, whose embedding and head are dense. They are loaded when this returns.
    batches: this rank's; the first rank solves.
    """
    todo = on_grid_outside(model, plan)
    heads = [found for found in todo if found.head is not None]
    stats = _inputs_of(model, heads[0].head, loader, batches, store, tick, ranks) if heads and batches else None
    if not ranks.first:
        return [], {}
    loader.load_outside(model)
    records, scales = [], {}
    # loading made new parameters
    for found in on_grid_outside(model, plan):
        record, scales[found.layer.name] = _solve(found, None if found.head is None else stats, plan)
        records.append(record)
    return records, scales


def _inputs_of(
    model: nn.Module, head: Any, loader: Loader, batches: Sequence[Batch], store: Activations, tick: Callable[[], None],
    ranks: Ranks,
) -> Stats | None:  # fmt: skip
    """Sums over what the head multiplies in the pruned model; None if it is not called."""
    count = len(blocks_of(model)[0])
    for _ in stream(model, batches, loader, store, keep_last=True, tick=tick):
        pass
    stats = Stats.zeros(head.in_features, gram=True)

    def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        stats.add_(given[0])
        # its outputs are not needed
        raise Stop

    handle = head.register_forward_pre_hook(add)
    try:
        for b, batch in enumerate(batches):
            with suppress(Stop):
                leave(model, loader, store.read(count, b), batch, None, store.more(count, b))
    finally:
        handle.remove()
    total = stats.summed(ranks, 0)
    return total if total.tokens else None


def _solve(found: Outside, stats: Stats | None, plan: Plan) -> tuple[LayerRecord, Scales]:
    began, layer, grid = time.perf_counter(), found.layer, found.grid
    notes = [] if stats is not None or found.head is None else ["no input of the head was seen; rounded to nearest"]
    if layer.also:
        notes.append(f"the weight of {', '.join(layer.also)} too, quantized once for all its uses")
    rows, inputs = layer.shape
    each = max(1, _NUMBERS // inputs)
    scale, zero = [], []
    lost, whole, before = 0.0, 0.0, 0
    for first in range(0, rows, each):
        part = slice(first, first + each)
        weight_VI = layer.parameter.detach()[part].to(torch.float32, copy=True)
        try:
            new_VI, part_scales = _rounded(weight_VI, found, stats, plan)
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None
        written_VI = layer.read()[part].copy_(new_VI)
        scale.append(part_scales.scale_OG)
        zero += [] if part_scales.zero_OG is None else [part_scales.zero_OG]
        before += int((weight_VI != 0).sum())
        lost += _squared(written_VI.float() - weight_VI, stats)
        whole += _squared(weight_VI, stats)
    scales = Scales(grid, torch.cat(scale), torch.cat(zero) if zero else None)
    written_VI = layer.read()
    if off := scales.off(written_VI):
        raise LayerError(f"{layer.name}: {off}")
    kept = int((written_VI != 0).sum())
    return LayerRecord(
        layer.name, layer.shape, 0.0, kept,
        error=(lost / whole) ** 0.5 if whole else 0.0,
        error_from="weights" if stats is None else "gram",
        tokens=0 if stats is None else stats.tokens,
        seconds=time.perf_counter() - began,
        note="; ".join(notes) or None,
        grid=str(grid),
        rounded_to_zero=max(0, before - kept),
        role=found.role,
    ), scales  # fmt: skip


def _rounded(weight_VI: Tensor, found: Outside, stats: Stats | None, plan: Plan) -> tuple[Tensor, Scales]:
    if stats is None:
        return quantize(weight_VI, weight_VI, None, found.grid, 0.0)
    damping = RIDGE if "embedding" in found.role else plan.damping_of(stats)
    return joint_polished(weight_VI, stats, Unstructured(), 0.0, found.grid, damping)


def _squared(weight_VI: Tensor, stats: Stats | None) -> float:
    """The sum of squares of the outputs of a matrix, or of the matrix itself."""
    if stats is None or stats.gram_II is None:
        return float(weight_VI.square().sum())
    return float(row_loss(weight_VI, stats.gram_II).sum())
