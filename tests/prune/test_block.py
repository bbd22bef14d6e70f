import importlib
from dataclasses import replace

import pytest
import tiny
import torch
from plans import asked
from torch import nn

import secateurs as sc
from secateurs import Plan, Stats
from secateurs.base.errors import LayerError
from secateurs.matrix import solvers
from secateurs.model import walk
from secateurs.model.activations import InMemory
from secateurs.model.couplings import couplings_of
from secateurs.model.discover import layout_of
from secateurs.model.layers import Layer, layers_of
from secateurs.model.walk import stream
from secateurs.prune.allocation import Share
from secateurs.prune.assign import _levels, _losses, assign
from secateurs.prune.block import Guide, prune_block, prune_layer, take_up
from secateurs.prune.guide import in_passes
from secateurs.prune.record import LayerRecord
from secateurs.prune.tuning import Outcome


def test_a_row_s_error_counts_by_the_root_of_its_sensitivity():
    guide = Guide(sensitivity={"layer": torch.tensor([30.0, 2.0])})
    # (g / mean)^(1/4) on the weights is (g / mean)^(1/2) on squared errors
    assert guide.output_scale("layer").flatten().tolist() == pytest.approx([1.875**0.25, 0.125**0.25])
    assert guide.output_scale("other") is None


def test_rows_that_the_loss_depends_on_keep_more():
    linear = nn.Linear(64, 2, bias=False)
    layer = Layer("layer", linear, linear.weight, "linear")
    stats = Stats.of(torch.randn(500, 64))
    plan = asked(Plan, method="admm", sparsity=0.5)
    prune_layer(layer, stats, plan, Guide(sensitivity={"layer": torch.tensor([1000.0, 1.0])}))
    kept = (linear.weight != 0).sum(1)
    assert int(kept.sum()) == 64
    assert kept[0] > 50


@pytest.mark.parametrize("allocation", ["global", "measured"])
def test_layers_that_the_loss_depends_on_keep_more(allocation):
    model = tiny.make("llama")
    batches = [{"input_ids": torch.randint(0, 250, (8, 32))}]
    plan = asked(Plan, method="sparsegpt", allocation=allocation, sparsity=0.5)
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(3) for p in ("gate", "up", "down")]
    sensitivity = {name: torch.ones(32 if "down" in name else 64) for name in names}
    sensitivity[names[0]] *= 1e8
    sensitivity[names[4]] *= 1e-8
    shares = assign(model, None, batches, plan, sensitivity, {})
    assert shares[names[0]][1] == pytest.approx(0.3, abs=1e-3)
    assert shares[names[4]][1] == pytest.approx(0.7, abs=1e-3)


def test_an_expert_counts_by_how_many_tokens_reach_it():
    linear = nn.Linear(16, 4, bias=False)
    layer = Layer("layer", linear, linear.weight, "linear")
    x_TI = torch.randn(64, 16)
    plan = asked(Plan, method="sparsegpt", allocation="measured")
    few, many = (
        [loss for _, loss in _losses(layer, Stats.of(x), plan, torch.tensor(2.0))] for x in (x_TI, x_TI.repeat(8, 1))
    )
    assert many == pytest.approx([8 * loss for loss in few], rel=1e-4)


def test_a_layer_whose_sensitivity_nobody_measured_counts_like_the_others():
    model = tiny.make("llama")
    batches = [{"input_ids": torch.randint(0, 250, (8, 32))}]
    plan = asked(Plan, method="sparsegpt", allocation="measured")
    names = [layer.name for i in range(3) for layer in layers_of(model.model.layers[i], f"model.layers.{i}")]
    # in the units of a loss; 1 would be far out
    everywhere = {name: torch.full((model.get_submodule(name).out_features,), 1e-6) for name in names}
    all_but_one = {name: value for name, value in everywhere.items() if name != names[3]}
    want, got = (assign(model, None, batches, plan, found, {}) for found in (everywhere, all_but_one))
    assert got == want


def test_a_budget_is_looked_for_between_the_bounds():
    assert asked(Plan, budget="bytes=0.5").bounds == (0.0, 0.9)
    levels = _levels(asked(Plan, budget="bytes=0.1", max_sparsity=0.96))
    assert (levels[0], levels[-1], len(levels)) == (0.08, 0.96, 12)
    assert asked(Plan).bounds == (0.3, 0.7)
    levels = _levels(asked(Plan, allocation="measured", max_sparsity=0.95))
    assert (levels[0], levels[-1]) == (0.3, 0.95)
    assert 0.5 in levels


