"""stream x observe x solve: prune a model folder into a run directory, or a live module in place.

The run directory holds plan.json, model/ (a plain checkpoint), report.json, and work/ while the run is under way. Each
block is finished in this order: its shard is renamed into model/, its outputs are stored in work/, and work/state.json
moves on to the next block; so a kill at any moment repeats at most one block, from the inputs it had. What is found out
beforehand is kept when it is complete (sensitivities) or block by block (the losses of allocation `measured`).
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs import calibrate, checkpoint, evaluate, families, gates, tasks
from secateurs.apportion import Cost, Shares, apportion, kept_weights
from secateurs.block import Guide, prune_block, seed_of, survivors_of, take_up
from secateurs.card import model_card
from secateurs.device import machine, peak_memory, return_memory
from secateurs.distill import dense_ends, distill
from secateurs.errors import CalibrationError, PlanError, SecateursError
from secateurs.files import (
    cache_folder,
    claim,
    fingerprint_of,
    locked,
    resolved,
    trim,
    unchanged,
    write_json,
    write_tensors,
    write_text,
)
from secateurs.formats import bitmask_nbytes
from secateurs.patterns import count_zeros
from secateurs.plan import Plan
from secateurs.products import compute_dtype, described
from secateurs.profile import DeviceProfile
from secateurs.report import LayerRecord, Report, shrunk_before
from secateurs.sensitivity import sensitivity
from secateurs.stats import Stats
from secateurs.tuning import Outcome
from secateurs.walk import Activations, AllLoaded, Batch, InMemory, OnDisk, blocks_of, device_of, stream

Progress = Callable[[str, int, int], None]
"""(what is being done, how much is done, of how much)."""

# windows run together; more fill the cores better and take more memory
_TOKENS_PER_BATCH = 4096
# windows run back together: their logits and the gradients of these are in memory at once
_TOKENS_BACK = 1024
# of calibration text whose perplexity is shown beside that of the evaluation text
_TOKENS_TOLD = 4096
# evaluation notes its place after this many windows
_WINDOWS_PER_GROUP = 8
# of what leaves dense models' last blocks, kept from run to run
_ENDS_BYTES = 4 << 30
# tuning notes its place when so much would be lost
_NOTE_SECONDS = 300


def silent(label: str, done: int, total: int) -> None:
    pass


def prune(
    model: str | Path | nn.Module,
    plan: Plan,
    out: str | Path | None = None,
    calibration: Sequence[Batch] | Tensor | None = None,
    progress: Progress = silent,
) -> Report:
    """Prune a Hugging Face folder or hub id into the run directory `out`, or a live module in place.

    A live module takes its calibration as `calibration`: token windows [N, S], or a sequence of keyword-argument
    dicts it is called with; methods that need no inputs take none. Nothing is written and quality is not measured.
    With a folder the whole run is done: prune, verify, evaluate, report; rerun after a kill and it goes on.
    Raises SecateursError; QualityGateError and SkippedLayersError only from the command line, a Report tells here.
    """
    if isinstance(model, nn.Module):
        return _prune_live(model, plan, calibration, progress)
    if out is None:
        raise PlanError("pruning a model folder needs a folder for the result: prune(model, plan, out=...)")
    if calibration is not None:
        raise PlanError("a model folder takes its calibration from plan.calibration; batches are for a live module")
    plan = dataclasses.replace(plan, model=str(model))
    return Run(plan, Path(out).expanduser(), progress).complete()


# ------------------------------------------------------------------------------------------------------ a live module


def _prune_live(
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
    if plan.gate:
        raise PlanError(
            "a live module is not evaluated here, so it can have no gate; prune a folder, or call sc.evaluate"
        )
    began, cost = time.perf_counter(), _cost(plan)
    absent = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
    if absent is not None:
        raise PlanError(
            f"{absent} is on the meta device (not loaded, or offloaded); load the whole model, or prune its folder"
        )
    device = device_of(model)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches] if plan.calibrated else []
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    report = Report(plan.as_dict(), machine(device), status="complete", compute=described(dtype, device))
    found: dict[str, Tensor] = {}
    norms: dict[str, Stats] = {}
    # a module that is one block has no loss to be sensitive to
    whole = blocks_of(model)[0] == [""]
    if plan.sensitivity and not whole:
        found, norms = sensitivity(model, first_windows(batches, plan.sensitivity), AllLoaded(), InMemory(), plan.seed)
    report.warnings += _left_out(plan, found, whole)
    guide = _guide(model, plan, apportion(model, None, batches, plan, found, norms, cost), found)
    teacher = InMemory() if plan.blend else None
    targets = InMemory() if plan.reconstruct else None
    ends = None
    if plan.distill and not whole:
        ends = dense_ends(model, batches, AllLoaded(), InMemory(), lambda: None)
    for step in stream(model, batches, propagate=plan.propagate, teacher=teacher, targets=targets):
        outcome = prune_block(step, plan, guide)
        report.layers += outcome.records
        report.tuned += outcome.tuned
        report.reconstruction += [outcome.reconstruction] if outcome.reconstruction else []
        progress("pruning", step.index + 1, step.count)
    if not report.layers:
        raise PlanError(f"{type(model).__name__} has no Linear, Conv1D, Conv2d or fused expert weights to prune")
    if ends:
        tick = ticker(progress, "tuning the whole model", plan.distill or 0)
        found_out = distill(
            model, survivors_of(model, report.layers), (model, AllLoaded()), ends, batches, plan.distill or 0,
            seed=seed_of(plan.seed, "distill"), tick=tick,
        )  # fmt: skip
        _note_distillation(model, plan, report, found_out)
    report.seconds["prune"] = time.perf_counter() - began
    report.peak_memory_bytes = peak_memory()
    return report


def _left_out(plan: Plan, found: dict[str, Tensor], whole: bool = False) -> list[str]:
    """What the plan asks for and the model has no place for, as warnings. whole: it is a module without blocks."""
    if whole:
        asked = {
            "sensitivities": plan.sensitivity,
            "reordering": plan.permute and any(p.fixed_sparsity is not None for p in plan.layer_patterns),
            "tuning of blocks": plan.reconstruct,
            "tuning of the whole": plan.distill,
        }
        names = [name for name, value in asked.items() if value]
        return [f"left out: {', '.join(names)}; only a Hugging Face model's blocks and loss are known"] if names else []
    if plan.sensitivity and not found:
        return ["sensitivities were not measured: the model predicts no next token"]
    return []


def _note_distillation(model: nn.Module, plan: Plan, report: Report, outcome: Outcome | None) -> None:
    if outcome is None:
        report.warnings.append("the whole model was not tuned: it predicts no next token")
        return
    report.distillation = {"before": outcome.before, "after": outcome.after, "steps": outcome.steps}
    if outcome.accepted:
        report.layers, vectors = take_up(model, plan, report.layers)
        report.tuned = sorted({*report.tuned, *vectors})


def ticker(progress: Progress, label: str, total: int, done: int = 0) -> Callable[[], None]:
    """A function that counts its calls and shows them."""

    def tick() -> None:
        nonlocal done
        done += 1
        progress(label, done, total)

    return tick


def _guide(model: nn.Module, plan: Plan, shares: Shares | None, found: dict[str, Tensor]) -> Guide:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return Guide(shares, found)
    return Guide(shares, found, families.find(config.model_type), config)


def first_windows(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first windows that hold at least this many tokens, in batches small enough for their logits and gradients."""
    taken: list[Batch] = []
    for batch in batches:
        windows, each = next(iter(batch.values())).shape[:2]
        wanted = min(windows, -(-tokens // each))
        tokens -= wanted * each
        step = max(1, _TOKENS_BACK // each)
        for start in range(0, wanted, step):
            part = slice(start, min(start + step, wanted))
            taken.append({key: value[part] for key, value in batch.items()})
        if tokens <= 0:
            break
    return taken


def _packed_bytes(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> float:
    numel = shape[0] * shape[1]
    return min(numel * dtype.itemsize, bitmask_nbytes(shape, numel - count_zeros(numel, sparsity), dtype))


def _cost(plan: Plan) -> Cost:
    """What the plan's budget is in: kept weights, bytes as packed, or seconds of decoding one token on this machine."""
    if plan.budget is None:
        return kept_weights
    if plan.budget.startswith("bytes"):
        return _packed_bytes
    profile = DeviceProfile.at_hand()
    if profile is None:
        raise PlanError(
            f"budget {plan.budget} needs a profile of this machine, and there is none; run `secateurs probe` first"
        )

    def seconds(shape: tuple[int, int], dtype: torch.dtype, sparsity: float) -> float:
        name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
        speedup = profile.speedup(name, sparsity, 1)
        if speedup is None:
            raise PlanError(f"the profile of this machine has no row for {name}; run `secateurs probe --dtype {name}`")
        dense = shape[0] * shape[1] * dtype.itemsize / profile.bytes_per_second
        # a layer is packed only where that is faster
        return dense / max(1.0, speedup if sparsity else 1.0)

    return seconds


def batched(windows: Tensor) -> list[Batch]:
    per_batch = max(1, _TOKENS_PER_BATCH // windows.shape[1])
    return [{"input_ids": part} for part in torch.split(windows, per_batch)]


# -------------------------------------------------------------------------------------------------------- a folder


class Noted:
    """A file in which tuning notes its place (tuning.Memory)."""

    def __init__(self, file: Path) -> None:
        self.file, self.last = file, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last > _NOTE_SECONDS

    def read(self) -> dict[str, Tensor] | None:
        from safetensors.torch import load_file

        return load_file(self.file) if self.file.is_file() else None

    def write(self, state: dict[str, Tensor]) -> None:
        write_tensors(self.file, state)
        self.last = time.monotonic()

    def step(self) -> int:
        state = self.read()
        return 0 if state is None else int(state["step"])


class Run:
    """One run directory. complete() does what is left to do."""

    def __init__(self, plan: Plan, out: Path, progress: Progress = silent) -> None:
        self.plan = dataclasses.replace(plan, model=resolved(plan.model))
        self.out = out
        self.progress = progress
        self.work = out / "work"
        self.model_folder = out / "model"
        self.report_file = out / "report.json"

    def complete(self) -> Report:
        """Whatever is left of: prune, verify, evaluate, report. Returns the report of a run that is complete already."""
        # before the folder is made, so that a wrong model name leaves nothing behind
        source = checkpoint.Checkpoint(self.plan.model)
        if self.plan.tasks:
            tasks.check(self.plan.tasks, self.plan.tasks_path)
        claim(self.out, self.plan.as_dict())
        with locked(self.out):
            report = Report.read(self.report_file) if self.report_file.is_file() else None
            if report is not None and report.status == "complete":
                return report
            unchanged(self.out, {self.plan.model: source.fingerprint()})
            if report is None:
                report = self._prune(source)
                report.write(self.report_file)
            self._evaluate(source, report)
            self._finish(report)
        shutil.rmtree(self.work, ignore_errors=True)
        return report

    # ------------------------------------------------------------------------------------------------ the folder

    # -------------------------------------------------------------------------------------------------- pruning

    def _prune(self, source: checkpoint.Checkpoint) -> Report:
        plan, state = self.plan, self._state()
        model = source.skeleton()
        # what cannot be is said before anything is measured
        self._check_memory(source, model)
        cost = _cost(plan)
        compute = described(model.config.dtype)
        report = Report(plan.as_dict(), machine(), shrunk=shrunk_before(plan.model), compute=compute)
        batches = self._calibration(source, model, report)
        self._spend("calibration")
        store: Activations = OnDisk(self.work / "activations")
        start = state["next_block"]
        records = [LayerRecord.from_dict(r) for r in state["layers"]]
        guide = self._guide(source, model, batches, cost)
        report.warnings += _left_out(plan, guide.sensitivity)
        report.tuned, report.reconstruction = state["tuned"], state["reconstruction"]
        teacher = OnDisk(self.work / "dense") if batches and plan.blend else None
        targets = OnDisk(self.work / "targets") if batches and plan.reconstruct else None

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
        if start == 0:
            source.copy_small_files(self.model_folder)
            for i, keys in enumerate(outside):
                checkpoint.write_shard(self.model_folder, i, count, source.read(keys))
        walk = stream(
            model, batches, source, store, start, plan.propagate, tick=tick, teacher=teacher, targets=targets
        )  # fmt: skip
        for step in walk:
            # what a pass left out is made up for here
            done = each * step.index
            self._save_state(state, step.index, records, report)
            outcome = prune_block(step, plan, guide, tick)
            report.tuned += outcome.tuned
            report.reconstruction += [outcome.reconstruction] if outcome.reconstruction else []
            edited = {layer.tensor_name for layer in step.layers} | set(outcome.tuned)
            shard = source.edited(model, step.name, edited)
            checkpoint.write_shard(self.model_folder, len(outside) + step.index, count, shard)
            records += outcome.records
            # the next block must not meet this one's tensors
            del shard
            return_memory()
            if not batches:
                tick()
        checkpoint.write_index(self.model_folder, count)
        if not records:
            raise PlanError(f"{plan.model} has no layers to prune in its blocks")
        report.layers = records
        if plan.distill and batches:
            self._save_state(state, len(names), records, report)
            self._distill(source, model, batches, report, count)
            self._spend("distill")
        for i in range(count):
            file = checkpoint.shard_name(i, count)
            report.shards[file] = checkpoint.checksum(self.model_folder / file)
        report.bytes = {
            "dense": source.nbytes,
            "pruned": sum((self.model_folder / f).stat().st_size for f in report.shards),
        }
        self._spend("prune")
        report.seconds.update(self.spent)
        report.peak_memory_bytes = peak_memory()
        return report

    def _check_memory(self, source: checkpoint.Checkpoint, model: nn.Module) -> None:
        """Tuning the whole model comes last: that it does not fit is better said first."""
        if not self.plan.distill:
            return
        blocks = (model.get_submodule(name) for name in source.block_names(model))
        weights = sum(p.numel() for block in blocks for p in block.parameters())
        # fp32 copies, gradients and two moments
        needed = source.nbytes + 16 * weights
        there = machine()["memory_bytes"]
        if needed > there:
            raise PlanError(
                f"tuning all blocks together (distill {self.plan.distill}) takes at least {needed / 1e9:.1f} GB of memory, this "
                f"machine has {there / 1e9:.1f}; leave it out with --distill 0, or choose --effort balanced"
            )

    def _state(self) -> dict[str, Any]:
        """Where an earlier run of this plan stopped, or the beginning."""
        file = self.work / "state.json"
        state: dict[str, Any] = {"next_block": 0, "seconds": {}, "layers": [], "tuned": [], "reconstruction": []}
        if file.is_file():
            state = json.loads(file.read_text())
        self.spent: dict[str, float] = state["seconds"]
        self._since = time.perf_counter()
        return state

    def _spend(self, stage: str) -> None:
        """Count the seconds since the last call for a stage of the report."""
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + now - self._since
        self._since = now

    def _save_state(self, state: dict[str, Any], block: int, records: list[LayerRecord], report: Report) -> None:
        self._spend("prune")
        saved = {
            **state, "next_block": block, "layers": [dataclasses.asdict(r) for r in records], "seconds": self.spent,
            "tuned": report.tuned, "reconstruction": report.reconstruction,
        }  # fmt: skip
        write_json(self.work / "state.json", saved)

    def _calibration(self, source: checkpoint.Checkpoint, model: nn.Module, report: Report) -> list[Batch]:
        plan = self.plan
        if not plan.calibrated:
            return []
        seqlen = window_length(plan.seqlen, model)
        file = self.work / "calibration.safetensors"
        facts_file = self.work / "calibration.json"
        if facts_file.is_file():
            from safetensors.torch import load_file

            windows, report.calibration = load_file(file)["windows"], json.loads(facts_file.read_text())
        else:
            text = (
                self._sample(source, seqlen)
                if plan.calibration == "self"
                else calibrate.load(plan.calibration, source.tokenizer(), plan.samples, seqlen, plan.seed)
            )
            windows, report.calibration = text.windows, text.facts()
            write_tensors(file, {"windows": windows})
            write_json(facts_file, report.calibration)
        assert report.calibration is not None
        if len(windows) < plan.samples:
            report.warnings.append(
                f"calibration: {report.calibration['source']} has text for {len(windows)} windows of {seqlen} tokens, "
                f"{plan.samples} were asked for"
            )
        self._check_vocabulary(windows, model)
        return batched(windows)

    def _sample(self, source: checkpoint.Checkpoint, seqlen: int) -> calibrate.Text:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto")
        tick = ticker(self.progress, "sampling", seqlen - 1)
        return calibrate.sample_from(model, source.tokenizer(), self.plan.samples, seqlen, self.plan.seed, tick)

    @staticmethod
    def _check_vocabulary(windows: Tensor, model: nn.Module) -> None:
        config: Any = model.config
        if int(windows.max()) >= config.vocab_size:
            raise CalibrationError(
                f"the tokenizer gives token {int(windows.max())}, the model knows {config.vocab_size}; they do not belong together"
            )

    def _guide(self, source: checkpoint.Checkpoint, model: nn.Module, batches: list[Batch], cost: Cost) -> Guide:
        """What the dense model tells before its first layer is pruned; both parts are kept, for a run that goes on."""
        from safetensors.torch import load_file

        plan = self.plan
        file = self.work / "sensitivity.safetensors"
        found: dict[str, Tensor] = {}
        norms: dict[str, Stats] = {}
        if plan.sensitivity and batches:
            if not file.is_file():
                part = first_windows(batches, plan.sensitivity)
                blocks = len(source.block_names(model))
                store = OnDisk(self.work / "gradients")
                tick = ticker(self.progress, "measuring sensitivity", len(part) * (2 * blocks + 1))
                found, norms = sensitivity(model, part, source, store, plan.seed, tick)
                tokens = torch.tensor([norms[name].tokens for name in sorted(norms)])
                squares = {f"inputs {name}": stats.sqnorm_I for name, stats in norms.items()}
                write_tensors(file, {**found, **squares, "tokens": tokens})
                shutil.rmtree(store.folder, ignore_errors=True)
                return_memory()
                self._spend("sensitivity")
            stored = load_file(file)
            names = sorted(name.removeprefix("inputs ") for name in stored if name.startswith("inputs "))
            tokens = stored.pop("tokens").tolist()
            norms = {n: Stats(t, stored.pop(f"inputs {n}")) for n, t in zip(names, tokens, strict=True)}
            found = stored
        shares_file = self.work / "shares.json"
        if shares_file.is_file():
            shares: Shares | None = {name: (p, s) for name, (p, s) in json.loads(shares_file.read_text()).items()}
        else:
            tick = ticker(self.progress, "sharing out zeros", len(source.block_names(model)) * len(batches))
            shares = apportion(model, source, batches, plan, found, norms, cost, tick, self.work)
            if shares is not None:
                write_json(shares_file, shares)
                # until now a kill could go back to them
                shutil.rmtree(self.work / "inputs", ignore_errors=True)
                return_memory()
                self._spend("allocation")
        return _guide(model, plan, shares, found)

    def _distill(
        self, source: checkpoint.Checkpoint, dense: nn.Module, batches: list[Batch], report: Report, count: int
    ) -> None:
        """Tune the pruned model as a whole and write its blocks' shards again; `count` shards in all."""
        plan, memory = self.plan, Noted(self.work / "distill.safetensors")
        names = source.block_names(dense)
        store = OnDisk(self.work / "ends")
        tick = ticker(self.progress, "looking at the dense model", len(names) * len(batches))
        ends = dense_ends(dense, batches, source, store, tick, self.work / "ends.json")
        pruned = checkpoint.Checkpoint(self.model_folder)
        model = pruned.skeleton()
        pruned.load_whole(model)
        tick = ticker(self.progress, "tuning the whole model", plan.distill or 0, memory.step())
        outcome = distill(
            model, survivors_of(model, report.layers), (dense, source), ends, batches, plan.distill or 0,
            seed=seed_of(plan.seed, "distill"), tick=tick, memory=memory,
        )  # fmt: skip
        source.release(dense)
        _note_distillation(model, plan, report, outcome)
        if outcome is None or not outcome.accepted:
            return
        edited = {name for name, _ in model.named_parameters()}
        for i, name in enumerate(names, count - len(names)):
            checkpoint.write_shard(self.model_folder, i, count, pruned.edited(model, name, edited))

    # -------------------------------------------------------------------------------------------- quality

    def _evaluate(self, source: checkpoint.Checkpoint, report: Report) -> None:
        plan, began = self.plan, time.perf_counter()
        if plan.eval_windows and report.quality is None:
            result = checkpoint.Checkpoint(self.model_folder)
            cache = self.work / "windows.json"
            measured = quality(
                source, result, plan.eval_text, plan.eval_windows, plan.eval_seqlen, plan.seed, self.progress, cache
            )  # fmt: skip
            if measured is None:
                if any(gates.Gate.parse(text).task is None for text in plan.gate):
                    raise CalibrationError(f"{plan.model} predicts no next token, so a gate on it cannot be measured")
                report.warnings.append("quality was not measured: the model predicts no next token")
            else:
                found, text = measured
                report.evaluation, report.quality = text.facts(), found.as_dict()
                self._against_calibration(source, report, text, found)
        if plan.tasks and report.tasks is None:
            results = {
                name: self._tasks(name, folder)
                for name, folder in (("dense", source.folder), ("pruned", self.model_folder))
            }
            report.tasks = {name: tasks.without_scores(found) for name, found in results.items()}
            report.compared = tasks.compare(results["dense"], results["pruned"], plan.seed)
        report.gate = gates.judge(plan.gate, report.quality, report.compared)
        report.seconds["evaluate"] = time.perf_counter() - began

    def _tasks(self, name: str, folder: Path) -> dict[str, Any]:
        """Results of one model; kept, for a run that goes on."""
        file = self.work / f"tasks-{name}.json"
        if not file.is_file():
            write_json(file, tasks.run_tasks(folder, self.plan.tasks, self.plan.tasks_path, self.plan.tasks_limit))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _against_calibration(
        self, source: checkpoint.Checkpoint, report: Report, text: calibrate.Text, found: evaluate.Quality
    ) -> None:
        """Whether the two texts share passages, or are of different kinds."""
        file = self.work / "calibration.safetensors"
        if not file.is_file():
            return
        from safetensors.torch import load_file

        windows = load_file(file)["windows"]
        report.distance, warnings = texts_apart(source, windows, text.windows, found, self.plan.seed)
        report.warnings += warnings

    def _finish(self, report: Report) -> None:
        from secateurs.verify import check_run

        for warning in check_run(self.out, report, self.progress):
            report.warnings.append(warning)
        report.status = "complete"
        report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory())
        write_text(self.model_folder / "README.md", model_card(report))
        report.write(self.report_file)


def quality(
    dense: checkpoint.Checkpoint,
    pruned: checkpoint.Checkpoint | None,
    source: str,
    windows: int,
    seqlen: int | None,
    seed: int,
    progress: Progress = silent,
    cache: Path | None = None,
) -> tuple[evaluate.Quality, calibrate.Text] | None:
    """Measure one or two model folders on held-out text; None if the model predicts no next token.

    cache: a file that remembers finished windows of the same models and text across a kill. What leaves the dense model's last
    block is kept in the cache folder for all that is measured against it later, 4 GB in all.
    """
    if not predicts_next_token(dense):
        return None
    models = [(c.skeleton(), c) for c in (dense, pruned) if c is not None]
    length = window_length(seqlen, models[0][0])
    text = calibrate.load(source, dense.tokenizer(), windows, length, None, "held-out")
    Run._check_vocabulary(text.windows, models[0][0])
    of = [dense.fingerprint(), pruned.fingerprint() if pruned else "", fingerprint_of(text.windows)]
    ends = _ends_of(models[0][0], of) if pruned is not None else None
    done: list[evaluate.Window] = []
    if cache is not None and cache.is_file():
        known = json.loads(cache.read_text())
        if isinstance(known, dict) and known["of"] == of:
            done = [evaluate.Window(**w) for w in known["windows"]]
    blocks = len(dense.block_names(models[0][0]))
    n = len(text.windows)
    total = n * (blocks * len(models) + 1)
    ticks = len(done) * (blocks * len(models) + 1)

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        progress("evaluating", ticks, total)

    while len(done) < n:
        group = text.windows[: len(done) + _WINDOWS_PER_GROUP]
        second = models[1] if pruned is not None else None
        done = evaluate.measure(models[0], second, group, done, tick, ends)
        if cache is not None:
            write_json(cache, {"of": of, "windows": [dataclasses.asdict(w) for w in done]})
    return evaluate.summarise(done, seed), text


def _ends_of(model: Any, of: Sequence[str]) -> Path | None:
    """Where what leaves a dense model's last block is kept for a text; None where nothing can be written.

    Another version, instruction set or dtype of products has other bits.
    """
    here = machine()
    facts = [of[0], of[2], here["versions"], here["isa"], str(compute_dtype(model.config.dtype))]
    folder = cache_folder() / "ends" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # whatever was used last goes last
        folder.touch()
        trim(folder.parent, _ENDS_BYTES)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def predicts_next_token(source: checkpoint.Checkpoint) -> bool:
    """Whether its class is one of transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = source.raw_config.get("architectures") or [""]
    return names[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def texts_apart(
    source: checkpoint.Checkpoint, calibration: Tensor, evaluation: Tensor, found: evaluate.Quality, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """How far apart the windows of two texts are for the dense model, of which `found` tells the second; and warnings."""
    some = calibration[: max(1, _TOKENS_TOLD // calibration.shape[1])]
    seen = evaluate.summarise(evaluate.measure((source.skeleton(), source), None, some), seed)
    apart = dataclasses.replace(
        calibrate.distance(calibration, evaluation),
        ppl_calibration=seen.ppl_dense.value,
        ppl_evaluation=found.ppl_dense.value,
    )
    mismatch = [apart.mismatch] if apart.mismatch else []
    return dataclasses.asdict(apart), overlap_warning(calibration, evaluation) + mismatch


def overlap_warning(calibration: Tensor, evaluation: Tensor) -> list[str]:
    """One sentence if they share text, else none."""
    share = calibrate.overlap(calibration, evaluation)
    if not share:
        return []
    return [
        f"{share:.0%} of the evaluation windows share a run of 50 tokens with the calibration text, so quality looks better than "
        "it is"
    ]


def window_length(asked: int | None, model: nn.Module) -> int:
    """The window length: as asked, or 2048 or what the model's positions allow. Raises PlanError if it cannot be."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None) or 2048
    if asked is not None and asked > positions:
        raise PlanError(
            f"windows of {asked} tokens were asked for, the model has {positions} positions; lower --seqlen"
        )
    return asked or min(2048, positions)


def failure(report: Report) -> SecateursError | None:
    """Why a finished run must still exit non-zero: a missed gate, or layers left dense that nobody allowed."""
    from secateurs.errors import QualityGateError, SkippedLayersError

    missed = [g["missed"] for g in report.gate if not g["passed"]]
    if missed:
        return QualityGateError("; ".join(missed) + "; the results are kept")
    skipped = [r for r in report.layers if r.skipped_by == "shape"]
    if skipped and not report.plan["allow_skips"]:
        return SkippedLayersError(
            f"{len(skipped)} of {len(report.layers)} layers cannot take {report.plan['pattern']} and stay dense, first "
            f"{skipped[0].name}: {skipped[0].skipped}; the results are kept; pass --allow-skips if that is wanted"
        )
    return None
