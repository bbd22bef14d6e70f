"""Optimizers that are given a closure, as Lightning gives one to all: gradients are made inside the step, perhaps many times."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def made(model, optimizer, number):
    """A closure with data of its own."""

    def closure():
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def plain(optimizer, closure):
    closure()
    optimizer.step()


WAYS = {"plain": plain, "argument": lambda o, c: o.step(c), "keyword": lambda o, c: o.step(closure=c)}
PRUNERS = {
    "hold": lambda m, o: sc.train.hold(m, o, {"0.weight": torch.arange(256).reshape(32, 8) % 3 > 0}),
    "gradual": lambda m, o: sc.train.gradual(m, o, sc.train.cubic(0.8, 1, 5, 0.2, every=2), score="fisher"),
    "rigl": lambda m, o: sc.train.dynamic(m, o, 0.6, until=9, every=2),
}


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures_end_where_plain_steps_do(pruner, name):
    """Weights, masks and the optimizer's state, to the bit."""
    found = []
    for way in WAYS.values():
        model = net()
        optimizer = OPTIMIZERS[name](model.parameters())
        pruning = PRUNERS[pruner](model, optimizer)
        for i in range(6):
            way(optimizer, made(model, optimizer, i))
        held = getattr(pruning, "held", pruning)
        state = {n: optimizer.state[p] for n, p in model.named_parameters()}
        found.append({**model.state_dict(), **{f"mask {n}": m for n, m in held.masks.items()}})
        found[-1] |= {f"{n} {k}": v for n, values in state.items() for k, v in values.items() if torch.is_tensor(v)}
    assert any("buffer" in key or "exp_avg" in key for key in found[0])
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())


class Masked(nn.Module):
    """The net of a mask, whose removed weights no gradient reaches."""

    def __init__(self, model, mask):
        super().__init__()
        self.layers = nn.Sequential(sc.train.MaskedLinear.of(model[0], mask), model[1], model[2])

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_moves_as_if_removed_weights_were_not_there(search):
    mask = torch.rand(32, 8, generator=torch.Generator().manual_seed(1)) > 0.6
    found = []
    for held in (True, False):
        model = net()
        model[0].weight.data.mul_(mask)
        model = model if held else Masked(model, mask)
        optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=6, line_search_fn=search)
        if held:
            sc.train.hold(model, optimizer)
        losses = [float(optimizer.step(made(model, optimizer, 0)).detach()) for _ in range(3)]
        assert losses[2] < losses[0] / 2
        found.append([losses, *(p.detach() for p in model.parameters())])
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_lbfgs_forgets_directions_along_weights_that_were_removed_since():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4)
    pruner = sc.train.gradual(model, optimizer, sc.train.Steps({1: 0.3, 3: 0.6}))
    for i in range(5):
        zero = {n: ~m for n, m in pruner.held.masks.items()}
        seen, begun = [], made(model, optimizer, 0)

        def closure(zero=zero, seen=seen, begun=begun):
            seen.append(max(float(model.get_parameter(n).detach()[z].abs().sum()) for n, z in zero.items()))
            return begun()

        iterations = dict(optimizer.state[next(model.parameters())]).get("n_iter", 0)
        optimizer.step(closure)
        assert seen == [0.0] * len(seen)
        # it starts over once after each pruning, and not else
        assert (optimizer.state[next(model.parameters())]["n_iter"] > iterations) == (i not in (1, 3))


def test_lbfgs_goes_on_bit_for_bit():
    def begun():
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4)
        return model, optimizer, sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=1))

    def run(stop):
        things = begun()
        for i in range(5):
            if i == stop:
                states = copy.deepcopy([thing.state_dict() for thing in things])
                things = begun()
                for thing, state in zip(things, states, strict=True):
                    thing.load_state_dict(state)
            things[1].step(made(*things[:2], 0))
        return things[0].state_dict()

    whole, resumed = run(None), run(3)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class Twice(torch.optim.SGD):
    """Calls its closure again at other weights, as line searches do, and its base class's step, whose hooks are called too."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


def test_a_step_counts_once_with_the_gradients_that_it_begins_with():
    """By hand: |w g| of the first call, 1 2 3 4, and of the second, 4 3 2 1."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(model[0].weight)
    # the base class's step has hooks once one of it was made
    torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Twice(model.parameters(), 0.0)
    pruner = sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=2), score="taylor")
    gradients = iter([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [1.0, 2, 3, 4], [4.0, 3, 2, 1]])

    def closure():
        model[0].weight.grad = torch.tensor([next(gradients)])

    optimizer.step(closure)
    assert pruner.step == 1
    assert pruner.state_dict()["sums"]["0.weight"].tolist() == [[1.0, 2.0, 3.0, 4.0]]
    optimizer.step(closure)
    assert pruner.step == 2
    assert model[0].weight.tolist() == [[0.0, 0.0, 1.0, 1.0]]
