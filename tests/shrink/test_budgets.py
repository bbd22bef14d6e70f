"""What a smaller live module may cost: bytes, memory, time in an engine; and which layers it must leave."""

import itertools
import time

import pytest
import torch
from torch import nn

from secateurs import save_shrunk, shrink_module
from secateurs.base.errors import PlanError
from secateurs.shrink import engines
from secateurs.shrink.budget import LIVE, Budget
from secateurs.shrink.memory import Peak, moments, peak
from secateurs.shrink.widths import Widths


class Chain(nn.Module):
    """Of 1x8x8 images: tensors of 8, 32, 16 and 4 channels in turn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 32, 1)
        self.c, self.d = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


X = torch.randn(1, 1, 8, 8)
PLACE = 4 * 64


def test_moments_by_hand():
    """After each operator: what it made and what is still held. relu's input goes when its output is there."""
    assert moments(Chain(), (X,)) == [PLACE * n for n in (8, 16, 40, 64, 48, 32, 20)]


class Held(nn.Module):
    def forward(self, x):
        a = x + 1
        b = a.view(-1)[:32]
        c = a * 2
        del a
        # b is part of a's storage, which is still held
        d = (c * 2).relu_()
        return b, d


def test_a_storage_counts_once_and_while_a_view_of_it_is_held():
    assert moments(Held(), (X,)) == [PLACE * n for n in (1, 1, 1, 2, 3, 3)]


def cut(model, counts):
    sizes = [1, counts["a"], counts["b"], counts["c"], 4]
    out = Chain()
    for name, (inputs, outputs) in zip("abcd", itertools.pairwise(sizes), strict=True):
        setattr(out, name, nn.Conv2d(inputs, outputs, 1))
    return out


def test_the_peak_of_other_widths_is_what_they_measure():
    dense = {"a": 8, "b": 32, "c": 16}
    found = Peak.of(Chain(), (X,), dense, lambda counts: cut(Chain(), counts))
    for counts in (dense, {"a": 3, "b": 20, "c": 16}, {"a": 8, "b": 4, "c": 15}, {"a": 1, "b": 1, "c": 1}):
        assert found.at(counts) == peak(cut(Chain(), counts), (X,))
    # above 44 channels lie the moments of 64 and 48; a unit of b takes 2 from the first and 1 from the second, one of c 1
    found.limit = PLACE * 44
    assert found.saved(dense, "b", [30, 32]) == [PLACE * (4 + 2), 0.0]
    assert found.saved(dense, "c", [14]) == [PLACE * 2]
    assert found.saved(dense, "a", [4]) == [0.0]


