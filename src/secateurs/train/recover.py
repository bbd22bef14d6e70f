"""Train what pruning left of a language model until its quality is back, zeros kept.

It is trained against a teacher's predictions, the teacher's hidden states, the text itself, or all of them (objective.py). A
teacher's last hidden states are kept on disk, from which its own head gives its logits exactly: 2 bytes a channel and token in
place of 2 a word of the vocabulary. The run directory holds plan.json, model/, report.json, and work/ while the run is under way.
All processes of a torchrun share each step's windows; the first one writes.
"""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import machine, peak_memory
from secateurs.base.errors import PlanError, VerifyError
from secateurs.base.files import fingerprint_of, write_json, write_text
from secateurs.base.precision import described, widened
from secateurs.base.processes import Ranks, joined
from secateurs.base.progress import Progress, silent, ticker
from secateurs.base.run_directory import (
    REPORT_FORMAT,
    claim,
    is_run,
    locked,
    read_object,
    report_of,
    resolved,
    unchanged,
)
from secateurs.model import checkpoint, shards
from secateurs.model.activations import OnDisk
from secateurs.model.batches import Batch, batched
from secateurs.model.blocks import blocks_of
from secateurs.prune.tune_model import dense_ends
from secateurs.prune.tuning import Moving, Noted, Outcome, tune
from secateurs.quality import texts
from secateurs.quality.evaluation import check, measured, overlap_warning, predicts_next_token, quality
from secateurs.train.lora import Lora, lora
from secateurs.train.matrices import prunable
from secateurs.train.objective import Objective, Teacher
from secateurs.train.recover_plan import DTYPES, TRAINED, RecoverPlan


