"""Removing columns and making up for them."""

import itertools

import pytest
import torch

from secateurs import Stats
from secateurs.shrink import columns

DAMPING = 0.01


@pytest.fixture
def problem():
    """weight_OI [6, 12] and Stats of correlated inputs."""
    x_TI = torch.randn(200, 12) @ torch.randn(12, 12)
    return torch.randn(6, 12), Stats.of(x_TI)


def side(weight_OI, stats, groups_GC):
    return columns.Side(weight_OI, stats, groups_GC, torch.rand(len(groups_GC)))


def loss(weight_OI, new_OI, stats):
    delta = (new_OI - weight_OI).double()
    return float(((delta @ stats.damped(DAMPING).double()) * delta).sum())


def after(weight_OI, stats, groups_GC, removed):
    """The loss when these groups go and the others are refit."""
    kept = columns.kept_columns(groups_GC, removed)
    new_OI = torch.zeros_like(weight_OI)
    new_OI[:, kept] = columns.refit(weight_OI, stats, kept, DAMPING)
    return loss(weight_OI, new_OI, stats)


def test_refit_is_least_squares(problem):
    """Of the kept columns, on the inputs themselves and the ridge: by torch's own solver."""
    weight_OI, stats = problem
    kept = torch.tensor([0, 2, 3, 7, 11])
    lower = torch.linalg.cholesky(stats.damped(DAMPING).double())
    expected = torch.linalg.lstsq(lower.T[:, kept], lower.T @ weight_OI.double().T).solution.T
    torch.testing.assert_close(columns.refit(weight_OI, stats, kept, DAMPING).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", columns.CRITERIA)
def test_refit_never_raises_the_loss(criterion, problem):
    weight_OI, stats = problem
    groups_GC = torch.arange(12)[:, None]
    removed = columns.CRITERIA[criterion][0]([side(weight_OI, stats, groups_GC)], 5, DAMPING, None)
    assert len(set(removed.tolist())) == 5
    kept = columns.kept_columns(groups_GC, removed)
    plain_OI = torch.zeros_like(weight_OI)
    plain_OI[:, kept] = weight_OI[:, kept]
    assert after(weight_OI, stats, groups_GC, removed) < loss(weight_OI, plain_OI, stats)


@pytest.mark.parametrize("width", [1, 3])
def test_obs_finds_the_best_single_group(width, problem):
    weight_OI, stats = problem
    groups_GC = torch.arange(12).reshape(-1, width)
    costs = [after(weight_OI, stats, groups_GC, [g]) for g in range(len(groups_GC))]
    assert columns.obs([side(weight_OI, stats, groups_GC)], 1, DAMPING).tolist() == [costs.index(min(costs))]


@pytest.mark.parametrize("width", [1, 2])
def test_obs_is_greedy_on_the_exact_loss(width, problem):
    """Every next group is the one that exhaustive search would take."""
    weight_OI, stats = problem
    groups_GC = torch.arange(12).reshape(-1, width)
    found = columns.obs([side(weight_OI, stats, groups_GC)], 4, DAMPING).tolist()
    gone = []
    for g in found:
        rest = [h for h in range(len(groups_GC)) if h not in gone]
        assert g == min(rest, key=lambda h: after(weight_OI, stats, groups_GC, [*gone, h]))
        gone.append(g)


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_losses_are_those_after_refit(at_once, problem):
    weight_OI, stats = problem
    groups_GC = torch.arange(12)[:, None]
    order, losses = columns.removal([side(weight_OI, stats, groups_GC)], 6, DAMPING, at_once)
    for count in range(at_once, 7, at_once):
        assert float(losses[count - 1]) == pytest.approx(after(weight_OI, stats, groups_GC, order[:count]), rel=1e-3)
    assert (losses.diff() >= 0).all()


def test_obs_is_near_the_best_of_all_sets(problem):
    weight_OI, stats = problem
    groups_GC = torch.arange(12)[:, None]
    best = min(after(weight_OI, stats, groups_GC, list(s)) for s in itertools.combinations(range(12), 5))
    obs, by_size = (
        after(weight_OI, stats, groups_GC, f([side(weight_OI, stats, groups_GC)], 5, DAMPING))
        for f in (columns.obs, columns.magnitude)
    )
    assert obs < 1.2 * best
    assert obs < by_size


def test_dead_inputs_go_first(problem):
    weight_OI, _ = problem
    x_TI = torch.randn(100, 12)
    x_TI[:, [4, 9]] = 0
    stats = Stats.of(x_TI)
    found = columns.obs([side(weight_OI, stats, torch.arange(12)[:, None])], 2, DAMPING)
    assert sorted(found.tolist()) == [4, 9]


def test_sides_add_up(problem):
    """A unit that two matrices read goes when the sum of what both lose is least."""
    weight_OI, stats = problem
    other_OI, other = torch.randn(4, 12), Stats.of(torch.randn(90, 12) @ torch.randn(12, 12))
    groups_GC = torch.arange(12)[:, None]
    found, losses = columns.removal([side(weight_OI, stats, groups_GC), side(other_OI, other, groups_GC)], 3, DAMPING)
    gone = []
    for g, expected in zip(found.tolist(), losses.tolist(), strict=True):
        both = {
            h: after(weight_OI, stats, groups_GC, [*gone, h]) + after(other_OI, other, groups_GC, [*gone, h])
            for h in range(12)
            if h not in gone
        }
        assert g == min(both, key=both.get)
        gone.append(g)
        assert expected == pytest.approx(both[g], rel=1e-3)


@pytest.mark.parametrize("criterion", columns.CRITERIA)
def test_parents_lose_in_turns(criterion, problem):
    weight_OI, stats = problem
    parents_G = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    sides = [side(weight_OI, stats, torch.arange(12)[:, None])]
    found = columns.CRITERIA[criterion][0](sides, 8, DAMPING, parents_G)
    assert sorted(parents_G[found[:4]].tolist()) == sorted(parents_G[found[4:]].tolist()) == [0, 1, 2, 3]
    assert len(set(found.tolist())) == 8
