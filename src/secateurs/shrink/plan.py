"""Every choice of a run of shrink, as data."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from secateurs.base.errors import PlanError, nearest
from secateurs.matrix.solvers import DAMPING
from secateurs.quality.settings import Calibration, Evaluation
from secateurs.shrink import columns, experts
from secateurs.shrink.budget import Budget
from secateurs.shrink.units import KINDS


@dataclass(frozen=True)
class ShrinkPlan:
    """What to remove and until when. Raises PlanError for what cannot be.

    budget: 'params=0.75x', 'bytes=0.75x', 'flops=0.75x' (of a prompt) or 'latency=0.8x' of the dense model's, latency being seconds
    of the prompt and of each token after it, both; 'seconds=1.5' for a prompt of `prompt` tokens and `new` more. units: of KINDS,
    refused where the model cannot lose them; none for those of USUAL that it can lose.
    criterion: a row of columns.CRITERIA; depth: 'loss' or 'influence', which blocks go; experts: a row of experts.CRITERIA, which
    experts go; refit: least squares on what is left. experts_per_token: to how many experts a token is sent, None for as many as
    before. multiple: MLP widths are multiples of this. All blocks get one shape, for that is all that config.json can state.
    calibration, damping, evaluation: as in Plan.
    model: folder or hub id.

    Example:

        >>> import secateurs as sc
        >>> sc.ShrinkPlan("my-model", "params=0.75x").bound.value
        0.75
        >>> sc.ShrinkPlan("my-model", "params=0.75x", units=("neurons",))
        Traceback (most recent call last):
        secateurs.base.errors.PlanError: unknown unit 'neurons'; write some of ...
    """

    model: str
    budget: str
    units: tuple[str, ...] = ()
    criterion: str = "obs"
    depth: str = "loss"
    experts: str = "loss"
    experts_per_token: int | None = None
    refit: bool = True
    multiple: int = 64
    prompt: int = 512
    new: int = 32
    calibration: Calibration = Calibration()
    damping: float = DAMPING
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(self.units))
        _ = self.bound
        if self.depth not in ("loss", "influence"):
            raise PlanError(f"unknown depth '{self.depth}'; write loss or influence")
        unknown = [u for u in self.units if u not in KINDS]
        if unknown:
            raise PlanError(
                f"unknown unit '{', '.join(unknown)}'; write some of {', '.join(KINDS)}{nearest(''.join(unknown[:1]), KINDS)}"
            )
        if self.criterion not in columns.CRITERIA:
            near = nearest(self.criterion, columns.CRITERIA)
            raise PlanError(f"unknown criterion '{self.criterion}'; write {', '.join(columns.CRITERIA)}{near}")
        if self.experts not in experts.CRITERIA:
            near = nearest(self.experts, experts.CRITERIA)
            raise PlanError(f"unknown experts '{self.experts}'; write {', '.join(experts.CRITERIA)}{near}")
        if self.experts_per_token is not None and self.experts_per_token < 1:
            raise PlanError(f"experts-per-token {self.experts_per_token} is too small; give 1 or more")
        for name, least in (("multiple", 1), ("prompt", 1), ("new", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name.replace('_', '-')} {getattr(self, name)} is too small; give {least} or more")
        if not self.damping > 0:
            raise PlanError(f"damping {self.damping:g} is not above 0; 0.01 is usual")

    @property
    def bound(self) -> Budget:
        """The budget: of what, and how much."""
        return Budget.parse(self.budget)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]
