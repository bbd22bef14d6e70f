"""Schedules: the sparsity that a model should have after each optimizer step. The first step is 1."""

from dataclasses import dataclass
from typing import Protocol

from secateurs.base.errors import PlanError


class Schedule(Protocol):
    def at(self, step: int) -> float:
        """The fraction of zeros after `step` steps."""

    def due(self, step: int) -> bool:
        """True if masks are chosen again after `step` steps."""

    @property
    def last(self) -> int:
        """The last step after which they are."""


@dataclass(frozen=True)
class Ramp:
    """Sparsity rises from `initial` to `final` between steps `begin` and `end`; masks change every `every` steps and at both ends.

    With p = (step - begin) / (end - begin):  final + (initial - final) (1 - p)^power.
    power 3: Zhu and Gupta 2017, arXiv 1710.01878, fast at first, when there is most to remove; 1: linear.
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0
    every: int = 100
    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.initial <= self.final < 1:
            raise PlanError(f"a schedule from {self.initial:g} to {self.final:g} zeros; give 0 <= initial <= final < 1")
        if not 0 <= self.begin < self.end:
            raise PlanError(
                f"a schedule that begins at step {self.begin} and ends at {self.end}; it must end after it begins"
            )
        if self.every < 1 or self.power <= 0:
            raise PlanError(f"every {self.every}, power {self.power:g}: give at least 1 step, and a power above 0")

    def at(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        p = min(1.0, (step - self.begin) / (self.end - self.begin))
        left: float = (1 - p) ** self.power
        return self.final + (self.initial - self.final) * left

    def due(self, step: int) -> bool:
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    @property
    def last(self) -> int:
        return self.end


@dataclass(frozen=True)
class Steps:
    """Sparsity jumps at given steps: {step: sparsity}. One entry is one-shot pruning, several are rounds with training between."""

    jumps: dict[int, float]

    def __post_init__(self) -> None:
        values = [self.jumps[step] for step in sorted(self.jumps)]
        if not values or values != sorted(values) or not values[0] >= 0 or not values[-1] < 1 or min(self.jumps) < 0:
            raise PlanError(f"jumps {self.jumps}: give steps from 0 on, and sparsities in [0, 1) that do not fall")

    def at(self, step: int) -> float:
        return max((s for when, s in self.jumps.items() if when <= step), default=0.0)

    def due(self, step: int) -> bool:
        return step in self.jumps

    @property
    def last(self) -> int:
        return max(self.jumps)


def cubic(final: float, begin: int, end: int, initial: float = 0.0, every: int = 100) -> Ramp:
    return Ramp(final, begin, end, initial, every, 3.0)


def linear(final: float, begin: int, end: int, initial: float = 0.0, every: int = 100) -> Ramp:
    return Ramp(final, begin, end, initial, every, 1.0)


def one_step(final: float, at: int = 0) -> Steps:
    return Steps({at: final})


def rounds(final: float, count: int, every: int, begin: int = 0) -> Steps:
    """`count` rounds, `every` steps apart. Each removes the same fraction of what is left: 1 - (1 - final)^(n / count)."""
    if count < 1 or every < 1:
        raise PlanError(f"{count} rounds {every} steps apart; give 1 or more of both")
    return Steps({begin + (n - 1) * every: 1 - (1 - final) ** (n / count) for n in range(1, count + 1)})
