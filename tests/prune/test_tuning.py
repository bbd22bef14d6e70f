"""The loop that tunes: its order, its rates, and what a kill leaves of it."""

import pytest
import torch
from test_tune_model import Notes

from secateurs.prune import tuning
from secateurs.prune.tuning import Moving, tune

# places, of which 2 are held out
PLACES = range(20)


def tuned(losses, memory=None):
    """120 steps, and a look at the held-out loss every 30: the outcome and the weights."""
    p = torch.nn.Parameter(torch.ones(3, 3))
    calls = iter(value for value in losses for _ in range(2))
    found = tune(
        [Moving.of(p)], lambda place: next(calls), lambda place: [torch.full((3, 3), 1.0 + place)], PLACES, 120, 1e-2,
        memory=memory,
    )  # fmt: skip
    return found, p.detach()


@pytest.mark.parametrize(("before", "after"), [
    # the best was seen before the kill, and the second look in vain after it ends the tuning
    ([1.0, 0.5, 0.6], [0.7, 0.1]),
    # a better one comes after it
    ([1.0, 0.5, 0.6], [0.4, 0.3]),
    # given weights were the best
    ([1.0, 1.2, 1.1], [1.3, 0.1]),
])  # fmt: skip
def test_a_killed_tuning_ends_as_an_undisturbed_one(before, after):
    expected, weights = tuned(before + after)
    notes = Notes(2)
    with pytest.raises(KeyboardInterrupt):
        tuned(before, notes)
    found, again = tuned(after, notes)
    assert found == expected
    assert torch.equal(again, weights)


def order(seed):
    """Places in the order of their steps, and those that are held out."""
    steps, held = [], set()

    def gradients(place):
        steps.append(place)
        return [torch.ones(3, 3)]

    def loss(place):
        held.add(place)
        return 1.0

    tune([Moving.of(torch.nn.Parameter(torch.ones(3, 3)))], loss, gradients, PLACES, 36, 1e-2, seed)
    return steps, held


def test_another_seed_is_another_order():
    steps, held = order(3)
    assert order(3) == (steps, held)
    others = [order(seed) for seed in range(3)]
    assert all(other != steps for other, _ in others)
    assert len({frozenset(found) for _, found in [*others, (steps, held)]}) > 1
    # every training place once, and once again in an order of its own
    first, second = steps[:18], steps[18:]
    assert set(first) == set(second) == set(PLACES) - held
    assert first != second


def test_the_rate_climbs_and_falls_along_a_cosine(monkeypatch):
    rates = []
    monkeypatch.setattr(tuning._Survivors, "step", lambda self, rate: rates.append(rate))
    p = torch.nn.Parameter(torch.ones(3, 3))
    tune([Moving.of(p)], lambda place: 1.0, lambda place: [torch.ones(3, 3)], PLACES, 20, 0.1)
    # of 20 steps the first two climb; (1 + cos(pi / 10)) / 2 = 0.97553
    assert [rates[step - 1] for step in (1, 2, 5, 10, 20)] == pytest.approx(
        [0.05, 0.097553, 0.085355, 0.05, 0.0], abs=1e-6
    )
