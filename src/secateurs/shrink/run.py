"""Shrinks a model folder to a smaller dense model under a budget: a plain Hugging Face folder that needs no code of ours.

All blocks keep the same width and heads, so config.json can state them. The run directory holds plan.json, model/, report.json, and
work/ while the run is under way. The model is walked block by block as prune does, so memory holds one block, and a kill loses at
most one estimate or one block.

This file orders the stages and writes and measures the result. The stages: estimates.py (what units cost), shapes.py (which shape
is taken), cutting.py (the model is cut to it).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.device import machine, peak_memory
from secateurs.base.errors import PlanError
from secateurs.base.files import fingerprint_of, write_json, write_text
from secateurs.base.precision import described
from secateurs.base.processes import Ranks, joined
from secateurs.base.progress import Clock, Progress, silent
from secateurs.base.run_directory import REPORT_FORMAT, claim, locked, report_of, resolved, unchanged
from secateurs.model import checkpoint
from secateurs.quality import inputs
from secateurs.quality.evaluation import check, measured, texts_apart
from secateurs.quality.kinds import Kind, kind_of
from secateurs.quality.outputs import subject_of
from secateurs.shrink import cutting, estimates, latency, shapes
from secateurs.shrink.config import not_in_vllm
from secateurs.shrink.cut_experts import uncovered
from secateurs.shrink.job import Dense, Job
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.units import Shape

_UNTIMED = "tokens after a prompt were not timed: this class does not decode one token after another with its cache"


def shrink(
    plan: ShrinkPlan,
    out: str | Path,
    progress: Progress = silent,
    beside: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Begin or go on with a run: estimate losses, choose a shape, cut, measure. Returns the report. Raises SecateursError.

    beside: a folder where the dense model's tasks are kept for other runs on it. say: is told, before the work begins, if no
    shape comes near the budget; it is among the report's warnings too. A missed gate is in the report's `gate`, and raises
    nothing. Under torchrun every process calls it, all return the same, and the first one says it. plan: what is asked. out: the
    run directory, whose model/ loads in transformers alone. progress: called with (stage, done, total).

    Example:

        >>> import secateurs as sc
        >>> short = {"calibration": sc.Calibration(samples=8, seqlen=64), "evaluation": sc.Evaluation(windows=4, seqlen=64)}
        >>> report = sc.shrink(sc.ShrinkPlan("my-model", "params=0.8x", units=("mlp",), multiple=8, **short), "smaller")
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained("smaller/model").intermediate_size < 64
        True
    """
    with joined() as ranks:
        return _shrink(plan, Path(out).expanduser(), progress, beside, say, ranks)


def _shrink(
    plan: ShrinkPlan, out: Path, progress: Progress, beside: Path | None, say: Callable[[str], None], ranks: Ranks
) -> dict[str, Any]:
    plan = replace(plan, model=resolved(plan.model))
    with ranks.leading():
        source = checkpoint.Checkpoint(plan.model)
    kind = kind_of(source)
    _refuse(kind, plan)
    check(plan.evaluation, source, plan.calibration)
    subject = None if kind.causal else subject_of(kind, source)
    dense = Dense.of(plan, source.skeleton())
    units, stay = (plan.units, []) if plan.units else dense.cuts.usual()
    plan = replace(plan, units=units)
    job = Job(plan, dense, out / "work", progress, subject, ranks, stay=tuple(stay))
    shapes.check_units(job)
    shapes.check_experts(job)

    def begin() -> None:
        if not (out / "plan.json").is_file():
            for sentence in stay:
                say(sentence)
            with ranks.all_threads():
                shapes.refuse_too_small(job)
                if far := shapes.coarse(job):
                    say(far)
        claim(out, plan.as_dict())

    ranks.alone(begin)
    with locked(out, ranks):
        report = report_of(out)
        if report is None:
            made = _made(job, source, out, beside)
            ranks.alone(lambda: write_json(out / "report.json", made))
            report = report_of(out) or {}
    ranks.alone(lambda: shutil.rmtree(job.work, ignore_errors=True))
    return report


def _refuse(kind: Kind, plan: ShrinkPlan) -> None:
    """Raise PlanError for a model that is not called with text alone, or that has no loss which a criterion needs."""
    if kind.pairs or "text" not in kind.reads:
        what = "both sides of an encoder-decoder" if kind.pairs else " and ".join(kind.reads) or "recordings with text"
        raise PlanError(f"{plan.model} is a {kind.name}, which reads {what}; shrink takes models of text alone")
    if plan.criterion == "taylor" and not kind.causal:
        raise PlanError(
            f"criterion taylor asks for the gradient of the next token's loss, and {kind.name} predicts none; choose obs"
        )


