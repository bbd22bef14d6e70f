"""The budget that a smaller model must meet, as it is written on the command line."""

import re
from dataclasses import dataclass

from secateurs.base.errors import PlanError

# budgets that are a fraction of the dense model's cost, and what they count
FRACTIONS = {
    "params": "parameters",
    "bytes": "bytes of its weights",
    "flops": "multiplications of a prompt",
    "latency": "seconds, of the prompt and of each token after it, both",
}

# the same for a live module; flops is another name of macs
LIVE = {
    "params": "parameters",
    "bytes": "bytes of its parameters and buffers",
    "macs": "multiplications of one example in convolutions, linear and recurrent layers",
    "flops": "multiplications of one example in convolutions, linear and recurrent layers",
    "memory": "the most bytes of activations that are live at once, of one example",
    "latency": "seconds of one example in an engine",
}


@dataclass(frozen=True)
class Budget:
    """A limit on the cost of a model.

    kind: of FRACTIONS, or 'seconds'; of a live module, of LIVE. value: a fraction of the dense model's cost, or seconds. text: as
    it was written.
    """

    kind: str
    value: float
    text: str

    @property
    def timed(self) -> bool:
        """True if the budget is one of time, which has to be measured."""
        return self.kind in ("latency", "seconds")

    @classmethod
    def parse(cls, text: str, kinds: tuple[str, ...] = (*FRACTIONS, "seconds")) -> "Budget":
        """Read 'params=0.75x', 'latency=0.8x' or 'seconds=1.5'. Raises PlanError."""
        found = re.fullmatch(r"(\w+)=(\d*\.?\d+)(x?)", text)
        kind = found[1] if found else ""
        if not found or kind not in kinds or (kind == "seconds") == bool(found[3]) or not float(found[2]) > 0:
            known = ", ".join(f"{k}=1.5" if k == "seconds" else f"{k}=0.8x" for k in kinds)
            raise PlanError(f"cannot read budget '{text}'; write one of {known}, x meaning times the dense model's")
        if kind != "seconds" and float(found[2]) >= 1:
            raise PlanError(f"budget {text} is all of the dense model; give a fraction below 1")
        return cls(kind, float(found[2]), text)
