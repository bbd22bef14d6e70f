"""Which experts of a mixture go, and what is done with what is left."""

import copy
import itertools

import mixtures
import pytest
import reap
import tiny
import torch
from torch.testing import assert_close

from secateurs.matrix.solvers import DAMPING
from secateurs.model.batches import batched
from secateurs.model.discover import layout_of
from secateurs.model.walk import stream
from secateurs.shrink import cut_experts, experts, merging, refit_experts
from secateurs.shrink.cuts import cuts_of
from secateurs.shrink.experts import CRITERIA, Trial
from secateurs.shrink.mixture import Mixture


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["mixtral", "qwen2_moe", "deepseek_v3"])
def mixture(request):
    model = mixtures.make(request.param)
    return Mixture(model.model.layers[1], layout_of(model).experts)


def qwen3():
    model = mixtures.make("qwen3_moe")
    return Mixture(model.model.layers[1], layout_of(model).experts)


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss(mixture, gone, x_TH, weight_H):
    """By a mixture that has them no more."""
    smaller = copy.deepcopy(mixture)
    smaller.cut(gone)
    return float(((smaller(x_TH) - mixture(x_TH)).square().mean(0) * weight_H).sum() / 2)


def may_go(mixture, gone):
    """If there are groups, one of the first goes, then one of the other."""
    half = mixture.number // mixture.groups
    groups = [e // half for e in gone]
    return [
        e for e in range(mixture.number) if e not in gone and groups.count(e // half) == len(gone) // mixture.groups
    ]


def test_the_cheapest_go_first_and_the_loss_is_that_of_the_smaller_mixture(mixture):
    x_TH, weight_H = random(60, 32), random(32, seed=2).abs()
    trial = Trial(mixture, x_TH, weight_H)
    order, losses = experts.removal(trial, "loss", 2)
    # a mixture that is chosen from in groups cannot be without one of one group alone
    if mixture.groups == 1:
        singles = [loss(mixture, [e], x_TH, weight_H) for e in range(8)]
        assert order[0] == singles.index(min(singles))
        assert losses[0] == pytest.approx(min(singles), rel=1e-4)
    pairs = {e: loss(mixture, [order[0], e], x_TH, weight_H) for e in may_go(mixture, order[:1])}
    assert order[1] == min(pairs, key=pairs.get)
    assert losses[1] == pytest.approx(pairs[order[1]], rel=1e-4)


def test_the_order_is_that_of_trying_all_each_time(mixture, monkeypatch):
    trial, wanted, tried = Trial(mixture, random(60, 32)), [], []
    while len(wanted) < 6:
        wanted.append(min(may_go(mixture, wanted), key=lambda e: trial.loss([*wanted, e])))
    try_one = experts._Search.loss_without
    monkeypatch.setattr(experts, "_TRIED", 1)
    monkeypatch.setattr(experts._Search, "loss_without", lambda *given: (tried.append(given[1]), try_one(*given))[1])
    assert experts.loss(trial, 6) == wanted
    # of 33 where any may go; every one at least once
    assert set(tried) == set(range(8))
    assert len(tried) < 33


def test_an_expert_that_costs_more_than_when_it_was_tried_is_tried_again(monkeypatch):
    """0 and 1 are one expert twice: at first neither costs anything, then the other costs more than all."""
    costs = {(): [0.0, 0.0, 2.0, 3.0], (0,): [None, 9.0, 2.5, 3.0], (0, 2): [None, 9.0, None, 4.0]}
    monkeypatch.setattr(experts, "_TRIED", 1)

    class Known(experts.Whole):
        def __init__(self):
            self.ranks = experts.ALONE

        def may_go(self, order):
            return [e for e in range(4) if e not in order]

        def loss(self, gone):
            return costs[tuple(gone[:-1])][gone[-1]]

    assert experts.loss(Known(), 3) == [0, 2, 3]


def test_what_one_more_expert_costs_is_the_loss_of_the_set(mixture):
    """With none and with some gone: where weights stay, where they grow with what is gone, and where groups are chosen anew."""
    trial = Trial(mixture, random(60, 32), random(32, seed=2).abs())
    search = experts._Search(trial)
    for gone in ([], [1, 6], [1, 6, 2, 5]):
        search.remove(gone)
        for e in may_go(mixture, gone):
            assert search.loss_without(e) / (2 * 60) == pytest.approx(trial.loss([*gone, e]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_tokens_of_the_expert_that_is_tried_are_mixed_again(dtype, monkeypatch):
    """Weights that are not normalised grow for all tokens when an expert goes, and are rounded to the model's dtype; the router
    multiplies once for all sets.
    """
    model = mixtures.make("qwen2_moe").to(dtype)
    mixture = Mixture(model.model.layers[1], layout_of(model).experts)
    trial = Trial(mixture, random(60, 32).to(dtype))
    search, mixed, mix = experts._Search(trial), [], trial.mixed
    monkeypatch.setattr(
        trial, "mixed", lambda tokens_N, *given: (mixed.append(len(tokens_N)), mix(tokens_N, *given))[1]
    )
    mixture.router.weight.fill_(torch.nan)
    costs = [search.loss_without(e) for e in range(8)]
    assert all(cost > 0 for cost in costs)
    assert mixed == [int((search.index_TK == e).any(1).sum()) for e in range(8)]


def test_experts_that_stand_in_for_each_other_do_not_both_go():
    mixture = qwen3()
    router_EH, experts_of = mixture.router.weight, mixture.experts
    # 0 and 1 are one expert twice, chosen for the same tokens, whose work nobody else does
    for parameter in (router_EH, experts_of.gate_up_proj, experts_of.down_proj):
        parameter[1] = parameter[0]
    x_TH = random(200, 32)
    order = experts.loss(Trial(mixture, x_TH), 2)
    gone = set(order)
    assert len(gone & {0, 1}) == 1
    pairs = {pair: loss(mixture, list(pair), x_TH, torch.ones(32)) for pair in itertools.combinations(range(8), 2)}
    assert pairs[tuple(sorted(gone))] < pairs[0, 1]


def test_a_wide_output_is_compared_by_a_random_projection(monkeypatch):
    mixture, x_TH = qwen3(), random(300, 32)
    monkeypatch.setattr(experts, "_KEPT", 16)
    trial = Trial(mixture, x_TH, torch.full((32,), 3.0))
    assert trial.dense_TD.shape == (300, 16)
    monkeypatch.setattr(experts, "_KEPT", 256)
    exact = Trial(mixture, x_TH, torch.full((32,), 3.0)).loss([2, 5])
    assert trial.loss([2, 5]) == pytest.approx(exact, rel=0.2)
    assert exact == pytest.approx(3 * loss(mixture, [2, 5], x_TH, torch.ones(32)), rel=1e-4)


def test_reap_is_that_of_its_paper():
    mixture, x_TH = qwen3(), random(30, 32)
    held = mixture.experts
    published = reap.saliency(x_TH, mixture.router.weight, held.gate_up_proj, held.down_proj, 2)
    trial = Trial(mixture, x_TH)
    assert_close(experts.saliency(trial), torch.tensor(published), rtol=1e-4, atol=1e-6)
    assert CRITERIA["reap"].order(trial, 3) == sorted(range(8), key=lambda e: published[e])[:3]


def test_reap_by_hand():
    # logits 0 and log 3 for x = 1, log 3 and 0 for x = -1: gates 3/4; silu(1) = 0.731059
    router_EH, x_TH = torch.tensor([[0.0], [1.0986123]]), torch.tensor([[1.0], [-1.0]])
    gate_up_EOH, down_EHI = torch.tensor([[[1.0], [1.0]]] * 2), torch.tensor([[[2.0]], [[4.0]]])
    silu = 0.7310586
    # of x = -1 silu(-1) = -0.268941, times -1
    want = [0.75 * 2 * (1 - silu), 0.75 * 4 * silu]
    assert reap.saliency(x_TH, router_EH, gate_up_EOH, down_EHI, 1, False) == pytest.approx(want, rel=1e-5)
    assert reap.saliency(x_TH, router_EH, gate_up_EOH, down_EHI, 1) == pytest.approx([w / 0.75 for w in want], rel=1e-5)


def test_reap_goes_as_published():
    model = mixtures.make("qwen3_moe")
    ids = torch.randint(250, (6, 40), generator=torch.Generator().manual_seed(3))
    step = next(stream(model, batched(ids)))
    x_TH = experts.inputs(step, cuts_of(model).fused, 10_000)
    ours = sorted(CRITERIA["reap"].order(Trial(Mixture(step.block, cuts_of(model).fused), x_TH), 3))
    assert reap.prune(model, ids, 3)[0] == ours
    assert model(input_ids=ids).logits.shape == (6, 40, tiny.VOCABULARY)
    assert len(model.model.layers[1].mlp.experts.down_proj) == 5


def test_frequency_counts_tokens_and_one_that_has_none_goes_first():
    mixture, x_TH = qwen3(), random(30, 32).abs()
    # its logits are far below all others
    mixture.router.weight[4] = -9.0
    trial = Trial(mixture, x_TH)
    tokens_E = experts.tokens_of(mixture, x_TH)
    assert (int(tokens_E.sum()), int(tokens_E[4])) == (60, 0)
    for criterion in CRITERIA:
        (e,), (lost,) = experts.removal(trial, criterion, 1)
        assert (int(tokens_E[e]), lost) == (0, pytest.approx(0.0, abs=1e-10))
    order = CRITERIA["frequency"].order(trial, 8 - 2)
    assert [int(tokens_E[e]) for e in order] == sorted(tokens_E.tolist())[:6]


def test_nothing_is_left_behind(mixture):
    x_TH = random(20, 32)
    before = mixture(x_TH)
    experts.removal(Trial(mixture, x_TH), "loss", 2)
    assert torch.equal(mixture(x_TH), before)


# ------------------------------------------------------------------------------------------------------------------ merging


def test_the_most_salient_choose_the_most_alike():
    score_E = torch.tensor([5.0, 1.0, 9.0, 2.0, 0.5])
    similar_EE = torch.zeros(5, 5)
    similar_EE[2] = torch.tensor([0.0, 0.4, 0.0, 0.1, 0.9])
    similar_EE[0] = torch.tensor([0.0, 0.9, 0.0, 0.0, 0.9])
    assert merging.grouped(score_E, similar_EE, [1, 4], 16) == {2: [4, 1]}


def test_a_group_that_is_full_takes_no_more():
    assert merging.grouped(torch.arange(5.0), torch.eye(5), [0, 1], 2) == {4: [0], 3: [1]}
    assert merging.grouped(torch.arange(5.0), torch.eye(5), [0, 1, 2], 2) == {4: [0], 3: [1]}


def merged(mixture, x_TH, removed):
    model = mixtures.make("qwen3_moe")
    cuts = cuts_of(model)
    layers = list(cuts.layers(mixture.parent, "").values())
    # the couplings of the family, with the layers of this mixture
    block = model.model.layers[1]
    block.mlp = mixture.parent
    name = "model.layers.1"
    layers = list(cuts.layers(block, name).values())
    return merging.merge(Trial(mixture, x_TH), removed, cuts.couplings.of(name, block, layers, model.config))


def test_an_expert_whose_neurons_change_places_merges_into_its_twin():
    mixture, x_TH = qwen3(), random(100, 32)
    held, order = mixture.experts, torch.randperm(16, generator=torch.Generator().manual_seed(3))
    # the most salient chooses first
    held.down_proj[2].mul_(10)
    held.gate_up_proj[5] = held.gate_up_proj[2][torch.cat([order, order + 16])]
    held.down_proj[5] = held.down_proj[2][:, order]
    mixture.router.weight[5] = mixture.router.weight[2]
    before = mixture.expert(x_TH, 2)
    assert merged(mixture, x_TH, [5]) == {"2": [5]}
    assert_close(mixture.expert(x_TH, 2), before, rtol=1e-4, atol=1e-5)


def test_merged_weights_are_means_by_saliency():
    mixture, x_TH = qwen3(), random(100, 32)
    score_E = experts.saliency(Trial(mixture, x_TH))
    weights = copy.deepcopy(mixture.experts.down_proj)
    ((center, (e,)),) = merged(mixture, x_TH, [5]).items()
    center = int(center)
    share = float(score_E[center] / (score_E[center] + score_E[e]))
    # in whatever order the other's neurons were put, the sums over neurons are those of the mean
    got, want = mixture.experts.down_proj[center], share * weights[center] + (1 - share) * weights[5]
    assert_close(got.sum(1), want.sum(1), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ refit


@pytest.mark.parametrize(
    ("model_type", "what"),
    [("mixtral", "expert"), ("deepseek_v3", "expert"), ("deepseek_v3", "shared"), ("qwen2_moe", "shared")],
)
def test_a_last_matrix_that_was_changed_comes_back(model_type, what, monkeypatch):
    model = mixtures.make(model_type)
    mixture, x_TH = Mixture(model.model.layers[1], layout_of(model).experts), random(2000, 32)
    wanted_TH = mixture(x_TH)
    changed_OI = mixture.experts.down_proj[1] if what == "expert" else mixture.shared(x_TH)[0].weight
    before_OI = changed_OI.clone()
    changed_OI.mul_(0.3)
    monkeypatch.setattr(refit_experts._Fit, "router", lambda fit: None)
    monkeypatch.setattr(refit_experts, "_ROUNDS", 10)
    found = refit_experts.refit(mixture, x_TH, wanted_TH, None, 1e-6)
    assert found.all < 1e-3
    assert (found.router, found.tokens) == (1, 1750)
    assert_close(changed_OI, before_OI, rtol=0.1, atol=0.02)


def test_a_router_that_was_changed_moves_back():
    mixture, x_TH = qwen3(), random(1000, 32)
    wanted_TH = mixture(x_TH)
    mixture.router.weight.add_(0.2 * random(8, 32, seed=7))
    assert refit_experts.refit(mixture, x_TH, wanted_TH, None, DAMPING).router < 0.6


def test_what_is_not_better_on_held_out_tokens_is_taken_back(mixture):
    # nothing can be learnt: what is missing is noise, of a hundredth of the tokens that a fit needs
    x_TH = random(32, 32)
    before = {n: p.clone() for n, p in mixture.parent.named_parameters()}
    wanted_TH = mixture(x_TH) + 100 * random(32, 32, seed=9)
    found = refit_experts.refit(mixture, x_TH, wanted_TH, None, DAMPING)
    assert found.router <= 1
    assert found.all <= found.router
    if found.all == 1:
        assert all(torch.equal(p, before[n]) for n, p in mixture.parent.named_parameters())


def test_the_ridge_by_hand():
    held_N = torch.tensor([False, False, True])
    fit = refit_experts._Fit(qwen3(), random(3, 32), random(3, 32), held_N, torch.ones(2), 0.01)
    a_NI, missing_NO = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([[3.0, 0.0], [6.0, 0.0], [3.0, 0.0]])
    # 15 / (5 + 0.01 * 5) of the smallest ridge, which the held-out token likes best
    assert_close(fit.ridge(a_NI, missing_NO, held_N), torch.tensor([[15 / 5.05], [0.0]]))
    assert fit.ridge(a_NI, -missing_NO * torch.tensor([[1.0], [1.0], [-1.0]]), held_N) is None


# ------------------------------------------------------------------------------------------------------------------ blocks


def how(**changes):
    return cut_experts.How(
        **{"criterion": "loss", "gone": 4, "active": None, "refit": True, "damping": DAMPING} | changes
    )


def walked(model_type, **changes):
    """A model of that family, cut block by block, and its records."""
    model = mixtures.make(model_type)
    cuts = cuts_of(model)
    ids = torch.randint(250, (12, 40), generator=torch.Generator().manual_seed(3))
    records = []
    for step in stream(model, batched(ids)):
        layers = list(cuts.layers(step.block, step.name).values())
        records.append(
            cut_experts.cut(
                step,
                cuts.fused,
                None,
                how(**changes),
                lambda s=step, y=layers: cuts.couplings.of(s.name, s.block, y, cuts.config),
            )
        )
    return model, records


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_cuts_every_block_that_has_experts(criterion):
    model, records = walked("glm4_moe", criterion=criterion)
    assert records[0] is None
    assert len(records[1]["removed"]) == 4
    assert sum(records[1]["tokens"]) == 2 * 12 * 40
    mixture = Mixture(model.model.layers[1], cuts_of(model).fused)
    assert (mixture.number, mixture.router.num_experts, mixture.router.e_score_correction_bias.shape) == (4, 4, (4,))
    assert (records[1].get("merged") is not None) == (criterion == "ream")
    assert records[1]["refit"]["all"] < 1


def test_fewer_experts_per_token_are_refit_to_what_more_of_them_gave():
    _, records = walked("qwen3_moe", gone=0, active=1)
    assert records[0]["removed"] == []
    assert records[0]["refit"]["all"] < 0.9


def test_experts_that_saw_too_little_are_named():
    records = [
        {"block": "layers.3", "units": {"experts": {"tokens": [64, 63, 900, 0]}}},
        {"block": "layers.4", "units": {}},
    ]
    (said,) = cut_experts.uncovered(records)
    assert said.startswith(
        "2 of 4 experts saw fewer than 64 of the calibration tokens looked at (layers.3: 1, 3); name"
    )
    (said,) = cut_experts.uncovered([records[0] | {"block": str(n)} for n in range(10)] + records)
    assert said.startswith("22 of 44 experts saw fewer")
    assert "7: 1, 3; and of 3 blocks more, see report.json)" in said
    assert cut_experts.uncovered(records[1:]) == []


def test_inputs_are_taken_evenly_from_all_batches():
    model = mixtures.make("qwen3_moe")
    ids = torch.randint(250, (40, 20), generator=torch.Generator().manual_seed(3))
    step = next(stream(model, [{"input_ids": ids[:30]}, {"input_ids": ids[30:]}]))
    whole_TH = experts.inputs(step, cuts_of(model).fused, 10_000)
    assert whole_TH.shape == (800, 32)
    few_TH = experts.inputs(step, cuts_of(model).fused, 80)
    places = [int((whole_TH - x_H).abs().sum(1).argmin()) for x_H in few_TH]
    assert places == sorted(set(places))
    assert [sum(p < 600 for p in places), len(places)] == [60, 80]
    assert experts.inputs(next(stream(tiny.make("llama"), batched(ids))), {"gate_up_proj": "expert"}) is None


def test_a_mixture_that_weighs_what_goes_into_its_experts_is_cut_by_the_loss_of_the_whole():
    size = {**tiny._LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1}
    model = tiny.random("Llama4ForCausalLM", "llama4_text", {**size, "head_dim": 8, "intermediate_size_mlp": 64}).eval()
    cuts = cuts_of(model)
    assert (cuts.refuses("experts"), cuts.sums_experts) == (None, False)
    assert "experts are not called with" in cuts.refuses("active")
    fused = layout_of(model).experts
    mixture, x_TH = Mixture(model.model.layers[1], fused), random(50, 32)
    order, (lost,) = experts.removal(experts.trial_of(mixture, x_TH, None), "loss", 1)
    singles = [loss(mixture, [e], x_TH, torch.ones(32)) for e in range(4)]
    assert (order, lost) == ([singles.index(min(singles))], pytest.approx(min(singles), rel=1e-4))
    step = next(stream(model, batched(torch.randint(250, (4, 20)))))
    record = cut_experts.cut(step, fused, None, how(gone=2), list)
    assert record["refit"].startswith("left out: its experts do not give the weighted sum")
    assert Mixture(step.block, fused).number == 2
