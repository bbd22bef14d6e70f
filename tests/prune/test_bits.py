"""Plans with bits: what they resolve to, what cannot be, and what a run then holds."""

import itertools
import math

import pytest
import tiny
import torch
from plans import asked

import secateurs as sc
from secateurs.base.errors import PlanError
from secateurs.matrix.grids import Grid, bits_a_weight
from secateurs.matrix.stats import Stats
from secateurs.model.scales import SCALES_FILE, read_scales
from secateurs.prune.allocation import Share
from secateurs.prune.cost import stored_bits
from secateurs.prune.record import LayerRecord, Report


@pytest.mark.parametrize(("options", "grids"), [
    ({}, []),
    ({"bits": 4}, [Grid(4, 64)]),
    ({"bits": "3", "group": "row"}, [Grid(3, 0)]),
    ({"bits": "3", "group": 128, "grid": "asymmetric"}, [Grid(3, 128, False)]),
    ({"grid": "q4_0"}, [Grid(4, 32, half=True)]),
    ({"grid": "q8_0", "bits": 8}, [Grid(8, 32, half=True)]),
    ({"bits": "8,4", "budget": "bytes=0.3"}, [Grid(8), Grid(4)]),
    ({"budget": "bits=3.3"}, [Grid(b) for b in (8, 6, 5, 4, 3, 2)]),
    ({"budget": "bytes=0.5"}, []),
])  # fmt: skip
def test_what_bits_group_and_grid_say(options, grids):
    plan = sc.Plan(**options)
    assert plan.layer_grids == grids
    assert sc.Plan.from_dict(plan.as_dict()) == plan


