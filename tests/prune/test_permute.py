import itertools

import pytest
import tiny
import torch
from torch.testing import assert_close

from secateurs import Stats
from secateurs.matrix.patterns import NM
from secateurs.prune import permute

TWO_FOUR = NM(2, 4)


def random_scores(rows, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(inputs, generator=generator).mul(2).exp()
    return torch.rand(rows, inputs, generator=generator).square() * scale


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 16)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_an_order_is_a_bijection_and_never_keeps_less(pattern, seed):
    score = random_scores(24, 64, seed)
    order = permute.order_of(score, pattern)
    assert sorted(order.tolist()) == list(range(64))
    kept = permute.kept_score(score[:, order], pattern)
    assert kept > permute.kept_score(score, pattern)
    assert kept == pytest.approx(float((score[:, order] * pattern.keep(score[:, order], 0.5)).sum()), rel=1e-5)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(2, 6), NM(4, 12)], ids=str)
def test_many_inputs_are_ordered_in_pieces_of_whole_groups(pattern, monkeypatch):
    monkeypatch.setattr(permute, "_MOST", 32)
    score = random_scores(12, 72)
    order = permute.order_of(score, pattern)
    assert sorted(order.tolist()) == list(range(72))
    most = 32 // pattern.m * pattern.m
    for start in range(0, 72, most):
        piece = slice(start, start + most)
        assert sorted(order[piece].tolist()) == list(range(72))[piece]
        assert permute.kept_score(score[:, order[piece]], pattern) > permute.kept_score(score[:, piece], pattern)


def test_eight_inputs_come_close_to_the_best_grouping():
    gaps = []
    for seed in range(10):
        score = random_scores(6, 8, seed)
        best = max(
            permute.kept_score(score[:, [0, *rest, *(i for i in range(1, 8) if i not in rest)]], TWO_FOUR)
            for rest in itertools.combinations(range(1, 8), 3)
        )
        found = permute.kept_score(score[:, permute.order_of(score, TWO_FOUR)], TWO_FOUR)
        assert found <= best * (1 + 1e-6)
        gaps.append(1 - found / best)
    assert sum(gaps) / len(gaps) < 0.01


def test_a_crowded_group_is_thinned_out():
    # four inputs that matter share a group; two groups can keep two each
    score = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]])
    order = permute.order_of(score, TWO_FOUR)
    assert permute.kept_score(score[:, order], TWO_FOUR) == 36


def test_gains_are_those_of_brute_force():
    score = random_scores(5, 12)
    groups = torch.arange(12).reshape(3, 4)
    gain = permute._gains(score, groups, 1, 2)
    for candidate, group in itertools.product(range(3), range(3)):
        members = groups[group].clone()
        members[1] = groups[candidate, 1]
        with_it = score[:, members].topk(2, 1).values.sum()
        without = score[:, groups[group, [0, 2, 3]]].topk(2, 1).values.sum()
        assert_close(gain[candidate, group], with_it - without)


@pytest.mark.parametrize("model_type", tiny.TINY)
def test_reordering_leaves_every_family_s_function_alone(model_type):
    model = tiny.make(model_type)
    ids = torch.arange(40).reshape(2, 20) * 5
    with torch.no_grad():
        # biases begin at zero, and then it does not matter where they are
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        before = model(ids)[0]
    reordered, moved = set(), []
    for coupling in tiny.couplings(model):
        assert permute.refuses(coupling, TWO_FOUR) is None
        sqnorm = torch.rand(coupling.consumer.shape[1]) * 10
        order = permute.choose(coupling, sqnorm, TWO_FOUR)
        # the order of a head of 8 may be the best already
        if order is None and coupling.width == 8:
            continue
        weight = coupling.consumer.read().clone()
        kept = permute.kept_score(weight.square() * sqnorm, TWO_FOUR)
        moved += coupling.reorder(order)
        assert torch.equal(coupling.consumer.read(), weight[:, order])
        assert permute.kept_score(coupling.consumer.read().square() * sqnorm[order], TWO_FOUR) > kept
        reordered.add(coupling.consumer.name)
    with torch.no_grad():
        after = model(ids)[0]
    assert len(reordered) >= 5, "of three blocks attention's output and the MLP's"
    assert_close(after, before, rtol=1e-4, atol=1e-5)
    parameters = dict(model.named_parameters())
    assert all(name in parameters for name in moved)


def test_a_head_that_is_no_whole_number_of_groups_is_refused():
    by_heads = next(c for c in tiny.couplings(tiny.make("llama")) if c.consumer.name.endswith("o_proj"))
    assert by_heads.heads == (4, 2)
    assert permute.refuses(by_heads, NM(8, 16)) == "a head of 8 inputs is not a multiple of 16"


def test_stats_follow_the_order():
    x_TI = torch.randn(50, 8)
    order = torch.randperm(8)
    dense_TI = torch.randn(50, 8)
    stats, want = Stats.zeros(8, True), Stats.zeros(8, True)
    stats.add_(x_TI, dense_TI)
    want.add_(x_TI[:, order], dense_TI[:, order])
    got = stats.finish().reordered(order)
    assert_close(got.gram_II, want.finish().gram_II)
    assert_close(got.drift_II, want.drift_II)
    assert_close(got.sqnorm_I, want.sqnorm_I)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        permute.order_of(torch.rand(3, 6), TWO_FOUR)
