"""What every plan shares: the text that a run looks at (Calibration), and how its result is measured (Evaluation)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.base.errors import PlanError
from secateurs.model.batches import window_length
from secateurs.quality import gates as floors

# windows of calibration text where nobody says
_WINDOWS = 64
# tokens of a window where nobody says, and the model's positions allow as many
_CALIBRATION_TOKENS, _EVALUATION_TOKENS = 512, 2048


# the flags of the command line that set each field
FLAGS = {
    "calibration": {"source": "calibration", "samples": "samples", "seqlen": "seqlen", "seed": "seed"},
    "evaluation": {
        "text": "eval-text", "windows": "eval-windows", "seqlen": "eval-seqlen", "tasks": "tasks", "tasks_path": "tasks-path",
        "tasks_limit": "tasks-limit", "gates": "gate",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """The text that a run looks at. Raises PlanError for what cannot be.

    source: what documents.read() reads, e.g. 'pydoc' or 'FILE.jsonl:COLUMN'; or 'self'. samples: windows of it; None, for
    `recover` alone, is one for each window that it trains on. seqlen: tokens of a window; None for 512, or what the model's
    positions allow. seed: orders the text, and seeds whatever else a run draws.

    Example:

        >>> import secateurs as sc
        >>> sc.Calibration(samples=8, seqlen=64).count
        8
    """

    source: str = "pydoc"
    samples: int | None = _WINDOWS
    seqlen: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, (("samples", 1), ("seqlen", 2)))

    @property
    def count(self) -> int:
        """Windows to read where they are not trained on."""
        return self.samples or _WINDOWS

    def length(self, model: nn.Module) -> int:
        """Tokens of a window for this model."""
        return window_length(self.seqlen, model, _CALIBRATION_TOKENS, "--seqlen")


@dataclass(frozen=True)
class Evaluation:
    """How a result is measured against the dense model, and the floors that it must hold. Raises PlanError for what cannot be.

    text: as Calibration.source; of pydoc, its held-out part. windows: 0 measures nothing on text. seqlen: tokens of a window; None
    for 2048, or what the model's positions allow. tasks: names of lm-eval tasks; tasks_path: a folder of task files of your own;
    tasks_limit: questions of each, None for all. gates: floors, as gates.Gate.parse() reads them.

    Example, with a floor: perplexity may rise by 10% at most.

        >>> import secateurs as sc
        >>> sc.Evaluation(windows=4, seqlen=64, gates=("ppl<=+10%",)).text_gates
        ('ppl<=+10%',)
    """

    text: str = "pydoc"
    windows: int = 24
    seqlen: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None
    tasks_limit: int | None = None
    gates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tasks", "gates"):
            object.__setattr__(self, name, tuple(text.strip() for text in getattr(self, name)))
        _at_least(self, (("windows", 0), ("seqlen", 2), ("tasks_limit", 1)))
        try:
            floors.check(self.gates, self.tasks)
        except ValueError as error:
            raise PlanError(str(error)) from None
        if self.text_gates and not self.windows:
            raise PlanError("a gate needs an evaluation, and eval-windows is 0; leave out one of the two")

    def length(self, model: nn.Module) -> int:
        """Tokens of a window for this model."""
        return window_length(self.seqlen, model, _EVALUATION_TOKENS, "--eval-seqlen")

    @property
    def text_gates(self) -> tuple[str, ...]:
        """The floors that windows of text decide, not tasks."""
        return tuple(text for text in self.gates if floors.Gate.parse(text).task is None)


def from_json(data: dict[str, Any], where: str) -> dict[str, Any]:
    """A plan's JSON object with its `calibration` and `evaluation` as dataclasses. Raises PlanError for an unknown key."""
    found = dict(data)
    for name, kind in (("calibration", Calibration), ("evaluation", Evaluation)):
        if isinstance(found.get(name), dict):
            unknown = sorted(set(found[name]) - set(kind.__dataclass_fields__))
            if unknown:
                known = ", ".join(kind.__dataclass_fields__)
                raise PlanError(f"{where} has unknown key '{unknown[0]}' in {name}; known: {known}")
            found[name] = kind(**found[name])
    return found


def _at_least(settings: object, limits: tuple[tuple[str, int], ...]) -> None:
    flags = FLAGS[type(settings).__name__.lower()]
    for name, least in limits:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise PlanError(f"{flags[name]} {value} is too small; give {least} or more")
