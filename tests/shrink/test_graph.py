"""Which channels go together in a traced module, and that taking dead ones out changes nothing."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateurs.base.errors import PlanError
from secateurs.shrink import graph
from secateurs.shrink.proof import prove
from secateurs.shrink.readers import Reader, Watched
from secateurs.shrink.trace import trace


class Squeeze(nn.Module):
    """Channel attention."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Net(nn.Module):
    """A residual sum, a concatenation, a grouped, a depthwise and a multiplied depthwise convolution, attention, a flat end."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.widen, self.each, self.narrow = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.Conv2d(12, 8, 1),
        )
        self.squeeze = Squeeze(12)
        self.left, self.right = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(8, 4, 3, stride=2, padding=1)
        self.grouped, self.more = (
            nn.Conv2d(10, 12, 3, padding=1, groups=2),
            nn.Conv2d(12, 24, 3, groups=12, padding="same"),
        )
        self.slope = nn.PReLU(24)
        self.hidden, self.out = nn.Linear(24 * 16, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.narrow(self.squeeze(F.relu6(self.each(self.widen(x)))))
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = self.slope(self.more(F.relu(self.grouped(x))))
        x = F.relu(self.hidden(torch.flatten(x, 1)))
        return self.out(x)


@pytest.fixture
def net():
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    model.slope.weight.data.uniform_(0, 0.5)
    return model, (torch.randn(2, 3, 8, 8),)


def test_the_groups_are_these(net):
    model, example = net
    found = trace(model, example)
    sizes = {group.name: len(group.units) for group in found.groups}
    # left's 6 and right's 4 are read in two halves, place p of both together: 0 and 5 are left's, 1 to 4 go with one of right's
    assert sizes == {"stem": 8, "widen": 12, "squeeze.down": 4, "left": 1, "left'": 4, "grouped": 6, "hidden": 10}
    assert set(found.fixed) == {"out"}
    names = {graph.layer_of(found.axes[i].tensor) for i in found.groups[0].axes}
    assert names == {"stem", "norm", "narrow", "widen", "left", "right"}


def test_dead_units_can_go_and_costs_are_true(net):
    model, example = net
    found = trace(model, example)
    counts = {group.name: len(group.units) for group in found.groups}
    for group in found.groups:
        whole = copy.deepcopy(model)
        units = [0, 2] if len(group.units) > 2 else []
        graph.kill(whole, found, group.units[units].tolist())
        with torch.no_grad():
            expected = whole(*example)
        smaller = copy.deepcopy(whole)
        graph.cut(smaller, found, group.units[units].tolist())
        with torch.no_grad():
            torch.testing.assert_close(smaller(*example), expected, rtol=1e-4, atol=1e-5)
        left = {**counts, group.name: len(group.units) - len(units)}
        assert found.parameters(model).at(left) == sum(p.numel() for p in smaller.parameters())
        again = trace(smaller, example)
        all_left = {g.name: len(g.units) for g in again.groups}
        assert found.macs(model).at(left) == again.macs(smaller).at(all_left)
        assert found.macs(model).saved(counts, group.name, [left[group.name]]) == pytest.approx(
            [found.macs(model).at(counts) - found.macs(model).at(left)]
        )


def test_multiply_adds_by_hand(net):
    model, example = net
    found = trace(model, example)
    convolutions = (27 * 8 + 8 * 12 + 9 * 12 + 12 * 8) * 64 + 2 * 12 * 4
    halves = (72 * 10 + 45 * 12 + 9 * 24) * 16
    counts = {group.name: len(group.units) for group in found.groups}
    assert found.macs(model).at(counts) == convolutions + halves + 384 * 10 + 50


def test_two_steps_are_one(net):
    model, example = net
    found = trace(model, example)
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    graph.cut(once, found, [int(g.units[i]) for g in found.groups if len(g.units) > 3 for i in (0, 1)])
    for _ in range(2):
        here = trace(twice, example)
        graph.cut(twice, here, [int(g.units[0]) for g in here.groups if len(g.units) > 2])
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(once(*example), twice(*example), rtol=0, atol=0)


@pytest.mark.parametrize(("module", "x"), [
    (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), torch.randn(2, 6, 9, 9)),
    (nn.Conv2d(6, 8, (3, 2), padding="same", dilation=2), torch.randn(2, 6, 9, 9)),
    (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), torch.randn(2, 6, 5, 5)),
    (nn.Conv1d(6, 4, 5, padding=2), torch.randn(2, 6, 9)),
    (nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2), torch.randn(2, 4, 5, 6, 3)),
    (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, dilation=2), torch.randn(2, 4, 5)),
    (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2), torch.randn(2, 6, 5, 4)),
    (nn.Linear(6, 3), torch.randn(2, 6)),
    (nn.Linear(6, 3), torch.randn(2, 5, 4, 6)),
])  # fmt: skip
def test_unfolded_times_matrices_is_the_layer(module, x):
    calls = []
    with Watched(lambda call, weight: calls.append(call)), torch.no_grad():
        expected = module(x)
    (call,) = calls
    groups = getattr(module, "groups", 1)
    reader = Reader("weight", call.kind, np.arange(6), "bias", groups)
    parts = call.unfolded(reader, 1000, torch.Generator())
    got = (
        torch.cat([part @ m.T for part, m in zip(parts, reader.matrices(module.weight), strict=True)], 2) + module.bias
    )
    torch.testing.assert_close(got.flatten(0, 1).T, reader.rows(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(reader.weight_of(reader.matrices(module.weight), module.weight), module.weight)


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM])
def test_a_recurrent_layer_reads_its_inputs_and_its_state_before_each_step(make):
    module, x = make(3, 4, batch_first=True), torch.randn(2, 5, 3)
    calls = {}
    with Watched(lambda call, weight: calls.setdefault(id(weight), call)), torch.no_grad():
        out, _ = module(x)
    state = calls[id(module.weight_hh_l0)]
    (seen,) = state.unfolded(Reader("weight_hh_l0", "state", np.arange(4)), 1000, torch.Generator())
    torch.testing.assert_close(seen, torch.cat([torch.zeros(2, 1, 4), out[:, :-1]], 1), rtol=0, atol=0)
    (seen,) = state.unfolded(Reader("weight_ih_l0", "inputs", np.arange(3)), 1000, torch.Generator())
    torch.testing.assert_close(seen, x, rtol=0, atol=0)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.again(self.again(self.first(x))))


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.a(x).view(x.size(0), 16))


class WrittenLast(Written):
    """The batch's place is left open, the width is not."""

    def __init__(self, reshape):
        super().__init__()
        self.reshape = reshape

    def forward(self, x):
        return self.b(self.reshape(self.a(x)))


