"""What a layer costs, in each unit that a budget may have."""

from dataclasses import replace

import pytest
import tiny
import torch

import secateurs as sc
from secateurs import Plan
from secateurs.base.errors import PlanError
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import Grid
from secateurs.prune.cost import cost_of, whole_of

# two panels of one word: 2 * 4 masks of 8 bytes
SHAPE = (8, 64)


def test_a_layer_costs_its_weights_where_nothing_is_said():
    assert cost_of(Plan())(SHAPE, torch.bfloat16, 0.75, None) == 128


def test_a_layer_costs_its_bytes_as_packed():
    cost = cost_of(Plan(budget="bytes=0.5"))
    # 256 survivors and 32 zeros behind them, and the masks
    assert cost(SHAPE, torch.bfloat16, 0.5, None) == 288 * 2 + 64
    assert cost(SHAPE, torch.float32, 0.5, None) == 288 * 4 + 64
    # without zeros it is left dense
    assert cost(SHAPE, torch.bfloat16, 0.0, None) == 1024


def test_a_layer_costs_the_seconds_of_its_bytes(monkeypatch):
    rows = [
        {"dtype": dtype, "sparsity": s, "tokens": 1, "kernel": "bitmask_x", "speedup": v}
        for dtype, s, v in (("bf16", 0.5, 2.0), ("fp32", 0.5, 0.8))
    ]
    made = DeviceProfile("m", {}, 1000.0, {}, rows, {})
    monkeypatch.setattr(DeviceProfile, "at_hand", classmethod(lambda cls: made))
    cost = cost_of(Plan(budget="seconds=0.5"))
    assert cost(SHAPE, torch.bfloat16, 0.0, None) == pytest.approx(1.024)
    assert cost(SHAPE, torch.bfloat16, 0.5, None) == pytest.approx(0.512)
    # a packed layer that is slower is left dense
    assert cost(SHAPE, torch.float32, 0.5, None) == pytest.approx(2.048)


def test_a_layer_of_integers_costs_what_their_kernel_takes(monkeypatch):
    rows = [
        {"dtype": "bf16", "grid": "int4/64", "sparsity": 0.0, "tokens": 1, "kernel": "dense_int4", "speedup": 4.0},
        {"dtype": "bf16", "sparsity": 0.5, "tokens": 1, "kernel": "bitmask_x", "speedup": 2.0},
    ]
    made = DeviceProfile("m", {}, 1000.0, {}, rows, {})
    monkeypatch.setattr(DeviceProfile, "at_hand", classmethod(lambda cls: made))
    cost = cost_of(Plan(budget="seconds=0.5", bits="4,3"))
    # a quarter of the 1.024 s that 1024 bytes take
    assert cost(SHAPE, torch.bfloat16, 0.0, Grid(4)) == pytest.approx(0.256)
    with pytest.raises(PlanError, match=r"no row for int3 beside bf16; run `secateurs probe --dtype bf16 --bits 4,3`"):
        cost(SHAPE, torch.bfloat16, 0.0, Grid(3))


def of_tiny(model_type="llama", **options):
    return whole_of(plan := Plan(**options), tiny.make(model_type)), plan


def test_a_budget_of_bytes_is_of_all_weights_by_hand():
    """4 bytes each of 3 blocks of 9216 weights, an embedding and a head of 8320, and 7 norms of 32."""
    whole, plan = of_tiny(budget="bytes=0.5x")
    assert (whole.asked, whole.weights, whole.layers, whole.rest) == (89_024, 178_048, 110_592, 67_456)
    assert whole.of_layers(plan).budgeted == ("bytes", pytest.approx(21_568 / 110_592, abs=1e-9))
    # 8 bits and one scale for a row of 32 inputs
    whole, plan = of_tiny(budget="bytes=0.5", embedding_bits=8)
    assert whole.rest == 896 + 33_280 + 260 * 34
    # one matrix counts once
    whole, _ = of_tiny("gpt2", budget="bytes=0.9", head_bits=8)
    assert whole.rest == pytest.approx(whole.weights - whole.layers - 33_280 + 260 * 34)
    # what is left dense is none of the layers
    whole, _ = of_tiny(budget="bytes=0.8", skip=("*.0.*",))
    assert (whole.layers, whole.rest) == (73_728, 67_456 + 36_864)
    # more than all layers take leaves them as they are
    whole, plan = of_tiny(budget="bytes=1.0", head_bits=2)
    assert whole.of_layers(plan).budgeted == ("bytes", 1.0)


@pytest.mark.parametrize("budget", [None, "bits=3.3", "seconds=0.5"])
def test_other_budgets_are_of_the_layers(budget):
    assert of_tiny(budget=budget)[0] is None


def test_a_budget_of_bytes_that_cannot_be_met_is_refused():
    said = (
        r"budget bytes=0.2 is 0.04 MB of the 0.18 MB that all weights take, and 0.09 MB are needed: 0.02 MB for the layers at "
        r"their smallest, 0.07 MB for embedding, head and what else is not pruned; raise the budget, or let it choose from fewer"
    )
    with pytest.raises(PlanError, match=said):
        of_tiny(budget="bytes=0.2")
    # with 2 bits everywhere the same fits
    whole, _ = of_tiny(budget="bytes=0.2", bits="2", embedding_bits=2, head_bits=2)
    assert whole.rest == 896 + 2 * 260 * 10
    # 13,354 bytes hold 1.7 bits a weight with 90% zeros, and not the 2.5 (2.25 where there are 64 inputs) without
    tight = {"budget": "bytes=0.075", "bits": "2", "embedding_bits": 2, "head_bits": 2}
    assert of_tiny(**tight)[0].rest == 6_096
    with pytest.raises(PlanError, match=r"is 0.01 MB of the 0.18 MB that all weights take, and 0.01 MB are needed"):
        of_tiny(**tight, max_sparsity=0, sparsity=0)


def test_a_live_module_keeps_its_budget_of_bytes():
    model = tiny.make("llama")
    plan = Plan(method="sparsegpt", budget="bytes=0.42", bits="4,2")
    # embedding and head are left as they are: 67,456 bytes; 90% zeros on int2 take 5,875 more
    with pytest.raises(PlanError, match="and 0.07 MB are needed"):
        sc.prune(model, replace(plan, budget="bytes=0.41"), calibration=tiny.tokens())
    budget = sc.prune(model, plan, calibration=tiny.tokens().repeat(4, 1)).budget
    assert (budget["asked"], budget["weights"], budget["rest"]) == (74_780, 178_048, 67_456)
    assert 0.98 * 74_780 < budget["stored"] <= 74_780
