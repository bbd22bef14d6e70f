"""A live module to fewer channels, under a budget."""

import copy
import warnings

import pytest
import torch
from test_graph import Branching, Net, Written
from torch import nn
from torch.nn.utils import parametrizations, prune

from secateurs import save_shrunk, shrink_module
from secateurs.base.errors import OutputError, PlanError
from secateurs.shrink import engines, graph
from secateurs.shrink.export import export
from secateurs.shrink.spread import Seen, Spread
from secateurs.shrink.trace import trace


@pytest.fixture
def net():
    model = Net().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model, [(torch.randn(256, 3, 8, 8),) for _ in range(4)]


def distance(model, other, batches):
    with torch.no_grad():
        return sum(float((model(*b) - other(*b)).square().mean()) for b in batches)


@pytest.mark.parametrize("budget", ["params=0.6x", "flops=0.5x"])
def test_the_budget_is_met_and_the_report_is_true(net, budget):
    model, batches = net
    before = copy.deepcopy(model.state_dict())
    small, report = shrink_module(model, batches, budget, multiple=2)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert type(small) is Net
    for kind, module in (("dense", model), ("left", small)):
        assert report["parameters"][kind] == sum(p.numel() for p in module.parameters())
        found = trace(module, (batches[0][0][:1],))
        assert report["macs"][kind] == found.macs(module).at({g.name: len(g.units) for g in found.groups})
    key, most = ("parameters", 0.6) if budget.startswith("params") else ("macs", 0.5)
    assert 0.75 * most < report[key]["left"] / report[key]["dense"] <= most
    assert all(r["after"] == r["before"] - len(r["removed"]) and r["after"] % 2 == 0 for r in report["groups"])
    assert small(*batches[0]).shape == (256, 5)
    assert report["kept_whole"] == {"out": "it is the model's output"}


def test_dead_channels_cost_nothing(net):
    """The search finds them, and the result computes what the dense module does."""
    model, batches = net
    found = trace(model, (batches[0][0][:1],))
    for group in found.groups:
        if len(group.units) >= 4:
            graph.kill(model, found, group.units[::2].tolist())
    small, report = shrink_module(model, batches, "flops=0.5x", multiple=1, damping=1e-4)
    assert report["estimated_loss"] < 1e-4
    assert distance(model, small, batches) < 1e-5 * distance(model, lambda x: 0, batches)


@pytest.mark.parametrize("criterion", ["magnitude", "energy", "taylor", "obs"])
def test_refit_pays_whatever_goes(net, criterion):
    model, batches = net
    with_refit, without = (
        shrink_module(model, batches, "flops=0.6x", criterion, refit, multiple=2)[0] for refit in (True, False)
    )
    assert distance(model, with_refit, batches) < 0.7 * distance(model, without, batches)


def test_obs_is_better_than_magnitude(net):
    model, batches = net
    obs, size = (shrink_module(model, batches, "flops=0.6x", c, multiple=2)[0] for c in ("obs", "magnitude"))
    assert distance(model, obs, batches) < distance(model, size, batches)


def test_a_consumer_is_least_squares_with_an_intercept():
    """One hidden layer: what is left of the last layer is torch's own least squares on the dense outputs."""
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(400, 6)
    small, report = shrink_module(model, [(x,)], "params=0.7x", multiple=4, damping=1e-7)
    with torch.no_grad():
        hidden = torch.cat([small[1](small[0](x)), torch.ones(400, 1)], 1)
        expected = torch.linalg.lstsq(hidden.double(), model(x).double()).solution.T.float()
    torch.testing.assert_close(torch.cat([small[2].weight, small[2].bias[:, None]], 1), expected, rtol=1e-3, atol=1e-3)
    # the search is that of all 12 choose 4 or near it: no other subset's refit is much better
    assert report["groups"][0]["after"] == 8


