"""Estimates what units cost in quality, once for a run; results are kept in its work folder.

losses.json and sensitivity.safetensors hold the estimates, made on the dense model. truth.json holds measured losses of models cut
in one kind of unit, which correct the estimates where several kinds compete.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
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
from secateurs.model.layers import Layer
from secateurs.model.walk import Step, stream
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
    file, ranks = job.work / "losses.json", job.ranks
    sensitive = _sensitivities(job, windows)
    with _folder(job, "curves") as folder:
        if not ranks.tell(file.is_file()):
            plan = job.plan
            kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
            source, model = job.dense.open()
            batches = ranks.share(job.batches(windows))
            tick = ticker(job.progress, "what units cost", job.dense.shape.layers * len(batches))
            found = losses.curves(
                model, batches, job.dense.cuts, kinds, sensitive, plan.damping, tick, plan.experts, source, folder,
                ranks,
            )  # fmt: skip
            if "hidden" in plan.units:
                found["hidden"] = [_of_channels(job, windows, sensitive)]
            order, after = _of_blocks(job, windows) if "layers" in plan.units else ([], [])
            active = 0.0 if plan.experts_per_token is None else _of_active(job, windows, plan.experts_per_token)
            every = {"curves": found, "blocks": order, "after": after, "active": active}
            ranks.alone(lambda: write_json(file, every))
    return Losses(**json.loads(file.read_text())), sensitive


@contextmanager
def _folder(job: Job, name: str) -> Iterator[Path]:
    """A folder of the job's work for one stage, deleted once that is done; also where a kill left it behind."""
    folder = job.work / name
    yield folder
    job.ranks.alone(lambda: shutil.rmtree(folder, ignore_errors=True))
    return_memory()


def _sensitivities(job: Job, windows: Tensor) -> dict[str, Tensor]:
    file, plan, ranks = job.work / "sensitivity.safetensors", job.plan, job.ranks
    if not ranks.tell(file.is_file()):
        source, model = job.dense.open()
        part = first_windows(batched(windows), _SENSITIVITY)
        blocks = job.dense.shape.layers
        tick = ticker(job.progress, "measuring sensitivity", len(ranks.share(part)) * (2 * blocks + 1))
        embed = embedder(job.subject) if job.subject else None
        with _folder(job, "gradients") as folder:
            store = OnDisk(folder, ranks)
            found = sensitivity(model, part, source, store, plan.calibration.seed, tick, embed, ranks)[0]
        kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
        if plan.criterion == "taylor" and kinds:
            few = _first(windows, _SENSITIVITY)
            tick = ticker(job.progress, "taking gradients", len(ranks.share(list(few))) * (2 * blocks + 1))
            with _folder(job, "taylor") as folder:

                def of(step: Step) -> Sequence[Layer]:
                    return consumers_of(step, job.dense.cuts, kinds)

                taken = losses.taylor(model, few, of, tick, source, OnDisk(folder, ranks), ranks)
                found |= {f"taylor {name}": products for name, products in taken.items()}
        ranks.alone(lambda: write_tensors(file, found or {"none": torch.zeros(1)}))
    stored: dict[str, Tensor] = load_file(file)
    return stored


def _of_channels(job: Job, windows: Tensor, sensitive: dict[str, Tensor]) -> list[float]:
    """The loss with 0, 1, 2, ... channels removed from the residual stream."""
    source, model = job.dense.open()
    dense, damping, ranks = job.dense.shape, job.plan.damping, job.ranks
    batches = ranks.share(job.batches(windows))
    tick = ticker(job.progress, "what channels cost", dense.layers * len(batches))
    with _folder(job, "channels") as folder:
        reading = width.readers(model, job.dense.cuts.stream, batches, sensitive, tick, source, folder, ranks)
        lost = width.removal(reading, losses.most(dense.hidden), damping, folder / "surgeons", ranks)[1]
    return [0.0, *lost.tolist()]


def _of_blocks(job: Job, windows: Tensor) -> tuple[list[int], list[float]]:
    """The order in which to remove blocks, and the loss after each."""
    source, model = job.dense.open()
    layers, influence = job.dense.shape.layers, job.plan.depth == "influence"
    count = job.dense.sizes.most_blocks(job.plan.bound)
    tick = ticker(job.progress, "what blocks cost", layers * losses.walks(layers, count, influence))
    few = _first(windows[:, : min(windows.shape[1], 512)], _DEPTH)
    with _folder(job, "depth") as folder:
        return losses.blocks(
            model, few, count, tick, influence, job.subject, job.dense.cuts.may_keep, source, folder, job.ranks
        )


def _of_active(job: Job, windows: Tensor, active: int) -> float:
    """The loss if tokens are sent to so many experts, and nothing else is changed."""
    cuts = job.dense.cuts
    above = losses.above(_pair(*job.dense.open()), _first(windows, _DEPTH), job.subject, job.ranks)
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
    dense, work, ranks = job.dense.shape, job.work, job.ranks
    if len(job.plan.units) == 1:
        return lost
    file = work / "truth.json"
    truth: dict[str, list[list[float]]] = ranks.tell(json.loads(file.read_text()) if file.is_file() else {})
    held_out = _first(windows, _DEPTH)
    # the loss is measured on windows that the model was not fitted to, unless there are no others
    others = windows[len(held_out) :]
    fitting = _first(others, _TRUTH) if len(others) else windows
    cuts = []
    for kind, curves in lost.curves.items():
        for number, gone in enumerate(_parts(job, kind, len(curves[0]) - 1)):
            if number < len(truth.get(kind, ())):
                # that of one that was killed before it removed it
                ranks.alone(functools.partial(shutil.rmtree, work / f"{kind}-{gone}", ignore_errors=True))
            else:
                cuts.append((kind, gone))
    above = losses.above(_pair(*job.dense.open()), held_out, job.subject, ranks) if cuts else None
    for kind, gone in cuts:
        assert above
        part = replace(job, work=work / f"{kind}-{gone}")
        steps = dense.steps(kind)
        shape = replace(dense, **{kind: steps - gone})
        label = f"checking {gone} of {steps} {kind}"
        cutting.shaped(part, fitting, shape, range(dense.layers), sensitive, label, part.work / "model", hurry=True)
        left = Checkpoint(part.work / "model")
        truth.setdefault(kind, []).append([lost.at(shape, dense), above(_pair(left, left.skeleton()))])
        ranks.alone(functools.partial(write_json, file, truth))
        ranks.alone(functools.partial(shutil.rmtree, part.work, ignore_errors=True))
        return_memory()
    return replace(lost, truth=truth)


def _parts(job: Job, kind: str, known: int) -> list[int]:
    """How many units are cut to measure what that loses: a quarter and a half of them, or the nearest numbers that may go and of
    which transformers loads the rest.

    known: how many may go. Experts that are chosen among groups go from all of them.
    """
    dense = job.dense.shape
    steps, each = dense.steps(kind), job.dense.cuts.groups if kind == "experts" else 1
    found = set()
    for part in (steps // 4, steps // 2):
        tries = sorted(range(each, known + 1, each), key=lambda gone: abs(gone - part))
        loads = (n for n in tries if job.dense.not_loadable(replace(dense, **{kind: steps - n})) is None)
        found |= set(islice(loads, 1))
    return sorted(found)


def _pair(source: Checkpoint, model: Any) -> losses.Pair:
    return model, source
