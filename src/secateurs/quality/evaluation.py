"""Quality of model folders on held-out inputs: the dense and the pruned model, walked side by side."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.device import machine
from secateurs.base.errors import CalibrationError
from secateurs.base.files import (
    cache_folder,
    fingerprint_of,
    trim,
    write_json,
)
from secateurs.base.precision import compute_dtype
from secateurs.base.processes import ALONE, Ranks
from secateurs.base.progress import Progress, silent, ticker
from secateurs.model import checkpoint
from secateurs.model.batches import check_vocabulary
from secateurs.quality import compare, gates, inputs, outputs, tasks, texts
from secateurs.quality.inputs import Inputs
from secateurs.quality.kinds import Kind, kind_of
from secateurs.quality.settings import Calibration, Evaluation

# tokens of calibration text on which the dense model's perplexity is measured, to be shown beside the evaluation text's
_TOKENS_TOLD = 4096

# windows after which evaluation notes its place
_WINDOWS_PER_GROUP = 8

# most bytes of dense models' last hidden states that are kept from run to run
_ENDS_BYTES = 4 << 30


@dataclass(frozen=True)
class Measured:
    """What a report says of a result's worth: quality and evaluation (its inputs), tasks and compared, gate, warnings.

    numbers, inputs: what quality and evaluation are made of; None where nothing was measured on inputs.
    """

    gate: list[dict[str, Any]]
    warnings: list[str]
    tasks: dict[str, Any] | None = None
    compared: dict[str, Any] = field(default_factory=dict)
    numbers: compare.Quality | None = None
    inputs: Inputs | None = None

    @property
    def windows(self) -> Tensor | None:
        """The token windows of the evaluation, where its inputs are nothing else."""
        return self.inputs.windows if self.inputs else None

    @property
    def quality(self) -> dict[str, Any] | None:
        return self.numbers.as_dict() if self.numbers else None

    @property
    def evaluation(self) -> dict[str, Any] | None:
        return self.inputs.facts if self.inputs else None

    def as_dict(self) -> dict[str, Any]:
        """The keys of a report."""
        names = ("quality", "evaluation", "tasks", "compared", "gate")
        return {name: getattr(self, name) for name in names}


def check(
    asked: Evaluation, source: checkpoint.Checkpoint | None = None, calibration: Calibration | None = None
) -> None:
    """Raise CalibrationError before a run is begun for what could not be measured at its end.

    source, calibration: the model, and what it is calibrated on, where that may be other than a causal language model and text.
    """
    if asked.tasks:
        tasks.check(asked.tasks, asked.tasks_path)
    if source is None:
        return
    kind = kind_of(source)
    ways = [way for way in (source.sentences.pooling if source.sentences else ()) if way not in outputs.POOLINGS]
    if ways and asked.windows:
        known = ", ".join(outputs.POOLINGS)
        raise CalibrationError(f"{source.given} pools embeddings by {ways[0]}, which is not known here; known: {known}")
    if asked.tasks and not kind.causal:
        raise CalibrationError(f"{kind.name} is no causal language model, which lm-eval tasks need; leave out --tasks")
    if calibration is not None:
        inputs.check(kind, calibration.source, "--calibration")
    if asked.windows:
        reads = inputs.check(kind, asked.text, "--eval-text")
        _check_gates(asked, kind, inputs.numbers_of(kind, asked.text, reads))


def _check_gates(asked: Evaluation, kind: Kind, numbers: Sequence[str]) -> None:
    for gate in map(gates.Gate.parse, asked.text_gates):
        if gate.metric not in numbers:
            raise CalibrationError(
                f"gate {gate.text} asks about {gate.metric}, which {kind.name} does not have on {asked.text}; it has "
                f"{', '.join(numbers)}"
            )


def measured(
    dense: checkpoint.Checkpoint,
    result: checkpoint.Checkpoint | None,
    asked: Evaluation,
    seed: int,
    progress: Progress = silent,
    work: Path | None = None,
    beside: Path | None = None,
    calibration: str | None = None,
    ranks: Ranks = ALONE,
) -> Measured:
    """Measure a folder against its dense model, or the dense one alone, and hold it to its gates.

    work: where finished windows and tasks are kept, for a run that goes on. beside: where the dense model's tasks are kept for
    other runs on it. calibration: the source that the result was calibrated on; of the same folder, the files are taken that
    calibration leaves alone. ranks: those that share the inputs; only the first has the tasks run, holds gates and writes. Raises
    CalibrationError where a gate asks for what the model cannot tell.
    """
    found = None
    warnings = [model.note for model in (dense, result) if model and model.note]
    if asked.windows:
        cache = work / "windows.json" if work else None
        found = quality(dense, result, asked, progress, cache, calibration, warnings, ranks)
    numbers, on = found or (None, None)
    if not ranks.first:
        return Measured([], warnings, numbers=numbers, inputs=on)
    told, compared = None, {}
    if asked.tasks:
        models = {"dense": (dense, beside or work)} | ({"pruned": (result, work)} if result else {})
        results = {name: _tasks(name, one, asked, kept) for name, (one, kept) in models.items()}
        told = {name: tasks.without_scores(one) for name, one in results.items()}
        if result is not None:
            compared = tasks.compare(results["dense"], results["pruned"], seed)
    gate = gates.judge(asked.gates, numbers.as_dict() if numbers else None, compared)
    return Measured(gate, warnings, told, compared, numbers, on)


def _tasks(name: str, model: checkpoint.Checkpoint, asked: Evaluation, kept: Path | None) -> dict[str, Any]:
    """Results of one model's tasks, from where they are kept if they are."""
    file = kept / f"tasks-{name}.json" if kept else None
    if file is not None and file.is_file():
        return json.loads(file.read_text())  # type: ignore[no-any-return]
    found = tasks.run_tasks(model.folder, asked.tasks, asked.tasks_path, asked.tasks_limit)
    if file is not None:
        write_json(file, found)
    return found


