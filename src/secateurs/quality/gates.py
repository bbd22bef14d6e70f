"""Gates: limits that a result must hold, with the bad end of its interval, not with its mean.

ppl<=+5%          perplexity at most 5% above the dense model's, paired
ppl<=12, kl<=0.1  perplexity; mean KL to the dense model in nats a token
agree>=0.9        positions, or inputs, where both put the same token or class first; also agree>=90%
cosine>=0.98      mean cosine of an input's embedding with the dense model's
neighbours>=0.9   inputs whose nearest neighbour among the others is the same
error<=0.1        relative error of the outputs of a model that has none of these
TASK>=0.35        accuracy of a task of --tasks
TASK>=dense-0.02  its accuracy at most 0.02 below the dense model's, paired by question
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.base.estimate import Estimate, reach

METRICS = ("ppl", "kl", "agree", "cosine", "neighbours", "error")
_LOWER = ("ppl", "kl", "error")
_SHARES = ("agree", "neighbours")
# with fewer samples than this nothing passes: misses of the interval of fewer were not counted (bench/intervals.py)
LEAST = {"windows": 8, "images": 8, "recordings": 8, "questions": 20}
_FORMS = (
    "'ppl<=+5%', 'ppl<=12.0', 'kl<=0.1', 'agree>=0.9', 'cosine>=0.98', 'neighbours>=0.9', 'error<=0.1', 'TASK>=0.35' or "
    "'TASK>=dense-0.02'"
)


@dataclass(frozen=True)
class Gate:
    """One gate. metric: one of METRICS, or a task. limit: what the estimate is compared with, in the estimate's units.

    against_dense: the estimate is relative to the dense model's: a ratio of perplexities, or a difference of accuracies.
    """

    text: str
    metric: str
    limit: float
    against_dense: bool

    @classmethod
    def parse(cls, text: str) -> "Gate":
        """'ppl<=+5%' -> Gate. Raises ValueError naming what was written and what may be."""
        found = re.fullmatch(r"\s*([\w.:-]+?)\s*(<=|>=)\s*(\+|dense\s*-\s*)?(\d+(?:\.\d+)?)(%?)\s*", text)
        if found:
            metric, sign, prefix, number, percent = found.groups()
            limit, plain = float(number), not prefix and not percent
            if metric in _SHARES and percent and not prefix:
                limit, plain = limit / 100, True
            if metric in _LOWER and sign == "<=":
                if plain:
                    return cls(text.strip(), metric, limit, False)
                if metric == "ppl" and prefix == "+" and percent:
                    return cls(text.strip(), metric, 1 + limit / 100, True)
            elif metric not in _LOWER and sign == ">=" and limit <= 1:
                if plain:
                    return cls(text.strip(), metric, limit, False)
                if metric not in METRICS and prefix and prefix != "+" and not percent:
                    return cls(text.strip(), metric, -limit, True)
        raise ValueError(f"cannot read gate '{text}'; write {_FORMS}")

    @property
    def task(self) -> str | None:
        """The task that the gate is about, or None."""
        return None if self.metric in METRICS else self.metric

    @property
    def at_least(self) -> bool:
        """True if higher is better."""
        return self.metric not in _LOWER

    def _estimate(self, quality: dict[str, Any] | None, compared: dict[str, Any]) -> tuple[Estimate | None, str]:
        """The estimate that is compared with the limit, or None, and what its samples are: the keys of LEAST."""
        if self.task is not None:
            found = compared.get(self.metric)
            return (Estimate(**found["difference" if self.against_dense else "pruned"]) if found else None), "questions"
        name = "ppl_ratio" if self.against_dense else self.metric
        value = quality.get(name) if quality else None
        unit = quality.get("unit", "windows") if quality else "windows"
        return (Estimate(**value) if value else None), unit

    def judge(self, quality: dict[str, Any] | None, compared: dict[str, Any]) -> dict[str, Any]:
        """The gate's record in a report. quality: as in the report. compared: from tasks.compare().

        verdict: 'missed' if even the good end of the interval breaks the limit, 'passed' if the bad end holds it, else 'undecided',
        which is no pass. With fewer samples than LEAST it is undecided at best, and with one always. more: how many more windows
        or questions would settle it if mean and spread stay. missed: the sentence for the user, or None.
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
        if not self._holds(good) and estimate.n > 1:
            off = abs(estimate.value - self.limit)
            share = f" ({off / abs(self.limit):.1%})" if self.limit else ""
            verdict, missed = "missed", f"gate {self.text} missed: {measured}, off by {off:.4g}{share}"
        elif estimate.n >= LEAST[unit] and self._holds(bad):
            verdict, missed = "passed", ""
        else:
            end = bad if self._holds(estimate.value) else good
            more, settle = self._more(estimate, end, unit)
            verdict, missed = "undecided", f"gate {self.text} undecided, so not passed: {measured}; {settle}"
        return {**record, "verdict": verdict, "passed": verdict == "passed", "more": more, "missed": missed or None}

    def _more(self, estimate: Estimate, end: float, unit: str) -> tuple[int | None, str]:
        """How many more samples bring `end`, an end of the interval, to the limit if mean and spread stay; and a sentence on it."""
        n, least = estimate.n, LEAST[unit]
        few = f"fewer than {least} {unit} cannot pass it" if n < least else ""
        # perplexities are compared as logarithms, of which the intervals are
        scale = math.log if self.metric == "ppl" and min(self.limit, estimate.value, end) > 0 else float
        gap, off = (abs(scale(x) - scale(estimate.value)) for x in (self.limit, end))
        if n == 1:
            return least - n, f"{few}, and one of them shows no spread"
        if not gap:
            return (
                (least - n, few) if few and not off else (None, "no number of samples would settle a mean at the limit")
            )
        # an end nears the mean at least as fast as the root of the number of samples
        low, high = max(n, least) - 1, max(least, math.ceil(n * (off / gap) ** 2 - 1e-9))
        if unit != "questions":
            # of fewer windows the interval is wider by more than that
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if off * reach(middle) <= gap * reach(n) else (middle, high)
        more = max(1, high - n)
        return more, "; ".join(filter(None, (few, f"about {more} more {unit} would settle it if mean and spread stay")))

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
    """The records of all gates, in order."""
    return [Gate.parse(text).judge(quality, compared or {}) for text in gates]
