"""An intercept goes where its layer, and nothing else, adds it."""

import pytest
import torch
import torch.nn.functional as F
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
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
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
    small, _ = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    got = torch.cat([small.read.weight, small.read.bias[:, None]], 1)
    torch.testing.assert_close(got, refit_of(small, model, "first", "read", x), rtol=1e-3, atol=1e-3)


class Reads(nn.Module):
    """Two layers, the second called in some way."""

    def __init__(self, call, read):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.call, self.read = nn.Linear(6, 12), call, read()
        self.other, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.call(self, self.first(x).relu()).relu())


class Plain(nn.Linear):
    """A layer that leaves out its bias."""

    def forward(self, x):
        return F.linear(x, self.weight)


class Pointwise(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return F.conv1d(x, weight)


def with_bias():
    return nn.Linear(12, 5)


def without():
    return nn.Linear(12, 5, bias=False)


def called(model, x):
    return model.read(x)


# what adds no bias, or one that others add too
@pytest.mark.parametrize(("call", "read"), [
    (lambda model, x: F.linear(x, model.read.weight), without),
    (lambda model, x: F.linear(x, model.read.weight), with_bias),
    (lambda model, x: F.linear(x, model.read.weight) + model.read(x), with_bias),
    (lambda model, x: model.read(x) + F.linear(x, model.read.weight), without),
    (lambda model, x: F.linear(x, model.read.weight, model.other.bias) + model.other(model.read(x)), without),
    (lambda model, x: F.linear(x, model.read.weight, model.other.bias), without),
    (lambda model, x: model.read(x) + model.read.bias, with_bias),
    (called, lambda: Plain(12, 5, bias=False)),
    (called, lambda: Plain(12, 5)),
    (lambda model, x: model.read(x[..., None])[..., 0], lambda: Pointwise(12, 5, 1, bias=False)),
])  # fmt: skip
def test_a_layer_that_adds_no_bias_of_its_own_is_refit_without(call, read):
    model, x = Reads(call, read).eval(), torch.randn(400, 6)
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
    assert [(r["group"], r["after"]) for r in report["groups"]] == [("first", 8)]
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    for name in ("read.bias", "other.bias"):
        if name in dict(model.named_parameters()):
            assert torch.equal(small.get_parameter(name), model.get_parameter(name))
    with torch.no_grad():
        hidden, whole = small.first(x).relu().double(), model.first(x).relu().double()
        expected = torch.linalg.lstsq(hidden, whole @ model.read.weight.flatten(1).double().T).solution.T.float()
    torch.testing.assert_close(small.read.weight.flatten(1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("read", [without, with_bias])
def test_a_layer_that_is_called_as_it_is_has_an_intercept(read):
    model, x = Reads(called, read).eval(), torch.randn(400, 6)
    small, _ = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
    got = torch.cat([small.read.weight, small.read.bias[:, None]], 1)
    torch.testing.assert_close(got, refit_of(small, model, "first", "read", x), rtol=1e-3, atol=1e-3)


class OneBias(nn.Module):
    """Two matrices that share a bias, in one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(5, 3)
        self.a, self.b, self.bias = (nn.Parameter(torch.randn(*shape)) for shape in ((5, 12), (5, 12), (5,)))

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(F.linear(x, self.a, self.bias).relu() + F.linear(x, self.b, self.bias).relu())


def test_a_bias_of_two_layers_takes_the_intercept_of_neither():
    model, x = OneBias().eval(), torch.randn(400, 6)
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
    assert [(r["group"], r["after"]) for r in report["groups"]] == [("first", 8)]
    assert torch.equal(small.bias, model.bias)
