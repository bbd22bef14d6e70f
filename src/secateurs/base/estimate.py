"""A measured value and its 95% interval, each end of which misses the truth in about 2.5% of measurements, in 4% at worst.

`ratio_of` is for windows of text, few numbers without bounds; `score_of` for answers, numbers between two bounds.
bench/intervals.py counts the misses of both.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 10_000

# Few samples understate the skewness, so an end takes what makes it wider: so many times the sample's, and so many standard errors.
# The least with which no row of bench/intervals.py misses more than 4%.
_SKEWNESS, _STANDARD_ERRORS = 1.1, 1.5


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval from n samples (windows of text, questions). With one sample the ends are the value."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def exp(self) -> "Estimate":
        """The same of the exponential; what overflows is the largest number there is."""
        most = math.log(np.finfo(np.float64).max)
        value, low, high = (math.exp(min(v, most)) for v in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.n)

    def within(self, least: float, most: float) -> "Estimate":
        """The same with its ends inside of what can be."""
        return Estimate(self.value, max(least, self.low), min(most, self.high), self.n)


def ratio_of(sums: Array, sizes: Array) -> Estimate:
    """sum(sums) / sum(sizes) over independent samples, e.g. nats over tokens.

    Student's t with Hall's correction for skewness (1992, JRSS B 54, 221): an end is reach() standard deviations away.
    """
    n, value = len(sums), float(sums.sum() / sizes.sum())
    if n == 1:
        return Estimate(value, value, value, n)
    # what each sample adds to the ratio's error, to first order
    errors = (sums - value * sizes) / sizes.mean()
    spread = math.sqrt(float(np.square(errors).sum()) / (n - 1))
    skewness = 0.0
    if n > 2 and spread:
        skewness = float(np.mean((errors / spread) ** 3)) * n**2 / ((n - 1) * (n - 2))
    return Estimate(value, value - spread * reach(n, -skewness), value + spread * reach(n, skewness), n)


def reach(n: int, skewness: float = 0.0) -> float:
    """Standard deviations of n samples from their mean to the upper end of its interval; of the negated samples for the lower."""
    t = float(stdtrit(n - 1, 0.975))
    if n < 3:
        return t / math.sqrt(n)
    # of the skewness of n normal numbers
    error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    k = (_SKEWNESS * skewness + _STANDARD_ERRORS * error) / math.sqrt(n)
    if abs(k) < 1e-6:
        return t / math.sqrt(n)
    return 3 / k * (1 - float(np.cbrt(1 - k * (t + k / 6)))) / math.sqrt(n)


def score_of(scores: Array, least: float, most: float, seed: int = 0) -> Estimate:
    """The mean of independent scores that lie between two bounds.

    Gaffke's bounds (Learned-Miller and Thomas 2019, arXiv 1905.06208): the scores and one that is as bad as can be get random
    weights, Dirichlet(1, ..., 1); an end is a quantile of the weighted mean. For right and wrong answers this is
    Clopper and Pearson's interval, so equal answers are not certain.
    """
    # one draw serves all scores that are equal
    distinct, counts = np.unique(scores, return_counts=True)
    random = np.random.default_rng(seed)
    found = np.empty((2, RESAMPLES))
    for part in np.split(np.arange(RESAMPLES), 20):
        weights = random.standard_gamma(np.append(counts, 1.0), (len(part), len(counts) + 1))
        total, seen = weights.sum(1), weights[:, :-1] @ distinct
        for end, bound in zip(found, (least, most), strict=True):
            end[part] = (seen + weights[:, -1] * bound) / total
    low, high = float(np.quantile(found[0], 0.025)), float(np.quantile(found[1], 0.975))
    return Estimate(float(scores.mean()), low, high, len(scores))
