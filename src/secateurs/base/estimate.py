"""A measured value and its interval."""

from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% bootstrap interval over n samples (windows of text, questions, runs)."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_of(values: "np.ndarray[Any, np.dtype[np.float64]]", seed: int = 0) -> Estimate:
    """The mean of independent samples, with its interval from RESAMPLES bootstrap resamples."""
    n = len(values)
    # a resample is drawn as counts of the distinct values (multinomial), of which scores have few
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, RESAMPLES)
    low, high = np.quantile(drawn @ distinct / n, [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)
