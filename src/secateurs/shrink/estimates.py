"""Estimates what units cost in quality, once for a run; results are kept in its work folder.

losses.json and sensitivity.safetensors hold the estimates, made on the dense model. truth.json holds measured losses of models cut
in one kind of unit, which correct the estimates where several kinds compete.
"""

import json
import shutil
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateurs.base.files import write_json, write_tensors
from secateurs.base.progress import ticker
from secateurs.model.activations import InMemory
from secateurs.model.batches import Batch, batched, first_windows
from secateurs.model.blocks import AllLoaded, blocks_of
from secateurs.prune.sensitivity import sensitivity
from secateurs.quality.outputs import embedder
from secateurs.shrink import cutting, losses, units, width
from secateurs.shrink.job import Job
from secateurs.shrink.losses import Losses
from secateurs.shrink.sizes import consumers_of

# calibration tokens for gradients, and for measuring the loss without some blocks
_SENSITIVITY = 4096
_DEPTH = 1024
# calibration tokens on which a model is cut in one kind of unit, to correct the estimates
_TRUTH = 8192


def estimate(job: Job, windows: Tensor) -> tuple[Losses, dict[str, Tensor]]:
    """Estimate the losses of the plan's units on calibration windows [N, S]. Returns them and the sensitivities used.

    Sensitivities: {layer: E[g^2] of its outputs}, and {'taylor LAYER': losses.taylor()} for that criterion.
    """
    file, tensors = job.work / "losses.json", job.work / "sensitivity.safetensors"
    if not file.is_file():
        plan = job.plan
        kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
        model, batches = job.dense.load(), batched(windows)
        sensitive = _sensitivities(job, model, batches)
        tick = ticker(job.progress, "what units cost", job.dense.shape.layers * len(batches))
        found = losses.curves(model, batches, job.dense.cuts, kinds, sensitive, plan.damping, tick)
        if "hidden" in plan.units:
            found["hidden"] = [_of_channels(job, model, windows, sensitive)]
        order, after = _of_blocks(job, model, windows) if "layers" in plan.units else ([], [])
        if plan.criterion == "taylor" and kinds:
            few = _first(windows, _SENSITIVITY)
            tick = ticker(job.progress, "taking gradients", len(few))
            layers = consumers_of(model, job.dense.cuts, kinds)
            sensitive |= {f"taylor {n}": t for n, t in losses.taylor(model, few, layers, tick).items()}
        write_tensors(tensors, sensitive or {"none": torch.zeros(1)})
        write_json(file, {"curves": found, "blocks": order, "after": after})
    return Losses(**json.loads(file.read_text())), load_file(tensors)


def _sensitivities(job: Job, model: Any, batches: list[Batch]) -> dict[str, Tensor]:
    part = first_windows(batches, _SENSITIVITY)
    tick = ticker(job.progress, "measuring sensitivity", len(part) * (2 * len(blocks_of(model)[0]) + 1))
    embed = embedder(job.subject) if job.subject else None
    return sensitivity(model, part, AllLoaded(), InMemory(), job.plan.calibration.seed, tick, embed)[0]


def _of_channels(job: Job, model: Any, windows: Tensor, sensitive: dict[str, Tensor]) -> list[float]:
    """The loss with 0, 1, 2, ... channels removed from the residual stream."""
    tick = ticker(job.progress, "what channels cost", len(windows))
    reading = width.readers(model, blocks_of(model)[0], job.dense.cuts.stream, windows, sensitive, tick)
    gone = losses.most(job.dense.shape.hidden)
    return [0.0, *width.removal(reading, gone, job.plan.damping)[1].tolist()]


def _of_blocks(job: Job, model: Any, windows: Tensor) -> tuple[list[int], list[float]]:
    """The order in which to remove blocks, and the loss after each."""
    count, influence = job.dense.sizes.most_blocks(job.plan.bound), job.plan.depth == "influence"
    tries = losses.tries(job.dense.shape.layers, count, influence)
    tick = ticker(job.progress, "what blocks cost", tries)
    each = min(windows.shape[1], 512)
    few = _first(windows[:, :each], _DEPTH)
    return losses.blocks(model, few, count, tick, influence, job.subject, job.dense.cuts.may_keep)


def _first(windows: Tensor, tokens: int) -> Tensor:
    """The first windows that hold at most so many tokens, but one at least."""
    return windows[: max(1, tokens // windows.shape[1])]


def corrected(job: Job, lost: Losses, windows: Tensor, sensitive: dict[str, Tensor]) -> Losses:
    """The estimates with measured losses of models that are cut by a quarter and by a half, in one kind of unit each.

    If the plan names one kind of unit, there is nothing to compare and nothing is measured.
    """
    dense, work = job.dense.shape, job.work
    if len(job.plan.units) == 1:
        return lost
    file = work / "truth.json"
    truth: dict[str, list[list[float]]] = json.loads(file.read_text()) if file.is_file() else {}
    held_out = _first(windows, _DEPTH)
    # the loss is measured on windows that the model was not fitted to, unless there are no others
    others = windows[len(held_out) :]
    fitting = _first(others, _TRUTH) if len(others) else windows
    todo = [kind for kind in lost.curves if kind not in truth]
    above = losses.above(job.dense.load(), held_out, job.subject) if todo else None
    for kind in todo:
        assert above
        steps, known = dense.steps(kind), len(lost.curves[kind][0]) - 1
        points = []
        for gone in sorted({min(known, max(1, steps // 4)), min(known, max(1, steps // 2))}):
            part = replace(job, work=work / f"{kind}-{gone}")
            shape = replace(dense, **{kind: steps - gone})
            label = f"checking {gone} of {steps} {kind}"
            model, _ = cutting.shaped(part, fitting, shape, range(dense.layers), sensitive, label, hurry=True)
            points.append([lost.at(shape, dense), above(model)])
            shutil.rmtree(part.work, ignore_errors=True)
        truth[kind] = points
        write_json(file, truth)
    return replace(lost, truth=truth)
