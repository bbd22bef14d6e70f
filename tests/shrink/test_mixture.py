"""Every family's own routing: without a change nothing changes, and taking experts out is never choosing them."""

import copy

import mixtures
import pytest
import torch
from torch.testing import assert_close

from secateurs.model.discover import layout_of
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.mixture import Mixture, never, number

FUSED = {"gate_up_proj": "expert", "down_proj": "expert"}


@pytest.fixture(scope="module", params=mixtures.FAMILIES)
def model(request):
    return mixtures.make(request.param)


@pytest.fixture
def mixture(model):
    return Mixture(copy.deepcopy(model.model.layers[1]), layout_of(model).experts)


@pytest.fixture
def x_TH():
    return torch.randn(40, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


# of each group of DeepSeek's, of which there are two of four, one or two
GONE = [[], [1, 6], [0, 2, 5, 7]]


@pytest.mark.parametrize("gone", GONE)
def test_a_cut_model_gives_what_the_whole_one_does_if_it_never_chooses_them(model, gone):
    smaller = copy.deepcopy(model)
    fused = layout_of(model).experts
    whole = [Mixture(b, fused) for b in model.model.layers if number(b, fused)]
    for block in smaller.model.layers:
        if number(block, fused):
            Mixture(block, fused).cut(gone)
    ids = torch.arange(60).reshape(2, 30) * 7 % 250
    dense = model(input_ids=ids).logits
    with never(whole, gone):
        expected = model(input_ids=ids).logits
    assert_close(smaller(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(dense, expected) == (not gone)
    # biases are back
    assert torch.equal(model(input_ids=ids).logits, dense)


def test_what_is_never_chosen_is_not_chosen_and_all_others_go_by_their_own_rank(mixture, x_TH):
    index_TK, weight_TK = mixture.routed(x_TH)
    assert (index_TK.shape, mixture.active) == ((40, 2), 2)
    fewer_TK, _ = mixture.routed(x_TH, [1, 6])
    assert not {1, 6} & set(fewer_TK.unique().tolist())
    if mixture.groups == 1:
        kept = ~torch.isin(index_TK, torch.tensor([1, 6]))
        assert all(set(a[k].tolist()) <= set(b.tolist()) for a, k, b in zip(index_TK, kept, fewer_TK, strict=True))
    assert weight_TK.min() > 0


def test_the_mixture_is_the_weighted_sum_of_its_experts_and_the_shared_one(mixture, x_TH):
    index_TK, weight_TK = mixture.routed(x_TH)
    total = torch.zeros_like(x_TH)
    for t in range(len(x_TH)):
        for e, weight in zip(index_TK[t].tolist(), weight_TK[t], strict=True):
            total[t] += weight * mixture.expert(x_TH[t : t + 1], e)[0]
    shared = mixture.shared(x_TH)
    if shared is not None:
        total += shared[1] @ shared[0].weight.T
    assert_close(total, mixture(x_TH), rtol=1e-4, atol=1e-4)
    assert (shared is not None) == any("shared" in n for n, _ in mixture.parent.named_modules())


def test_the_last_matrix_and_what_it_multiplies(mixture, x_TH):
    layer, a_TI = mixture.down(x_TH, 3)
    bias_EH = mixture.experts._parameters.get("down_proj_bias")
    product = a_TI @ layer.read().T + (0 if bias_EH is None else bias_EH[3])
    assert (layer.index, layer.parameter.shape[0]) == (3, 8)
    assert_close(product, mixture.expert(x_TH, 3), rtol=1e-4, atol=1e-4)


def test_fewer_experts_per_token_are_the_best_of_them(mixture, x_TH):
    index_TK, weight_TK = mixture.routed(x_TH)
    mixture.send_to(1)
    one_TK, _ = mixture.routed(x_TH)
    assert one_TK.shape == (40, 1)
    biased = any("score_correction" in n or "expert_bias" in n for n in mixture.parent.state_dict())
    if mixture.groups == 1 and not biased:
        best_T1 = index_TK.gather(1, weight_TK.argmax(1, keepdim=True))
        assert torch.equal(one_TK, best_T1)


def test_both_cuts_are_stated_by_the_config(model):
    cuts = cuts_of(model)
    assert (cuts.refuses("experts"), cuts.refuses("active")) == (None, None)
    assert (cuts.shape.experts, cuts.shape.active) == (8, 2)
    grouped, dense_first = ("deepseek_v2", "deepseek_v3"), ("glm4_moe", "afmoe", "ernie4_5_moe")
    one = model.config.model_type in (*grouped, *dense_first) or getattr(model.config, "decoder_sparse_step", 1) == 2
    assert cuts.groups == (2 if model.config.model_type in grouped else 1)
    assert len(cuts.mixtures) == (1 if one else 2)


def test_a_block_without_a_router_is_refused():
    import tiny

    with pytest.raises(ValueError, match="no router"):
        Mixture(tiny.make("llama").model.layers[0], FUSED)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_routers_that_multiply_with_a_copy_of_their_matrix_are_seen(model_type, x_TH):
    # DeepSeek's is made in fp32
    model = mixtures.make(model_type).to(torch.bfloat16)
    mixture, x_TH = Mixture(model.model.layers[1], layout_of(model).experts), x_TH.bfloat16()
    mixture.is_sum_of_experts()
    assert not {1, 6} & set(mixture.routed(x_TH, [1, 6])[0].flatten().tolist())
    smaller = copy.deepcopy(mixture)
    smaller.cut([1, 6])
    with never([mixture], [1, 6]):
        expected = mixture(x_TH)
    assert_close(smaller(x_TH), expected, rtol=0.02, atol=0.02)
    logits_TE = x_TH.float() @ mixture.router.weight.float().T + mixture.router._parameters.get("bias", 0)
    assert_close(mixture.logits(x_TH), logits_TE, rtol=0.02, atol=0.05)
