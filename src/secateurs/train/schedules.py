"""Schedules: the sparsity that a model should have after each optimizer step. The first step is 1."""

from dataclasses import dataclass
from typing import Protocol

from secateurs.base.errors import PlanError


class Schedule(Protocol):
    """A sparsity for every step: what gradual() asks for. Any object with these three will do.

    Example, zeros that come at once after step 10:

        >>> import secateurs as sc
        >>> class Late:
        ...     last = 10
        ...     def at(self, step):
        ...         return 0.5 if step >= 10 else 0.0
        ...     def due(self, step):
        ...         return step == 10
        >>> [Late().at(step) == sc.train.one_step(0.5, at=10).at(step) for step in (9, 10, 11)]
        [True, True, True]
    """

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
    Raises PlanError for a sparsity outside [0, 1), one that falls, and an end before the beginning.

    Example:

        >>> import secateurs as sc
        >>> ramp = sc.train.Ramp(final=0.8, begin=0, end=100, power=1)
        >>> ramp.at(50), ramp.due(50), ramp.due(100)
        (0.4, False, True)
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
        """The fraction of zeros after `step` steps; 0 before `begin`."""
        if step < self.begin:
            return 0.0
        p = min(1.0, (step - self.begin) / (self.end - self.begin))
        left: float = (1 - p) ** self.power
        return self.final + (self.initial - self.final) * left

    def due(self, step: int) -> bool:
        """True if masks are chosen again after `step` steps."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)

    @property
    def last(self) -> int:
        """The last step after which they are."""
        return self.end


@dataclass(frozen=True)
class Steps:
    """Sparsity jumps at given steps: {step: sparsity}. One entry is one-shot pruning, several are rounds with training between.

    jumps: steps from 0 on, sparsities in [0, 1) that do not fall. Raises PlanError for others.

    Example:

        >>> import secateurs as sc
        >>> steps = sc.train.Steps({10: 0.5, 20: 0.75})
        >>> [steps.at(step) for step in (9, 10, 25)]
        [0.0, 0.5, 0.75]
    """

    jumps: dict[int, float]

    def __post_init__(self) -> None:
        values = [self.jumps[step] for step in sorted(self.jumps)]
        if not values or values != sorted(values) or not values[0] >= 0 or not values[-1] < 1 or min(self.jumps) < 0:
            raise PlanError(f"jumps {self.jumps}: give steps from 0 on, and sparsities in [0, 1) that do not fall")

    def at(self, step: int) -> float:
        """The fraction of zeros after `step` steps."""
        return max((s for when, s in self.jumps.items() if when <= step), default=0.0)

    def due(self, step: int) -> bool:
        """True if masks are chosen again after `step` steps."""
        return step in self.jumps

    @property
    def last(self) -> int:
        """The last step after which they are."""
        return max(self.jumps)


def cubic(final: float, begin: int, end: int, initial: float = 0.0, every: int = 100) -> Ramp:
    """A Ramp from `initial` to `final` zeros that is fast at first, between steps `begin` and `end`, every `every` steps.

    Zhu and Gupta 2017, arXiv 1710.01878. Raises PlanError, as Ramp does.

    Example:

        >>> import secateurs as sc
        >>> round(sc.train.cubic(0.8, begin=0, end=100).at(50), 2)
        0.7
    """
    return Ramp(final, begin, end, initial, every, 3.0)


def linear(final: float, begin: int, end: int, initial: float = 0.0, every: int = 100) -> Ramp:
    """A Ramp from `initial` to `final` zeros along a line, between steps `begin` and `end`, every `every` steps.

    Raises PlanError, as Ramp does.

    Example:

        >>> import secateurs as sc
        >>> sc.train.linear(0.8, begin=0, end=100).at(50)
        0.4
    """
    return Ramp(final, begin, end, initial, every, 1.0)


def one_step(final: float, at: int = 0) -> Steps:
    """All zeros at once: `final` of them after step `at`. Raises PlanError, as Steps does.

    Example:

        >>> import secateurs as sc
        >>> sc.train.one_step(0.5, at=10).at(10)
        0.5
    """
    return Steps({at: final})


def rounds(final: float, count: int, every: int, begin: int = 0) -> Steps:
    """`count` rounds, `every` steps apart. Each removes the same fraction of what is left: 1 - (1 - final)^(n / count).

    final: the fraction of zeros after the last. begin: the step of the first. Raises PlanError for less than 1 round or step.

    Example, half of what is left in each round:

        >>> import secateurs as sc
        >>> sc.train.rounds(0.75, count=2, every=10).jumps
        {0: 0.5, 10: 0.75}
    """
    if count < 1 or every < 1:
        raise PlanError(f"{count} rounds {every} steps apart; give 1 or more of both")
    return Steps({begin + (n - 1) * every: 1 - (1 - final) ** (n / count) for n in range(1, count + 1)})
