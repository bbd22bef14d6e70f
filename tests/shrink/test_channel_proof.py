"""What the proof must not take for shown."""

import copy

import torch
from torch import nn

from secateurs import shrink_module
from secateurs.shrink.proof import Proof, prove
from secateurs.shrink.trace import trace


class OneNumber(nn.Module):
    """Two groups of eight channels, both of them counted by one attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c = 8
        self.a, self.b, self.d, self.e = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        h = self.a(x).view(len(x), -1, self.c).relu()
        h = self.b(h).reshape(len(x), -1, self.c).relu()
        return self.e(self.d(h).relu())


def test_two_groups_that_one_attribute_counts_stay_and_others_go():
    model, x = OneNumber().eval(), torch.randn(100, 4, 6)
    found = trace(model, (x[:2],))
    assert [s.attribute for s in found.sizes if s.guessed] == []
    proven = prove(model, found, (x[:2],))
    assert [g.name for g in proven.groups] == ["d"]
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=1)
    assert [r["group"] for r in report["groups"]] == ["d"]
    assert small.c == 8


class Hidden(OneNumber):
    """The second group is counted where no operator is given the number."""

    def forward(self, x):
        h = self.a(x).view(len(x), -1, self.c).relu()
        h = self.b(h).relu()
        h = h * torch.ones(self.c)
        return self.e(self.d(h).relu())


def test_a_number_that_fits_two_groups_by_chance_is_not_shown():
    """Groups of one size lose different numbers of units."""
    model, x = Hidden().eval(), torch.randn(100, 4, 6)
    proven = prove(model, trace(model, (x[:2],)), (x[:2],))
    assert len({"a", "b"} & {g.name for g in proven.groups}) <= 1
    small, _ = shrink_module(model, [(x,)], "params=0.8x", multiple=1)
    assert small(x).shape == (100, 4, 3)


def test_what_is_left_is_shown_to_go_together(monkeypatch):
    """Of four groups "2" cannot go, and "0" not together with "4": each half without "2" can, and what is left of both cannot."""
    layers = [nn.Linear(6, 6) for _ in range(5)]
    model, x = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())]), torch.randn(2, 6)
    found = trace(model, (x,))
    assert [g.name for g in found.groups] == ["0", "2", "4", "6"]

    def why_not(proof, graph, removed):
        gone = {g.name for g in graph.groups if set(g.units.tolist()) & set(removed)}
        return "no" if "2" in gone or {"0", "4"} <= gone else None

    monkeypatch.setattr(Proof, "why_not", why_not)
    proven = prove(model, found, (x,))
    assert [g.name for g in proven.groups] == ["0"]
    assert proven.fixed["2"] == "no"
    assert proven.fixed["4"] == proven.fixed["6"] == "no, together with others"


class Bounded(nn.Module):
    """A width, and three numbers that equal it and mean something else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.longest, self.width, self.kernel, self.steps = 16, 16, (16, 3), 16
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        if x.shape[1] > self.longest:
            raise ValueError("too long")
        return self.b(self.a(x).relu().view(len(x), -1, self.width))


def test_an_attribute_that_equals_a_width_by_chance_stays():
    model, x = Bounded().eval(), torch.randn(100, 4, 6)
    small, report = shrink_module(model, [(x,)], "params=0.6x", multiple=1)
    left = report["groups"][0]["after"]
    assert left < 12
    assert (small.width, small.longest, small.kernel, small.steps) == (left, 16, (16, 3), 16)
    assert [s for s in report["cut"]["sizes"] if s[0] == ""] == [["", "width", None, left]]
    assert small(torch.randn(2, 12, 6)).shape == (2, 12, 3)


class Chaos(nn.Module):
    """In training the last digits of its numbers decide the outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b((1e15 * y).sin() if self.training else y)


def test_a_mode_in_which_rounding_decides_is_left_out_and_said():
    model, x = Chaos().eval(), torch.randn(2, 3, 8, 8)
    found = prove(model, trace(model, (x,)), (x,))
    assert {g.name: len(g.units) for g in found.groups} == {"a": 8}
    assert found.proof["modes"] == ["eval"]
    assert found.proof["missing"] == ["train mode"]


def test_the_module_is_copied_a_few_times_whatever_is_tried(monkeypatch):
    """Copies are what the analysis of a deep network costs most: one that is moved, one with zeros, one that is cut, two more."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 16, 16)
    found, whole, seen = trace(model, (x,)), copy.deepcopy, []

    def counted(value, memo=None):
        if memo is None:
            seen.append(type(value))
        return whole(value, memo)

    monkeypatch.setattr(copy, "deepcopy", counted)
    assert [g.name for g in prove(model, found, (x,)).groups] == ["0"]
    copies = seen.count(nn.Sequential)
    assert 3 <= copies <= 8, copies


class Dropping(nn.Module):
    """Attention that drops weights at random, which has other numbers to draw for fewer heads."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 4, dropout=0.5, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_attention_is_shown_without_dropout():
    model, x = Dropping().eval(), torch.randn(2, 5, 8)
    found = prove(model, trace(model, (x,)), (x,))
    assert {g.name: len(g.units) for g in found.groups} == {"attention": 4, "attention.out_proj": 8}
    assert found.proof["modes"] == ["eval", "train"]