# tensors that are made in inference mode could not be trained
@torch.inference_mode(False)
def recover(plan: RecoverPlan, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Begin or go on with a run: train, check the zeros, measure. Returns the report. Raises SecateursError.

    Under torchrun every process calls it, and only the first returns a report with the quality in it. A missed gate is in the
    report's `gate`, and raises nothing.
    plan: what is asked. out: the run directory. progress: called with (stage, done, total).

    Example, of the run directory that prune() wrote:

        >>> import secateurs as sc
        >>> short = {"calibration": sc.Calibration(samples=8, seqlen=64), "evaluation": sc.Evaluation(windows=4, seqlen=64)}
        >>> report = sc.train.recover(sc.train.RecoverPlan("half", steps=2, batch=2, **short), "recovered")
        >>> report["status"]
        'complete'
    """
    run = _Run(plan, Path(out).expanduser(), progress)
    with joined() as ranks:
        trained = run.train(ranks)
        ranks.wait()
    return run.measure(trained) if ranks.first else trained


class _Run:
    def __init__(self, plan: RecoverPlan, out: Path, progress: Progress) -> None:
        teacher = plan.teacher
        if is_run(plan.model):
            earlier = read_object(Path(plan.model).expanduser() / "plan.json")
            teacher = teacher or earlier.get("teacher") or earlier.get("model")
        if teacher is None:
            raise PlanError(
                f"{plan.model} is no run directory that names its dense model: give --teacher, or --teacher none to train on the "
                "text alone"
            )
        check(plan.evaluation)
        self.source = checkpoint.Checkpoint(plan.model)
        self.teacher = None if teacher == "none" else checkpoint.Checkpoint(teacher)
        self.plan = dataclasses.replace(
            plan,
            model=resolved(plan.model),
            teacher="none" if self.teacher is None else resolved(str(teacher)),
            kl=plan.kl if self.teacher else 0.0,
            labels=plan.labels if plan.labels is not None else float(self.teacher is None),
        )
        self.out, self.progress = out, progress
        self.work, self.model_folder = out / "work", out / "model"

    # ------------------------------------------------------------------------------------------------------- training

    def train(self, ranks: Ranks) -> dict[str, Any]:
        """Write the trained model to model/ and return the report on it, without its quality."""
        file = self.out / "report.json"
        plan = self.plan
        model = self.source.skeleton()
        dense = self.teacher.skeleton() if self.teacher else None
        self._check(model, dense, ranks)
        if not (plan.kl or plan.hidden):
            # the teacher is only needed to measure quality at the end
            dense = None
        ranks.wait()
        if ranks.first:
            claim(self.out, plan.as_dict())
        with locked(self.out, ranks):
            if done := report_of(self.out):
                return done
            began = time.perf_counter()
            text = self._text(model)
            if ranks.first:
                unchanged(self.out, {**self._models(), plan.calibration.source: fingerprint_of(text.windows)})
            batches = batched(text.windows)
            teacher = self._teacher(dense, batches, ranks)
            self.source.load_whole(model)
            zeros = {name: p.detach() == 0 for name, p in prunable(model)}
            if plan.dtype:
                checkpoint.cast(model, DTYPES[plan.dtype])
            answers = None if text.answers is None else torch.split(text.answers, len(batches[0]["input_ids"]))
            outcome, low = self._tune(Objective(plan, model, teacher, batches, answers), ranks)
            if low:
                low.merge()
            report = {
                "format": REPORT_FORMAT,
                "status": "trained",
                "plan": plan.as_dict(),
                "machine": machine(),
                "compute": described(model.dtype),
                "training": {
                    **dataclasses.asdict(outcome),
                    "windows": len(text.windows),
                    "tokens": outcome.steps * plan.batch * text.windows.shape[1],
                    "rate": plan.rate or TRAINED[plan.train][0],
                    "ranks": ranks.size,
                },
                "zeros": sum(int(z.sum()) for z in zeros.values()),
                "of_weights": sum(z.numel() for z in zeros.values()),
                "calibration": text.facts(),
                "warnings": [],
                "quality_before": None,
                "quality": None,
                "recovered": None,
                "gate": [],
                "seconds": {"train": time.perf_counter() - began},
            }
            if len(text.windows) < text.asked:
                report["warnings"] = [
                    f"the text has {len(text.windows)} windows where {text.asked} were asked for, so they are used again"
                ]
            if ranks.first:
                self._write(model, zeros)
                write_json(file, report)
            return report

    def _models(self) -> dict[str, str]:
        """{model that is read: its fingerprint}."""
        read = {self.plan.model: self.source.fingerprint()}
        return {**read, self.plan.teacher or "": self.teacher.fingerprint()} if self.teacher else read

    def _check(self, model: Any, dense: Any, ranks: Ranks) -> None:
        """Raise PlanError for what cannot be trained. model, dense: without weights."""
        plan = self.plan
        if ranks.size > plan.batch or plan.batch % ranks.size:
            raise PlanError(
                f"{ranks.size} processes cannot share a batch of {plan.batch} windows; give a multiple of {ranks.size}"
            )
        for source in (self.source, self.teacher):
            if source and not predicts_next_token(source):
                raise PlanError(f"{source.folder} predicts no next token, so text cannot train it")
        if plan.kl + plan.hidden + (plan.labels or 0) == 0:
            raise PlanError("kl, hidden and labels are all 0: there is nothing to train for")
        if dense is None:
            if plan.hidden:
                raise PlanError(
                    f"hidden {plan.hidden:g} compares blocks with those of a teacher, and there is none; give --teacher"
                )
            return
        words = [m.get_input_embeddings().weight.shape[0] for m in (dense, model)]
        if words[0] != words[1] or (self.teacher is not None and _words(self.teacher) != _words(self.source)):
            raise PlanError(
                f"teacher {plan.teacher} has another vocabulary ({words[0]} tokens) than {plan.model} ({words[1]}), so their "
                "predictions cannot be compared; give the dense model that it was pruned from"
            )
        if plan.hidden:
            sizes = [(len(blocks_of(m)[0]), m.get_input_embeddings().weight.shape[1]) for m in (dense, model)]
            if sizes[0] != sizes[1]:
                raise PlanError(
                    f"hidden {plan.hidden:g} compares block with block: the teacher has {sizes[0][0]} of width {sizes[0][1]}, the "
                    f"model {sizes[1][0]} of {sizes[1][1]}; leave it out"
                )

    def _text(self, model: nn.Module) -> texts.Text:
        """The windows to train on, without those in which no token counts. Raises PlanError if there is only one."""
        plan = self.plan
        asked, wanted = plan.calibration, plan.calibration.samples or plan.steps * plan.batch
        text = texts.read(asked, self.source, model, wanted, self.progress, plan.train_on == "assistant")
        if text.answers is not None:
            # the first token of a window is predicted from nothing
            some = text.answers[:, 1:].any(1)
            text = dataclasses.replace(text, windows=text.windows[some], answers=text.answers[some])
        if len(text.windows) < 2:
            tokens = text.windows.shape[1]
            raise PlanError(
                f"{asked.source} has {len(text.windows) or 'no'} window of {tokens} tokens to train on, and one is held out; "
                "give more text or a smaller --seqlen"
            )
        return text

    def _teacher(self, dense: Any, batches: Sequence[Batch], ranks: Ranks) -> Teacher | None:
        """The teacher to train against, or None.

        What leaves its last block is kept in work/. Where hidden states are compared, it is loaded whole instead.
        """
        if self.teacher is None or dense is None:
            return None
        if self.plan.hidden:
            self.teacher.load_whole(dense)
            return Teacher(dense, self.teacher, None)
        store = OnDisk(self.work / "ends")
        blocks = self.teacher.block_names(dense)
        if ranks.first:
            tick = ticker(self.progress, "looking at the teacher", len(blocks) * len(batches))
            dense_ends(dense, batches, self.teacher, store, tick, self.work / "ends.json")
        ranks.wait()
        return Teacher(dense, self.teacher, lambda batch: store.read(len(blocks), batch))

    def _tune(self, objective: Objective, ranks: Ranks) -> tuple[Outcome, Lora | None]:
        """Train the model in place, or low-rank additions to it, which are returned."""
        plan, model = self.plan, objective.model
        low = lora(model, plan.rank, plan.calibration.seed) if plan.train == "lora" else None
        moving = (
            [Moving(p, None, 1.0) for p in low.parameters()] if low else [Moving.of(p) for p in self._trained(model)]
        )
        if plan.checkpointing:
            recompute(model)
        parameters = [m.parameter for m in moving]
        memory = Noted(self.work / "training.safetensors")
        tick = ticker(self.progress, "training", plan.steps, memory.step())
        rate = plan.rate or TRAINED[plan.train][0]
        with widened():
            outcome = tune(
                moving, objective.loss, lambda place: objective.gradients(place, parameters), objective.places, plan.steps, rate,
                plan.calibration.seed, tick, memory, plan.batch, ranks,
            )  # fmt: skip
        return outcome, low

    def _trained(self, model: Any) -> list[nn.Parameter]:
        """The parameters that plan.train names."""
        inside = (
            model if self.plan.train == "all" else nn.ModuleList(model.get_submodule(n) for n in blocks_of(model)[0])
        )
        found = [p for p in inside.parameters() if p.is_floating_point()]
        return [p for p in found if p.dim() == 1] if self.plan.train == "vectors" else found

    def _write(self, model: Any, zeros: dict[str, Tensor]) -> None:
        """Write model/ and read it back. Raises VerifyError if a weight is not zero that was."""
        source = self.source
        source.copy_small_files(self.model_folder)
        edited = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        prefixes = source.block_names(model)
        outside = source.outside_groups(model)
        count = len(outside) + len(prefixes)
        for i, keys in enumerate(outside):
            shards.write_shard(self.model_folder, i, count, source.edited_keys(model, keys, edited))
        for i, prefix in enumerate(prefixes, len(outside)):
            shards.write_shard(self.model_folder, i, count, source.edited(model, prefix, edited))
        shards.write_index(self.model_folder, count)
        write_text(self.model_folder / "README.md", _card(self.plan))
        written = checkpoint.Checkpoint(self.model_folder)
        again = written.skeleton()
        written.load_whole(again)
        for name, parameter in prunable(again):
            if bool(parameter.detach()[zeros[name]].any()):
                raise VerifyError(f"{self.model_folder}: {name} is not zero where {self.plan.model} is")

    # ------------------------------------------------------------------------------------------------------ measuring

    def measure(self, report: dict[str, Any]) -> dict[str, Any]:
        """Add quality and gates to the report, and complete it.

        The model before and after training is compared with the teacher; without one, after with before.
        """
        if report["status"] != "complete":
            self._measure(report)
        # also what a kill after the last report has left
        shutil.rmtree(self.work, ignore_errors=True)
        return report

    def _measure(self, report: dict[str, Any]) -> None:
        plan, began, seed = self.plan, time.perf_counter(), self.plan.calibration.seed
        with locked(self.out):
            unchanged(self.out, self._models())
            if self.teacher and plan.evaluation.windows:
                # new checkpoints: these remember what they have loaded into other skeletons
                pair = checkpoint.Checkpoint(self.teacher.given), checkpoint.Checkpoint(self.source.given)
                before = quality(*pair, plan.evaluation, self.progress, self.work / "windows-before.json")
                # _check() has made sure that both predict a next token
                assert before is not None
                report["quality_before"] = before[0].as_dict()
            dense = checkpoint.Checkpoint((self.teacher or self.source).given)
            result = checkpoint.Checkpoint(self.model_folder)
            found = measured(dense, result, plan.evaluation, seed, self.progress, self.work)
            report |= found.as_dict()
            report["warnings"] += found.warnings
            if found.windows is not None:
                report["recovered"] = _recovered(report)
                trained_on = self._text(self.source.skeleton())
                report["warnings"] += overlap_warning(trained_on.windows, found.windows)
            report["seconds"]["evaluate"] = time.perf_counter() - began
            report["status"], report["peak_memory_bytes"] = "complete", peak_memory()
            write_json(self.out / "report.json", report)


def _recovered(report: dict[str, Any]) -> float | None:
    """The part of the loss added by pruning that training removed; None if there is none, or no teacher."""
    from math import log

    if report["quality_before"] is None:
        return None
    before, after = (
        log(report[n]["ppl"]["value"] / report[n]["ppl_dense"]["value"]) for n in ("quality_before", "quality")
    )
    return 1 - after / before if before > 0 else None


def _words(source: checkpoint.Checkpoint) -> dict[str, int]:
    found: dict[str, int] = source.tokenizer().get_vocab()
    return found


def recompute(model: Any) -> None:
    """Switch on gradient checkpointing: blocks are computed again on the way back. Dropout stays off."""
    # transformers checkpoints in training mode only
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            # OPT's blocks call dropout as a function, with this rate
            for name, value in vars(module).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


def _card(plan: RecoverPlan) -> str:
    how = f"{plan.steps} steps of {plan.batch} windows, {TRAINED[plan.train][1]}"
    against = "the text" if plan.teacher == "none" else "the dense model's predictions"
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [pruning, sparsity, secateurs]", "---", "", "# A pruned model, recovered",
            "",
            f"Trained after pruning against {against}: {how}. Zeros stayed zero. It loads with "
            "`AutoModelForCausalLM.from_pretrained` and needs no code of secateurs.", "",
        ]
    )  # fmt: skip