def test_the_intercept_moves_a_batch_norm_s_mean():
    """A consumer without a bias: what stands behind its batch norm is least squares with an intercept, and no bias is added."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)
    ).eval()
    model[3].running_mean.normal_()
    model[3].weight.data.uniform_(1, 2)
    x = torch.randn(40, 2, 4, 4)
    # the second group stays whole: 5 channels have no smaller multiple of 4 but 4
    small, report = shrink_module(model, [(x,)], "params=0.75x", multiple=4, damping=1e-7, recalibrated=False)
    assert [(r["group"], r["after"]) for r in report["groups"]] == [("0", 8)]
    assert small[2].bias is None
    assert not torch.equal(small[3].running_mean, model[3].running_mean)
    with torch.no_grad():
        hidden = small[1](small[0](x)).transpose(0, 1).flatten(1).T
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
        target = model[:4](x).transpose(0, 1).flatten(1).T.double()
        expected = hidden @ torch.linalg.lstsq(hidden, target).solution
        got = small[:4](x).transpose(0, 1).flatten(1).T.double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


class OneNorm(nn.Module):
    """Two layers without a bias that read the same channels and feed the same batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 12), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.a, self.b = nn.Linear(12, 5, bias=False), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu())


def test_a_batch_norm_of_two_layers_takes_the_intercept_of_neither():
    model, x = OneNorm().eval(), torch.randn(400, 6)
    # the norm's own 5 channels have no smaller multiple of 8
    small, report = shrink_module(model, [(x,)], "params=0.8x", multiple=8, damping=1e-7, recalibrated=False)
    assert [(r["group"], r["after"]) for r in report["groups"]] == [("first", 8)]
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    with torch.no_grad():
        hidden = torch.cat([small.first(x).relu(), torch.ones(400, 1)], 1).double()
        for name in ("a", "b"):
            got, want = getattr(small, name), getattr(model, name)(model.first(x).relu())
            expected = torch.linalg.lstsq(hidden, want.double()).solution.T.float()
            torch.testing.assert_close(torch.cat([got.weight, got.bias[:, None]], 1), expected, rtol=1e-3, atol=1e-3)
    assert (
        report["parameters"]["left"]
        == sum(p.numel() for p in small.parameters())
        <= 0.8 * report["parameters"]["dense"]
    )


class Joined(nn.Module):
    """Two groups that one layer reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(12, 4)

    def forward(self, x):
        return self.c(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))


def test_the_second_group_is_chosen_on_what_the_first_left():
    """Of a consumer of both: whichever of b's units costs least when a's are gone, by least squares of every candidate."""
    model = Joined().eval()
    x = torch.randn(300, 5)
    small, report = shrink_module(model, [(x,)], "params=0.85x", multiple=5, damping=1e-6)
    removed = {r["group"]: r["removed"] for r in report["groups"]}
    assert set(removed) == {"a", "b"}
    with torch.no_grad():
        hidden = torch.relu(torch.cat([model.a(x), model.b(x)], 1))
        target = model(x).double()

    # outputs count by the gradients of the model's own samples; here all of its last layer's
    def error(gone):
        kept = torch.tensor([i for i in range(12) if i not in gone])
        design = torch.cat([hidden[:, kept], torch.ones(300, 1)], 1).double()
        left = design @ torch.linalg.lstsq(design, target).solution - target
        return float((left.square() * weigh).sum())

    chance = model(x).detach().softmax(1)
    weigh = (chance * (1 - chance)).mean(0).double()
    first = removed["a"][0]
    errors = [error({first, 6 + i}) for i in range(6)]
    # sampled labels weigh outputs a little differently
    assert errors[removed["b"][0]] <= 1.05 * min(errors)
    assert sorted(errors)[1] > 1.05 * min(errors)
    with torch.no_grad():
        design = torch.relu(torch.cat([small.a(x), small.b(x)], 1))
        design = torch.cat([design, torch.ones(300, 1)], 1).double()
        expected = design @ torch.linalg.lstsq(design, target).solution
        torch.testing.assert_close(small(x).double(), expected, rtol=1e-2, atol=1e-3)


class Pooled(nn.Module):
    """Two channels: one is read at 64 places and averaged, the other is averaged and read at one."""

    def __init__(self):
        super().__init__()
        self.make = nn.Conv2d(2, 2, 1, bias=False)
        self.fine, self.coarse = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)
        with torch.no_grad():
            self.make.weight.copy_(torch.eye(2)[..., None, None])
            self.fine.weight.copy_(torch.tensor([[2.0, 0.0]])[..., None, None])
            self.coarse.weight.copy_(torch.tensor([[0.0, 1.0]])[..., None, None])

    def forward(self, x):
        x = self.make(x)
        return self.fine(x).mean((2, 3)) + self.coarse(nn.functional.adaptive_avg_pool2d(x, 1)).flatten(1)


def test_a_reader_of_many_places_counts_by_all_of_them():
    """Of independent places both readers give what their weights say: 2 is worth four times as much as 1."""
    _, report = shrink_module(Pooled().eval(), [(torch.randn(256, 2, 8, 8),)], "params=0.7x", multiple=1)
    assert [(r["group"], r["removed"]) for r in report["groups"]] == [("make", [1])]


class Smooth(nn.Module):
    """Twelve channels of images that change slowly, of which a 3 by 3 convolution reads 108 numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.read, self.out = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.read(self.stem(x).relu()).relu().mean((2, 3)))


