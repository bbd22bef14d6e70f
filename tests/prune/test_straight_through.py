"""Tuning on a grid: gradients by hand, and weights that never leave it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from secateurs.matrix.grids import Grid, Scales
from secateurs.model.layers import Layer, survivors
from secateurs.prune.straight_through import OnGrid, StraightThrough
from secateurs.prune.tuning import Moving, movable, tune


def made(weight, scale, grid):
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight.data = torch.tensor(weight)
    return Layer("y", linear, linear.weight, "linear"), Scales(grid, torch.tensor(scale).to(grid.scale_dtype))


def test_gradients_by_hand():
    # 3 bits, -4 .. 3: w / s = 1.25, 3.75 (clipped to 3), -4.75 (clipped to -4), 0.5
    layer, scales = made([[2.5, 7.5, -9.5, 1.0]], [[2.0]], Grid(3))
    found = StraightThrough(OnGrid(layer, scales), torch.tensor([[2.5, 7.5, -9.5, 1.0]]), None)
    gradient = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    found.pull(gradient)
    # outside the range the weight has no say, and the scale all of it
    assert gradient.tolist() == [[1.0, 0.0, 0.0, 1000.0]]
    assert_close(found.scale_OG.grad, torch.tensor([[1 * (1 - 1.25) + 10 * 3 + 100 * -4 + 1000 * (0 - 0.5)]]))


def test_a_part_of_a_parameter_has_gradients_of_its_own():
    parameter = nn.Parameter(torch.stack([torch.full((3, 2), 7.0), torch.arange(6.0).view(3, 2)]))
    layer = Layer("y.1", nn.Module(), parameter, "expert1d", 1)
    scales = Scales(Grid(8), torch.ones(2, 1).bfloat16())
    found = StraightThrough(OnGrid(layer, scales), parameter.detach().clone(), None)
    gradient = torch.ones(2, 3, 2)
    found.scale_OG.mul_(0.5)
    found.pull(gradient)
    found.write()
    assert torch.equal(gradient, torch.ones(2, 3, 2))
    assert torch.equal(parameter[0], torch.full((3, 2), 7.0))
    assert torch.equal(parameter[1], torch.arange(6.0).view(3, 2))
    ((_, mask),) = survivors([layer])
    assert torch.equal(mask, torch.stack([torch.zeros(3, 2, dtype=torch.bool), parameter[1] != 0]))


def test_moving_weights_start_towards_the_dense_ones_in_the_steps_that_were_chosen():
    # in steps of 2: integers 1, 3 (the grid's end), 0 and a weight that was pruned; dense at .8, 9, -3 and 2.5 steps
    layer, scales = made([[2.0, 6.0, 0.0, 0.0]], [[2.0]], Grid(3))
    copy = layer.parameter.detach().clone()
    mask = torch.tensor([[True, True, True, False]])
    found = StraightThrough(OnGrid(layer, scales, torch.tensor([[1.6, 18.0, -6.0, 5.0]])), copy, mask)
    assert_close(copy, torch.tensor([[1.6, 2 * 3.499, 2 * -0.499, 0.0]]))
    found.write()
    assert layer.read().tolist() == [[2.0, 6.0, 0.0, 0.0]]


def test_weights_that_bf16_rounded_start_in_their_own_steps():
    # 127 steps of .01 are 1.2734375 in bf16, .34 steps further
    linear = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    scales = Scales(Grid(8), torch.tensor([[0.01]]).bfloat16())
    linear.weight.data = scales.rounded(torch.tensor([[1.27]])).bfloat16()
    layer = Layer("y", linear, linear.weight, "linear")
    copy = linear.weight.detach().float()
    StraightThrough(OnGrid(layer, scales, torch.tensor([[1.29]])), copy, None)
    assert float(copy / scales.scale_OG.float()) == pytest.approx(127.499)


def tuned(memory=None, steps=40):
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    target = torch.randn(8, 64)
    grid = Grid(3)
    scales = Scales(grid, (target.abs().amax(1, keepdim=True) / 3).bfloat16())
    linear.weight.data = scales.rounded(target * (target.abs() > 0.3))
    layer = Layer("y", linear, linear.weight, "linear")
    x = torch.randn(20, 16, 64) @ torch.randn(64, 64)

    def error(i):
        return (linear(x[i]) - x[i] @ target.T).square().mean()

    moving = movable(linear, survivors([layer]), [OnGrid(layer, scales)])
    before = linear.weight.detach().clone()
    kept = scales.scale_OG.clone()
    outcome = tune(
        moving, lambda i: float(error(i)), lambda i: torch.autograd.grad(error(i), [linear.weight]), list(range(20)), steps, 8e-3,
        memory=memory,
    )  # fmt: skip
    return linear, scales, outcome, before, kept


def test_what_is_tuned_stays_on_its_grid_and_zeros_stay_zero():
    linear, scales, outcome, before, kept = tuned()
    assert outcome.after < 0.98 * outcome.before
    assert scales.off(linear.weight.detach()) is None
    assert not linear.weight[before == 0].any()
    assert not torch.equal(scales.scale_OG, kept)


def test_where_nothing_helped_weights_and_scales_are_what_they_were():
    torch.manual_seed(0)
    layer, scales = made([[2.0, -4.0, 6.0]], [[2.0]], Grid(3))
    before = scales.scale_OG.clone()
    losses = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    moving = [Moving.of(layer.parameter, None, [OnGrid(layer, scales)])]
    outcome = tune(moving, lambda i: next(losses), lambda i: [torch.ones(1, 3)], list(range(3)), 48, 0.5)
    assert not outcome.accepted
    assert torch.equal(scales.scale_OG, before)
    assert layer.read().tolist() == [[2.0, -4.0, 6.0]]


def test_steps_are_in_units_of_the_grid_s():
    layer, scales = made([[2.0, -4.0, 0.0]], [[2.0]], Grid(3))
    assert Moving.of(layer.parameter, None, [OnGrid(layer, scales)]).scale == pytest.approx(2.0)
    assert Moving.of(layer.parameter).scale == pytest.approx(10**0.5)


class Notes:
    def __init__(self):
        self.states = []

    def read(self):
        return self.states[-1] if self.states else None

    def due(self):
        return True

    def write(self, state):
        self.states.append({name: value.clone() for name, value in state.items()})


def test_tuning_that_was_cut_off_ends_where_an_undisturbed_one_does():
    whole = Notes()
    linear, scales, *_ = tuned(whole)
    cut = Notes()
    cut.states = whole.states[:13]
    again, scales_again, *_ = tuned(cut)
    assert torch.equal(linear.weight, again.weight)
    assert torch.equal(scales.scale_OG, scales_again.scale_OG)
    assert len(whole.states) == 40
