"""prune(), the way in: a model folder into a run directory, or a live module in place."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.base.progress import Progress, silent
from secateurs.model.batches import Batch
from secateurs.prune.live import prune_live
from secateurs.prune.plan import Plan
from secateurs.prune.record import Report
from secateurs.prune.run import Run


# gradients are needed on the way, and inference mode cannot be left from within
@torch.inference_mode(False)
def prune(
    model: str | Path | nn.Module,
    plan: Plan,
    out: str | Path | None = None,
    calibration: Sequence[Batch] | Tensor | None = None,
    progress: Progress = silent,
) -> Report:
    """Prune a Hugging Face folder or hub id into the run directory `out`, or a live module in place.

    A live module takes its calibration as `calibration`: token windows [N, S], or a sequence of keyword-argument dicts it is
    called with; methods that need no inputs take none. Nothing is written and quality is not measured. With a folder the whole
    run is done: prune, verify, evaluate, report; rerun after a kill and it goes on. Raises SecateursError, PlanError for a
    request that cannot be; QualityGateError and SkippedLayersError only from the command line, a Report tells here. model: the
    folder, the hub id, or the module. plan: what is asked; of a folder, its `model` is filled in. out: the run directory, for a
    folder alone. progress: called with (stage, done, total).

    Example:

        >>> import secateurs as sc
        >>> short = {"calibration": sc.Calibration(samples=8, seqlen=64), "evaluation": sc.Evaluation(windows=4, seqlen=64)}
        >>> report = sc.prune("my-model", sc.Plan(sparsity=0.5, **short), out="half")
        >>> report.status, report.totals["sparsity"]
        ('complete', 0.5)
    """
    if isinstance(model, nn.Module):
        return prune_live(model, plan, calibration, progress)
    if out is None:
        raise PlanError("pruning a model folder needs a folder for the result: prune(model, plan, out=...)")
    if calibration is not None:
        raise PlanError("a model folder takes its calibration from plan.calibration; batches are for a live module")
    plan = dataclasses.replace(plan, model=str(model))
    return Run(plan, Path(out).expanduser(), progress).complete()