def _made(job: Job, source: checkpoint.Checkpoint, out: Path, beside: Path | None) -> dict[str, Any]:
    """Write the smaller model to model/ and return the report on it."""
    clock = Clock()
    plan, dense, folder, ranks = job.plan, job.dense, out / "model", job.ranks
    text, parts = _calibration(job, source, out)
    job, windows = replace(job, parts=parts), text.windows
    assert windows is not None
    ranks.need(len(job.batches(windows)), f"batches of {len(windows)} calibration windows")
    clock.spend("calibration")
    lost, sensitive = estimates.estimate(job, windows)
    clock.spend("estimates")
    lost = estimates.corrected(job, lost, windows, sensitive)
    clock.spend("corrections")
    # others wait, lest they disturb the clock
    ranks.wait()
    with ranks.all_threads():
        shape, tried = ranks.tell(shapes.choose(job, lost) if ranks.first else (dense.shape, []))
    clock.spend("shape")
    kept_layers = [i for i in range(dense.shape.layers) if i not in lost.blocks[: dense.shape.layers - shape.layers]]
    cut = replace(job, work=job.work / "cut")
    records = cutting.shaped(cut, windows, shape, kept_layers, sensitive, "cutting", folder)
    kind = kind_of(source)
    card = _card(plan, "AutoModelForCausalLM" if kind.causal else kind.name)
    ranks.alone(lambda: write_text(folder / "README.md", card))
    left = checkpoint.Checkpoint(folder)
    clock.spend("cutting")
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "plan": plan.as_dict(),
        "machine": machine() | ({"processes": ranks.size} if ranks.size > 1 else {}),
        "compute": described(dense.config.dtype),
        "dense": {**asdict(dense.shape), "parameters": dense.sizes.parameters(dense.shape)},
        "left": {
            **asdict(shape),
            "parameters": sum(p.numel() for p in left.skeleton().parameters()),
            "kept_layers": kept_layers,
        },
        "blocks": records,
        "estimated_loss": lost.at(shape, dense.shape),
        "truth": lost.truth,
        "loss_of_fewer_experts_per_token": lost.active,
        "tried": tried,
        "calibration": text.facts,
        "bytes": {
            "dense": source.nbytes,
            "left": left.nbytes,
        },
        "warnings": [
            *job.stay,
            *([far] if (far := shapes.coarse(job)) else []),
            *text.warnings("calibration"),
            *uncovered(records),
            *not_in_vllm(left.skeleton().config),
            *([] if job.subject or job.new else [_UNTIMED]),
        ],
        "distance": None,
        "seconds": clock.seconds,
    }
    ranks.wait()
    with ranks.all_threads():
        timed = _latency(job, source, folder, shape, kept_layers) if ranks.first else ({}, [])
        report["latency"], notes = ranks.tell(timed)
    report["warnings"] += notes
    clock.spend("latency")
    _evaluate(job, source, folder, report, windows, beside)
    clock.spend("evaluate")
    report["peak_memory_bytes"] = peak_memory()
    return report


def _calibration(job: Job, source: checkpoint.Checkpoint, out: Path) -> tuple[inputs.Inputs, int]:
    """The plan's calibration text, and the number of ranks that the run was begun with. Raises OutputError if the text or the model
    has changed since.
    """
    asked, ranks, file = job.plan.calibration, job.ranks, job.work / "parts.json"

    def read() -> tuple[inputs.Inputs, int]:
        text = inputs.read(asked, source, job.dense.skeleton, job.progress)
        if text.windows is None:
            raise PlanError(f"{asked.source} holds {text.unit}; shrink calibrates with text")
        unchanged(out, {job.plan.model: source.fingerprint(), asked.source: fingerprint_of(text.windows)})
        if not file.is_file():
            write_json(file, ranks.size)
        return text, int(json.loads(file.read_text()))

    first = read() if ranks.first else None
    found = ranks.tell(first)
    assert found
    return found


def _card(plan: ShrinkPlan, loader: str) -> str:
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [pruning, secateurs]", "---", "", "# A smaller model", "",
            f"Units ({', '.join(plan.units)}) were removed from a dense model until {plan.budget} was met; by {plan.criterion}"
            f"{', with least squares on what is left' if plan.refit else ''}. It loads with `{loader}.from_pretrained` "
            "and needs no code of secateurs.", "",
        ]
    )  # fmt: skip


def _latency(
    job: Job, source: checkpoint.Checkpoint, folder: Path, shape: Shape, kept_layers: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """Seconds of the dense model and of the smaller one, both loaded from disk, measured in turn; and what to know of them."""
    plan, whole = job.plan, job.dense.shape
    found: dict[str, Any] = {"prompt": plan.prompt, "new": job.new}
    try:
        samples = [
            job.dense.stored(source.folder, whole, range(whole.layers)),
            job.dense.stored(folder, shape, kept_layers),
        ]
    except PlanError as error:
        return {**found, "dense": {}, "left": {}, "ratio": {}}, [f"no time was measured: {error}"]
    dense, left = latency.seconds_of(samples, plan.prompt, job.new)
    seconds = {"dense": asdict(dense), "left": asdict(left), "ratio": asdict(left.over(dense))}
    if not job.new:
        for values in seconds.values():
            del values["decode"]
    some = [
        f"{' and '.join(map(str, sample.models))} of {sample.layers}" for sample in samples if len(sample.models) > 1
    ]
    notes = (
        [f"time was measured on {' and on '.join(some)} blocks, and is that of all blocks on a line"] if some else []
    )
    return {**found, **seconds}, notes


def _evaluate(
    job: Job, source: checkpoint.Checkpoint, folder: Path, report: dict[str, Any], windows: Tensor, beside: Path | None
) -> None:
    """Measure the smaller model's quality, judge it by the plan's gates, and add both to the report."""
    seed, ranks = job.plan.calibration.seed, job.ranks
    left = checkpoint.Checkpoint(folder)
    found = measured(source, left, job.plan.evaluation, seed, job.progress, job.work, beside, ranks=ranks)
    report |= found.as_dict()
    report["warnings"] += found.warnings
    report["distance"], warnings = texts_apart(source, windows, report["calibration"], found, ranks)
    report["warnings"] += warnings
