"""Pruning in training that begins, goes on and ends as it says."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.base.errors import PlanError

BY_GRADIENT = [name for name, (_, summed, _) in sc.train.SCORES.items() if summed]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def step(model, optimizer, number=0):
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("score", BY_GRADIENT)
def test_a_sum_of_no_steps_ranks_nothing(score):
    model = net()
    dense = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(PlanError, match="none is taken before step 0; begin the schedule at step 1 or later"):
        sc.train.gradual(model, optimizer, sc.train.one_step(0.5), score=score)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())
    # nothing is pruned at step 0 of these
    sc.train.gradual(model, optimizer, sc.train.cubic(0.5, 0, 10), score=score)
    sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=1), score=score)


@pytest.mark.parametrize("score", BY_GRADIENT)
def test_a_frozen_matrix_is_refused_by_name(score):
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said = r"0.weight is frozen \(requires_grad is False\), and .* give frozen='prune' to prune .* or frozen='skip'"
    with pytest.raises(PlanError, match=said):
        sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=1), score=score)
    with pytest.raises(PlanError, match=said):
        sc.train.sr_ste(model)
    with pytest.raises(PlanError, match=said):
        sc.train.dynamic(model, optimizer, 0.5, until=5, every=1)
    with pytest.raises(PlanError, match="frozen 'yes'; write prune or skip"):
        sc.train.dynamic(model, optimizer, 0.5, until=5, every=1, frozen="yes")
    sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=1), score=score, skip=("0.weight",))
    model.requires_grad_(False)
    with pytest.raises(PlanError, match="all matrices are frozen"):
        sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=1), frozen="prune")


def _frozen():
    """Two layers of 8 x 8, of which the first is frozen and not the optimizer's; and its three smallest quarters of weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    size = model[0].weight.abs().flatten()
    smallest = torch.zeros(64, dtype=torch.bool)
    smallest[size.argsort()[:48]] = True
    return model, optimizer, smallest.view(8, 8), model[0].weight.clone()


def _learn(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("score", sc.train.SCORES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_frozen_matrix_is_pruned_once_or_skipped(scope, score):
    model, optimizer, smallest, dense = _frozen()
    schedule = sc.train.cubic(0.75, begin=1, end=3, every=1)
    pruner = sc.train.gradual(model, optimizer, schedule, scope=scope, score=score, frozen="prune")
    assert torch.equal(model[0].weight, dense.masked_fill(smallest, 0))
    for _ in range(4):
        _learn(model, optimizer)
    assert torch.equal(model[0].weight, dense.masked_fill(smallest, 0))
    assert int((model[2].weight == 0).sum()) == 48
    assert pruner.held.sparsity == 0.75
    # a checkpoint of the dense weights, and training that thaws the layer, change nothing
    model[0].weight.data.copy_(dense)
    pruner.load_state_dict(pruner.state_dict())
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [model[0].weight]})
    _learn(model, optimizer)
    assert torch.equal(model[0].weight == 0, smallest)

    model, optimizer, _, dense = _frozen()
    pruner = sc.train.gradual(model, optimizer, sc.train.one_step(0.75, at=1), scope=scope, score=score, frozen="skip")
    _learn(model, optimizer)
    assert torch.equal(model[0].weight, dense)
    assert list(pruner.held.masks) == ["2.weight"]


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_frozen_matrix_does_not_move_its_connections(grow):
    model, optimizer, smallest, dense = _frozen()
    pruner = sc.train.dynamic(model, optimizer, 0.75, until=9, every=1, grow=grow, frozen="prune")
    first = {name: mask.clone() for name, mask in pruner.held.masks.items()}
    for _ in range(4):
        _learn(model, optimizer)
    assert torch.equal(model[0].weight, dense.masked_fill(smallest, 0))
    assert not torch.equal(pruner.held.masks["2.weight"], first["2.weight"])
    model, optimizer, _, dense = _frozen()
    sc.train.dynamic(model, optimizer, 0.75, until=9, every=1, grow=grow, frozen="skip")
    assert torch.equal(model[0].weight, dense)


def test_sr_ste_leaves_a_frozen_matrix_plain():
    model, _, _, dense = _frozen()
    size = dense.abs().view(8, 2, 4)
    kept = (size >= size.topk(2).values[..., -1:]).view(8, 8)
    assert sc.train.sr_ste(model, frozen="prune") == ["2.weight"]
    assert torch.equal(model[0].weight, dense * kept)
    assert isinstance(model[0].weight, nn.Parameter)
    model, _, _, dense = _frozen()
    assert sc.train.sr_ste(model, frozen="skip") == ["2.weight"]
    assert torch.equal(model[0].weight, dense)


