"""How many units each group of a live module keeps: the least estimated loss that a budget allows.

A budget of time is met by measurement: sizes are tried until the time of one is near enough to what was asked. One of memory is
met by what passes with fewer units have shown, and measured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from secateurs.base.errors import PlanError, nearest
from secateurs.base.progress import Progress
from secateurs.shrink import graph
from secateurs.shrink.budget import Budget
from secateurs.shrink.graph import Cost
from secateurs.shrink.memory import Peak

Bounds = Mapping[str, float | tuple[float, float]]
"""{glob of layers: the least share of their channels that stays, or the least and the most}."""
Counts = dict[str, int]
Curves = dict[str, list[float]]
"""{group: the loss with 0, 1, ... units gone}, nats an example."""

# for a time budget: shapes that are measured, and how near to the budget is near enough
_TRIES = 6
_OVER, _UNDER = 1.01, 0.98


@dataclass
class Widths:
    """The widths that groups may have, and what they cost.

    dense: {group: units}. runs: {group: channels of a unit that lie next to each other}, which count for the multiple. steps:
    {group: widths that it may have, falling, its own first}. cost: what the budget counts (for a time budget, multiplications);
    whole: the dense module's. kept_whole: {layer: why its channels stay}.
    """

    bound: Budget
    multiple: int
    dense: Counts
    cost: Cost | Peak
    whole: int
    kept_whole: dict[str, str]
    runs: Counts

    def __post_init__(self) -> None:
        self.steps = {
            name: [units, *(n for n in range(units - 1, 0, -1) if n * self.runs[name] % self.multiple == 0)]
            for name, units in self.dense.items()
        }

    def limit(
        self, layers: Mapping[str, Sequence[str]], known: Sequence[str], skip: Sequence[str], bounds: Bounds
    ) -> None:
        """Keep groups of layers that match a glob of `skip`, and the shares of those that match one of `bounds`.

        layers: {group: the layers that make its channels}. known: all layers. Raises PlanError for a glob that matches none of
        them, for shares that make no sense, and where no width lies between them.
        """
        for glob in (*skip, *bounds):
            if not any(fnmatchcase(name, glob) for name in known):
                raise PlanError(
                    f"no layer is called '{glob}'{nearest(glob, known)}; write its name, or a glob such as 'head.*'"
                )
        for group, names in layers.items():
            for glob, given in bounds.items():
                if not any(fnmatchcase(name, glob) for name in names):
                    continue
                least, most = given if isinstance(given, tuple | list) else (given, 1.0)
                if not 0 <= least <= most <= 1:
                    raise PlanError(f"bounds of '{glob}' are {least:g} to {most:g}; give 0 <= least <= most <= 1")
                units = self.dense[group]
                low, high = math.ceil(least * units - 1e-9), math.floor(most * units + 1e-9)
                self.steps[group] = [n for n in self.steps[group] if low <= n <= high]
                if not self.steps[group]:
                    raise PlanError(
                        f"bounds of '{glob}': no width of {group} from {low} to {high} is a multiple of {self.multiple}; lower the "
                        "multiple or widen the bounds"
                    )
            for glob in skip:
                if any(fnmatchcase(name, glob) for name in names):
                    self.keep(group, f"skip leaves {glob} alone")

    def keep(self, group: str, why: str) -> None:
        """Keep all units of a group."""
        self.steps[group] = [self.dense[group]]
        self.kept_whole[group] = why

    def most(self, group: str) -> int:
        """How many units a group may lose."""
        return self.dense[group] - self.steps[group][-1]

    def size(self, counts: Counts) -> float:
        """The cost over the dense module's."""
        return self.cost.at(counts) / self.whole

    @property
    def least(self) -> float:
        """The size of the smallest module."""
        return self.size({name: steps[-1] for name, steps in self.steps.items()})

    def refuse_too_small(self) -> None:
        """Raise PlanError if the smallest module is above the budget. A time budget is not judged here."""
        least = self.least
        if not self.bound.timed and least > self.bound.value:
            raise PlanError(
                f"budget {self.bound.text}: with widths that are multiples of {self.multiple} the smallest shape is {least:.3f}x"
                f"{graph.whole(self.kept_whole)}; raise the budget or lower the multiple"
            )

    def choose(
        self, curves: Curves, ratio_of: Callable[[Counts], float], progress: Progress
    ) -> tuple[Counts, list[dict[str, Any]]]:
        """Widths with the least estimated loss in the budget, and the ones that were timed on the way.

        ratio_of: the seconds, or the peak, of a module of some widths over the dense module's; called for such a budget only.
        """
        if isinstance(self.cost, Peak):
            return self._by_peak(curves, ratio_of)
        if not self.bound.timed:
            return self._fitting(curves, self.bound.value), []
        tried: list[dict[str, Any]] = []
        best: tuple[float, Counts] | None = None
        aim = low = self.least
        for number in range(_TRIES):
            # the smallest first: if that is too slow, every other is
            counts = self._fitting(curves, aim)
            ratio = ratio_of(counts)
            used = ratio / self.bound.value
            tried.append({"counts": counts, "ratio": ratio})
            progress("measuring latency", number + 1, _TRIES)
            if used <= _OVER:
                size = self.size(counts)
                if best is None or size > best[0]:
                    best = (size, counts)
            if number == 0 and used > _OVER:
                raise PlanError(
                    f"budget {self.bound.text}: the smallest shape takes {ratio:.3g}x the dense module's time; raise the budget"
                )
            if number and _UNDER <= used <= _OVER:
                break
            aim = self._next(tried, low)
        assert best is not None
        return best[1], tried

    def _by_peak(self, curves: Curves, ratio_of: Callable[[Counts], float]) -> tuple[Counts, list[dict[str, Any]]]:
        """Widths whose measured peak is in the budget; Peak is exact where tensors have one axis of channels."""
        tried: list[dict[str, Any]] = []
        aim = self.bound.value
        for _ in range(_TRIES):
            counts = self._fitting(curves, aim)
            ratio = ratio_of(counts)
            tried.append({"counts": counts, "ratio": ratio})
            if ratio <= self.bound.value + 1e-12:
                return counts, tried
            aim *= self.bound.value / ratio
        raise PlanError(f"budget {self.bound.text}: the peak stays at {ratio:.3f}x; raise the budget")

    def _next(self, tried: list[dict[str, Any]], low: float) -> float:
        """The size to try next: where a straight line through the two measurements nearest to the budget meets it."""
        points = sorted([(1.0, 1.0), *((t["ratio"], self.size(t["counts"])) for t in tried)])
        under = [p for p in points if p[0] <= self.bound.value]
        over = [p for p in points if p[0] > self.bound.value]
        a, b = (under[-1] if under else points[0]), (over[0] if over else points[-1])
        share = (self.bound.value - a[0]) / (b[0] - a[0]) if b[0] > a[0] else 0.5
        return max(low, a[1] + share * (b[1] - a[1]))

    def _fitting(self, curves: Curves, size: float) -> Counts:
        """Repeat the step with the least loss for what it saves, until the size is at most `size`."""
        if isinstance(self.cost, Peak):
            self.cost.limit = size * self.whole
        counts = {name: steps[0] for name, steps in self.steps.items()}
        now = self.size(counts)
        while now > size + 1e-12:
            best: tuple[float, str, int] | None = None
            for name, steps in self.steps.items():
                spent = curves[name][self.dense[name] - counts[name]]
                options = [n for n in steps if n < counts[name]]
                for count, saved in zip(options, self.cost.saved(counts, name, options), strict=True):
                    if saved > 0:
                        slope = (curves[name][self.dense[name] - count] - spent) / saved
                        if best is None or slope < best[0]:
                            best = (slope, name, count)
            if best is None:
                break
            counts[best[1]] = best[2]
            now = self.size(counts)
        return counts
