"""Chooses the shape that a model is cut to: of all that the plan allows, the one with the least estimated loss in the budget.

A budget of parameters, bytes or multiplications is counted. A budget of time is measured: blank models with half of one thing
each are timed, a linear model fitted to them says which shape to try, that shape is timed, and so on until one fits.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from secateurs.base.errors import PlanError
from secateurs.base.files import write_json
from secateurs.base.progress import ticker
from secateurs.shrink import latency, losses, units
from secateurs.shrink.job import Job
from secateurs.shrink.latency import LatencyModel, Sample, Seconds
from secateurs.shrink.losses import Losses
from secateurs.shrink.units import Shape

# a step is coarse where the nearest shape takes less than this of the budget
_COARSE = 0.95
# shapes that are measured at most; one may take 1% more than the budget, and is near enough from 2% less
_TRIES = 10
_OVER, _UNDER, _AIM = 1.01, 0.98, 0.995
# a shape this near to the budget is timed again, in more rounds
_NEAR, _ROUNDS = 0.06, 12


def check_units(job: Job) -> None:
    """Raise PlanError for units that the model does not have, or whose number its config cannot state."""
    dense, multiple = job.dense, job.plan.multiple
    for kind in job.plan.units:
        refused = dense.cuts.refuses(kind)
        if refused:
            raise PlanError(f"units {kind}: {refused}; leave it out of --units")
        if kind in ("mlp", "hidden") and dense.shape.steps(kind) <= multiple:
            what = "MLPs of {} neurons" if kind == "mlp" else "a residual width of {}"
            raise PlanError(
                f"{what.format(dense.shape.steps(kind))} cannot become a smaller multiple of {multiple}; lower --multiple"
            )


def check_experts(job: Job) -> None:
    """Raise PlanError for a criterion of experts or a number per token that the model cannot have."""
    active, dense = job.plan.experts_per_token, job.dense
    if "experts" in job.plan.units and job.plan.experts != "loss" and not dense.cuts.sums_experts:
        raise PlanError(
            f"experts {job.plan.experts} asks what each expert gives, and this {dense.config.model_type} weighs what goes into "
            "them; choose loss"
        )
    if active is None:
        return
    if not active < dense.shape.active:
        now = f"a token is sent to {dense.shape.active} experts" if dense.shape.experts else "this model has none"
        raise PlanError(f"experts-per-token {active} is not fewer: {now}")
    if refused := dense.cuts.refuses("active"):
        raise PlanError(f"experts-per-token {active}: {refused}")


def refuse_too_small(job: Job) -> None:
    """Raise PlanError for a budget that the smallest shape does not meet."""
    plan, bound, sizes = job.plan, job.plan.bound, job.dense.sizes
    shape = min(allowed(job), key=sizes.parameters)
    if bound.timed:
        samples = [job.dense.blank(s) for s in (job.dense.shape, shape)]
        dense, least = latency.seconds_of(samples, plan.prompt, job.new, rounds=3)
        used = _used(job, least, dense)
        if used <= _OVER:
            return
        took = f"takes about {used * bound.value:.3g}{' seconds' if bound.kind == 'seconds' else 'x'}"
    else:
        share = sizes.share(bound.kind, shape, plan.prompt)
        if share <= bound.value:
            return
        took = f"has {share:.3f}x the {'parameters' if bound.kind == 'params' else bound.kind}"
    raise PlanError(
        f"budget {plan.budget}: the smallest shape that {', '.join(plan.units)} can be cut to {took}; raise the budget or name "
        "more --units"
    )


def allowed(job: Job) -> list[Shape]:
    """All smaller shapes that the units allow and that transformers loads. Raises PlanError if there is none."""
    chosen, dense, step, sizes = job.plan.units, job.dense.shape, job.plan.multiple, job.dense.sizes
    least = {kind: dense.steps(kind) - losses.most(dense.steps(kind)) for kind in units.COLUMNS if kind in chosen}
    fewest_experts = dense.experts - (sizes.most_experts if "experts" in chosen else 0)
    fewest = dense.layers - sizes.most_blocks(job.plan.bound) if "layers" in chosen else dense.layers
    wide = [dense.mlp, *(w for w in range(dense.mlp - 1, least.get("mlp", dense.mlp) - 1, -1) if w % step == 0)]
    deep = losses.most(dense.hidden) if "hidden" in chosen else 0
    hidden = [dense.hidden, *(w for w in range(dense.hidden - 1, dense.hidden - deep - 1, -1) if w % step == 0)]
    heads = range(dense.heads, least.get("heads", dense.heads) - 1, -1)
    queries = range(dense.queries, least.get("queries", dense.queries) - 1, -1)
    active = job.plan.experts_per_token or dense.active
    found = [
        Shape(d, w, h, q, e, n, active)
        for d in range(dense.layers, fewest - 1, -1)
        for w in wide
        for h in heads
        for q in queries
        for e in range(dense.experts, fewest_experts - 1, -job.dense.cuts.groups)
        for n in hidden
    ]
    # some classes require the residual width to be a multiple of the query heads
    kinds = {
        (s.heads, s.queries, s.hidden): replace(dense, heads=s.heads, queries=s.queries, hidden=s.hidden) for s in found
    }
    refused = {kind: job.dense.not_loadable(shape) for kind, shape in kinds.items()}
    shapes = [s for s in found if s != dense and not refused[s.heads, s.queries, s.hidden]]
    if not shapes:
        reasons = [why for why in refused.values() if why]
        raise PlanError(
            f"{', '.join(chosen)} cannot be cut to anything that transformers loads: "
            f"{reasons[0] if reasons else 'nothing smaller is left'}"
        )
    return shapes


def coarse(job: Job) -> str | None:
    """A sentence on a counted budget that no shape comes near: the two nearest results, and what allows a finer step; or None."""
    plan, dense, bound = job.plan, job.dense.shape, job.plan.bound
    if bound.timed:
        return None

    def share(shape: Shape) -> float:
        return job.dense.sizes.share(bound.kind, shape, plan.prompt)

    shapes = allowed(job)
    below = max((s for s in shapes if share(s) <= bound.value), key=share, default=None)
    if below is None or share(below) >= _COARSE * bound.value:
        return None
    above = min((s for s in shapes if share(s) > bound.value), key=share, default=dense)
    said = f"budget {plan.budget}: {', '.join(plan.units)} can be cut to {_of(share(below), below, job)}, and the next larger is "
    said += _of(share(above), above, job)
    best, multiple = below, plan.multiple
    for step in (
        m for m in range(plan.multiple - 1, 0, -1) if plan.multiple % m == 0 and share(best) < _COARSE * bound.value
    ):
        for kind in (k for k in ("mlp", "hidden") if k in plan.units):
            numbers = (n for n in range(dense.steps(kind) - 1, best.steps(kind), -1) if n % step == 0)
            wider = (replace(below, **{kind: n}) for n in numbers)
            found = next((s for s in wider if share(s) <= bound.value and not job.dense.not_loadable(s)), below)
            if share(found) > share(best):
                best, multiple = found, step
    if best != below:
        said += f"; --multiple {multiple} allows {_of(share(best), best, job)}"
    more = [kind for kind in units.KINDS if kind not in plan.units and not job.dense.cuts.refuses(kind)]
    if more:
        said += f"; more --units may allow a finer one ({', '.join(more)})"
    return said


def _of(share: float, shape: Shape, job: Job) -> str:
    """'0.500x (hidden 48 of 96)': what is less than in the dense model."""
    found = {kind: (getattr(shape, kind), getattr(job.dense.shape, kind)) for kind in units.KINDS}
    what = ", ".join(f"{kind} {now} of {before}" for kind, (now, before) in found.items() if now != before)
    return f"{share:.3f}x ({what or 'the dense model'})"


def choose(job: Job, lost: Losses) -> tuple[Shape, list[dict[str, Any]]]:
    """The shape with the least estimated loss in the budget, and the shapes that were timed on the way; kept in shape.json."""
    file = job.work / "shape.json"
    if file.is_file():
        data = json.loads(file.read_text())
        return Shape(**data["shape"]), data["tried"]
    bound, sizes = job.plan.bound, job.dense.sizes
    shapes = [shape for shape in allowed(job) if job.dense.shape.layers - shape.layers <= len(lost.blocks)]

    def loss(shape: Shape) -> float:
        return lost.at(shape, job.dense.shape)

    # there is one if any number of blocks may go: refuse_too_small() has checked
    fitting = [s for s in shapes if bound.timed or sizes.share(bound.kind, s, job.plan.prompt) <= bound.value]
    if not fitting:
        raise PlanError(
            f"budget {job.plan.budget}: of this model's blocks only {len(lost.blocks)} may go, since its config cannot state what "
            "would be left; raise the budget or name more --units"
        )
    tried: list[dict[str, Any]] = []
    if bound.timed:
        shape, tried = _within_time(job, shapes, loss)
    else:
        shape = min(fitting, key=loss)
    write_json(file, {"shape": asdict(shape), "tried": tried})
    return shape, tried


def _within_time(
    job: Job, shapes: Sequence[Shape], loss: Callable[[Shape], float]
) -> tuple[Shape, list[dict[str, Any]]]:
    """choose() for a budget of time. Raises PlanError if no shape that was timed is within it, or the dense model is."""
    plan, dense = job.plan, job.dense.shape
    tick = ticker(job.progress, "measuring latency", _TRIES + 1)
    probes = _probes(job)
    whole = job.dense.blank(dense)
    samples = [whole, *(job.dense.blank(p) for p in probes)]
    at_first, *seconds = latency.seconds_of(samples, plan.prompt, job.new, rounds=3)
    points = [(dense, Seconds(1.0, 1.0)), *((p, s.over(at_first)) for p, s in zip(probes, seconds, strict=True))]
    tick()
    if _used(job, at_first, at_first) <= 1:
        raise PlanError(f"budget {plan.budget}: the dense model is within it already; lower it")
    best: Shape | None = None
    tried: list[dict[str, Any]] = []
    for _ in range(_TRIES):
        fitted = LatencyModel.fit(dense, points)
        if tried:
            fitted = fitted.through(*points[-1])
        # shapes that were timed are not tried again
        known = [shape for shape, _ in points[1 + len(probes) :]]
        new = {s: _used(job, fitted.at(s).times(at_first), at_first) for s in shapes if s not in known}
        fitting = [s for s, used in new.items() if used <= _AIM] or sorted(new, key=lambda s: new[s])[:1]
        shape = min(fitting, key=loss, default=best)
        if shape is None or (best is not None and loss(shape) >= loss(best)):
            break
        ratio, used = _timed(job, [whole, job.dense.blank(shape)], at_first)
        points.append((shape, ratio))
        tried.append({"shape": asdict(shape), "prefill": ratio.prefill, "decode": ratio.decode, "of_budget": used})
        tick()
        if used <= _OVER:
            best = shape
        if _UNDER <= used <= _OVER:
            break
    if best is None:
        raise PlanError(
            f"budget {plan.budget}: no shape that was tried was fast enough, the last at {tried[-1]['of_budget']:.3g} of it; "
            "other work on this machine may disturb the clock: rerun, or raise the budget"
        )
    return best, tried


def _probes(job: Job) -> list[Shape]:
    """Shapes with half of one thing each, by whose times the linear model is fitted."""
    dense, multiple = job.dense.shape, job.plan.multiple
    found = [
        replace(dense, layers=max(1, dense.layers // 2)),
        replace(dense, mlp=max(multiple, dense.mlp // 2 // multiple * multiple)),
    ]
    for kind in (k for k in ("heads", "queries", "hidden") if k in job.plan.units):
        # the nearest number that transformers loads
        fewer = (replace(dense, **{kind: n}) for n in range(max(1, dense.steps(kind) // 2), 0, -1))
        found += islice((shape for shape in fewer if not job.dense.not_loadable(shape)), 1)
    return found


def _timed(job: Job, pair: Sequence[Sample], at_first: Seconds) -> tuple[Seconds, float]:
    """The seconds of the second sample over those of the first, and the share of the budget that it uses.

    at_first: the dense model's seconds. A shape near the budget is timed again in more rounds.
    """
    for rounds in (3, _ROUNDS):
        base, now = latency.seconds_of(pair, job.plan.prompt, job.new, rounds)
        ratio = now.over(base)
        used = _used(job, ratio.times(at_first), at_first)
        if abs(used - 1) > _NEAR:
            break
    return ratio, used


def _used(job: Job, seconds: Seconds, dense: Seconds) -> float:
    """The share of a time budget that is used; 1 is all of it."""
    bound = job.plan.bound
    if bound.kind == "seconds":
        return (seconds.prefill + job.new * seconds.decode) / bound.value
    ratio = seconds.over(dense)
    return max(ratio.prefill, ratio.decode) / bound.value