@pytest.mark.parametrize("factor", [None, 0.0])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_matrix_that_no_gradient_reached_is_left_and_named(scope, factor):
    """Half of the other one goes. A gradient of zeros is none."""
    model = nn.ModuleList([nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = sc.train.gradual(model, optimizer, sc.train.Steps({1: 0.5, 2: 0.5}), scope=scope, score="taylor")
    model[1](torch.ones(1, 4)).sum().backward()
    if factor is not None:
        (factor * model[0](torch.ones(1, 4))).sum().backward()
    with pytest.warns(UserWarning, match="^0.weight had no gradient to rank weights by at step 1; not pruned"):
        optimizer.step()
    assert [int((layer.weight == 0).sum()) for layer in model] == [0, 4]
    # the next decision has what it needs
    for layer in model:
        layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert [int((~mask).sum()) for mask in pruner.held.masks.values()] == [4, 4]


def test_connections_of_a_matrix_without_gradient_stay_and_it_is_named():
    model = nn.ModuleList([nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = sc.train.dynamic(model, optimizer, 0.5, until=9, every=1)
    old = found.held.masks
    model[1](torch.randn(1, 16)).sum().backward()
    with pytest.warns(UserWarning, match="^0.weight had no gradient in step 1; connections not moved"):
        optimizer.step()
    assert torch.equal(found.held.masks["0.weight"], old["0.weight"])
    assert not torch.equal(found.held.masks["1.weight"], old["1.weight"])


@pytest.mark.parametrize("begin", [0, 99_999, 100_001, 1_000_000])
def test_a_ramp_is_not_a_pattern_s_whenever_it_begins(begin):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(PlanError, match="2:4 is 0.5 zeros and nothing else"):
        sc.train.gradual(model, optimizer, sc.train.cubic(0.5, begin, begin + 100, initial=0.2), pattern="2:4")
    sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=begin + 1), pattern="2:4")


def test_the_last_decision_of_a_schedule():
    assert sc.train.cubic(0.5, 10, 95, every=20).last == 95
    assert sc.train.rounds(0.5, 3, every=10, begin=5).last == 25


@pytest.mark.parametrize("before", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_sparse_training_goes_on_whatever_was_loaded_before_it(grow, stop, before):
    """Weights (0) and the optimizer's state (1) are loaded before dynamic() or after it. At 4, connections have just moved."""

    def begun(states=(), seed=0):
        model = net(seed)
        optimizer = torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.1)
        for i in before if states else ():
            (model, optimizer)[i].load_state_dict(states[i])
        pruner = sc.train.dynamic(model, optimizer, 0.6, until=8, every=2, grow=grow)
        return model, optimizer, pruner

    def run(stop):
        things = begun()
        for i in range(11):
            if i == stop:
                states = copy.deepcopy([thing.state_dict() for thing in things])
                things = begun(states, seed=7)
                for j, (thing, state) in enumerate(zip(things, states, strict=True)):
                    if j not in before:
                        thing.load_state_dict(state)
            step(*things[:2], i)
        model, optimizer, _ = things
        state = {f"{n} {k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
        return model.state_dict() | state

    whole, resumed = run(None), run(stop)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_loaded_state_is_not_added_to():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = sc.train.gradual(model, optimizer, sc.train.one_step(0.5, at=9), score="fisher")
    step(model, optimizer)
    state = copy.deepcopy(pruner.state_dict())
    kept = copy.deepcopy(state)
    pruner.load_state_dict(state)
    step(model, optimizer)
    assert all(torch.equal(total, kept["sums"][name]) for name, total in state["sums"].items())


@pytest.mark.parametrize("kind", ["gradual", "dynamic"])
def test_what_is_released_prunes_no_more(kind):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = (
        sc.train.gradual(model, optimizer, sc.train.Steps({1: 0.25, 2: 0.5}), score="taylor")
        if kind == "gradual"
        else sc.train.dynamic(model, optimizer, 0.5, until=9, every=1)
    )
    step(model, optimizer)
    masks = pruner.held.masks
    pruner.held.release()
    for _ in range(3):
        step(model, optimizer)
    assert pruner.step == 1
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.held.masks.items())
    assert not any(bool((model.get_parameter(name)[~mask] == 0).any()) for name, mask in masks.items())
