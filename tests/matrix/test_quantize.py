"""Rounding to a grid: by hand, against the independent GPTQ, and what must never happen."""

import itertools

import gptq
import pytest
import torch
from torch.testing import assert_close

from secateurs import Stats
from secateurs.matrix import solvers
from secateurs.matrix.grids import BITS, Grid, Scales
from secateurs.matrix.patterns import NM, Unstructured
from secateurs.matrix.quantize import descend, fit, joint, joint_polished, polish, quantize, refit_scales

GRIDS = [Grid(b) for b in BITS] + [
    Grid(4, 32),
    Grid(3, 128),
    Grid(4, 0),
    Grid(4, 64, False),
    Grid(2, 32, False),
    Grid(4, 32, half=True),
]
ROW = Unstructured("row")


def loss(weight, new, stats, damping=0.01):
    return float(solvers.row_loss(new.double() - weight.double(), stats.damped(damping).double()).sum())


@pytest.fixture
def wide():
    """weight_OI [12, 144], whose last group of 64 or 32 is not whole, and Stats of correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(144, 144, generator=generator) * torch.randn(144, generator=generator).exp()
    return torch.randn(12, 144, generator=generator), Stats.of(torch.randn(600, 144, generator=generator) @ mixing)


def test_scales_by_hand():
    # 2 bits, -2 .. 1: with a negative scale the extra level is above zero, so +2 and -1 both fit
    found = fit(torch.tensor([[2.0, -1.0, 0.0, 1.0]]), Grid(2))
    assert found.scale_OG.tolist() == [[-1.0]]
    assert found.integers(torch.tensor([[2.0, -1.0, 0.0, 1.0]])).tolist() == [[-2, 1, 0, -1]]
    # 0 .. 3 with zero 1: only an asymmetric grid has -1 and 2
    assert fit(torch.tensor([[2.0, -1.0, 1.0]]), Grid(2, 64, False)).zero_OG.tolist() == [[1]]
    # an empty group
    assert fit(torch.zeros(1, 3), Grid(3)).rounded(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_an_input_s_weight_decides_what_is_clipped():
    # alone in a group 8 would make 1 and -1 zero; an input that hardly counts is clipped
    weight = torch.tensor([[8.0, 1.0, -1.0, 1.0]])
    assert fit(weight, Grid(2)).rounded(weight)[0, 0] == 8
    assert_close(
        fit(weight, Grid(2), torch.tensor([1e-6, 1.0, 1.0, 1.0])).rounded(weight)[0, 1:],
        weight[0, 1:],
        atol=0.01,
        rtol=0,
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("pattern", "sparsity"), [(ROW, 0.0), (ROW, 0.5), (NM(2, 4), 0.5)], ids=["all", "half", "2:4"])
def test_weights_are_on_their_grid_and_hold_their_pattern(wide, grid, pattern, sparsity):
    weight, stats = wide
    for new, scales in (
        joint_polished(weight, stats, pattern, sparsity, grid, 0.01),
        quantize(weight, solvers.find("wanda").solve(weight, stats, pattern, sparsity, 0.01), stats, grid, 0.01),
    ):
        assert scales.off(new) is None
        assert scales.scale_OG.dtype == grid.scale_dtype
        assert not new[new == 0].signbit().any()
        assert pattern.violation(new != 0, sparsity) is None


@pytest.mark.parametrize("bits", BITS)
def test_without_zeros_the_joint_pass_is_gptq(wide, bits, monkeypatch):
    """With the independent one's scales, absmax of the weights as updated: alike but for ties of rounding."""
    import secateurs.matrix.quantize as module

    def absmax(part, weight, grid):
        scale = part.abs().amax(-1) / (grid.middle - 1)
        return scale, torch.full_like(scale, grid.middle)

    monkeypatch.setattr(module, "_search", absmax)
    weight, stats = wide
    got, _ = joint(weight, stats, ROW, 0.0, Grid(bits), 0.01)
    want = gptq.gptq(weight, stats.gram_II, bits, 64).float()
    # one integer that rounding in fp32 put elsewhere changes what comes after it in its row
    assert (torch.isclose(got, want, atol=1e-4).all(1)).float().mean() > 0.8


def test_with_many_levels_the_joint_pass_is_sparsegpt(layer, monkeypatch):
    import secateurs.matrix.quantize as module

    def fine(part, weight, grid):
        # room for what compensation adds to the weights of a group
        scale = torch.full(part.shape[:-1], 1e-4)
        return scale, torch.full_like(scale, grid.middle)

    monkeypatch.setattr(module, "_search", fine)
    weight, stats, _ = layer
    many = Grid(8, 32)
    object.__setattr__(many, "bits", 24)
    got, _ = joint(weight, stats, ROW, 0.5, many, 0.01)
    want = solvers.obs(weight, stats, ROW, 0.5)
    assert torch.equal(got != 0, want != 0)
    assert_close(got, want, atol=2e-3, rtol=0)


