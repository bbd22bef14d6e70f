"""What a pass switched on is off again after it, whatever happened."""

import pytest
import torch
from torch import nn

from secateurs.shrink.passes import asking, hooked


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
