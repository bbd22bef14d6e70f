"""Intervals: by hand, by their forward formula, and by counting how often an end misses the truth."""

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, multinomial, skew, t

from secateurs.base.estimate import Estimate, ratio_of, reach, score_of


def mean_of(values):
    return ratio_of(np.asarray(values, dtype=float), np.ones(len(values)))


def test_two_samples_have_student_s_interval():
    found = mean_of([1.0, 2.0])
    # one degree of freedom: 12.706 standard errors of 0.5
    assert (found.value, found.n) == (1.5, 2)
    assert found.low == pytest.approx(1.5 - 12.7062 * 0.5, abs=1e-4)
    assert found.high == pytest.approx(1.5 + 12.7062 * 0.5, abs=1e-4)


def test_an_end_is_where_hall_s_transformation_gives_student_s_quantile():
    values = np.array([0.1, 0.2, 0.2, 0.4, 0.5, 0.9, 1.4, 4.0, 0.3])
    found, n = mean_of(values), 9
    error = math.sqrt(6 * 9 * 8 / (7 * 10 * 12))
    skewness = skew(values, bias=False)
    for end, sign in ((found.low, -1), (found.high, 1)):
        x = (values.mean() - end) * math.sqrt(n) / values.std(ddof=1)
        # the skewness that makes this end lie further away
        k = (1.1 * skewness + sign * 1.5 * error) / math.sqrt(n)
        assert x + k * x**2 / 3 + k**2 * x**3 / 27 + k / 6 == pytest.approx(-sign * t.ppf(0.975, n - 1))


def test_a_ratio_s_error_is_that_of_the_sums_against_the_sizes():
    # twice the nats over twice the tokens: the ratio has no spread, though the sums have
    assert ratio_of(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == Estimate(0.5, 0.5, 0.5, 3)
    found = ratio_of(np.array([2.0, 6.0]), np.array([1.0, 3.0]) * 2)
    assert (found.value, found.low) == (1.0, 1.0)
    # 4 nats over 4 tokens; errors of 1 and -1 over a mean of 2 tokens: a deviation of 0.7071
    found = ratio_of(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    assert found.high - 1 == pytest.approx(12.7062 * 0.5, abs=1e-4)


def test_a_long_tail_moves_both_ends_its_way_and_mirrors():
    values = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 5.0] * 3)
    found, mirrored = mean_of(values), mean_of(-values)
    assert found.high - found.value > 1.5 * (found.value - found.low)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_one_sample_or_equal_ones_have_no_spread():
    assert mean_of([2.0]) == Estimate(2.0, 2.0, 2.0, 1)
    assert mean_of([2.0] * 9) == Estimate(2.0, 2.0, 2.0, 9)


def test_many_samples_take_the_normal_quantile():
    assert reach(10**6) * 1000 == pytest.approx(1.96, abs=0.01)
    assert reach(24) > reach(48) > reach(96)


def test_an_exponential_that_overflows_is_a_number():
    found = Estimate(1.0, -1e4, 1e4, 2).exp()
    assert (found.value, found.low) == (math.e, 0.0)
    assert math.isfinite(found.high)


DRAWS = {
    "normal": lambda r, n: r.normal(size=n),
    "exponential": lambda r, n: r.exponential(size=n) - 1,
    "lognormal": lambda r, n: r.lognormal(-0.5, 1.0, n) - 1,
    "Student's t, 3": lambda r, n: r.standard_t(3, n),
}


@pytest.mark.parametrize("n", [8, 12, 24, 48])
@pytest.mark.parametrize("name", DRAWS)
def test_an_end_misses_the_truth_in_at_most_4_percent(name, n):
    random, trials = np.random.default_rng(0), 1000
    found = [mean_of(DRAWS[name](random, n)) for _ in range(trials)]
    for missed in (sum(f.high < 0 for f in found), sum(f.low > 0 for f in found)):
        # 4%, and three standard errors of such a count
        assert missed <= 0.04 * trials + 3 * math.sqrt(trials * 0.04 * 0.96)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (1, 20), (13, 20), (20, 20), (60, 100), (99, 100)])
def test_answers_right_or_wrong_have_clopper_and_pearson_s_interval(right, n):
    scores = np.repeat([1.0, 0.0], [right, n - right])
    found, want = score_of(scores, 0.0, 1.0), binomtest(right, n).proportion_ci(method="exact")
    assert (found.low, found.high) == (pytest.approx(want.low, abs=0.004), pytest.approx(want.high, abs=0.004))


@pytest.mark.parametrize("n", [20, 50])
def test_of_a_share_no_end_misses_more_than_it_claims(n):
    """All numbers of right answers, weighed by how likely each is. 2.5%, and what 10,000 resamples leave to chance."""
    found = [score_of(np.repeat([1.0, 0.0], [k, n - k]), 0.0, 1.0) for k in range(n + 1)]
    for p in np.linspace(0.02, 0.98, 49):
        chance = binom.pmf(np.arange(n + 1), n, p)
        assert chance[[f.low > p for f in found]].sum() <= 0.03
        assert chance[[f.high < p for f in found]].sum() <= 0.03


def test_of_a_paired_difference_no_end_misses_more_than_it_claims():
    """All numbers of questions that one of two models alone gets right, of 20."""
    n = 20
    counts = [(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]
    found = [score_of(np.repeat([1.0, -1.0, 0.0], c), -1.0, 1.0) for c in counts]
    for won, lost in ((0.0, 0.05), (0.0, 0.15), (0.02, 0.1), (0.1, 0.1), (0.3, 0.4), (0.05, 0.6)):
        chance = multinomial.pmf(counts, n, (won, lost, 1 - won - lost))
        assert chance[[f.low > won - lost for f in found]].sum() <= 0.03
        assert chance[[f.high < won - lost for f in found]].sum() <= 0.03


def test_scores_between_right_and_wrong_count():
    found = score_of(np.array([0.2, 0.9, 0.5, 0.7] * 10), 0.0, 1.0)
    assert found.value == pytest.approx(0.575)
    assert 0.4 < found.low < 0.53 < 0.62 < found.high < 0.72
    # the same seed, the same ends
    assert found == score_of(np.array([0.2, 0.9, 0.5, 0.7] * 10), 0.0, 1.0)