def smooth(count):
    return nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=(12, 12), mode="bilinear") + torch.randn(
        count, 3, 1, 1
    )


def test_eight_images_are_enough_to_start_and_are_said_to_be_few():
    """What least squares learns of them holds for others: it is far ahead of what needs no images."""
    model, few, others = Smooth().eval(), smooth(8), [(smooth(256),)]
    with pytest.warns(
        UserWarning, match=r"2 of 2 layers saw little: .* saw 8 examples, \d+ places worth about \d+ ind"
    ):
        small, report = shrink_module(model, [(few,)], "params=0.7x", multiple=2)
    with pytest.warns(UserWarning, match="saw little"):
        blind, _ = shrink_module(model, [(few,)], "params=0.7x", "magnitude", refit=False, multiple=2)
    assert set(report["little_data"]) == {"read.weight", "out.weight"}
    assert "saw 8 examples, 1152 places worth about" in report["little_data"]["read.weight"]
    assert not any(said.endswith(" 0% of their correlations is noise") for said in report["little_data"].values())
    assert distance(model, small, others) < 0.3 * distance(model, blind, others)


def test_noise_that_rounds_to_nothing_is_not_warned_of(monkeypatch):
    seen = Seen(images=64, places=4096, worth=2000.0, numbers=576, share=0.0049)
    monkeypatch.setattr(Spread, "shrink", lambda self, *_: seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = shrink_module(Smooth().eval(), [(smooth(8),)], "params=0.7x", multiple=2)
    assert report["little_data"] == {}


def test_a_time_budget_is_met_by_measurement(net, monkeypatch):
    """Time is a known function of size here; the search sees only measurements."""
    model, batches = net
    dense = sum(p.numel() for p in model.parameters())

    def fake(self, other, seconds=0):
        ratio = 0.2 + 0.8 * sum(p.numel() for p in other.parameters()) / dense
        return 1.0, ratio, ratio

    monkeypatch.setattr(engines.Stopwatch, "against", fake)
    _, report = shrink_module(model, batches, "latency=0.7x", multiple=1)
    assert 0.63 <= report["latency"]["ratio"] <= 0.7 * 1.01
    assert 2 <= len(report["tried"]) <= 6
    with pytest.raises(PlanError, match="the smallest shape takes"):
        shrink_module(model, batches, "latency=0.21x", multiple=1)


@pytest.mark.parametrize(("make", "batches", "budget", "options", "words"), [
    (Net, None, "flops=0.01x", {}, "multiples of 8 the smallest shape is"),
    (Net, None, "seconds=0.5", {}, "cannot read budget"),
    (Net, None, "flops=1.2x", {}, "all of the dense model"),
    (Net, [], "flops=0.5x", {}, "no calibration inputs"),
    (Net, [torch.randn(4, 3, 8, 8)], "flops=0.5x", {}, r"one is a Tensor; write \(x,\) for x"),
    (Net, [{"x": torch.randn(4, 3, 8, 8)}], "flops=0.5x", {}, "one is a dict"),
    (Net, None, "flops=0.5x", {"criterion": "best"}, "unknown criterion 'best'"),
    (Written, [(torch.randn(3, 3, 2, 2),)], "flops=0.5x", {}, "has no channels that can go; .*a stays whole: without it the module fails: shape"),
    (Branching, [(torch.randn(3, 3, 2, 2),)], "flops=0.5x", {}, "cannot be traced"),
])  # fmt: skip
def test_bad_requests_are_refused_in_a_sentence(make, batches, budget, options, words):
    given = [(torch.randn(4, 3, 8, 8),)] if batches is None else batches
    with pytest.raises(PlanError, match=words):
        shrink_module(make(), given, budget, **options)


def test_a_module_is_shrunk_under_inference_mode_to_one_that_trains():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
    want, _ = shrink_module(model, [(x,)], "params=0.6x", multiple=1)
    with torch.inference_mode():
        got, _ = shrink_module(model, [(x.clone(),)], "params=0.6x", multiple=1)
    torch.testing.assert_close(got(x), want(x))
    got(x).sum().backward()
    assert got[0].weight.grad is not None


def computed(how, at):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    how(model[at])
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("how", "words"), [
    (parametrizations.weight_norm, "computed from it by WeightNorm; call torch.nn.utils.parametrize"),
    (parametrizations.orthogonal, "computed from it by Orthogonal"),
    (torch.nn.utils.weight_norm, "by WeightNorm before each call; call torch.nn.utils.remove_weight_norm"),
    (torch.nn.utils.spectral_norm, "by SpectralNorm before each call"),
    (lambda module: prune.l1_unstructured(module, "weight", 0.5), "call torch.nn.utils.prune.remove first"),
])  # fmt: skip
def test_a_weight_that_is_computed_from_another_is_refused_in_a_sentence(how, words, at):
    with pytest.raises(PlanError, match=rf"^{at}\..* cannot be cut: .*{words}"):
        shrink_module(computed(how, at), [(torch.randn(64, 4),)], "params=0.6x", multiple=1)