@pytest.mark.parametrize(("options", "error"), [
    ({"bits": "7"}, "cannot store weights in '7' bits; write one of 8, 6, 5, 4, 3, 2"),
    ({"bits": "4,3"}, "bits 4,3 leave a choice for every layer, which only a budget decides"),
    ({"group": "64"}, "a group or grid (64) is for --bits, and none were given"),
    ({"grid": "asymmetric"}, "a group or grid (asymmetric) is for --bits"),
    ({"bits": "4", "group": "48"}, "unknown group '48'; write 32, 64, 128 or row"),
    ({"bits": "4", "grid": "symetric"}, "did you mean 'symmetric'?"),
    ({"bits": "8", "grid": "q4_0"}, "grid q4_0 is 4 bits in groups of 32; leave --bits and --group out"),
    ({"budget": "bits=17"}, "or bits=B with B <= 16"),
    ({"budget": "bits=0"}, "cannot read budget 'bits=0'"),
    ({"budget": "bits=3", "allocation": "global"}, "a budget is kept by --allocation measured"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, error):
    with pytest.raises(PlanError) as found:
        sc.Plan(**options)
    assert error in str(found.value)


def test_without_zeros_nothing_is_shared_out_and_blocks_are_tuned():
    plan = sc.Plan(sparsity=0, bits=4)
    assert (plan.allocation, plan.sensitivity, plan.reconstruct) == ("uniform", 0, 24)
    assert sc.Plan(sparsity=0.5, bits=4).reconstruct == 24
    assert sc.Plan(sparsity=0.5).reconstruct == 0


def test_a_budget_may_end_in_x():
    assert sc.Plan(budget="bytes=0.2x").budgeted == ("bytes", 0.2)


def test_bits_as_stored_by_hand():
    # 8 x 128: 2 groups of 64 a row, 16 bits each; dense 4 bits, or a bit a position and 4 bits for a quarter
    assert bits_a_weight(Grid(4), (8, 128)) == 4.25
    assert bits_a_weight(Grid(4, 64, False), (8, 128)) == 4.25 + 2 * 4 / 128
    assert bits_a_weight(Grid(4), (8, 128), 256) == 1 + 1 + 0.25
    assert stored_bits((8, 128), torch.bfloat16, 0.75, Grid(4)) == 1024 * 2.25
    # at 10% zeros dense integers take less
    assert stored_bits((8, 128), torch.bfloat16, 0.1, Grid(4)) == 1024 * 4.25
    record = LayerRecord("a", (8, 128), 0.75, 256, grid="int4/64", rounded_to_zero=7)
    totals = Report({}, {}, [record, LayerRecord("b", (8, 128), 0.5, 512)]).totals
    assert (totals["bits"], totals["weights_on_grid"], totals["rounded_to_zero"]) == (2.25, 1024, 7)


def windows():
    return torch.randint(0, 250, (16, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [
    {"sparsity": 0, "bits": 4}, {"sparsity": 0.5, "bits": 3, "group": "32"}, {"pattern": "2:4", "bits": 8},
    {"sparsity": 0.5, "bits": 4, "method": "magnitude"}, {"sparsity": 0, "bits": 2, "method": "sparsegpt"},
    {"sparsity": 0, "bits": 2, "reconstruct": 48},
], ids=str)  # fmt: skip
def test_a_live_model_ends_on_its_grid(options):
    model = tiny.make("llama")
    report = sc.prune(model, asked(sc.Plan, **options), calibration=windows())
    assert set(report.scales) == {record.name for record in report.pruned}
    for record in report.pruned:
        weight = model.get_submodule(record.name).weight.detach()
        assert report.scales[record.name].off(weight) is None
        assert record.kept == int((weight != 0).sum())
        wanted = weight.numel() - round(weight.numel() * record.sparsity)
        assert record.kept + record.rounded_to_zero == wanted
    assert report.totals["bits"] <= int(options["bits"]) + 1


@pytest.mark.parametrize("bits", [2.4, 3.3, 5.0])
def test_a_budget_in_bits_is_kept_and_used(bits):
    model = tiny.make("llama")
    plan = asked(sc.Plan, budget=f"bits={bits}", method="sparsegpt", group="32")
    report = sc.prune(model, plan, calibration=windows())
    assert 0.9 * bits < report.totals["bits"] <= bits
    assert len({record.grid for record in report.pruned}) > 1


def test_layers_that_matter_more_get_more_bits():
    from secateurs.prune.assign import _losses

    torch.manual_seed(0)
    layer = next(y for y in tiny_layers() if y.name.endswith("up_proj"))
    stats = Stats.of(torch.randn(256, layer.shape[1]) @ torch.randn(layer.shape[1], layer.shape[1]))
    plan = asked(sc.Plan, budget="bits=3.3", group="32")
    found = dict(_losses(layer, stats, plan, torch.tensor(1.0)))
    by_bits = [found[Share("unstructured", 0.0, f"int{b}/32")] for b in (8, 6, 5, 4, 3, 2)]
    assert all(fine < coarse for fine, coarse in itertools.pairwise(by_bits))
    assert found[Share("unstructured", 0.0, None)] == 0
    # both together cost the sum
    zeros = found[Share("unstructured", 0.6, None)]
    assert found[Share("unstructured", 0.6, "int3/32")] == pytest.approx(zeros + by_bits[4])


def tiny_layers():
    from secateurs.model.layers import layers_of

    return layers_of(tiny.make("llama").model.layers[0], "model.layers.0")


def test_a_folder_holds_its_scales_and_says_what_they_take(tmp_path, llama, words):
    plan = asked(
        sc.Plan,
        sparsity=0,
        bits=4,
        group="32",
        method="sparsegpt",
        calibration=str(words),
        samples=8,
        seqlen=32,
        eval_windows=0,
    )
    report = sc.prune(llama, plan, out=tmp_path / "run")
    scales = read_scales(tmp_path / "run" / "model" / SCALES_FILE)
    assert set(scales) == {record.name for record in report.pruned}
    numel = sum(record.numel for record in report.pruned)
    wide = report.bytes["pruned"] - numel * 4
    assert report.bytes["stored"] == wide + math.ceil(numel * report.totals["bits"] / 8)
    assert not list((tmp_path / "run").glob("work"))


def test_weights_that_tuning_brought_back_are_no_longer_counted_as_rounded_to_zero():
    from secateurs.matrix.grids import Scales
    from secateurs.model.layers import Layer
    from secateurs.prune.block import _tuned

    linear = torch.nn.Linear(8, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, 2.0, 3.0, -4.0, 1.0, 2.0, 0.0, 0.0]])
    layer = Layer("y", linear, linear.weight, "linear")
    scales = Scales(Grid(3, 32), torch.ones(1, 1).bfloat16())
    before = LayerRecord("y", (1, 8), 0.0, 5, pattern="unstructured", grid="int3/32", rounded_to_zero=3)
    after = _tuned(layer, before, linear.weight.data, None, sc.Plan(bits=3, sparsity=0), scales)
    assert (after.kept, after.rounded_to_zero) == (6, 2)


@pytest.mark.parametrize(("grid", "sparsity", "title", "tags"), [
    (None, 0.5, "# A pruned model", "[pruning, sparsity, secateurs]"),
    ("int4/64", 0.0, "# A quantized model", "[quantization, secateurs]"),
    ("int4/64", 0.5, "# A pruned and quantized model", "[pruning, sparsity, quantization, secateurs]"),
])  # fmt: skip
def test_a_model_card_says_what_was_done(grid, sparsity, title, tags):
    from secateurs.prune.model_card import model_card

    bits = {"bits": 4} if grid else {}
    record = LayerRecord("a", (8, 128), sparsity, 512, pattern="unstructured", grid=grid)
    plan = sc.Plan(model="m", sparsity=sparsity, **bits)
    card = model_card(Report(plan.as_dict(), {"versions": {"secateurs": "1"}}, [record]))
    assert title in card.splitlines()
    assert f"tags: {tags}" in card.splitlines()
    assert ("int4/64: " in card) == ("stores integers and scales" in card) == bool(grid)
