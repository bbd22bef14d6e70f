"""Every choice of a decision, as data."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from secateurs.base.errors import PlanError
from secateurs.decide.realize import Candidate
from secateurs.matrix import grids
from secateurs.prune.plan import Plan
from secateurs.quality.settings import Calibration, Evaluation
from secateurs.shrink.plan import ShrinkPlan

DEFAULT_CANDIDATES: tuple[str, ...] = (
    "0.5", "0.5+int8", "2:4+int4", "0.7+int4", "shrink:latency=0.8x", "shrink:latency=0.8x+int4",
)  # fmt: skip
# fewer bits and no zeros: what candidates with zeros have to beat
INTEGERS = ("int8", "int4")


@dataclass(frozen=True)
class DecidePlan:
    """Which candidates for which machine, and what they must be worth. Raises PlanError.

    evaluation: how quality is measured, with at least one floor. candidates: as Candidate.parse() reads them. budget:
    'seconds=0.8x' (of a request of `prompt` tokens and `new` more) or 'bytes=0.6x', of the dense model's. profile: a file of
    `secateurs probe`, or a name of HARDWARE; None for the one at hand, which is measured where there is none. foreign: let a
    profile of another machine decide, by estimates. effort, calibration: as in Plan. repeats: runs of each model, in turn.
    multiple: as in ShrinkPlan. integers: dense int8 and int4 are candidates too, whatever was named. rivals: the dense model under
    torch.compile and in llama.cpp is timed too, and must be beaten.
    model: folder or hub id.

    Example:

        >>> import secateurs as sc
        >>> plan = sc.DecidePlan("my-model", sc.Evaluation(gates=("ppl<=+5%",)), ("0.5", "2:4+int4"), budget="bytes=0.6x")
        >>> plan.limit
        ('bytes', 0.6)
    """

    model: str
    evaluation: Evaluation
    candidates: tuple[str, ...] = DEFAULT_CANDIDATES
    budget: str | None = None
    profile: str | None = None
    foreign: bool = False
    effort: str = "balanced"
    calibration: Calibration = Calibration()
    prompt: int = 256
    new: int = 64
    repeats: int = 5
    multiple: int = 64
    integers: bool = True
    rivals: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(text.strip() for text in self.candidates))
        if not self.evaluation.gates:
            raise PlanError("a decision needs a floor: give --gate, e.g. 'ppl<=+5%'")
        if not self.candidates:
            raise PlanError("no candidates to decide between; leave --candidates out for the usual ones")
        _ = self.limit
        for candidate in self.parsed:
            # whatever is wrong with a plan is found before the first one is run
            self.plan_of(candidate)
            if candidate.kind == "shrink":
                self.shrink_plan(candidate)
        if min(self.prompt, self.repeats) < 1 or self.new < 2:
            raise PlanError(f"prompt {self.prompt}, new {self.new}, repeats {self.repeats}: give at least 1, 2 and 1")

    @property
    def parsed(self) -> list[Candidate]:
        """The candidates, read."""
        texts = dict.fromkeys((*(INTEGERS if self.integers else ()), *self.candidates))
        return [Candidate.parse(text) for text in texts if text != "dense"]

    @property
    def limit(self) -> tuple[str, float] | None:
        """('seconds' or 'bytes', the fraction of the dense model's that it may take). Raises PlanError for other words."""
        if self.budget is None:
            return None
        found = re.fullmatch(r"(seconds|bytes)=(0?\.\d+)x?", self.budget)
        if not found or not float(found[2]) > 0:
            raise PlanError(
                f"cannot read budget '{self.budget}'; write seconds=0.8x or bytes=0.6x, of the dense model's"
            )
        return found[1], float(found[2])

    def plan_of(self, candidate: Candidate) -> Plan | ShrinkPlan:
        """What prune or shrink is asked for. Of a smaller model that is quantized it is what prune is asked for, where the model is
        still the dense one; its quality is measured by the decision, because the smaller model is not what it is held against."""
        if candidate.kind == "shrink" and not candidate.grid:
            return self.shrink_plan(candidate)
        evaluation = self.evaluation
        if candidate.kind == "shrink":
            evaluation = dataclasses.replace(evaluation, windows=0, tasks=(), gates=())
        chosen: dict[str, Any] = {"budget": candidate.budget} if candidate.kind == "bits" else {}
        if candidate.kind != "bits":
            chosen = {"pattern": candidate.pattern or "unstructured", "sparsity": candidate.sparsity}
        grid = candidate.grid
        if grid in grids.NAMED.values():
            chosen["grid"] = str(grid)
        elif grid:
            chosen |= {"bits": str(grid.bits), "group": str(grid.group or "row")}
            chosen["grid"] = "symmetric" if grid.symmetric else "asymmetric"
        return Plan(
            self.model,
            effort=self.effort,
            allow_skips=True,
            calibration=self.calibration,
            evaluation=evaluation,
            **chosen,
        )

    def shrink_plan(self, candidate: Candidate) -> ShrinkPlan:
        """What shrink is asked for."""
        units: dict[str, Any] = {"units": candidate.units} if candidate.units else {}
        return ShrinkPlan(
            self.model, candidate.budget, prompt=self.prompt, new=self.new, multiple=self.multiple,
            calibration=self.calibration, evaluation=self.evaluation, **units,
        )  # fmt: skip

    def fits(self, config: Any) -> None:
        """Raise PlanError for a request that the model's positions do not hold, before hours of work."""
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions and self.prompt + self.new > positions:
            raise PlanError(
                f"a request of {self.prompt} tokens and {self.new} new ones was asked for, the model has {positions} positions; "
                "lower --prompt or --new"
            )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found
