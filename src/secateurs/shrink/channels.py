"""Shrinks a live module, of convolutions above all, to one of the same class with fewer channels, under a budget.

trace.py finds the units, and proof.py shows that they can go. Loss curves in nats an example (half the OBS error of the
consumers' outputs, rows weighted by E[g^2]) decide how many units each group loses (widths.py). Then one group after another is
cut: each consumer is refit by least squares, with an intercept, to the dense layer's outputs on the inputs that the module, as
cut so far, gives it (consumers.py).
"""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.base.progress import Progress, silent
from secateurs.matrix.solvers import DAMPING
from secateurs.model.blocks import device_of
from secateurs.model.layers import why_computed
from secateurs.shrink import columns, graph
from secateurs.shrink.budget import LIVE, Budget
from secateurs.shrink.consumers import Consumers
from secateurs.shrink.engines import Stopwatch, check, facts
from secateurs.shrink.graph import Graph, layer_of
from secateurs.shrink.losses import at_once
from secateurs.shrink.memory import Peak, peak
from secateurs.shrink.norms import norms_of, recalibrate
from secateurs.shrink.outputs import Inputs, Loss, Objective, tensors_of
from secateurs.shrink.passes import copied, forgetting
from secateurs.shrink.proof import prove
from secateurs.shrink.trace import trace
from secateurs.shrink.widths import Bounds, Counts, Curves, Widths

# the largest difference that rounding may make, relative to the largest output
_CLOSE = 1e-2
# seconds for which a shape and the dense module take turns, where the budget is one of time
_TIMED = 2.0
# noise that is said: what rounds to 1% or more of a layer's correlations
_NOISE = 0.005