@pytest.mark.parametrize(("plan", "sensitivity", "reconstruct"), [
    (asked(Plan), 4096, 0), (asked(Plan, pattern="2:4"), 0, 24), (asked(Plan, scope="row"), 0, 24), (asked(Plan, method="admm"), 0, 0),
    (asked(Plan, pattern="2:4", budget="bytes=0.7"), 4096, 24), (asked(Plan, pattern="2:4,1:4", budget="bytes=0.7"), 4096, 24),
    (asked(Plan, method="sparsegpt", allocation="measured"), 4096, 0), (asked(Plan, scope="row", allocation="global"), 4096, 24),
])  # fmt: skip
def test_layers_are_compared_in_units_of_the_loss(plan, sensitivity, reconstruct):
    assert (plan.sensitivity, plan.reconstruct) == (sensitivity, reconstruct)


@pytest.mark.parametrize(("plan", "tokens", "damping"), [
    (asked(Plan), 7 * 16, 0.01), (asked(Plan), 8 * 16, 0.001), (asked(Plan, damping=0.02), 8 * 16, 0.02), (asked(Plan, method="sparsegpt"), 8 * 16, 0.01),
])  # fmt: skip
def test_efforts_go_by_tokens_an_input_for_their_damping(plan, tokens, damping, monkeypatch):
    linear = nn.Linear(16, 4, bias=False)
    given = []
    solver = replace(plan.solver, solve=lambda w, stats, pattern, sparsity, d: given.append(d) or w)
    monkeypatch.setattr(Plan, "solver", solver)
    with pytest.raises(LayerError):
        prune_layer(Layer("layer", linear, linear.weight, "linear"), Stats.of(torch.randn(tokens, 16)), plan, Guide())
    assert given == [damping]


