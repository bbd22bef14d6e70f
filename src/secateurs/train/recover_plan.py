"""Every choice of a run of recover, as data."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch

from secateurs.base.errors import PlanError, nearest
from secateurs.quality.settings import Calibration, Evaluation

# what is trained, and its learning rate; of LoRA's matrices, which begin at zero, it is the step itself
TRAINED = {
    "blocks": (4e-3, "every weight of the blocks"),
    "all": (4e-3, "every weight, embeddings and head too"),
    "vectors": (2e-2, "norms and biases"),
    "lora": (1e-3, "masked low-rank additions to pruned weights"),
}

# whose tokens the loss counts
TRAINED_ON = ("all", "assistant")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class RecoverPlan:
    """How to train what is left of a model. Raises PlanError for what cannot be.

    model: a run directory or a model folder. teacher: a folder or hub id; None is the dense model of the run directory, 'none' is
    no teacher: the text alone. calibration: the text to train on; samples None is one window for each window of each step.
    train_on: of TRAINED_ON; 'assistant' counts what predicts the answers of conversations, and nothing else.
    steps, of `batch` windows each. train: of TRAINED. rank: LoRA's. kl, hidden, labels: weights of the loss; labels None is 0
    with a teacher, 1 without. rate: None is that of TRAINED. dtype: of the computation, bf16 or fp32, None is the model's own.
    checkpointing: blocks are computed again on the way back, for less memory. evaluation: as in Plan.
    temperature: by which both models' logits are divided before they are compared.

    Example:

        >>> import secateurs as sc
        >>> sc.train.RecoverPlan("half", steps=100).batch
        4
        >>> sc.train.RecoverPlan("half", train="heads")
        Traceback (most recent call last):
        secateurs.base.errors.PlanError: ...
    """

    model: str
    teacher: str | None = None
    calibration: Calibration = Calibration(samples=None)
    train_on: str = "all"
    steps: int = 300
    batch: int = 4
    train: str = "blocks"
    rank: int = 16
    kl: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    labels: float | None = None
    rate: float | None = None
    dtype: str | None = None
    checkpointing: bool = False
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise PlanError(f"unknown train '{self.train}'; write {', '.join(TRAINED)}{nearest(self.train, TRAINED)}")
        if self.train_on not in TRAINED_ON:
            known = ", ".join(TRAINED_ON)
            raise PlanError(f"unknown train-on '{self.train_on}'; write {known}{nearest(self.train_on, TRAINED_ON)}")
        if self.dtype not in (None, *DTYPES):
            raise PlanError(f"unknown dtype '{self.dtype}'; write {' or '.join(DTYPES)}")
        for name, least in (("steps", 1), ("batch", 1), ("rank", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name.replace('_', '-')} {getattr(self, name)} is too small; give {least} or more")
        samples = self.calibration.samples
        if samples is not None and samples < 2:
            raise PlanError(f"samples {samples} is too small: one window is held out; give 2 or more")
        for name in ("temperature", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise PlanError(f"{name} {value:g} is not above 0")
        for name in ("kl", "hidden", "labels"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise PlanError(f"{name} {value:g} is below 0")

    def as_dict(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]
