"""Batch norms of a cut module take the statistics of what reaches them, where that helps."""

import copy

import pytest
import torch
from torch import nn

from secateurs import shrink_module
from secateurs.shrink.norms import measured, norms_of, recalibrate
from secateurs.shrink.outputs import Objective


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 5, 1),
    )  # fmt: skip
    # its own statistics are those without dropout
    model[3].eval()
    for _ in range(30):
        model(2 + torch.randn(32, 3, 8, 8))
    return model.eval()


def of(x):
    return Objective([(x,)], [(x,)], None)


def test_one_pass_gives_the_statistics_of_training_without_dropout():
    """As torch counts them itself in train mode, over one batch; and the module is as before."""
    model, x = net(), 1 + torch.randn(64, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    found = measured(model, [(x,)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    other = copy.deepcopy(model).train()
    other[3].eval()
    for norm in norms_of(other).values():
        norm.momentum = 1.0
    with torch.no_grad():
        other(x)
    for name, norm in norms_of(other).items():
        torch.testing.assert_close(found[name][0].float(), norm.running_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[name][1].float(), norm.running_var, rtol=1e-3, atol=1e-4)


def test_two_batches_count_by_their_places():
    """The first norm's inputs do not depend on others: its statistics are those of all images."""
    model, x = net(), torch.randn(24, 3, 8, 8)
    mean, variance = measured(model, [(x[:4],), (x[4:],)])["1"]
    with torch.no_grad():
        seen = model[0](x).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(mean, seen.mean(1))
    torch.testing.assert_close(variance, seen.var(1), rtol=1e-5, atol=1e-6)


def test_statistics_that_are_off_come_back():
    """A module whose statistics were spoiled gives what it gave, and its report says by how much."""
    dense = net()
    x, others = 2 + torch.randn(256, 3, 8, 8), 2 + torch.randn(64, 3, 8, 8)
    spoiled = copy.deepcopy(dense)
    for norm in norms_of(spoiled).values():
        norm.running_mean += 0.5
        norm.running_var *= 2
    found = recalibrate(spoiled, dense, of(x), of(others))
    assert (found["count"], found["share"], found["held_out"]) == (2, 1.0, 64)
    assert found["error"]["after"] < 0.1 * found["error"]["before"]
    assert of(others).error(spoiled, dense) == pytest.approx(found["error"]["after"])


def test_what_would_hurt_is_left_alone():
    """Inputs of another kind give other statistics, and the held-out ones say no."""
    dense = net()
    same = copy.deepcopy(dense)
    same[0].weight.data *= 1.001
    before = copy.deepcopy(same.state_dict())
    found = recalibrate(same, dense, of(-5 * torch.randn(64, 3, 8, 8)), of(2 + torch.randn(64, 3, 8, 8)))
    assert found["share"] == 0.0
    assert found["error"]["after"] == found["error"]["before"]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), same.state_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_a_cut_module_is_recalibrated_where_it_helps_and_says_so():
    """Without least squares the norms see other means. What is held out is in no statistic."""
    model, x, others = net(), 2 + torch.randn(128, 3, 8, 8), of(2 + torch.randn(128, 3, 8, 8))

    def cut(x, **options):
        return shrink_module(model, [(x,)], "params=0.4x", "magnitude", refit=False, multiple=4, **options)

    with_it, report = cut(x)
    without, other = cut(x, recalibrated=False)
    few, said = cut(x[:15])
    assert report["batch_norms"]["share"] > 0
    assert report["batch_norms"]["held_out"] == 16
    assert other["batch_norms"] == {"count": 2, "share": 0.0}
    assert said["batch_norms"]["why"] == "too few examples to hold some out"
    assert set(few[1].running_mean.tolist()) < set(model[1].running_mean.tolist())
    assert not set(with_it[1].running_mean.tolist()) & set(model[1].running_mean.tolist())
    assert others.error(with_it, model) < 0.95 * others.error(without, model)