# gradients are needed on the way, and the copy is to have parameters that train
@torch.inference_mode(False)
def shrink_module(
    model: nn.Module,
    batches: Sequence[Any],
    budget: str,
    criterion: str = "obs",
    refit: bool = True,
    multiple: int = 8,
    damping: float = DAMPING,
    seed: int = 0,
    progress: Progress = silent,
    *,
    loss: Loss | None = None,
    inputs: Callable[[Any], Sequence[Tensor]] | None = None,
    recalibrated: bool = True,
    engine: str = "torch",
    skip: Sequence[str] = (),
    bounds: Bounds | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a module with fewer channels, and a report on it. The given module stays as it is.

    batches: calibration inputs, each a tuple of positional arguments; the first example is traced and timed. budget: of 'params',
    'bytes', 'macs' (of convolutions, linear and recurrent layers; 'flops' is the same), 'memory' (peak of activations) or
    'latency', the last three at batch 1, as in 'macs=0.5x'. engine: where latency is measured on this machine: torch, onnxruntime
    or openvino. skip: globs of layers whose own channels stay. bounds: {glob: the least share of channels that stays, or (least,
    most)}. multiple: new widths are multiples of this. criterion: a row of columns.CRITERIA. refit: least squares for the
    consumers.

    loss: loss(module, batch) -> scalar, a mean over the batch's examples, by which channels are judged (its Fisher information
    E[g^2] weighs the consumers' outputs); without one the distance of all outputs to the dense module's. It is called in evaluation
    mode. inputs: inputs(batch) -> the module's arguments, where a batch holds more than those, such as targets. recalibrated: batch
    norms behind what was cut take new statistics, as far as these lower the error on an eighth of the examples that is held out.
    Outputs may be tensors, or lists, tuples, dicts and dataclasses of them.

    The report says why channels stayed, what share of the parameters makes such channels, on what it was shown that cutting is the
    same as zeros, and what became of batch norms.
    Raises PlanError if the module computes a weight from other parameters (weight norm, masks of torch.nn.utils.prune), cannot be
    exported by torch.export, has no units or cannot meet the budget; LayerError if a Gram matrix does not factor.
    model: in evaluation mode. damping: ridge, in units of the Gram matrix's mean diagonal. seed: of the timed inputs and of the
    units that are tried. progress: called with (stage, done, total).

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
        >>> small, report = sc.shrink_module(net, [(torch.randn(32, 8),)], budget="params=0.5x")
        >>> small
        Sequential(
          (0): Linear(in_features=8, out_features=24, bias=True)
          (1): ReLU()
          (2): Linear(in_features=24, out_features=4, bias=True)
        )
    """
    if criterion not in columns.CRITERIA:
        raise PlanError(f"unknown criterion '{criterion}'; write {', '.join(columns.CRITERIA)}")
    bound = Budget.parse(budget, tuple(LIVE))
    check(engine)
    for name, _ in model.named_parameters():
        why = why_computed(model, name)
        if why:
            raise PlanError(f"{name} cannot be cut: {why}")
    device = device_of(model)
    objective = Objective.of(batches, inputs, loss, device)
    batch = objective.batches[0]
    example = tuple(x[:1] for x in batch)
    # an export would take a batch of one for a constant
    shown = tuple(torch.cat([x[:2], x[:2]])[:2] for x in batch)
    model = copied(model).eval()
    found = prove(model, trace(model, shown), shown, seed)
    if not found.groups:
        why = graph.whole(found.fixed) or ": it has no such layers"
        raise PlanError(f"{type(model).__name__} has no channels that can go{why}")
    used, held = objective.parted() if recalibrated and norms_of(model) else (objective, None)
    consumers = Consumers(model, found, used, damping, seed, progress)
    widths = _widths(model, found, consumers, bound, multiple, example)
    layers = {
        g.name: [layer_of(found.axes[i].tensor) for i in g.axes if found.axes[i].role == "out"] for g in found.groups
    }
    widths.limit(layers, [name for name, _ in model.named_modules() if name], skip, bounds or {})
    widths.refuse_too_small()

    began = time.perf_counter()
    dense = copy.deepcopy(model)
    consumers.weigh()
    for group in found.groups:
        if not any(consumers.reached(name) for name in group.readers):
            widths.keep(group.name, "the loss does not change with it")
    widths.refuse_too_small()
    curves = _curves(consumers, widths)
    few = {name: str(seen) for name, seen in consumers.seen.items() if seen.share >= _NOISE}
    if few:
        name, said = max(few.items(), key=lambda item: consumers.seen[item[0]].share)
        warnings.warn(
            f"{len(few)} of {len(consumers.seen)} layers saw little: {name} {said}; give more inputs", stacklevel=2
        )

    watch = Stopwatch(dense, example, engine)
    most = peak(dense, example)

    def ratio_of(counts: Counts) -> float:
        left = _blank(dense, found, counts)
        return peak(left, example) / most if bound.kind == "memory" else watch.against(left, _TIMED)[2]

    counts, tried = widths.choose(curves, ratio_of, progress)
    records, done = _cut(consumers, counts, criterion, refit)
    norms = recalibrate(model, dense, used, held) if recalibrated else {"count": len(norms_of(model)), "share": 0.0}
    with torch.no_grad():
        model(*example)
    macs = found.macs(dense)
    both = (("dense", dense), ("left", model))
    predicted = next((t["ratio"] for t in tried if t["counts"] == counts), None) if bound.timed else None
    timed = watch.against(model, _TIMED if bound.timed else 0.0)
    return model, {
        "budget": bound.text,
        "groups": records,
        "kept_whole": widths.kept_whole,
        "fixed_parameters": found.standing(dense),
        "proof": found.proof,
        "cut": done,
        "little_data": few,
        "batch_norms": norms,
        "parameters": {kind: sum(p.numel() for p in m.parameters()) for kind, m in both},
        "bytes": {kind: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for kind, m in both},
        "macs": {"dense": macs.at(widths.dense), "left": macs.at(counts)},
        "memory": {kind: peak(m, example) for kind, m in both},
        "estimated_loss": sum(curves[name][widths.dense[name] - count] for name, count in counts.items()),
        "tried": tried,
        "latency": {
            **facts(engine),
            **dict(zip(("dense", "left", "ratio"), timed, strict=True)),
            "predicted": predicted,
        },
        "seconds": time.perf_counter() - began,
    }


def _widths(
    model: nn.Module, found: Graph, consumers: Consumers, bound: Budget, multiple: int, example: Inputs
) -> Widths:
    counts = {g.name: len(g.units) for g in found.groups}
    cost: Any
    if bound.kind == "memory":
        dense = copy.deepcopy(model)
        cost = Peak.of(dense, example, counts, lambda fewer: _blank(dense, found, fewer))
    elif bound.kind in ("params", "bytes"):
        cost = found.parameters(model) if bound.kind == "params" else found.nbytes(model)
    else:
        cost = found.macs(model)
    whole = cost.at(counts)
    # intercepts become biases where there are none
    each = {"params": lambda c: c.new_biases, "bytes": lambda c: c.new_biases * c.weight.element_size()}.get(bound.kind)
    if each:
        cost.rest += sum(each(c) for c in consumers.by_name.values())
    return Widths(bound, multiple, counts, cost, whole, dict(found.fixed), {g.name: g.run for g in found.groups})


def _curves(consumers: Consumers, widths: Widths) -> Curves:
    """What each group's units cost."""
    groups = consumers.graph.groups
    stats = consumers.observe(list(consumers.by_name), "what channels cost")
    found = {}
    for done, group in enumerate(groups):
        sides, places = consumers.sides(group, stats)
        most = widths.most(group.name)
        curve = [0.0] * (most + 1)
        if most:
            _, losses = consumers.removal(sides, places, most, at_once(len(group.units)))
            curve[1:] = losses.tolist()
        found[group.name] = curve
        consumers.progress("what channels cost", done + 1, len(groups))
    return found


def _cut(
    consumers: Consumers, counts: Counts, criterion: str, refit: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cut a module's groups to `counts` units, in place. Returns what each group lost, and what graph.cut() did."""
    records, removed = [], []
    taylor = consumers.taylor() if criterion == "taylor" else {}
    todo = [g for g in consumers.graph.groups if counts[g.name] < len(g.units)]
    for number, group in enumerate(todo):
        gone, error = consumers.cut(group, counts[group.name], criterion, refit, taylor)
        removed += group.units[gone.numpy()].tolist()
        records.append({
            "group": group.name, "before": len(group.units), "after": counts[group.name],
            "removed": sorted(gone.tolist()), "error": error,
        })  # fmt: skip
        consumers.progress("cutting", number + 1, len(todo))
    model, batch = consumers.model, consumers.batches[0]
    with torch.no_grad():
        with forgetting(model):
            zeroed = tensors_of(model(*batch))
        done = graph.cut(model, consumers.graph, removed)
        for a, b in zip(tensors_of(model(*batch)), zeroed, strict=True):
            gap = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if b.is_floating_point() else 0.0
            if not gap <= _CLOSE:
                raise PlanError(
                    f"what was cut gives something else than zeros did: {gap:.2g} of the largest output apart"
                )
    return records, done


def _blank(dense: nn.Module, found: Graph, counts: Counts) -> nn.Module:
    """A module of those widths to be timed, whichever units it has."""
    out = copy.deepcopy(dense)
    graph.cut(out, found, [u for g in found.groups for u in g.units[counts[g.name] :].tolist()])
    return out