def test_a_blend_aims_where_the_dense_model_s_outputs_say():
    x_TI = torch.randn(300, 16) @ torch.randn(16, 16)
    stats = Stats.zeros(16, gram=True)
    stats.add_(x_TI, x_TI + 0.3 * torch.randn(300, 16) + 0.2)
    stats.finish()
    for blend in (0.0, 0.5, 1.0):
        linear = nn.Linear(16, 4, bias=False)
        weight = linear.weight.detach().clone()
        plan = asked(Plan, method="sparsegpt", blend=blend, damping=0.01)
        prune_layer(Layer("layer", linear, linear.weight, "linear"), stats, plan, Guide())
        aim = solvers.dense_target(weight, stats, 0.01, blend)
        want = plan.solver.solve(aim, stats, plan.layer_patterns[0], 0.5, 0.01)
        torch.testing.assert_close(linear.weight.detach(), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(aim, weight) == (blend == 0)


def test_a_layer_with_few_tokens_says_so_beside_what_else_there_is_to_say():
    linear = nn.Linear(16, 4, bias=False)
    layer = Layer("layer", linear, linear.weight, "linear")
    record, _ = prune_layer(
        layer, Stats.of(torch.randn(9, 16)), asked(Plan, method="sparsegpt"), Guide(), "inputs reordered"
    )
    assert record.note == "inputs reordered; only 9 tokens for 16 inputs"


def test_random_numbers_of_a_layer_are_its_seed_s_and_its_name_s():
    def kept(seed, name):
        linear = nn.Linear(16, 4, bias=False)
        prune_layer(
            Layer(name, linear, linear.weight, "linear"), None, asked(Plan, method="random", seed=seed), Guide()
        )
        return linear.weight != 0

    assert torch.equal(kept(1, "a"), kept(1, "a"))
    assert not torch.equal(kept(1, "a"), kept(2, "a"))
    assert not torch.equal(kept(1, "a"), kept(1, "b"))


def test_the_order_of_windows_in_tuning_goes_by_the_seed(tmp_path, llama, words, monkeypatch):
    """Of every block and of the whole model, live and in a folder."""
    given = []

    def noted(*_, seed=0, **__):
        given.append(seed)
        return Outcome(1.0, 1.0, 0)

    for module, name in (("block", "reconstruct"), ("live", "distill"), ("run", "distill")):
        monkeypatch.setattr(importlib.import_module(f"secateurs.prune.{module}"), name, noted)

    def seeds(seed, out=None):
        given.clear()
        plan = asked(
            Plan, method="magnitude", reconstruct=1, distill=1, calibration=str(words), samples=4, seqlen=16, seed=seed, eval_windows=0
        )  # fmt: skip
        if out:
            sc.prune(llama, plan, out=out)
        else:
            sc.prune(tiny.make("llama"), plan, calibration=torch.arange(64).reshape(4, 16))
        return list(given)

    live = [seeds(seed) for seed in (0, 1)]
    # three blocks and the whole, twice
    assert len({*live[0], *live[1]}) == 8
    assert [seeds(seed, tmp_path / str(seed)) for seed in (0, 1)] == live


def test_norms_and_sensitivities_are_reordered_with_what_they_are_of(monkeypatch):
    """Nothing is pruned here, so that a second look at the reordered block says what its solvers should have been given."""
    given = {}

    def noted(layer, stats, plan, guide, note=None):
        given[layer.name] = stats.sqnorm_I, guide.sensitivity[layer.name], note
        return LayerRecord(layer.name, layer.shape, 0.0, 0), None

    monkeypatch.setattr(importlib.import_module("secateurs.prune.block"), "prune_layer", noted)
    model = tiny.make("llama")
    step = next(iter(stream(model, [{"input_ids": torch.randint(0, 250, (8, 32))}])))
    # a row's own size stands for what the loss depends on it
    sizes = {layer.name: layer.read().square().sum(1) for layer in step.layers}
    plan = asked(Plan, pattern="2:4", method="wanda", permute=True)
    prune_block(step, plan, Guide(None, sizes, couplings_of(model), model.config))
    assert [n.rpartition(".")[2] for n, (*_, note) in given.items() if note == "inputs reordered"] == [
        "o_proj",
        "down_proj",
    ]
    norms = step.observe(step.layers, gram=False)
    for layer in step.layers:
        sqnorm_I, sensitivity_O, _ = given[layer.name]
        torch.testing.assert_close(sqnorm_I, norms[layer.name].sqnorm_I)
        torch.testing.assert_close(sensitivity_O, layer.read().square().sum(1))


@pytest.mark.parametrize("options", [{}, {"blend": 0.5}, {"pattern": "2:4", "permute": True}, {"reconstruct": 4}])
def test_experts_that_are_looked_at_in_groups_are_pruned_as_together(options, tmp_path, words, monkeypatch):
    """Groups of one expert, and a last one that no token reaches would be no fault."""
    source = tiny.save(tmp_path / "dense", "mixtral")
    plan = asked(Plan, method="sparsegpt", calibration=str(words), samples=8, seqlen=32, eval_windows=0, **options)
    together = sc.prune(source, plan, out=tmp_path / "together")
    monkeypatch.setattr(walk, "memory_bytes", lambda: 0)
    apart = sc.prune(source, plan, out=tmp_path / "apart")
    assert [line for line in apart.warnings if line not in together.warnings] == [in_passes(5)]
    one, other = (tmp_path / name / "model" for name in ("together", "apart"))
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes()
    for a, b in zip(together.layers, apart.layers, strict=True):
        assert (a.name, a.kept, a.tokens, a.note) == (b.name, b.kept, b.tokens, b.note)
        if not ("reconstruct" in options and ".experts." in a.name):
            assert (a.error, a.error_from) == (b.error, b.error_from)


def test_scores_of_layers_are_compared_in_units_of_the_loss():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        model[1].weight.copy_(torch.tensor([[1.5, 3.5, 5.0, 7.0]]))
    plan = asked(Plan, method="magnitude", allocation="global", min_sparsity=0.0, max_sparsity=1.0)
    # alone 1, 1.5, 2, 3 go; times the root of 4, of the first layer 2 and 4 go, of the second 1.5 and 3.5
    for sensitivity, shares in (({}, (0.75, 0.25)), ({"0": torch.tensor([4.0]), "1": torch.tensor([1.0])}, (0.5, 0.5))):
        found = assign(model, None, [], plan, sensitivity, {})
        assert [found[name] for name in ("0", "1")] == [Share("unstructured", share) for share in shares]


def test_errors_of_experts_after_tuning_are_measured_in_groups_that_memory_has_room_for(monkeypatch):
    model, batches = tiny.make("mixtral"), [{"input_ids": tiny.tokens()}]
    fused = layout_of(model).experts
    whole = {
        y.name: y.read().clone()
        for i, b in enumerate(model.model.layers)
        for y in layers_of(b, f"model.layers.{i}", fused)
    }
    plan = asked(Plan, method="sparsegpt", reconstruct=0, distill=0, samples=2, seqlen=10, eval_windows=0)
    records = sc.prune(model, plan, calibration=batches).layers
    most = []
    observe = walk.Step.observe

    def counted(step, layers, *args, **options):
        most.append(len(layers))
        return observe(step, layers, *args, **options)

    def again():
        most.clear()
        return take_up(model, plan, records, batches, lambda _: whole, {}, InMemory(), lambda *_: None)[0]

    monkeypatch.setattr(walk.Step, "observe", counted)
    at_once = again()
    assert max(most) == 12
    monkeypatch.setattr(walk, "memory_bytes", lambda: 0)
    assert again() == at_once
    # an expert at a time, and the layers of the attention
    assert set(most) == {4, 2}
    assert all(record.error_from == "gram" for record in at_once if record.skipped is None and record.error)