def test_files_shrink_as_the_module_does(tmp_path):
    """The archive, the ONNX file and the one that loads again: tensors are most of each."""
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 64, 3)
    ).eval()
    x = torch.randn(2, 3, 12, 12)
    small, report = shrink_module(model, [(x,)], "params=0.4x", "magnitude")
    left = report["parameters"]["left"] / report["parameters"]["dense"]
    assert left <= 0.4
    dense, less = (export(m, (x,), tmp_path / name) for m, name in ((model, "dense"), (small, "small")))
    for a, b in zip(dense, less, strict=True):
        assert b.stat().st_size < (left + 0.05) * a.stat().st_size + 20_000, b.name
    file = save_shrunk(small, report, tmp_path / "small.safetensors")
    assert 4 * report["parameters"]["left"] < file.stat().st_size < 4 * report["parameters"]["left"] + 5_000


def test_what_is_exported_computes_the_same(net, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batches = net
    small, _ = shrink_module(model, batches, "flops=0.5x", multiple=2)
    x = torch.randn(7, 3, 8, 8)
    files = export(small, (x[:1],), tmp_path / "out")
    assert [f.name for f in files] == ["model.pt2", "model.onnx"]
    with torch.no_grad():
        expected = small(x)
    torch.testing.assert_close(torch.export.load(files[0]).module()(x), expected)
    session = onnxruntime.InferenceSession(files[1])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(OutputError, match="is not empty"):
        export(small, (x,), tmp_path / "out")
    with pytest.raises(OutputError, match="Branching cannot be exported"):
        export(Branching(), (x,), tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Kept(nn.Module):
    """It keeps a scale for each channel from pass to pass in evaluation, with its gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(6, 16), nn.Parameter(torch.rand(16) + 0.5), nn.Linear(16, 3)
        self.kept = {}

    def train(self, mode=True):
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        if self.training or "scale" not in self.kept:
            self.kept["scale"] = self.scale * 2
        return self.b((self.a(x) * self.kept["scale"]).relu())


def test_what_a_module_keeps_between_passes_is_neither_used_nor_handed_on():
    """Two batches are run backward, and the table would be of the dense widths after the cut."""
    torch.manual_seed(0)
    model, batches = Kept().eval(), [(torch.randn(64, 6),), (torch.randn(64, 6),)]
    small, report = shrink_module(model, batches, "params=0.6x", multiple=1)
    assert model.kept == {}
    left = report["groups"][0]["after"]
    assert small.scale.shape == small.kept.get("scale", small.scale).shape == (left,)
    assert small(torch.randn(2, 6)).shape == (2, 3)


class Overwriting(nn.Module):
    """What its gradients need is overwritten in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.a(x).sigmoid().mul_(3))


def test_a_module_without_gradients_is_refused_in_a_sentence():
    with pytest.raises(
        PlanError, match="Overwriting gives no gradients, which say what a channel is worth: one of the variables"
    ):
        shrink_module(Overwriting().eval(), [(torch.randn(64, 6),)], "params=0.6x", multiple=1)
