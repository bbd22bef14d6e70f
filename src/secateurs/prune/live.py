"""Prunes a module that is in memory, in place."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import machine, peak_memory
from secateurs.base.errors import CalibrationError, PlanError
from secateurs.base.precision import described
from secateurs.base.progress import Progress, ticker
from secateurs.base.seed import seed_of
from secateurs.matrix.stats import Stats
from secateurs.model.activations import InMemory
from secateurs.model.batches import Batch, batched, first_windows, placed
from secateurs.model.blocks import AllLoaded, device_of
from secateurs.model.walk import settle, stream
from secateurs.prune.allocation import Shares
from secateurs.prune.assign import assign
from secateurs.prune.block import left_outside, prune_block, survivors_of
from secateurs.prune.cost import check_reachable, cost_of, whole_of
from secateurs.prune.guide import ALIKE, UNMEASURED, alike, chosen, emptied, guide_of, note_distillation, reach, within
from secateurs.prune.plan import Plan
from secateurs.prune.record import Report
from secateurs.prune.sensitivity import sensitivity
from secateurs.prune.trial import nearest_to_dense
from secateurs.prune.tune_model import dense_ends, distill
from secateurs.quality.kinds import kind_of_class
from secateurs.quality.outputs import embedder, subject_of


def prune_live(
    model: nn.Module, plan: Plan, calibration: Sequence[Batch] | Tensor | None, progress: Progress
) -> Report:
    if isinstance(calibration, Tensor):
        calibration = batched(calibration)
    batches = list(calibration or [])
    if plan.calibrated and not batches:
        raise CalibrationError(
            f"{plan.method} needs to see the module's inputs: pass calibration=token windows [N, S] or a list of "
            "keyword-argument dicts; magnitude and random need none"
        )
    if plan.evaluation.gates:
        raise PlanError(
            "a live module is not evaluated here, so it can have no gate; prune a folder, or call sc.evaluate"
        )
    if plan.head_bits or plan.embedding_bits:
        raise PlanError("head and embedding bits are for a folder: a live module has its layers quantized alone")
    began, cost = time.perf_counter(), cost_of(plan)
    absent = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if absent is not None:
        raise PlanError(
            f"{absent} is on the meta device (not loaded, or offloaded); load the whole model, or prune its folder"
        )
    device = device_of(model)
    batches = [{k: placed(v, device) for k, v in batch.items()} for batch in batches] if plan.calibrated else []
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    report = Report(plan.as_dict(), machine(device), status="complete", compute=described(dtype, device))
    found: dict[str, Tensor] = {}
    norms: dict[str, Stats] = {}
    wanted = plan.sensitivity
    reach(model, plan, batches)
    layout = settle(model, batches[:1])
    plan, report.warnings = within(plan, layout)
    plan, left = chosen(model, plan, layout)
    report.warnings += left
    whole = whole_of(plan, model)
    check_reachable(plan, model, cost)
    config: Any = getattr(model, "config", None)
    kind = kind_of_class(type(model), config) if hasattr(config, "model_type") else None
    if plan.sensitivity:
        embed = embedder(subject_of(kind)) if kind else None
        part = first_windows(batches, plan.sensitivity)
        found, norms = sensitivity(model, part, AllLoaded(), InMemory(), plan.calibration.seed, embed=embed)
    if plan.sensitivity and not found:
        report.warnings.append(UNMEASURED)
    if kind and alike(plan, wanted, found):
        report.plan["allocation"] = "uniform"
        report.warnings.append(ALIKE)
        shares = None
    else:
        alone = guide_of(model, plan, None, found)

        def nearest(candidates: Sequence[Shares]) -> int:
            trial = nearest_to_dense(model, None, batches, plan, alone, candidates, progress)
            report.trial = trial.facts
            return trial.chosen

        of_layers = whole.of_layers(plan) if whole else plan
        shares = assign(model, None, batches, of_layers, found, norms, cost, nearest=nearest)
    guide = guide_of(model, plan, shares, found)
    teacher = InMemory() if plan.blend else None
    targets = InMemory() if plan.reconstruct else None
    ends = None
    if plan.distill:
        ends = dense_ends(model, batches, AllLoaded(), InMemory(), lambda: None)
    dense: list[dict[str, Tensor]] = []
    for step in stream(model, batches, propagate=plan.propagate, teacher=teacher, targets=targets):
        outcome = prune_block(step, plan, guide)
        report.layers += outcome.records
        report.tuned += outcome.tuned
        report.scales.update(outcome.scales)
        if ends:
            dense.append(outcome.dense)
        report.reconstruction += [outcome.reconstruction] if outcome.reconstruction else []
        progress("pruning", step.index + 1, step.count)
    if all(record.skipped_by == "kind" for record in report.layers):
        why = "".join(f"; {record.name}: {record.skipped}" for record in report.layers[:1])
        raise PlanError(
            f"{type(model).__name__} has no Linear, convolution, attention or fused expert weights to prune{why}"
        )
    report.layers += left_outside(model, report.layers)
    if ends:
        tick = ticker(progress, "tuning the whole model", plan.distill or 0)
        found_out = distill(
            model, survivors_of(model, report.layers, report.scales), (model, AllLoaded()), ends, batches, plan.distill or 0,
            seed=seed_of(plan.calibration.seed, "distill"), tick=tick,
        )  # fmt: skip
        note_distillation(
            model, plan, report, found_out, batches, dense.__getitem__, report.scales, InMemory(), progress
        )
    report.warnings += emptied(report.layers)
    report.budget = whole.as_dict(report.pruned, dtype) if whole else None
    report.seconds["prune"] = time.perf_counter() - began
    report.peak_memory_bytes = peak_memory()
    return report
