"""Prunes a model folder into a run directory, and goes on after a kill.

The run directory holds plan.json, model/ (a plain checkpoint), report.json, and work/ while the run is under way. Each
block is finished in this order: its shard is renamed into model/, its outputs are stored in work/, and work/state.json
moves on to the next block. So a kill at any moment repeats at most one block, from the inputs it had. What is measured before
the first block is kept once it is complete (sensitivities), or block by block (the losses of allocation `measured`).

All processes of a torchrun go through the same steps, each with its share of the windows, of a block's layers and of the checks;
the first one writes. What lies in work/ does not depend on how many they are, so a run goes on with more or fewer.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import machine, peak_memory, return_memory
from secateurs.base.errors import CalibrationError, PlanError, SecateursError, said
from secateurs.base.files import write_json, write_tensors, write_text
from secateurs.base.precision import described
from secateurs.base.processes import ALONE, joined
from secateurs.base.progress import Clock, Progress, silent, ticker
from secateurs.base.run_directory import claim, locked, resolved, shrunk_before, unchanged
from secateurs.base.seed import seed_of
from secateurs.matrix.grids import Scales
from secateurs.matrix.stats import Stats
from secateurs.model import checkpoint, shards
from secateurs.model.activations import Activations, OnDisk
from secateurs.model.batches import Batch, check_vocabulary, first_windows
from secateurs.model.discover import WHOLE, layout_of
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.model.walk import Step, settle, stream
from secateurs.prune.allocation import Share, Shares
from secateurs.prune.assign import assign
from secateurs.prune.block import Guide, Outcome, left_outside, prune_block, survivors_of
from secateurs.prune.cost import Cost, Whole, check_reachable, cost_of, whole_of
from secateurs.prune.guide import (
    ALIKE,
    UNMEASURED,
    alike,
    check_memory,
    chosen,
    emptied,
    guide_of,
    in_passes,
    note_distillation,
    reach,
    within,
)
from secateurs.prune.model_card import model_card
from secateurs.prune.outside import on_grid_outside, quantize_outside
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord, Report
from secateurs.prune.sensitivity import sensitivity
from secateurs.prune.trial import nearest_to_dense
from secateurs.prune.tune_model import dense_ends, distill
from secateurs.prune.tuning import Noted
from secateurs.quality import evaluation, inputs
from secateurs.quality.evaluation import measured, texts_apart
from secateurs.quality.kinds import kind_of
from secateurs.quality.outputs import embedder, subject_of


class Run:
    """A run directory of prune. complete() does whatever is left to do."""

    def __init__(self, plan: Plan, out: Path, progress: Progress = silent, beside: Path | None = None) -> None:
        """beside: a folder where the dense model's tasks are kept for other runs on it."""
        self.plan = dataclasses.replace(plan, model=resolved(plan.model))
        self.out = out
        self.progress = progress
        self.ranks, self.parts = ALONE, 1
        self.beside = beside
        self.work = out / "work"
        self.model_folder = out / "model"
        self.report_file = out / "report.json"

    def complete(self) -> Report:
        """Whatever is left of: prune, verify, evaluate, report. Returns the report of a run that is complete already.

        Under torchrun every process calls it, and only the first returns a report with the quality in it.
        """
        with joined() as self.ranks:
            return self._complete()

    def _complete(self) -> Report:
        ranks = self.ranks
        # before the folder is made, so that a wrong model name leaves nothing behind
        with ranks.leading():
            source = checkpoint.Checkpoint(self.plan.model)
        # what was stored is not read again
        stored = not self.plan.calibrated or (self.work / "calibration.json").is_file()
        evaluation.check(self.plan.evaluation, source, None if stored else self.plan.calibration)
        ranks.alone(lambda: claim(self.out, self.plan.as_dict()))
        with locked(self.out, ranks):
            report = Report.read(self.report_file) if self.report_file.is_file() else None
            if report is None or report.status != "complete":
                ranks.alone(lambda: unchanged(self.out, {self.plan.model: source.fingerprint()}))
                if report is None:
                    report = self._prune(source)
                    ranks.alone(functools.partial(report.write, self.report_file))
                self._evaluate(source, report)
                self._finish(report)
        # also what a kill after the last report has left
        ranks.alone(lambda: shutil.rmtree(self.work, ignore_errors=True))
        return report

    # -------------------------------------------------------------------------------------------------- pruning

    def _prune(self, source: checkpoint.Checkpoint) -> Report:
        plan, ranks, state = self.plan, self.ranks, self._state()
        model = source.skeleton()
        # what cannot be is said before anything is measured
        on_grid_outside(model, plan)
        whole_of(plan, model)
        plan, _ = within(plan, layout_of(model))
        check_memory(plan, source, model, self.ranks.here)
        cost = cost_of(plan)
        check_reachable(plan, model, cost)
        compute = described(model.config.dtype)
        here = machine() | ({"processes": ranks.size} if ranks.size > 1 else {})
        report = Report(self.plan.as_dict(), here, shrunk=shrunk_before(plan.model), compute=compute)
        found = self._calibration(plan, source, model, report)
        # those of all ranks, and this one's
        everything = found.batches(parts=self.parts) if found else []
        batches = ranks.share(everything)
        reach(model, plan, everything)
        try:
            layout = settle(model, everything[:1], source)
        except SecateursError:
            raise
        # a model may raise anything for what a wrong processor made
        except Exception as error:
            raise CalibrationError(
                f"{type(model).__name__} does not run on the calibration inputs, {_shapes(everything[0])}: {said(error)}; is the "
                f"processor in {plan.model} this model's?"
            ) from error
        plan, warnings = within(self.plan, layout)
        plan, left = chosen(model, plan, layout)
        report.warnings += warnings + left
        report.lists = list(layout.lists) if layout.how != WHOLE else []
        self.clock.spend("calibration")
        store: Activations = OnDisk(self.work / "activations", ranks)
        start = state["next_block"]
        records = [LayerRecord.from_dict(r) for r in state["layers"]]
        # of the layers that are pruned after all
        whole = whole_of(plan, model)
        guide = self._guide(plan, source, model, found.batches() if found else [], batches, cost, whole)
        if plan.sensitivity and not guide.sensitivity:
            report.warnings.append(UNMEASURED)
        if alike(plan, self.plan.sensitivity, guide.sensitivity):
            report.plan["allocation"] = "uniform"
            report.warnings.append(ALIKE)
        report.tuned, report.reconstruction = state["tuned"], state["reconstruction"]
        teacher = OnDisk(self.work / "dense", ranks) if batches and plan.blend else None
        targets = OnDisk(self.work / "targets", ranks) if batches and plan.reconstruct else None

        names = source.block_names(model)
        outside = source.outside_groups(model)
        count = len(outside) + len(names)
        passes = (1 if plan.propagate == "dense" else 2) + (teacher is not None)
        each = len(batches) * passes + (plan.reconstruct or 0 if targets else 0) if batches else 1
        total, done = each * len(names), each * start

        def tick() -> None:
            nonlocal done
            done += 1
            self.progress("pruning", done, total)

        self.progress("pruning", done, total)
        if start == 0 and ranks.first:
            source.copy_small_files(self.model_folder)
        # what is quantized after the blocks is dense again until that is noted
        if ranks.first and (start == 0 or (on_grid_outside(model, plan) and "outside" not in state)):
            for i, keys in enumerate(outside):
                shards.write_shard(self.model_folder, i, count, source.read(keys))
        walk = stream(
            model, batches, source, store, start, plan.propagate, tick=tick, teacher=teacher, targets=targets, ranks=ranks
        )  # fmt: skip
        for step in walk:
            # what a pass left out is made up for here
            done = each * step.index
            self._save_state(state, step.index, records, report)
            outcome = prune_block(step, plan, guide, tick)
            report.tuned += outcome.tuned
            if outcome.passes > 1 and in_passes(outcome.passes) not in report.warnings:
                report.warnings.append(in_passes(outcome.passes))
            report.reconstruction += [outcome.reconstruction] if outcome.reconstruction else []
            if ranks.first:
                self._write_block(source, model, step, outcome, count, bool(plan.distill and batches))
            records += outcome.records
            # the next block must not meet this one's tensors
            del outcome
            return_memory()
            if not batches:
                tick()
        # nothing is run through the last block once it is pruned
        self.progress("pruning", total, total)
        ranks.alone(lambda: shards.write_index(self.model_folder, count))
        if all(record.skipped_by == "kind" for record in records):
            raise PlanError(f"{plan.model} has no layers to prune in its blocks")
        source.load_outside(model)
        report.layers = [*records, *left_outside(model, records)]
        source.release(model)
        if plan.distill and batches:
            self._save_state(state, len(names), records, report)
        # before all blocks are tuned, which makes up for it
        if on_grid_outside(model, plan):
            if "outside" not in state:
                quantized = ranks.tell(self._quantize_outside(plan, model, batches, outside, count))
                state["outside"] = [dataclasses.asdict(record) for record in quantized]
                self._save_state(state, len(names), records, report)
            known = {r["name"]: LayerRecord.from_dict(r) for r in state["outside"]}
            report.layers = [known.get(record.name, record) for record in report.layers]
        if plan.distill and batches:
            self._distill(plan, source, model, everything, report, count)
            self.clock.spend("distill")
        scales = self._scales()
        if scales and ranks.first:
            write_scales(self.model_folder / SCALES_FILE, scales)
        report.warnings += emptied(report.layers)
        # the first one may still be writing
        ranks.wait()
        files = [shards.shard_name(i, count) for i in range(count)]
        sums = ranks.merged([shards.checksum(self.model_folder / file) for file in ranks.share(files)])
        report.shards = dict(zip(files, sums, strict=True))
        report.bytes = {
            "dense": source.nbytes,
            "pruned": sum((self.model_folder / f).stat().st_size for f in report.shards),
        }
        report.parameters = source.numel
        tried = self.work / "trial.json"
        report.trial = json.loads(tried.read_text()) if tried.is_file() else None
        report.budget = whole.as_dict(report.pruned, model.config.dtype) if whole else None
        if scales:
            held = [r for r in report.layers if r.name in scales]
            wide = sum(r.numel for r in held) * model.config.dtype.itemsize
            report.bytes["stored"] = report.bytes["pruned"] - wide + round(sum(r.stored_bits or 0 for r in held) / 8)
        self.clock.spend("prune")
        report.seconds.update(self.clock.seconds)
        report.peak_memory_bytes = peak_memory()
        return report

    def _write_block(
        self,
        source: checkpoint.Checkpoint,
        model: nn.Module,
        step: Step,
        outcome: Outcome,
        count: int,
        with_dense: bool,
    ) -> None:
        """Write what a block has become: its shard, the last of all `count` being blocks, and what later steps need of it."""
        if with_dense:
            write_tensors(self._dense_file(step.index), outcome.dense)
        if outcome.scales:
            write_scales(self._scales_file(step.index), outcome.scales)
        edited = {layer.tensor_name for layer in step.layers} | set(outcome.tuned)
        shard = source.edited(model, step.name, edited)
        shards.write_shard(self.model_folder, count - step.count + step.index, count, shard)

    def _state(self) -> dict[str, Any]:
        """The place where an earlier run of this plan stopped, or the beginning."""
        file = self.work / "state.json"
        state: dict[str, Any] = {"next_block": 0, "seconds": {}, "layers": [], "tuned": [], "reconstruction": []}
        if file.is_file():
            state = json.loads(file.read_text())
        self.clock = Clock(state["seconds"])
        return state

    def _save_state(self, state: dict[str, Any], block: int, records: list[LayerRecord], report: Report) -> None:
        self.clock.spend("prune")
        saved = {
            **state, "next_block": block, "layers": [dataclasses.asdict(r) for r in records], "seconds": self.clock.seconds,
            "tuned": report.tuned, "reconstruction": report.reconstruction,
        }  # fmt: skip
        # by now all ranks have stored the inputs of the block, and none has dropped those before
        self.ranks.alone(lambda: write_json(self.work / "state.json", saved))

    def _calibration(
        self, plan: Plan, source: checkpoint.Checkpoint, model: nn.Module, report: Report
    ) -> inputs.Inputs | None:
        """The calibration inputs, of all ranks. Batches are for `parts`, the number of ranks that the run began with."""
        if not plan.calibrated:
            return None
        asked, file = plan.calibration, self.work / "calibration.safetensors"
        facts_file = self.work / "calibration.json"
        with self.ranks.leading():
            if facts_file.is_file():
                kept = json.loads(facts_file.read_text())
                self.parts = kept.pop("parts", 1)
                found = inputs.Inputs(inputs.read_rows(file), asked.count, **kept)
            else:
                self.parts = self.ranks.size
                found = inputs.read(asked, source, model, self.progress)
                found.write(file)
                kept = {name: getattr(found, name) for name in ("reads", "facts", "unread", "given")}
                write_json(facts_file, {**kept, "parts": self.parts})
        self.ranks.need(len(found.batches(parts=self.parts)), f"batches of {len(found.rows)} calibration {found.unit}")
        report.calibration = found.facts
        report.warnings += found.warnings("calibration")
        for row in found.rows:
            for name, ids in row.items():
                if name.endswith("input_ids"):
                    check_vocabulary(ids, model)
        return found

    def _guide(
        self, plan: Plan, source: checkpoint.Checkpoint, model: nn.Module, everything: list[Batch], batches: Sequence[Batch],
        cost: Cost, whole: Whole | None,
    ) -> Guide:  # fmt: skip
        """Sensitivities and shares, measured on the dense model before the first layer is pruned; kept for a run that goes on.

        everything: the batches of all ranks; batches: this rank's.
        """
        from safetensors.torch import load_file

        kind = kind_of(source)
        file = self.work / "sensitivity.safetensors"
        found: dict[str, Tensor] = {}
        norms: dict[str, Stats] = {}
        ranks = self.ranks
        if plan.sensitivity and batches:
            gradients = self.work / "gradients"
            if not ranks.tell(file.is_file()):
                part = first_windows(everything, plan.sensitivity)
                blocks = len(source.block_names(model))
                store = OnDisk(gradients, ranks)
                tick = ticker(self.progress, "measuring sensitivity", len(ranks.share(part)) * (2 * blocks + 1))
                embed = embedder(subject_of(kind, source))
                found, norms = sensitivity(model, part, source, store, plan.calibration.seed, tick, embed, ranks)
                tokens = torch.tensor([norms[name].tokens for name in sorted(norms)])
                squares = {f"inputs {name}": stats.sqnorm_I for name, stats in norms.items()}
                every = {**found, **squares, "tokens": tokens}
                ranks.alone(functools.partial(write_tensors, file, every))
                return_memory()
                self.clock.spend("sensitivity")
            ranks.alone(lambda: shutil.rmtree(gradients, ignore_errors=True))
            stored = load_file(file)
            names = sorted(name.removeprefix("inputs ") for name in stored if name.startswith("inputs "))
            tokens = stored.pop("tokens").tolist()
            norms = {n: Stats(t, stored.pop(f"inputs {n}")) for n, t in zip(names, tokens, strict=True)}
            found = stored
        if alike(plan, self.plan.sensitivity, found):
            return guide_of(model, plan, None, found)
        shares_file = self.work / "shares.json"
        if ranks.tell(shares_file.is_file()):
            shares: Shares | None = {name: Share(*share) for name, share in json.loads(shares_file.read_text()).items()}
        else:
            tick = ticker(self.progress, "sharing out zeros", len(source.block_names(model)) * len(batches))
            shared = whole.of_layers(plan) if whole else plan

            def nearest(candidates: Sequence[Shares]) -> int:
                index, without = 0, guide_of(model, plan, None, found)
                ranks.wait()
                if ranks.first:
                    with ranks.all_threads():
                        trial = nearest_to_dense(
                            model, source, everything, plan, without, candidates, self.progress, self.work / "trial"
                        )
                        index = trial.chosen
                        write_json(self.work / "trial.json", trial.facts)
                return ranks.tell(index)

            # all find the same; on machines that are not alike they might round otherwise
            shares = ranks.tell(
                assign(model, source, batches, shared, found, norms, cost, tick, self.work, nearest, ranks)
            )
            if shares is not None:
                ranks.alone(functools.partial(write_json, shares_file, shares))
                return_memory()
                self.clock.spend("allocation")
        # until now a kill could go back to them
        ranks.alone(lambda: shutil.rmtree(self.work / "inputs", ignore_errors=True))
        return guide_of(model, plan, shares, found)

    def _distill(
        self, plan: Plan, source: checkpoint.Checkpoint, dense: nn.Module, everything: list[Batch], report: Report,
        count: int,
    ) -> None:  # fmt: skip
        """Tune the pruned model as a whole and write the shards of its blocks again; `count` is the number of all shards.

        everything: the batches of all ranks.
        """
        from safetensors.torch import load_file

        memory, scales = Noted(self.work / "distill.safetensors"), self._scales()
        names = source.block_names(dense)
        ranks, batches = self.ranks, self.ranks.share(everything)
        store = OnDisk(self.work / "ends", ranks)
        tick = ticker(self.progress, "looking at the dense model", len(names) * len(batches))
        ends = dense_ends(dense, batches, source, store, tick, self.work / "ends.json", ranks)
        pruned = checkpoint.Checkpoint(self.model_folder)
        model = pruned.skeleton()
        pruned.load_whole(model)
        tick = ticker(self.progress, "tuning the whole model", plan.distill or 0, memory.step())
        outcome = distill(
            model, survivors_of(model, report.layers, scales), (dense, source), ends, everything, plan.distill or 0,
            seed=seed_of(plan.calibration.seed, "distill"), tick=tick, memory=memory, ranks=ranks,
        )  # fmt: skip
        source.release(dense)
        note_distillation(
            model, plan, report, outcome, batches,
            lambda index: load_file(self._dense_file(index)), scales, OnDisk(self.work / "tuned", ranks), self.progress,
            ranks,
        )  # fmt: skip
        if outcome is None or not outcome.accepted or not ranks.first:
            return
        if scales:
            write_scales(self._scales_file("tuned"), scales)
        edited = {name for name, _ in model.named_parameters()}
        for i, name in enumerate(names, count - len(names)):
            shards.write_shard(self.model_folder, i, count, pruned.edited(model, name, edited))

    def _quantize_outside(
        self, plan: Plan, model: nn.Module, batches: Sequence[Batch], groups: list[list[str]], count: int
    ) -> list[LayerRecord]:
        """Put the embedding and the head on grids, as the plan says, and write their shards again and their scales.

        Their records, on the first rank. model: without weights.
        """
        # the first one may still be writing
        self.ranks.wait()
        pruned = checkpoint.Checkpoint(self.model_folder)
        pruned.skeleton()
        tick = ticker(self.progress, "looking at the pruned model", len(pruned.block_names(model)) * len(batches))
        store = OnDisk(self.work / "left", self.ranks)
        records, scales = quantize_outside(model, plan, pruned, batches, store, tick, self.ranks)
        if not self.ranks.first:
            return []
        edited = {f"{record.name}.weight" for record in records}
        for i, keys in enumerate(groups):
            shards.write_shard(self.model_folder, i, count, pruned.edited_keys(model, keys, edited))
        pruned.release(model)
        write_scales(self._scales_file("outside"), scales)
        self.clock.spend("outside")
        return records

    def _scales_file(self, block: int | str) -> Path:
        return self.work / "scales" / f"{block}.safetensors"

    def _scales(self) -> dict[str, Scales]:
        """Those of all blocks so far, as tuning left them."""
        found: dict[str, Scales] = {}
        # after those of the blocks, whose names are numbers, those that were tuned together
        for file in sorted((self.work / "scales").glob("*.safetensors")):
            found.update(read_scales(file))
        return found

    def _dense_file(self, block: int) -> Path:
        """Where Outcome.dense of a block is kept until all blocks are tuned."""
        return self.work / f"dense-{block}.safetensors"

    # -------------------------------------------------------------------------------------------- quality

    def _evaluate(self, source: checkpoint.Checkpoint, report: Report) -> None:
        began = time.perf_counter()
        result, seed = checkpoint.Checkpoint(self.model_folder), self.plan.calibration.seed
        asked, looked_at = self.plan.evaluation, self.plan.calibration.source if self.plan.calibrated else None
        found = measured(source, result, asked, seed, self.progress, self.work, self.beside, looked_at, self.ranks)
        for name, value in found.as_dict().items():
            setattr(report, name, value)
        report.warnings += found.warnings
        file = self.work / "calibration.safetensors"
        if file.is_file():
            from safetensors.torch import load_file

            windows = load_file(file).get("windows")
            if windows is not None:
                facts = report.calibration or {}
                report.distance, warnings = texts_apart(source, windows, facts, found, self.ranks)
                report.warnings += warnings
        report.seconds["evaluate"] = time.perf_counter() - began

    def _finish(self, report: Report) -> None:
        from secateurs.prune.verify import check_run

        # the first one knows what was quantized last
        report = self.ranks.tell(report)
        report.warnings += check_run(self.out, report, self.progress, self.ranks)
        if not self.ranks.first:
            return
        kind = kind_of(checkpoint.Checkpoint(self.model_folder))
        loader = "AutoModelForCausalLM" if kind.causal else kind.name
        report.status = "complete"
        report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory())
        write_text(self.model_folder / "README.md", model_card(report, loader))
        report.write(self.report_file)


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