def quality(
    dense: checkpoint.Checkpoint,
    pruned: checkpoint.Checkpoint | None,
    asked: Evaluation,
    progress: Progress = silent,
    cache: Path | None = None,
    calibration: str | None = None,
    warnings: list[str] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[compare.Quality, Inputs] | None:
    """Measure one or two model folders on held-out inputs; None if there is nothing to measure of a dense model alone.

    cache: a file that keeps finished inputs of the same models across a kill. The hidden states that leave a dense causal language
    model's last block are kept in the cache folder, 4 GB in all, for other models that are compared with it later. calibration: as
    for measured(). warnings: what is added to. ranks: those that share the inputs.
    """
    kind = kind_of(dense)
    reads = inputs.check(kind, asked.text, "--eval-text")
    _check_gates(asked, kind, inputs.numbers_of(kind, asked.text, reads))
    if not kind.causal or reads != "text":
        return _of_outputs(dense, pruned, asked, kind, progress, cache, calibration, warnings, ranks)
    models = [(c.skeleton(), c) for c in (dense, pruned) if c is not None]
    length = asked.length(models[0][0])
    text = texts.load(asked.text, dense.tokenizer(), asked.windows, length, None, "held-out")
    check_vocabulary(text.windows, models[0][0])
    of = [dense.fingerprint(), pruned.fingerprint() if pruned else "", fingerprint_of(text.windows)]
    ends = _ends_of(models[0][0], of) if pruned is not None else None
    done = [compare.Window(**w) for w in ranks.tell(_kept(cache, of))]
    blocks = len(dense.block_names(models[0][0]))
    n = len(text.windows)
    total = len(ranks.share(range(n))) * (blocks * len(models) + 1)
    ticks = len(ranks.share(done)) * (blocks * len(models) + 1)

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        progress("evaluating", ticks, total)

    while len(done) < n:
        group = text.windows[: len(done) + _WINDOWS_PER_GROUP * ranks.size]
        second = models[1] if pruned is not None else None
        done = compare.measure(models[0], second, group, done, tick, ends, ranks)
        if cache is not None and ranks.first:
            write_json(cache, {"of": of, "windows": [dataclasses.asdict(w) for w in done]})
    return compare.summarise(done), inputs.of_text(text)


def _of_outputs(
    dense: checkpoint.Checkpoint,
    pruned: checkpoint.Checkpoint | None,
    asked: Evaluation,
    kind: Kind,
    progress: Progress,
    cache: Path | None,
    calibration: str | None,
    warnings: list[str] | None,
    ranks: Ranks,
) -> tuple[compare.Quality, Inputs] | None:
    """The quality of a model that is no causal language model, or of one on images."""
    if pruned is None and kind.predicts != "next token":
        return None
    models = [(c.skeleton(), c) for c in (dense, pruned) if c is not None]
    config = models[0][0].config
    part = "held-out" if calibration is not None and _same(calibration, asked.text) else "all"
    on = inputs.load(asked.text, asked.windows, asked.seqlen, dense, models[0][0], kind, part, progress)
    sentences = dense.sentences
    pictured = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    subject = dataclasses.replace(outputs.subject_of(kind, dense), pictured=pictured, unit=on.unit)
    said = on.warnings("evaluation")
    if sentences and sentences.left:
        said.append(f"embeddings were compared before the modules {', '.join(sentences.left)} of {dense.given}")
    of = [dense.fingerprint(), pruned.fingerprint() if pruned else "", on.facts["sha256"]]
    done = outputs.from_json(ranks.tell(_kept(cache, of)), subject)
    batches, measured = on.batches(subject.alone), 0
    while measured < len(done):
        measured += len(next(iter(batches.pop(0).values())))
    total = len(ranks.share(batches)) * (sum(len(c.block_names(m)) for m, c in models) + 1)

    def keep(found: list[Any]) -> None:
        if cache is not None and ranks.first:
            write_json(cache, {"of": of, "windows": outputs.as_json([*done, *found], subject)})

    found = [
        *done,
        *outputs.measure(
            models[0],
            models[1] if pruned is not None else None,
            batches,
            subject,
            ticker(progress, "evaluating", total),
            keep,
            ranks,
        ),
    ]
    if warnings is not None:
        warnings += said
    numbers = outputs.summarise(found, subject)
    if not on.given:
        numbers = dataclasses.replace(numbers, ppl_dense=None, ppl=None, ppl_ratio=None)
    return numbers, on


def _kept(cache: Path | None, of: Sequence[str]) -> list[Any]:
    """What a run before a kill had measured of the same models and inputs."""
    if cache is None or not cache.is_file():
        return []
    known = json.loads(cache.read_text())
    return list(known["windows"]) if isinstance(known, dict) and known["of"] == of else []


def _same(one: str, other: str) -> bool:
    """True if two sources are one folder, or one lies in the other."""
    a, b = (Path(text).expanduser().resolve() for text in (one, other))
    return a == b or a in b.parents or b in a.parents


def _ends_of(model: Any, of: Sequence[str]) -> Path | None:
    """The folder for a dense model's last hidden states on a text; None where nothing can be written.

    Its name depends on the versions, the instruction set and the dtype of products, because the bits do.
    """
    here = machine()
    facts = [of[0], of[2], here["versions"], here["isa"], str(compute_dtype(model.config.dtype))]
    folder = cache_folder() / "ends" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # trim() deletes what was used longest ago
        folder.touch()
        trim(folder.parent, _ENDS_BYTES)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def predicts_next_token(source: checkpoint.Checkpoint) -> bool:
    """True for a causal language model, which plain text can train."""
    return kind_of(source).causal


def texts_apart(
    source: checkpoint.Checkpoint, calibration: Tensor, facts: Mapping[str, Any], found: Measured, ranks: Ranks = ALONE
) -> tuple[dict[str, Any] | None, list[str]]:
    """The distance of calibration from evaluation text as data, and warnings; None of what was not measured on text.

    calibration: its windows [N, S]; facts: as the report has them. found: what was measured of the source.
    """
    evaluation = found.windows
    if found.numbers is None or found.inputs is None or evaluation is None:
        return None, []
    apart = texts.distance(calibration, evaluation)
    if found.numbers.ppl_dense is not None:
        some = calibration[: max(1, _TOKENS_TOLD // calibration.shape[1])]
        windows = compare.measure((source.skeleton(), source), None, some, ranks=ranks)
        seen = compare.summarise(windows).ppl_dense
        assert seen is not None
        apart = dataclasses.replace(apart, ppl_calibration=seen.value, ppl_evaluation=found.numbers.ppl_dense.value)
    unlike = texts.unlike(texts.parted(calibration, facts), texts.parted(evaluation, found.inputs.facts), apart)
    return dataclasses.asdict(apart), overlap_warning(calibration, evaluation) + unlike


def overlap_warning(calibration: Tensor, evaluation: Tensor) -> list[str]:
    """A list with one sentence if the two texts share passages, else an empty one."""
    share = texts.overlap(calibration, evaluation)
    if not share:
        return []
    return [
        f"{share:.0%} of the evaluation windows share a run of 50 tokens with the calibration text, so quality looks better than "
        "it is"
    ]
