"""The floors that a result must pass: held by the bad end of the interval, not by the mean; and what would decide an open one.

ppl<=+5%          perplexity at most 5% above the dense model's, paired
ppl<=12, kl<=0.1  perplexity; mean KL to the dense model in nats a token
agree>=0.9        positions where both put the same token first
TASK>=0.35        accuracy of a task of --tasks
TASK>=dense-0.02  its accuracy at most 0.02 below the dense model's, paired by question
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.base.estimate import Estimate

METRICS = ("ppl", "kl", "agree")
# fewer samples than this pass nothing: their interval is too narrow to be believed
LEAST = {"windows": 8, "questions": 20}
_FORMS = "'ppl<=+5%', 'ppl<=12.0', 'kl<=0.1', 'agree>=0.9', 'TASK>=0.35' or 'TASK>=dense-0.02'"


@dataclass(frozen=True)
class Gate:
    """One floor. metric: of METRICS, or a task. limit: what the estimate is held against, in its own units.

    against_dense: the estimate is relative to the dense model's: a ratio of perplexities, a difference of accuracies.
    """

    text: str
    metric: str
    limit: float
    against_dense: bool

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """Raises ValueError naming what was written and what may be."""
        found = re.fullmatch(r"\s*([\w.:-]+?)\s*(<=|>=)\s*(\+|dense\s*-\s*)?(\d+(?:\.\d+)?)(%?)\s*", text)
        if found:
            metric, sign, prefix, number, percent = found.groups()
            limit, plain = float(number), not prefix and not percent
            if metric in ("ppl", "kl") and sign == "<=":
                if plain:
                    return cls(text.strip(), metric, limit, False)
                if metric == "ppl" and prefix == "+" and percent:
                    return cls(text.strip(), metric, 1 + limit / 100, True)
            elif metric not in ("ppl", "kl") and sign == ">=" and limit <= 1:
                if plain:
                    return cls(text.strip(), metric, limit, False)
                if metric != "agree" and prefix and prefix != "+" and not percent:
                    return cls(text.strip(), metric, -limit, True)
        raise ValueError(f"cannot read gate '{text}'; write {_FORMS}")

    @property
    def task(self) -> str | None:
        """The task that it asks about, if any."""
        return None if self.metric in METRICS else self.metric

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.metric not in ("ppl", "kl")

    def _estimate(self, quality: dict[str, Any] | None, compared: dict[str, Any]) -> tuple[Estimate | None, str]:
        """What is held against the limit, and what it is counted in."""
        if self.task is not None:
            found = compared.get(self.metric)
            return (Estimate(**found["difference" if self.against_dense else "pruned"]) if found else None), "questions"
        name = "ppl_ratio" if self.against_dense else self.metric
        value = quality[name] if quality else None
        return (Estimate(**value) if value else None), "windows"

    def judge(self, quality: dict[str, Any] | None, compared: dict[str, Any]) -> dict[str, Any]:
        """The gate's record in a report. quality: as in the report. compared: of tasks.compare().

        verdict: 'passed' if the bad end of the interval holds, 'missed' if the good end does not, else 'undecided', which is no
        pass; so are fewer samples than LEAST. more: how many more windows or questions would settle it, if the mean stays, for an
        interval narrows with their root. missed: the sentence, or None.
        """
        estimate, unit = self._estimate(quality, compared)
        record: dict[str, Any] = {"gate": self.text, "metric": self.metric, "limit": self.limit}
        if estimate is None:
            return {
                **record,
                "verdict": "missed",
                "passed": False,
                "more": None,
                "missed": f"gate {self.text}: {self.metric} was not measured",
            }
        bad, good = (estimate.low, estimate.high) if self.at_least else (estimate.high, estimate.low)
        what = self.metric + (" over the dense model's" if self.metric == "ppl" and self.against_dense else "")
        what += " less the dense model's" if self.task and self.against_dense else ""
        measured = f"{what} is {estimate} over {estimate.n} {unit}, the limit is {self.limit:.4g}"
        more = None
        if not self._holds(good):
            off = abs(estimate.value - self.limit)
            share = f" ({off / abs(self.limit):.1%})" if self.limit else ""
            verdict, missed = "missed", f"gate {self.text} missed: {measured}, off by {off:.4g}{share}"
        elif estimate.n < LEAST[unit]:
            more = LEAST[unit] - estimate.n
            settle = f"fewer than {LEAST[unit]} {unit} cannot pass it"
            verdict, missed = "undecided", f"gate {self.text} undecided, so not passed: {measured}; {settle}"
        elif self._holds(bad):
            verdict, missed = "passed", ""
        else:
            more = _more(estimate, self.limit, bad if self._holds(estimate.value) else good)
            settle = "no number of samples would settle a mean at the limit" if more is None else (
                f"about {more} more {unit} would settle it if the mean stays"
            )  # fmt: skip
            verdict, missed = "undecided", f"gate {self.text} undecided, so not passed: {measured}; {settle}"
        return {**record, "verdict": verdict, "passed": verdict == "passed", "more": more, "missed": missed or None}

    def _holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def check(gates: Sequence[str], tasks: Sequence[str] = ()) -> None:
    """Raises ValueError for a gate that cannot be read, or that asks about a task that is not run."""
    for gate in map(Gate.parse, gates):
        if gate.task is not None and gate.task not in tasks:
            raise ValueError(
                f"gate {gate.text} asks about {gate.task}, which is none of {', '.join(METRICS)} and no task that is run: "
                f"{', '.join(tasks) or 'none is'}"
            )


def judge(
    gates: Sequence[str], quality: dict[str, Any] | None, compared: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Records of all gates, in order."""
    return [Gate.parse(text).judge(quality, compared or {}) for text in gates]


def _more(estimate: Estimate, limit: float, end: float) -> int | None:
    """Samples beyond n at which the end of the interval that lies past the limit comes to lie at it."""
    gap = abs(estimate.value - limit)
    if not gap:
        return None
    return max(1, math.ceil(estimate.n * (abs(end - estimate.value) / gap) ** 2 - 1e-9) - estimate.n)