class Padded(Written):
    """A shortcut that pads channels."""

    def forward(self, x):
        a = self.a(x) + F.pad(x, (0, 0, 0, 0, 0, 1))
        return self.b(a.flatten(1))


class Shuffled(Written):
    def forward(self, x):
        a = self.a(x)
        a = a.view(-1, 2, 2, 2, 2).transpose(1, 2).reshape(a.shape)
        return self.b(a.flatten(1))


class Branching(Written):
    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class OverExamples(nn.Module):
    """A mean over the batch: what was axis 1 is axis 0 after it, or examples are no longer apart."""

    def __init__(self, mean):
        super().__init__()
        self.a, self.b, self.mean = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), mean

    def forward(self, x):
        return self.b(self.mean(self.a(x)))


@pytest.mark.parametrize(("model", "why"), [
    (Written(), r"shape '\[2, 16\]' is invalid"),
    (WrittenLast(lambda x: x.view(-1, 16)), "mat1 and mat2 shapes cannot be multiplied"),
    (WrittenLast(lambda x: x.reshape((-1, 16))), "mat1 and mat2 shapes"),
    (WrittenLast(lambda x: torch.reshape(x, shape=(x.size(0), 16))), "shape '"),
    (WrittenLast(lambda x: x.flatten(1)[:, torch.arange(15, -1, -1)]), "index, which picks it by its place"),
    (WrittenLast(lambda x: torch.fft.fft(x, dim=0).real.flatten(1)), "fft_fft, which is not known to keep channels apart"),
    (Padded(), "add takes it together with one that stays"),
    (Shuffled(), "without it the module gives something else"),
    (OverExamples(lambda x: x.mean(0).flatten(1)), "it is the model's output"),
    (OverExamples(lambda x: (x * x.mean(1, keepdim=True)).mean((2, 3))), "mul takes it with every one of several"),
    (OverExamples(lambda x: (x.softmax(1)).mean((2, 3))), "softmax takes all of its channels together"),
    (OverExamples(lambda x: F.layer_norm(x.mean((2, 3)), (4,))), "layer_norm takes all of its channels together"),
])  # fmt: skip
def test_what_cannot_be_shown_stays_whole(model, why):
    example = (torch.randn(2, 3, 2, 2),)
    found = prove(model, trace(model, example), example)
    assert found.groups == []
    assert re.search(why, found.fixed["a"])
    assert sum(found.standing(model).values()) == pytest.approx(sum(m.weight.numel() for m in (model.a, model.b))
                                                                / sum(p.numel() for p in model.parameters()))  # fmt: skip