def test_only_what_lies_in_a_moment_above_the_budget_is_cut():
    """Units of a cost nothing here, and their going would not lower the peak: 48 channels are allowed, and only b makes more."""
    dense = {"a": 8, "b": 32, "c": 16}
    found = Peak.of(Chain(), (X,), dense, lambda counts: cut(Chain(), counts))
    bound = Budget.parse("memory=0.75x", tuple(LIVE))
    widths = Widths(bound, 1, dense, found, found.at(dense), {}, dict.fromkeys(dense, 1))
    curves = {"a": [0.0] * 8, "b": [float(n) for n in range(32)], "c": [float(n) for n in range(16)]}
    counts, tried = widths.choose(curves, lambda counts: found.at(counts) / found.at(dense), lambda *_: None)
    assert counts == {"a": 8, "b": 24, "c": 16}
    assert [t["ratio"] for t in tried] == [0.75]


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_a_memory_budget_is_met_and_measured():
    model = Chain().eval()
    small, report = shrink_module(model, [(torch.randn(64, 1, 8, 8),)], "memory=0.6x", multiple=4)
    assert report["memory"] == {"dense": PLACE * 64, "left": peak(small, (X,))}
    assert 0.5 * PLACE * 64 <= report["memory"]["left"] <= 0.6 * PLACE * 64
    # b makes the peak; a is in no moment that is above the budget
    assert {r["group"] for r in report["groups"]} <= {"b", "c"}
    with pytest.raises(PlanError, match="multiples of 8 the smallest shape is 0.250x"):
        shrink_module(model, [(torch.randn(64, 1, 8, 8),)], "memory=0.2x")


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_bytes_count_buffers_and_dtypes(tmp_path):
    """As the file has them: here half of the first layer's bytes are in 16 bits."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 1)
    )
    model.register_buffer("table", torch.zeros(1000, dtype=torch.int64))
    x = torch.randn(64, 1, 8, 8)
    small, report = shrink_module(model.eval(), [(x,)], "bytes=0.6x", multiple=1)
    for kind, module in (("dense", model), ("left", small)):
        assert report["bytes"][kind] == sum(t.nbytes for t in module.state_dict().values())
    assert 0.55 * report["bytes"]["dense"] < report["bytes"]["left"] <= 0.6 * report["bytes"]["dense"]
    file = save_shrunk(small, report, tmp_path / "small.safetensors")
    assert report["bytes"]["left"] < file.stat().st_size < report["bytes"]["left"] + 4000


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1),
        nn.ReLU(), nn.Conv2d(32, 3, 1),
    ).eval()  # fmt: skip


def kept(budget, **options):
    torch.manual_seed(1)
    x = torch.randn(48, 1, 8, 8)
    small, report = shrink_module(net(), [(x,)], budget, multiple=options.pop("multiple", 1), **options)
    return [small[i].out_channels for i in (0, 2, 4)], report


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_macs_is_another_name_of_flops():
    (widths, one), (others, other) = kept("macs=0.5x"), kept("flops=0.5x")
    assert widths == others
    assert one["macs"] == other["macs"]
    assert 0.47 * one["macs"]["dense"] < one["macs"]["left"] <= 0.5 * one["macs"]["dense"]


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_layers_are_left_alone_and_bounded_by_glob():
    free, _ = kept("macs=0.4x")
    assert free[1] < 24
    assert free[2] < 32
    left, report = kept("macs=0.4x", skip=["2"])
    assert left[1] == 24
    assert report["kept_whole"]["2"] == "skip leaves 2 alone"
    assert kept("macs=0.4x", bounds={"2": 0.75})[0][1] >= 18
    # the most counts where the budget alone would keep more
    few, _ = kept("macs=0.9x", bounds={"4": (0.25, 0.5)})
    assert 8 <= few[2] <= 16
    assert kept("macs=0.6x", bounds={"[024]": (0.5, 1)}, multiple=4)[0] >= [8, 12, 16]


@pytest.mark.parametrize(("options", "words"), [
    ({"skip": ["haed.*"]}, "no layer is called 'haed.*'"),
    ({"bounds": {"2": (0.8, 0.5)}}, "bounds of '2' are 0.8 to 0.5"),
    ({"bounds": {"2": (0.7, 0.72)}, "multiple": 8}, "no width of 2 from 17 to 17 is a multiple of 8"),
    ({"bounds": {"*": 0.9}}, "the smallest shape is"),
    ({"engine": "tensorrt"}, "unknown engine 'tensorrt'; write torch, onnxruntime, openvino"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_a_sentence(options, words):
    with pytest.raises(PlanError, match=words):
        kept("macs=0.5x", **options)


def test_an_engine_that_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(PlanError, match="engine openvino needs openvino: pip install openvino"):
        engines.check("openvino")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, image, scale):
        return {"boxes": self.body(image) * scale}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_session_computes_what_the_module_does(engine):
    """What is timed is the module, with all of its inputs, in as many threads as torch has here."""
    pytest.importorskip(engine)
    model, example = Named().eval(), (torch.randn(1, 1, 8, 8), torch.full((1, 1, 1, 1), 3.0))
    run = engines.ENGINES[engine][0](model, example)
    out = run()
    found = out[0]
    # OpenVINO computes in bf16 where the CPU has it
    close = {"rtol": 1e-4, "atol": 1e-5} if engine == "onnxruntime" else {"rtol": 0.05, "atol": 0.02}
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(*example)["boxes"], **close)


@pytest.mark.filterwarnings("ignore:.* saw little")
def test_latency_is_measured_in_the_engine_that_is_asked_for(monkeypatch):
    """Time is the number of parameters that the session's file holds; the search and the report see that alone."""
    pytest.importorskip("onnxruntime")
    made = []

    def session(module, example):
        made.append(sum(p.numel() for p in module.parameters()))
        return made[-1]

    def against(self, left, seconds=0.0):
        ratio = 0.1 + 0.9 * self.make(left, self.example) / self.dense
        return 1.0, ratio, ratio

    monkeypatch.setitem(engines.ENGINES, "onnxruntime", (session, ()))
    monkeypatch.setattr(engines.Stopwatch, "against", against)
    _, report = kept("latency=0.7x", engine="onnxruntime")
    assert report["latency"]["engine"] == "onnxruntime"
    assert 0.6 < report["latency"]["ratio"] <= 0.707
    # the same widths are timed at the end
    assert report["latency"]["predicted"] == report["latency"]["ratio"]
    assert made[-1] == report["parameters"]["left"]


class Sleeps(nn.Module):
    def forward(self, x):
        time.sleep(0.01)
        return x


@pytest.mark.parametrize(("threads", "waits"), [(1, False), (2, True)])
def test_with_one_thread_waiting_takes_no_time(threads, waits):
    """Whoever has the CPU in between does not count; with several threads only the clock on the wall knows them all."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        dense, left, ratio = engines.measure(Sleeps(), nn.Identity(), (X,))
    finally:
        torch.set_num_threads(before)
    assert (dense >= 0.01) == waits
    assert left < 0.01
    assert not waits or ratio < 0.5
