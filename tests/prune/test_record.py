"""What the records of layers claim, against what the pruned model is."""

import pytest
import tiny
import torch
from plans import asked
from torch import nn

import secateurs as sc
from secateurs.model.layers import Layer
from secateurs.prune.block import Guide, prune_layer
from secateurs.prune.guide import emptied
from secateurs.prune.record import LayerRecord
from secateurs.quality import texts

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(1))


def inputs_of(model, name, ids=IDS):
    """x_TI of a layer."""
    seen = []
    with torch.no_grad(), model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(ids)
    return torch.cat(seen).flatten(0, 1).double()


def output_error(x_TI, dense, pruned, name):
    """|X (W' - W)'| / |X W'|."""
    before, after = (m.get_submodule(name).weight.detach().double() for m in (dense, pruned))
    return float((x_TI @ (after - before).T).norm() / (x_TI @ before.T).norm())


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("dtype", "options", "seen_in"),
    [
        # one weight of each row goes, which is so little that rounding the others to 16 bits counts
        ("bfloat16", {"method": "wanda+refit", "sparsity": 0.03}, "dense"),
        ("float32", {"method": "sparsegpt", "sparsity": 0.5}, "dense"),
        ("float32", {"method": "sparsegpt", "sparsity": 0.5, "reconstruct": 24}, "dense"),
        ("bfloat16", {"method": "magnitude", "sparsity": 0.5, "reconstruct": 24}, "dense"),
        # once all blocks were tuned the norms before a layer have moved, and with them its inputs
        ("float32", {"method": "sparsegpt", "sparsity": 0.5, "reconstruct": 24, "distill": 24}, "pruned"),
    ],
)
def test_the_error_is_that_of_the_weights_that_were_written(dtype, options, seen_in):
    dense, pruned = (tiny.make("llama").to(getattr(torch, dtype)).eval() for _ in range(2))
    pruned.load_state_dict(dense.state_dict())
    report = sc.prune(pruned, asked(sc.Plan, **options), calibration=[{"input_ids": IDS}])
    if "distill" in options:
        assert report.distillation["after"] < report.distillation["before"]
    record = next(r for r in report.layers if r.name == FIRST)
    x_TI = inputs_of({"dense": dense, "pruned": pruned}[seen_in], FIRST)
    if options["method"] == "magnitude":
        # nothing was seen, so of the weights themselves
        x_TI = torch.eye(32, dtype=torch.float64)
    assert record.error == pytest.approx(output_error(x_TI, dense, pruned, FIRST), rel=2e-3)


def test_a_layer_of_a_tuned_block_whose_inputs_are_zero_has_the_error_of_its_weights():
    dense, pruned = (tiny.make("llama").eval() for _ in range(2))
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight.zero_()
    pruned.load_state_dict(dense.state_dict())
    report = sc.prune(pruned, asked(sc.Plan, method="sparsegpt", reconstruct=24), calibration=[{"input_ids": IDS}])
    assert report.reconstruction[0]["after"] < report.reconstruction[0]["before"]
    name = "model.layers.0.mlp.down_proj"
    record = next(r for r in report.layers if r.name == name)
    assert record.error_from == "weights"
    assert record.error == pytest.approx(
        output_error(torch.eye(64, dtype=torch.float64), dense, pruned, name), rel=1e-3
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_folder_s_errors_are_those_of_the_tuned_model(pattern, tmp_path, words):
    """With inputs reordered, so that the dense weights are in another order than on disk."""
    import transformers

    source = tiny.save(tmp_path / "dense", "llama")
    plan = asked(sc.Plan,
        effort="best", pattern=pattern, allocation="uniform", blend=0, sensitivity=0, reconstruct=0, distill=48,
        calibration=str(words), samples=16, seqlen=24, eval_windows=0,
    )  # fmt: skip
    seen = {}
    report = sc.prune(
        source, plan, out=tmp_path / "run", progress=lambda stage, done, of: seen.update({stage: (done, of)})
    )
    assert report.distillation["after"] < report.distillation["before"]
    # one batch goes through three blocks, and through two of them once more
    assert seen["measuring errors"] == (5, 5)
    assert all(done == of for done, of in seen.values()), seen
    assert all(0.05 < r.error < 0.95 for r in report.pruned), [r.error for r in report.pruned]
    dense, pruned = (transformers.LlamaForCausalLM.from_pretrained(f) for f in (source, tmp_path / "run" / "model"))
    windows = texts.load(str(words), tiny.tokenizer(), 16, 24, 0).windows
    x_TI = inputs_of(pruned, FIRST, windows)
    got = next(r for r in report.layers if r.name == FIRST).error
    assert got == pytest.approx(output_error(x_TI, dense, pruned, FIRST), rel=2e-3)


def test_a_layer_whose_inputs_are_zero_is_pruned_by_magnitude_and_says_so():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        net[0].bias.fill_(-1e6)
    dense = net[2].weight.detach().clone()
    report = sc.prune(net, asked(sc.Plan, method="sparsegpt"), calibration=[{"input": torch.randn(64, 8)}])
    record = report.layers[1]
    assert record.note == "its inputs were zero for every calibration token; pruned by magnitude"
    assert (record.kept, record.error_from) == (16, "weights")
    keep = sc.patterns.Unstructured("layer").keep(dense.abs(), 0.5)
    assert torch.equal(net[2].weight, dense * keep)


def test_what_was_emptied_is_a_warning_with_its_name():
    net = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(1.0, 17).reshape(2, 8))
        # a row without weights was empty before
        net[1].weight.copy_(torch.tensor([[0.0, 0], [1, 1], [2, 2], [3, 3]] + [[30, 40]] * 4))
    plan = asked(sc.Plan, method="magnitude", sparsity=0.5)
    report = sc.prune(net, plan)
    assert [r.emptied_rows for r in report.layers] == [1, 3]
    assert report.warnings == ["4 outputs without a weight left: 3 of 1, 1 of 0"]


def test_groups_that_rounding_emptied_are_counted():
    """What is left is made so small by the others' compensation, or by a scale, that its dtype cannot hold it."""
    linear = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0] * 8, [1.0] * 4 + [1e-30] * 4]))
    layer = Layer("layer", linear, linear.weight, "linear")

    def written(weight_OI):
        linear.weight.data.copy_(weight_OI.half())

    object.__setattr__(layer, "write", written)
    record, _ = prune_layer(layer, None, asked(sc.Plan, method="magnitude", pattern="2:4"), Guide())
    assert (record.emptied_rows, record.emptied_groups, record.kept) == (0, 1, 6)


def test_a_warning_names_five_layers_and_counts_the_others():
    records = [LayerRecord(f"layer {i}", (4, 4), 0.5, 8, emptied_rows=i) for i in range(8)]
    assert emptied(records) == [
        "28 outputs without a weight left: 7 of layer 7, 6 of layer 6, 5 of layer 5, 4 of layer 4, 3 of layer 3 "
        "and of 2 more layers"
    ]
    gone = [LayerRecord("a", (4, 4), 1.0, 0, emptied_rows=4), LayerRecord("b", (4, 4), 0.5, 8, emptied_groups=1)]
    assert emptied(gone) == [
        "no weight is left of a; lower --max-sparsity",
        "1 N:M group without a weight left: 1 of b",
    ]


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.7), (0.7, 0.9), (0.85, 0.95), (0.9, 29 / 30)])
def test_every_layer_keeps_a_third_of_the_target_s_density(sparsity, most):
    assert asked(sc.Plan, sparsity=sparsity).bounds[1] == pytest.approx(most)
