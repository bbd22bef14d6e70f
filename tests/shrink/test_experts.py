"""Which experts of a mixture go, and that taking them out is never choosing them."""

import copy
import itertools

import pytest
import tiny
import torch

from secateurs.shrink import experts

FUSED = ("gate_up_proj", "down_proj")


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def block(request):
    model = tiny.make(request.param).eval()
    return model.model.layers[0], FUSED


def change(block, fused, gone, x_TH, weight_H):
    """By a block that has them no more."""
    smaller = copy.deepcopy(block)
    experts.cut(smaller, fused, gone)
    with torch.no_grad():
        delta = (smaller.mlp(x_TH[None]) - block.mlp(x_TH[None]))[0]
    return float((delta.square().mean(0) * weight_H).sum() / 2)


def test_the_cheapest_go_first_and_their_loss_is_that_of_the_smaller_block(block):
    block, fused = block
    x_TH, weight_H = torch.randn(50, 32), torch.rand(32)
    order, losses = experts.removal(block, fused, x_TH, weight_H, 2)
    singles = [change(block, fused, [e], x_TH, weight_H) for e in range(4)]
    assert order[0] == singles.index(min(singles))
    assert losses == pytest.approx([change(block, fused, order[:n], x_TH, weight_H) for n in (1, 2)], rel=1e-4)
    pairs = {
        pair: change(block, fused, list(pair), x_TH, weight_H)
        for pair in itertools.combinations(range(4), 2)
        if order[0] in pair
    }
    assert set(order) == set(min(pairs, key=pairs.get))


def test_nothing_is_left_behind(block):
    block, fused = block
    x_TH = torch.randn(9, 32)
    with torch.no_grad():
        before = block.mlp(x_TH[None])
        experts.removal(block, fused, x_TH, None, 1)
        assert torch.equal(block.mlp(x_TH[None]), before)


def test_a_block_without_a_router_is_refused():
    with pytest.raises(ValueError, match="no router"):
        experts.mixture(tiny.make("llama").model.layers[0], FUSED)
