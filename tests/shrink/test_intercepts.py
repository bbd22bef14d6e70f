"""An intercept goes where its layer, and nothing else, adds it."""

import pytest
import torch
from torch import nn

from secateurs import shrink_module


def refit_of(small, model, made, read, x):
    """The weights and the intercept of least squares from what is left of one layer's outputs to the dense outputs of the next."""
    with torch.no_grad():
        hidden = getattr(small, made)(x).relu().flatten(0, -2)
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
        target = getattr(model, read)(getattr(model, made)(x).relu()).flatten(0, -2).double()
        return torch.linalg.lstsq(hidden, target).solution.T.float()


class Tokens(nn.Module):
    """A batch norm over tokens behind a linear layer: its mean is one of each token, and not of each channel."""

    def __init__(self, tokens):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.read, self.norm = nn.Linear(6, 12), nn.Linear(12, 5, bias=False), nn.BatchNorm1d(tokens)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.read(self.first(x).relu())).relu())


# as many tokens as channels, and more of them
@pytest.mark.parametrize("tokens", [5, 7])
def test_a_batch_norm_over_tokens_takes_no_intercept(tokens):
    model, x = Tokens(tokens).eval(), torch.randn(100, tokens, 6)
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7)
    assert [(r["group"], r["after"]) for r in report["groups"]] == [("first", 8)]
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    got = torch.cat([small.read.weight, small.read.bias[:, None]], 1)
    torch.testing.assert_close(got, refit_of(small, model, "first", "read", x), rtol=1e-3, atol=1e-3)


class Twice(nn.Module):
    """A layer that is called twice, and once in front of a batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.read, self.norm = nn.Linear(6, 12), nn.Linear(12, 5, bias=False), nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.norm(self.read(x)).relu() + self.read(x).relu())


def test_a_batch_norm_behind_one_call_of_two_takes_no_intercept():
    model, x = Twice().eval(), torch.randn(400, 6)
    small, _ = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7)
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    got = torch.cat([small.read.weight, small.read.bias[:, None]], 1)
    torch.testing.assert_close(got, refit_of(small, model, "first", "read", x), rtol=1e-3, atol=1e-3)
