"""What a layer costs, in each unit that a budget may have."""

import pytest
import torch

from secateurs import Plan
from secateurs.machine.profile import DeviceProfile
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
