import dataclasses
import itertools
import math

import pytest
import torch

from secateurs.prune.allocation import (
    ALLOCATIONS,
    LayerSummary,
    Option,
    Share,
    alpha,
    cheapest_loss,
    erk,
    global_threshold,
    owl,
    uniform,
)

SHARED = {name: a.share for name, a in ALLOCATIONS.items() if a.share}


def summaries(*scores, block=None):
    return {
        f"layer{i}": LayerSummary(
            (1, s.numel()) if s.dim() == 1 else tuple(s.shape),
            block[i] if block else f"block{i}",
            lambda s=s: iter(s.reshape(-1).split(37)),
            lambda s=s: s.reshape(-1, s.shape[-1]),
        )
        for i, s in enumerate(scores)
    }


def zeros(layers, sparsities):
    return {name: round(sparsities[name] * layer.numel) for name, layer in layers.items()}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_the_whole_gets_its_count_within_the_bounds(name, sparsity, spread):
    layers = summaries(torch.rand(100), torch.rand(40, 10), torch.rand(30, 10))
    low, high = max(0.0, sparsity - spread), min(1.0, sparsity + spread)
    shares = SHARED[name](layers, sparsity, (low, high))
    assert sum(zeros(layers, shares).values()) == round(800 * sparsity)
    assert all(low - 0.01 <= s <= high + 0.01 for s in shares.values())


@pytest.mark.parametrize("name", SHARED)
def test_layers_that_are_alike_get_the_same(name):
    score = torch.rand(20, 10)
    shares = SHARED[name](summaries(score, score, score, score), 0.5, (0.0, 1.0))
    assert set(shares.values()) == {0.5}


def test_erk_by_hand():
    # densities proportional to (O + I) / (O I): 20 / 100 and 110 / 1000; at 50% scale * (20 + 110) = 550
    layers = summaries(torch.rand(10, 10), torch.rand(100, 10))
    shares = erk(layers, 0.5, (0.0, 1.0))
    scale = 550 / 130
    assert shares["layer0"] == pytest.approx(1 - scale * 0.2, abs=0.01)
    assert shares["layer1"] == pytest.approx(1 - scale * 0.11, abs=0.001)


def test_erk_counts_a_kernel_by_its_sides():
    # 8 x (3 x 3 x 4): (8 + 4 + 3 + 3) / 288; a matrix of the same shape: (8 + 36) / 288
    matrix, conv = summaries(torch.rand(8, 36), torch.rand(8, 36)).values()
    shares = erk({"matrix": matrix, "conv": dataclasses.replace(conv, kernel=(3, 3))}, 0.75, (0.0, 1.0))
    kept = {name: 288 - round(288 * share) for name, share in shares.items()}
    assert kept["conv"] / kept["matrix"] == pytest.approx(18 / 44, rel=0.02)


def test_owl_by_hand():
    # block a: 2 of 100 scores are above five times their mean, block b: none
    a, b = torch.full((100,), 0.1), torch.ones(100)
    a[:2] = 10.0
    shares = owl(summaries(a, b), 0.6, (0.0, 1.0))
    # densities differ by 2 * 0.08 around 0.4
    assert shares == {"layer0": pytest.approx(0.52), "layer1": pytest.approx(0.68)}


def test_only_scores_far_above_the_mean_are_outliers():
    # means of 1.12 and 1.09: four scores of a are above its mean and below five times it, one of b is above that
    a, b = torch.ones(100), torch.ones(100)
    a[:4], b[0] = 4.0, 10.0
    shares = owl(summaries(a, b), 0.6, (0.0, 1.0))
    # counts are whole
    assert shares == {"layer0": pytest.approx(0.68, abs=0.011), "layer1": pytest.approx(0.52, abs=0.011)}


def test_alpha_by_hand():
    # eigenvalues of W' W: 16, 4, 1, 1 -> k = 2, bar 1: alpha = 1 + 2 / (ln 16 + ln 4); flat: no tail at all
    heavy, flat = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0])), torch.eye(4)
    from secateurs.prune.allocation import _hill

    assert _hill(heavy) == pytest.approx(1 + 2 / math.log(64), rel=1e-5)
    shares = alpha(summaries(heavy, flat), 0.5, (0.0, 1.0))
    # 0.5 * (1 -+ 0.3) of 16 weights: 5.6 and 10.4 zeros
    assert [round(s * 16) for s in shares.values()] == [6, 10]


def test_the_knapsack_equals_brute_force():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        options = {
            f"layer{i}": [
                Option(Share("unstructured", s), float(c), float(loss))
                for s, c, loss in zip(
                    (0.7, 0.5, 0.3, 0.0), torch.rand(4, generator=generator).sort().values,
                    torch.rand(4, generator=generator).sort(descending=True).values, strict=True,
                )
            ]
            for i in range(5)
        }  # fmt: skip
        budget = 2.4
        best = min(
            (sum(o.loss for o in choice), choice)
            for choice in itertools.product(*options.values())
            if sum(o.cost for o in choice) <= budget
        )[0]
        found = cheapest_loss(options, budget)
        assert list(found) == list(options)
        assert sum(o.cost for o in found.values()) <= budget
        # costs are rounded up to a ten-thousandth of the budget
        assert sum(o.loss for o in found.values()) <= best * 1.001 + 1e-9


def test_a_budget_below_the_cheapest_choices_is_refused():
    with pytest.raises(ValueError, match="the cheapest choice for every layer costs 2, the budget is 1"):
        cheapest_loss({"a": [Option(Share("2:4", 0.5), 2.0, 0.1)]}, 1.0)


def test_uniform_is_the_same_everywhere():
    assert uniform(summaries(torch.rand(3), torch.rand(5)), 0.4, (0, 1)) == {"layer0": 0.4, "layer1": 0.4}


@pytest.mark.parametrize("kind", ["random", "tied", "tiny and huge", "zeros"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_global_threshold_equals_one_stable_sort(kind, sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) for n in (200, 1000, 57)]
    if kind == "tied":
        scores = [(s * 4).round() for s in scores]
    if kind == "tiny and huge":
        scores = [s * 10.0**e for s, e in zip(scores, (-40, 0, 37), strict=True)]
    if kind == "zeros":
        scores = [s * (s > 0.7) for s in scores]
    layers = summaries(*scores)
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    gone = owner[torch.cat(scores).argsort(stable=True)[: round(1257 * sparsity)]]
    want = {f"layer{i}": int((gone == i).sum()) for i in range(3)}
    assert zeros(layers, global_threshold(layers, sparsity, (0.0, 1.0))) == want


def test_bounds_hold_and_the_rest_makes_up_for_them():
    layers = summaries(torch.linspace(0, 0.01, 100), torch.linspace(2, 3, 100), torch.linspace(0.5, 1.5, 200))
    free = zeros(layers, global_threshold(layers, 0.5, (0.0, 1.0)))
    assert free["layer0"] == 100
    assert free["layer1"] == 0
    bound = zeros(layers, global_threshold(layers, 0.5, (0.2, 0.7)))
    assert bound["layer0"] == 70
    assert bound["layer1"] == 20
    assert sum(bound.values()) == 200


def test_impossible_bounds_and_bad_scores_are_refused():
    with pytest.raises(ValueError, match="50 zeros do not fit between the layers' bounds, 0 and 30"):
        global_threshold(summaries(torch.rand(100)), 0.5, (0.0, 0.3))
    with pytest.raises(ValueError, match="not negative"):
        global_threshold(summaries(-torch.ones(10)), 0.5, (0.0, 1.0))
