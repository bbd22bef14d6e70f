"""Estimates what units cost in quality, once for a run; results are kept in its work folder.

losses.json and sensitivity.safetensors hold the estimates, made on the dense model. truth.json holds measured losses of models cut
in one kind of unit, which correct the estimates where several kinds compete.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateurs.base.device import return_memory
from secateurs.base.files import write_json, write_tensors
from secateurs.base.progress import ticker
from secateurs.model.activations import OnDisk
from secateurs.model.batches import batched, first_windows
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.walk import stream
from secateurs.prune.sensitivity import sensitivity
from secateurs.quality.outputs import embedder
from secateurs.shrink import cutting, losses, units, width
from secateurs.shrink.job import Job
from secateurs.shrink.losses import Losses
from secateurs.shrink.mixture import Mixture
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
    file = job.work / "losses.json"
    sensitive = _sensitivities(job, windows)
    with _folder(job, "curves") as folder:
        if not file.is_file():
            plan = job.plan
            kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
            source, model = job.dense.open()
            batches = batched(windows)
            tick = ticker(job.progress, "what units cost", job.dense.shape.layers * len(batches))
            found = losses.curves(
                model, batches, job.dense.cuts, kinds, sensitive, plan.damping, tick, plan.experts, source, folder
            )
            if "hidden" in plan.units:
                found["hidden"] = [_of_channels(job, windows, sensitive)]
            order, after = _of_blocks(job, windows) if "layers" in plan.units else ([], [])
            active = 0.0 if plan.experts_per_token is None else _of_active(job, windows, plan.experts_per_token)
            write_json(file, {"curves": found, "blocks": order, "after": after, "active": active})
    return Losses(**json.loads(file.read_text())), sensitive


@contextmanager
def _folder(job: Job, name: str) -> Iterator[Path]:
    """A folder of the job's work for one stage, deleted once that is done; also where a kill left it behind."""
    folder = job.work / name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    return_memory()


def _sensitivities(job: Job, windows: Tensor) -> dict[str, Tensor]:
    file, plan = job.work / "sensitivity.safetensors", job.plan
    if not file.is_file():
        source, model = job.dense.open()
        part = first_windows(batched(windows), _SENSITIVITY)
        blocks = job.dense.shape.layers
        tick = ticker(job.progress, "measuring sensitivity", len(part) * (2 * blocks + 1))
        embed = embedder(job.subject) if job.subject else None
        with _folder(job, "gradients") as folder:
            found = sensitivity(model, part, source, OnDisk(folder), plan.calibration.seed, tick, embed)[0]
        kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
        if plan.criterion == "taylor" and kinds:
            few = _first(windows, _SENSITIVITY)
            tick = ticker(job.progress, "taking gradients", len(few) * (2 * blocks + 1))
            with _folder(job, "taylor") as folder:
                found |= {
                    f"taylor {n}": t
                    for n, t in losses.taylor(
                        model, few, lambda step: consumers_of(step, job.dense.cuts, kinds), tick, source, OnDisk(folder)
                    ).items()
                }
        write_tensors(file, found or {"none": torch.zeros(1)})
    stored: dict[str, Tensor] = load_file(file)
    return stored


def _of_channels(job: Job, windows: Tensor, sensitive: dict[str, Tensor]) -> list[float]:
    """The loss with 0, 1, 2, ... channels removed from the residual stream."""
    source, model = job.dense.open()
    dense, damping = job.dense.shape, job.plan.damping
    tick = ticker(job.progress, "what channels cost", dense.layers * len(batched(windows)))
    with _folder(job, "channels") as folder:
        reading = width.readers(model, job.dense.cuts.stream, windows, sensitive, tick, source, folder)
        lost = width.removal(reading, losses.most(dense.hidden), damping, folder / "surgeons")[1]
    return [0.0, *lost.tolist()]


def _of_blocks(job: Job, windows: Tensor) -> tuple[list[int], list[float]]:
    """The order in which to remove blocks, and the loss after each."""
    source, model = job.dense.open()
    layers, influence = job.dense.shape.layers, job.plan.depth == "influence"
    count = job.dense.sizes.most_blocks(job.plan.bound)
    tick = ticker(job.progress, "what blocks cost", layers * losses.walks(layers, count, influence))
    few = _first(windows[:, : min(windows.shape[1], 512)], _DEPTH)
    with _folder(job, "depth") as folder:
        return losses.blocks(model, few, count, tick, influence, job.subject, job.dense.cuts.may_keep, source, folder)


def _of_active(job: Job, windows: Tensor, active: int) -> float:
    """The loss if tokens are sent to so many experts, and nothing else is changed."""
    cuts = job.dense.cuts
    above = losses.above(_pair(*job.dense.open()), _first(windows, _DEPTH), job.subject)
    source, model = job.dense.open()
    # what a router states stays when its block is released
    for step in stream(model, [], source):
        if step.name in cuts.mixtures:
            Mixture(step.block, cuts.fused).send_to(active)
    return above(_pair(source, model))


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
    cuts = []
    for kind, curves in lost.curves.items():
        groups = job.dense.cuts.groups if kind == "experts" else 1
        for number, gone in enumerate(_parts(dense.steps(kind), len(curves[0]) - 1, groups)):
            if number < len(truth.get(kind, ())):
                # that of one that was killed before it removed it
                shutil.rmtree(work / f"{kind}-{gone}", ignore_errors=True)
            else:
                cuts.append((kind, gone))
    above = losses.above(_pair(*job.dense.open()), held_out, job.subject) if cuts else None
    for kind, gone in cuts:
        assert above
        part = replace(job, work=work / f"{kind}-{gone}")
        steps = dense.steps(kind)
        shape = replace(dense, **{kind: steps - gone})
        label = f"checking {gone} of {steps} {kind}"
        cutting.shaped(part, fitting, shape, range(dense.layers), sensitive, label, part.work / "model", hurry=True)
        left = Checkpoint(part.work / "model")
        truth.setdefault(kind, []).append([lost.at(shape, dense), above(_pair(left, left.skeleton()))])
        write_json(file, truth)
        shutil.rmtree(part.work, ignore_errors=True)
        return_memory()
    return replace(lost, truth=truth)


def _parts(steps: int, known: int, groups: int) -> list[int]:
    """A quarter and a half of the units, as far as they may go: how many are cut to measure what that loses.

    groups: as of Mixture; experts that are chosen among groups go from all of them.
    """
    return sorted({min(known, max(groups, steps // n // groups * groups)) for n in (4, 2)})


def _pair(source: Checkpoint, model: Any) -> losses.Pair:
    return model, source
