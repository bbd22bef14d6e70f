from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateurs import Plan, Stats
from secateurs.apportion import apportion
from secateurs.block import Guide, prune_layer
from secateurs.errors import LayerError
from secateurs.walk import Layer


def test_a_row_s_error_counts_by_the_root_of_its_sensitivity():
    guide = Guide(sensitivity={"layer": torch.tensor([30.0, 2.0])})
    # (g / mean)^(1/4) on the weights is (g / mean)^(1/2) on squared errors
    assert guide.output_scale("layer").flatten().tolist() == pytest.approx([1.875**0.25, 0.125**0.25])
    assert guide.output_scale("other") is None


def test_rows_that_the_loss_depends_on_keep_more():
    linear = nn.Linear(64, 2, bias=False)
    layer = Layer("layer", linear, linear.weight, "linear")
    stats = Stats.of(torch.randn(500, 64))
    plan = Plan(method="admm", sparsity=0.5)
    prune_layer(layer, stats, plan, Guide(sensitivity={"layer": torch.tensor([1000.0, 1.0])}))
    kept = (linear.weight != 0).sum(1)
    assert int(kept.sum()) == 64
    assert kept[0] > 50


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_layers_that_the_loss_depends_on_keep_more(allocation):
    model = tiny.make("llama")
    batches = [{"input_ids": torch.randint(0, 250, (8, 32))}]
    plan = Plan(method="sparsegpt", allocation=allocation, sparsity=0.5)
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(3) for p in ("gate", "up", "down")]
    sensitivity = {name: torch.ones(32 if "down" in name else 64) for name in names}
    sensitivity[names[0]] *= 1e8
    sensitivity[names[4]] *= 1e-8
    shares = apportion(model, None, batches, plan, sensitivity, {})
    assert shares[names[0]][1] == pytest.approx(0.3, abs=1e-3)
    assert shares[names[4]][1] == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(("plan", "tokens", "damping"), [
    (Plan(), 7 * 16, 0.01), (Plan(), 8 * 16, 0.001), (Plan(damping=0.02), 8 * 16, 0.02), (Plan(method="sparsegpt"), 8 * 16, 0.01),
])  # fmt: skip
def test_efforts_go_by_tokens_an_input_for_their_damping(plan, tokens, damping, monkeypatch):
    linear = nn.Linear(16, 4, bias=False)
    given = []
    solver = replace(plan.solver, solve=lambda w, stats, pattern, sparsity, d: given.append(d) or w)
    monkeypatch.setattr(Plan, "solver", solver)
    with pytest.raises(LayerError):
        prune_layer(Layer("layer", linear, linear.weight, "linear"), Stats.of(torch.randn(tokens, 16)), plan, Guide())
    assert given == [damping]


def test_a_layer_with_few_tokens_says_so_beside_what_else_there_is_to_say():
    linear = nn.Linear(16, 4, bias=False)
    layer = Layer("layer", linear, linear.weight, "linear")
    record = prune_layer(layer, Stats.of(torch.randn(9, 16)), Plan(method="sparsegpt"), Guide(), "inputs reordered")
    assert record.note == "inputs reordered; only 9 tokens for 16 inputs"