def test_rows_that_count_more_keep_more_in_a_joint_mask(layer):
    weight, stats, _ = layer
    importance = torch.ones(len(weight))
    importance[3] = 100.0
    kept = [
        (joint(weight, stats, Unstructured("layer"), 0.5, Grid(3), 0.01, i)[0] != 0).sum(1) for i in (None, importance)
    ]
    assert kept[1][3] > kept[0][3]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_descent_and_new_scales_never_raise_the_loss(wide, grid):
    weight, stats = wide
    hessian, keep = stats.damped(0.01), torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    scales = fit(weight * keep, grid)
    new = scales.rounded(weight * keep)
    losses = [loss(weight, new, stats)]
    for _ in range(3):
        new = descend(weight, new, scales, keep, hessian, 1)
        losses.append(loss(weight, new, stats))
        new, scales = refit_scales(weight, new, scales, hessian)
        losses.append(loss(weight, new, stats))
        assert scales.off(new) is None
        assert not new[~keep].any()
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


def test_descent_stops_where_no_single_integer_helps(layer):
    weight, stats, _ = layer
    hessian, grid = stats.damped(0.01), Grid(3, 32)
    scales = fit(weight, grid, hessian.diagonal())
    keep = torch.ones_like(weight, dtype=torch.bool)
    new = descend(weight, scales.rounded(weight), scales, keep, hessian, 100)
    integers, step = scales.integers(new), scales.scale_OG.float().double()
    slope, diagonal = (new - weight).double() @ hessian.double(), hessian.double().diagonal()
    for change in (-1, 1):
        delta = torch.where((integers + change).clamp(-4, 3) == integers, 0, change) * step
        assert (2 * delta * slope + delta.square() * diagonal).min() > -1e-3


def test_passes_together_are_passes_one_after_the_other(wide):
    weight, stats = wide
    hessian, scales = stats.damped(0.01), fit(weight, Grid(3))
    keep = torch.ones_like(weight, dtype=torch.bool)
    start = scales.rounded(weight)
    one_by_one = start
    for _ in range(3):
        one_by_one = descend(weight, one_by_one, scales, keep, hessian, 1)
    together = descend(weight, start, scales, keep, hessian, 3)
    assert (together == one_by_one).float().mean() > 0.99
    assert loss(weight, together, stats) == pytest.approx(loss(weight, one_by_one, stats), rel=1e-2)


def test_scales_are_refit_by_least_squares(layer):
    """Against a dense solve, row by row in fp64, before the scales are rounded to 16 bits."""
    weight, stats, _ = layer
    hessian, grid = stats.damped(0.01), Grid(3, 32)
    narrow = Grid(3, 32)
    object.__setattr__(narrow, "group", 8)
    scales = fit(weight, narrow)
    new = scales.rounded(weight)
    integers = scales.integers(new).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grid, "scale_dtype", property(lambda self: torch.float32))
        _, found = refit_scales(weight, new, scales, hessian)
    for row in range(len(weight)):
        basis = torch.zeros(4, 32, dtype=torch.double)
        for g in range(4):
            basis[g, 8 * g : 8 * g + 8] = integers[row, 8 * g : 8 * g + 8]
        want = torch.linalg.solve(basis @ hessian.double() @ basis.T, basis @ hessian.double() @ weight[row].double())
        assert_close(found.scale_OG[row].double(), want, rtol=1e-3, atol=1e-4)
    assert grid.groups(32) == 1


def test_without_calibration_weights_are_rounded_to_nearest(layer):
    weight, _, _ = layer
    start = weight * (weight.abs() > 0.5)
    for found in (None, Stats.zeros(32, False)):
        new, scales = quantize(weight, start, found, Grid(4, 32), 0.01)
        assert_close(new, scales.rounded(start))
    assert not new[start == 0].any()


def test_dead_inputs_are_rounded_and_do_no_harm(layer):
    weight, _, x = layer
    x = x.clone()
    x[:, 5] = 0
    stats = Stats.of(x)
    new, scales = joint_polished(weight, stats, ROW, 0.0, Grid(3, 32), 0.01)
    assert scales.off(new) is None
    assert (new[:, 5] - weight[:, 5]).abs().max() <= 0.51 * scales.scale_OG.float().abs().max() + weight[
        :, 5
    ].abs().max() * 0.6


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_polished_weights_beat_plain_gptq(wide, bits):
    weight, stats = wide
    plain = gptq.gptq(weight, stats.gram_II, bits, 64).float()
    new, _ = joint_polished(weight, stats, ROW, 0.0, Grid(bits), 0.01)
    assert loss(weight, new, stats) < 0.7 * loss(weight, plain, stats)


def test_the_joint_mask_beats_wanda_then_gptq(wide):
    weight, stats = wide
    plain = gptq.wanda_gptq(weight, stats.gram_II, 4, 64, 2, 4).float()
    for new, _ in (
        joint_polished(weight, stats, NM(2, 4), 0.5, Grid(4), 0.01),
        quantize(weight, solvers.find("admm").solve(weight, stats, NM(2, 4), 0.5, 0.01), stats, Grid(4), 0.01),
    ):
        assert loss(weight, new, stats) < 0.6 * loss(weight, plain, stats)


def test_polish_keeps_what_it_cannot_better():
    # integers that are exact stay
    weight = torch.tensor([[3.0, -2.0, 1.0, 0.0]])
    stats = Stats.of(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    scales = Scales(Grid(3), torch.tensor([[-1.0]], dtype=torch.bfloat16))
    new, found = polish(weight, weight, scales, weight != 0, stats.damped(0.01))
    assert torch.equal(new, weight)
    assert torch.equal(found.scale_OG, scales.scale_OG)
