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
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.base.progress import Progress, silent
from secateurs.matrix.solvers import DAMPING
from secateurs.model.blocks import device_of
from secateurs.model.layers import why_computed
from secateurs.shrink import columns, graph
from secateurs.shrink.budget import Budget
from secateurs.shrink.consumers import Consumers
from secateurs.shrink.graph import Graph
from secateurs.shrink.losses import at_once
from secateurs.shrink.norms import norms_of, recalibrate
from secateurs.shrink.outputs import Inputs, Loss, Objective, tensors_of
from secateurs.shrink.passes import copied, forgetting
from secateurs.shrink.proof import prove
from secateurs.shrink.trace import trace
from secateurs.shrink.widths import Counts, Curves, Widths

BUDGETS = ("params", "flops", "latency")
# the largest difference that rounding may make, relative to the largest output
_CLOSE = 1e-2


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
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a module with fewer channels, and a report on it. The given module stays as it is.

    batches: calibration inputs, each a tuple of positional arguments; the first example is traced and timed. budget: 'params=0.7x',
    'flops=0.5x' (of convolutions and linear layers) or 'latency=0.8x', measured on this machine at batch 1. criterion: a row of
    columns.CRITERIA. refit: least squares for the consumers. multiple: new widths are multiples of this.

    loss: loss(module, batch) -> scalar, a mean over the batch's examples, by which channels are judged (its Fisher information
    E[g^2] weighs the consumers' outputs); without one the distance of all outputs to the dense module's. It is called in evaluation
    mode. inputs: inputs(batch) -> the module's arguments, where a batch holds more than those, such as targets. recalibrated: batch
    norms behind what was cut take new statistics, as far as these lower the error on an eighth of the examples that is held out.
    Outputs may be tensors, or lists, tuples, dicts and dataclasses of them.

    The report says why channels stayed, what share of the parameters makes such channels, on what it was shown that cutting is the
    same as zeros, and what became of batch norms.
    Raises PlanError if the module computes a weight from other parameters (weight norm, masks of torch.nn.utils.prune), cannot be
    exported by torch.export, has no units or cannot meet the budget; LayerError if a Gram matrix does not factor.
    """
    if criterion not in columns.CRITERIA:
        raise PlanError(f"unknown criterion '{criterion}'; write {', '.join(columns.CRITERIA)}")
    bound = Budget.parse(budget, BUDGETS)
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
    widths = _widths(model, found, consumers, bound, multiple)
    widths.refuse_too_small()

    began = time.perf_counter()
    dense = copy.deepcopy(model)
    consumers.weigh()
    for group in found.groups:
        if not any(consumers.reached(name) for name in group.readers):
            widths.keep(group.name, "the loss does not change with it")
    widths.refuse_too_small()
    curves = _curves(consumers, widths)
    few = {name: str(seen) for name, seen in consumers.seen.items() if seen.share}
    if few:
        name, said = max(few.items(), key=lambda item: consumers.seen[item[0]].share)
        warnings.warn(f"{len(few)} of {len(consumers.seen)} layers saw little: {name} {said}", stacklevel=2)

    def ratio_of(counts: Counts) -> float:
        return measure(dense, _blank(dense, found, counts), example)[2]

    counts, tried = widths.choose(curves, ratio_of, progress)
    records, done = _cut(consumers, counts, criterion, refit)
    norms = recalibrate(model, dense, used, held) if recalibrated else {"count": len(norms_of(model)), "share": 0.0}
    with torch.no_grad():
        model(*example)
    macs = found.macs(dense)
    return model, {
        "budget": bound.text,
        "groups": records,
        "kept_whole": widths.kept_whole,
        "fixed_parameters": found.standing(dense),
        "proof": found.proof,
        "cut": done,
        "little_data": few,
        "batch_norms": norms,
        "parameters": {kind: sum(p.numel() for p in m.parameters()) for kind, m in (("dense", dense), ("left", model))},
        "macs": {"dense": macs.at(widths.dense), "left": macs.at(counts)},
        "estimated_loss": sum(curves[name][widths.dense[name] - count] for name, count in counts.items()),
        "tried": tried,
        "latency": dict(zip(("dense", "left", "ratio"), measure(dense, model, example), strict=True)),
        "seconds": time.perf_counter() - began,
    }


def _widths(model: nn.Module, found: Graph, consumers: Consumers, bound: Budget, multiple: int) -> Widths:
    counts = {g.name: len(g.units) for g in found.groups}
    cost = found.parameters(model) if bound.kind == "params" else found.macs(model)
    whole = cost.at(counts)
    if bound.kind == "params":
        # intercepts become biases where there are none
        cost.rest += sum(c.new_biases for c in consumers.by_name.values())
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


def measure(dense: nn.Module, left: nn.Module, example: Inputs, rounds: int = 15) -> tuple[float, float, float]:
    """Median seconds of two modules on one example, and their median ratio. They take turns, after two rounds to warm up."""
    samples: list[tuple[float, float]] = []
    cuda = any(x.is_cuda for x in example)
    with torch.no_grad():
        for number in range(rounds + 2):
            pair = []
            for module in (dense, left):
                begin = time.perf_counter()
                module(*example)
                if cuda:
                    torch.cuda.synchronize()
                pair.append(time.perf_counter() - begin)
            if number >= 2:
                samples.append((pair[0], pair[1]))
    return median(a for a, _ in samples), median(b for _, b in samples), median(b / a for a, b in samples)
