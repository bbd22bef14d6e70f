"""Collects per-layer statistics on the dense model and assigns each layer its pattern, sparsity and grid.

    shares = assign(model, loader, batches, plan, sensitivity, norms, cost, tick)     # {layer: Share}

O outputs, I inputs.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError, PlanError
from secateurs.base.processes import ALONE, Ranks
from secateurs.base.seed import seed_of
from secateurs.matrix import grids, quantize, solvers
from secateurs.matrix.patterns import Unstructured, count_zeros, parse
from secateurs.matrix.stats import Stats
from secateurs.model.activations import InMemory, OnDisk, note_place, read_place
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader
from secateurs.model.layers import Layer
from secateurs.model.walk import stream
from secateurs.prune.allocation import LayerSummary, Option, Share, Shares, cheapest_loss
from secateurs.prune.block import skip
from secateurs.prune.cost import Cost, kept_weights
from secateurs.prune.plan import Plan

# scores are made of this many rows at a time
_ROWS_PER_CHUNK = 4096
# sparsities whose losses are measured: beside the target, or where a budget decides, evenly between the bounds
_BESIDE = (-0.4, -0.3, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
_LEVELS = 13


def assign(
    model: nn.Module,
    loader: Loader | None,
    batches: Sequence[Batch],
    plan: Plan,
    sensitivity: dict[str, Tensor],
    norms: dict[str, Stats],
    cost: Cost = kept_weights,
    tick: Callable[[], None] = lambda: None,
    work: Path | None = None,
    nearest: Callable[[Sequence[Shares]], int] = lambda candidates: 0,
    ranks: Ranks = ALONE,
) -> Shares | None:
    """What each layer becomes, or None where all are alike. Scores and losses are those of the dense model.

    sensitivity: E[g^2] by layer; where it is known, scores and losses are in units of the model's loss, and can be compared
    between layers. norms: of the layers' inputs, as sensitivity() found them; a pass over the batches where there are none.
    cost: what the plan's budget is in. work: a folder where `measured` keeps what it found, block by block, so that a killed run
    goes on. nearest: which of several candidates for a budget to take. batches: this rank's; all ranks return the same.
    """
    needs = plan.allocator.needs
    if plan.allocation == "uniform":
        return None
    if needs == "curves":
        return _measured(model, loader, batches, plan, sensitivity, cost, tick, work, nearest, ranks)
    solver = plan.solver
    found: dict[str, tuple[str, Layer]] = {}
    norms = dict(norms)
    looks = needs == "scores" and solver.needs != "weights" and not norms
    for step in stream(model, batches if looks else [], loader, propagate="dense", tick=tick, ranks=ranks):
        todo = [layer for layer in step.layers if skip(layer, plan) is None]
        found.update((layer.name, (step.name, layer if loader is None else _without_weights(layer))) for layer in todo)
        if looks:
            norms.update(step.observe(todo, gram=False))
    # of a model that is walked as a whole the block's name is empty
    loaded: str | None = None

    def weight(name: str) -> Tensor:
        nonlocal loaded
        block, layer = found[name]
        if loader is not None:
            if block != loaded:
                loader.release(model)
                loader.load(model, block)
                loaded = block
            layer = _with_weights(layer)
        return layer.read().float()

    def scores(name: str) -> Iterator[Tensor]:
        weight_OI = weight(name)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(plan.calibration.seed, name))
            # an expert that no token reached has inputs of size 0
            stats = norms.get(name) or Stats.zeros(weight_OI.shape[1], False, weight_OI.device) if norms else None
            score_OI = solver.score(weight_OI, stats)
        if name in sensitivity:
            score_OI = score_OI * sensitivity[name].sqrt()[:, None]
        # outside the fork: whoever takes the chunks keeps its own random numbers
        yield from torch.split(score_OI, _ROWS_PER_CHUNK)

    summaries = {
        name: LayerSummary(
            layer.shape, block, functools.partial(scores, name), functools.partial(weight, name), layer.kernel
        )
        for name, (block, layer) in found.items()
    }
    share = plan.allocator.share
    assert share
    try:
        shares = share(summaries, plan.target, plan.bounds)
    except ValueError as error:
        raise PlanError(f"allocation {plan.allocation}: {error}") from None
    finally:
        if loader is not None:
            loader.release(model)
    grid = next((str(grid) for grid in plan.layer_grids), None)
    return {name: Share(plan.pattern, sparsity, grid) for name, sparsity in shares.items()}


def _measured(
    model: nn.Module,
    loader: Loader | None,
    batches: Sequence[Batch],
    plan: Plan,
    sensitivity: dict[str, Tensor],
    cost: Cost,
    tick: Callable[[], None],
    work: Path | None,
    nearest: Callable[[Sequence[Shares]], int],
    ranks: Ranks,
) -> Shares:
    """Losses of every layer at several sparsities and on several grids, by one pass each, and the choice that a budget allows."""
    place = work / "options.json" if work else None
    # {layer: its shape, its dtype, and [share, loss] of every option}; what they cost may change before a run goes on
    known: dict[str, Any] = json.loads(place.read_text())["layers"] if place and place.is_file() else {}
    store = OnDisk(work / "inputs", ranks) if work else InMemory()
    start = ranks.tell(read_place(place))
    for _ in range(start * len(batches)):
        tick()
    for step in stream(model, batches, loader, store, start, "dense", tick=tick, ranks=ranks):
        note_place(place, step.index, ranks, layers=known)
        todo = [layer for layer in step.layers if skip(layer, plan) is None]
        measured = [sensitivity[layer.name] for layer in todo if layer.name in sensitivity]
        # an expert that no token reached when sensitivities were measured counts like the others
        usual = torch.cat(measured).mean() if measured else torch.tensor(1.0)
        solved = {}
        for group, stats in step.observe_in_turn(todo, gram=True):
            for layer in step.mine(group):
                importance_O = sensitivity.get(layer.name, usual)
                # what has no price shows before anything is solved
                cost(layer.shape, layer.parameter.dtype, plan.target, next(iter(plan.layer_grids), None))
                try:
                    losses = list(_losses(layer, stats[layer.name], plan, importance_O))
                except ValueError as error:
                    raise LayerError(f"{layer.name}: {error}") from None
                dtype = str(layer.parameter.dtype).removeprefix("torch.")
                solved[layer.name] = {"shape": layer.shape, "dtype": dtype, "losses": losses}
        everyone = {name: facts for theirs in ranks.gather(solved) for name, facts in theirs.items()}
        known.update({layer.name: everyone[layer.name] for layer in todo})
    if not known:
        raise PlanError(f"{plan.model} has no layers to prune in its blocks")
    options: dict[str, list[Option]] = {}
    whole, dense = 0.0, 0.0
    counted, amount = plan.budgeted or ("weights", 1.0)
    for name, layer in known.items():
        shape, dtype = (layer["shape"][0], layer["shape"][1]), getattr(torch, layer["dtype"])
        shares = [(Share(*share), loss) for share, loss in layer["losses"]]
        options[name] = [Option(s, cost(shape, dtype, s.sparsity, s.on), loss) for s, loss in shares]
        whole += cost(shape, dtype, plan.target, None)
        dense += math.prod(shape) if counted == "bits" else cost(shape, dtype, 0.0, None)
    budget = amount * dense if plan.budget else whole
    try:
        chosen = cheapest_loss(options, budget)
    except ValueError as error:
        raise PlanError(f"allocation measured: {error}; raise the budget or --max-sparsity") from None
    found = {name: option.share for name, option in chosen.items()}
    if plan.budget:
        candidates = [found, *_alike(options, budget)]
        return candidates[nearest(candidates)]
    numels = {name: math.prod(layer["shape"]) for name, layer in known.items()}
    return _exactly(found, chosen, numels, plan)


def _alike(options: dict[str, list[Option]], budget: float) -> Iterator[Shares]:
    """The share that costs the least loss of those that all layers could have within the budget, if there is one."""
    by_layer = [{option.share: option for option in found} for found in options.values()]
    sums = {
        share: [sum(getattr(found[share], of) for found in by_layer) for of in ("cost", "loss")]
        for share in by_layer[0]
        if all(share in found for found in by_layer)
    }
    within = [share for share, (cost, _) in sums.items() if cost <= budget]
    if within:
        yield dict.fromkeys(options, min(within, key=lambda share: sums[share][1]))


def _exactly(shares: Shares, chosen: dict[str, Option], numels: dict[str, int], plan: Plan) -> Shares:
    """The shares with exactly as many zeros as asked: what the levels leave over is given back where a zero costs most."""
    zeros = {name: count_zeros(numels[name], share.sparsity) for name, share in shares.items()}
    over = sum(zeros.values()) - sum(count_zeros(numel, plan.target) for numel in numels.values())
    for name in sorted(shares, key=lambda name: chosen[name].loss / max(1, zeros[name]), reverse=True):
        if parse(shares[name].pattern).fixed_sparsity is None:
            back = max(0, min(over, zeros[name] - count_zeros(numels[name], plan.bounds[0])))
            over -= back
            shares[name] = shares[name]._replace(sparsity=(zeros[name] - back) / numels[name])
    return shares


def _losses(layer: Layer, stats: Stats, plan: Plan, importance_O: Tensor) -> Iterator[tuple[Share, float]]:
    """(share, loss) of everything that a layer could become. Losses are sums over the calibration tokens, so that an expert
    counts by how many reach it.

    Measured are all weights rounded to each grid, and zeros without rounding; both together are taken to cost the sum. On the
    anchor layer at 50% zeros that is within 10% of the joint pass (docs/log.md), and of a product of choices it takes a sum of
    passes.
    """
    weight_OI = layer.read().float()
    on_grids = [(str(grid), _loss_on(weight_OI, stats, grid, plan, importance_O)) for grid in plan.layer_grids]
    # with a budget a layer may stay as it is
    kept = [*on_grids, (None, 0.0)] if plan.budget or not on_grids else on_grids
    zeros: list[tuple[str, float, float]] = []
    if plan.bounds[0] == 0 or all(pattern.fixed_sparsity is not None for pattern in plan.layer_patterns):
        zeros.append(("unstructured", 0.0, 0.0))
    for pattern in plan.layer_patterns:
        if pattern.refuses(*layer.shape):
            continue
        fixed = pattern.fixed_sparsity
        for sparsity in _levels(plan) if fixed is None else [fixed]:
            loss = 0.0
            # an expert that no token reached loses nothing
            if stats.tokens and stats.gram_II is not None:
                new_OI = solvers.obs(weight_OI, stats, pattern, sparsity, plan.damping_of(stats))
                loss = _weighed(new_OI - weight_OI, stats.gram_II, importance_O)
            zeros.append((str(pattern), sparsity, loss))
    for text, sparsity, loss in zeros:
        for grid, more in kept:
            yield Share(text, sparsity, grid), loss + more


def _loss_on(weight_OI: Tensor, stats: Stats, grid: grids.Grid, plan: Plan, importance_O: Tensor) -> float:
    if not stats.tokens or stats.gram_II is None:
        return 0.0
    new_OI, _ = quantize.joint(weight_OI, stats, Unstructured(), 0.0, grid, plan.damping_of(stats))
    return _weighed(new_OI - weight_OI, stats.gram_II, importance_O)


def _weighed(delta_OI: Tensor, gram_II: Tensor, importance_O: Tensor) -> float:
    return float((solvers.row_loss(delta_OI, gram_II) * importance_O.to(delta_OI.device)).sum())


def _levels(plan: Plan) -> list[float]:
    """The sparsities whose losses are measured; the bounds are among them."""
    low, high = plan.bounds
    if plan.budget:
        found = [round(low + (high - low) * i / (_LEVELS - 1), 4) for i in range(_LEVELS)]
        return [s for s in found if s > 0]
    return sorted({low, high, *(round(plan.target + d, 4) for d in _BESIDE if low < plan.target + d < high)})


def _without_weights(layer: Layer) -> Layer:
    """The layer without its parameter; holding the parameters of all layers would hold the whole model."""
    return dataclasses.replace(layer, parameter=nn.Parameter(layer.parameter.detach().to("meta"), requires_grad=False))


def _with_weights(layer: Layer) -> Layer:
    """The layer with its parameter, once its block is loaded again; loading puts new parameters into the modules."""
    parameter = layer.module.get_parameter(layer.tensor_name.rpartition(".")[2])
    return dataclasses.replace(layer, parameter=parameter)