class Unused(Written):
    """A layer that is called, and whose outputs are multiplied by zero."""

    def forward(self, x):
        return x.mean((2, 3)) + self.b(self.a(x).flatten(1)).sum() * 0


def test_what_no_output_changes_with_is_not_cut():
    model, example = Unused(), (torch.randn(2, 3, 2, 2),)
    found = trace(model, example)
    assert [g.name for g in found.groups] == ["a"]
    assert "no output changes with it" in prove(model, found, example).fixed["a"]


@pytest.mark.parametrize("mean", [
    lambda x: x.mean((0, 2)).t(), lambda x: (x - x.mean(0, keepdim=True)).mean((2, 3)), lambda x: x.mean((2, 3)).t().t(),
    lambda x: torch.einsum("ncij,ncij->nc", x, x), lambda x: torch.stack([x, x.abs()], 2).amax((2, 3, 4)),
    lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).unbind(1)[2], lambda x: F.max_pool2d(x, 2)[:, :, 0, 0],
])  # fmt: skip
def test_channels_are_followed_wherever_they_go(mean):
    model, example = OverExamples(mean), (torch.randn(2, 3, 2, 2),)
    found = prove(model, trace(model, example), example)
    assert {g.name: len(g.units) for g in found.groups} == {"a": 4}


@pytest.mark.parametrize(
    "reshape",
    [lambda x: x.view(x.size(0), -1), lambda x: torch.reshape(x, (x.shape[0], -1)), lambda x: torch.flatten(x, 1)],
)
def test_a_width_that_follows_may_change(reshape):
    found = trace(WrittenLast(reshape), (torch.randn(2, 3, 2, 2),))
    assert [group.name for group in found.groups] == ["a"]


def test_what_is_called_twice_is_counted_as_it_is():
    model, example = Shared(), (torch.randn(2, 4),)
    found = prove(model, trace(model, example), example)
    assert [(g.name, len(g.units)) for g in found.groups] == [("first", 6)]
    for count in (6, 4):
        assert found.parameters(model).at({"first": count}) == 5 * count + count * (count + 1) + 2 * count + 2
        # first, again twice, last
        assert found.macs(model).at({"first": count}) == 4 * count + 2 * count * count + count * 2
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    found = trace(tied, example)
    assert found.parameters(tied).at({}) == sum(p.numel() for p in tied.parameters())
    assert found.macs(tied).at({}) == 16 + 16 + 8


def test_tied_layers_stay_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    found = trace(model, (torch.randn(2, 4),))
    assert found.fixed["2"] == "2 and 0 share a parameter"
    assert [group.name for group in found.groups] == []


def test_untraceable_and_emptied():
    with pytest.raises(PlanError, match="Branching cannot be traced by torch.export: .*data-dependent"):
        trace(Branching(), (torch.randn(2, 3, 2, 2),))
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    found = trace(model, (torch.randn(2, 4),))
    with pytest.raises(PlanError, match="all channels of 0 would go"):
        graph.cut(model, found, found.groups[0].units.tolist())


def test_each_reason_why_layers_stay_is_said_once():
    assert (
        graph.whole({"a": "no", "b": "it reads", "c": "no", "d": "no"})
        == "; a and 2 others stay whole: no; b stays whole: it reads"
    )
    many = {f"{i}": f"why {i % 7}" for i in range(9)}
    assert graph.whole(many).endswith("; 4 stays whole: why 4; 2 more for 2 more reasons")


class Standardized(nn.Conv2d):
    """A convolution whose weight is made of another in each pass."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_a_layer_whose_weight_is_computed_says_so():
    found = trace(nn.Sequential(Standardized(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), (torch.randn(2, 3, 4, 4),))
    assert found.fixed["0"] == "it has a conv2d with a weight that is computed"
    assert found.groups == []
