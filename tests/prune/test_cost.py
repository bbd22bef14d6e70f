"""What a layer costs, in each unit that a budget may have."""

import pytest
import torch

from secateurs import Plan
from secateurs.base.errors import PlanError
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix.grids import Grid
from secateurs.prune.cost import cost_of

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
