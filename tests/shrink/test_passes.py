"""What a pass switched on is off again after it, whatever happened."""

import pytest
import torch
from torch import nn

from secateurs.base.errors import PlanError
from secateurs.shrink.passes import asking, copied, forgetting, hooked, undone


def net():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def test_only_the_chosen_ask_for_gradients_and_all_are_as_they_were():
    model = net()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), asking(model, [model[0].bias]):
        model(torch.ones(1, 3)).sum().backward()
        assert [p.grad is not None for p in model.parameters()] == [False, True, False, False]
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == before == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_removed():
    model, seen = net(), []
    with pytest.raises(KeyboardInterrupt), hooked([(model[1], lambda _, __, out: seen.append(out))]):
        model(torch.ones(1, 3))
        raise KeyboardInterrupt
    model(torch.ones(1, 3))
    assert len(seen) == 1


class Keeping(nn.Module):
    """Keeps things from pass to pass: in a table, a list, an attribute, a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.table, self.seen, self.last = nn.Linear(2, 2), {"first": 1}, [], None
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.table["weight"] = self.linear.weight * 2
        self.seen.append(1)
        self.last = self.new = self.linear(x)
        self.mean += 1
        return self.last


def test_what_a_pass_keeps_is_forgotten_whatever_happened():
    model, x = Keeping(), torch.ones(1, 2)
    table, seen = model.table, model.seen
    with pytest.raises(KeyboardInterrupt), forgetting(model):
        model(x)
        assert (len(model.table), model.seen) == (2, [1])
        raise KeyboardInterrupt
    assert model.table is table
    assert model.seen is seen
    assert (table, seen, model.last, hasattr(model, "new")) == ({"first": 1}, [], None, False)
    # buffers are running means, say, which a pass is to move
    assert model.mean.tolist() == [1, 1]


def test_buffers_are_undone_as_well():
    model = Keeping()
    mean = model.mean
    with undone(model):
        model(torch.ones(1, 2))
        model.mean = model.mean + 1
        assert model.mean.tolist() == [2, 2]
    assert model.mean is mean
    assert model.mean.tolist() == [0, 0]
    assert model.table == {"first": 1}


def test_what_cannot_be_copied_is_refused_in_a_sentence():
    model = Keeping()
    assert copied(model).linear is not model.linear
    model(torch.ones(1, 2))
    with pytest.raises(PlanError, match=r"Keeping cannot be copied \(Only Tensors created explicitly .*give a new one"):
        copied(model)
