"""Nominal against realizable: the textbook's exercise, published machines, measured profiles."""

import pytest

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError
from secateurs.decide.realize import Candidate, machine_named, rank, realize
from secateurs.machine.hardware import HARDWARE
from secateurs.machine.profile import DeviceProfile


def of(text, where="a100", dtype="bf16"):
    return realize(Candidate.parse(text), HARDWARE[where] if isinstance(where, str) else where, dtype)


def profile(**speedups):
    """speedups: '0.5': (for 1 token, for 256)."""
    rows = [
        {"dtype": "bf16", "kernel": "bitmask_bf16_x", "tokens": tokens, "sparsity": float(s), "speedup": value}
        for s, pair in speedups.items()
        for tokens, value in zip((1, 256), pair, strict=True)
    ]
    return DeviceProfile("here", machine(), 1e10, {"bf16": 1e11}, rows, {"device": None})


def test_the_textbook_exercise():
    # 90% unstructured without a sparse kernel, 2:4 with sparse tensor cores, 30% of the neurons gone
    texts = ("0.9", "2:4", "shrink:flops=0.7x")
    found = {text: of(text) for text in texts}
    assert [found[t].nominal_flops for t in texts] == pytest.approx([0.1, 0.5, 0.7])
    assert [found[t].flops for t in texts] == pytest.approx([1.0, 0.5, 0.7])
    # the variant with the most zeros comes last
    assert [w.candidate for w in rank([Candidate.parse(t) for t in texts], HARDWARE["a100"])] == [
        "2:4",
        "shrink:flops=0.7x",
        "0.9",
    ]
    assert not found["0.9"].pays
    assert "multiplies them" in found["0.9"].why


@pytest.mark.parametrize("name", HARDWARE)
def test_every_published_figure_has_a_source_and_none_is_a_measurement(name):
    hardware = HARDWARE[name]
    wanted = {"flops_per_second", "bytes_per_second"}
    wanted |= {"two_four prefill", "two_four decode"} if hardware.two_four else set()
    wanted |= {"bitmask"} if hardware.bitmask else set()
    assert set(hardware.sources) == wanted
    assert all(hardware.sources.values())
    assert not of("2:4", name).measured


def test_bytes_are_honest():
    # 2:4 stores half of the values and two bits for each: 0.5 * (1 + 2/16); ours a bit a weight: 0.5 + 1/16
    assert of("2:4").nbytes == pytest.approx(0.5625)
    assert of("0.5", "avx2").nbytes == pytest.approx(0.5625)
    assert of("0.9", "avx2", "fp32").nbytes == pytest.approx(0.1 + 1 / 32)
    # never more than dense
    assert of("0.01", "avx2").nbytes == 1.0


def test_a_measured_profile_says_what_packed_products_were_worth():
    here = profile(**{"0.5": (1.6, 0.97), "0.9": (4.0, 1.5)})
    half = of("0.5", here)
    assert half.measured
    assert half.decode == pytest.approx(1 / 1.6)
    assert half.prefill == pytest.approx(1 / 0.97)
    assert half.flops == 1.0
    # the seconds halfway between those at 50 and 90%
    assert of("0.7", here).decode == pytest.approx((1 / 1.6 + 1 / 4.0) / 2)


def test_where_packing_is_no_faster_it_is_left_dense():
    slow = of("0.5", profile(**{"0.5": (1.02, 0.9)}))
    assert (slow.decode, slow.prefill, slow.nbytes) == (1.0, 1.0, 1.0)
    assert not slow.pays
    assert "no faster here" in slow.why


def test_two_four_rows_of_a_gpu_win_over_packed_ones():
    here = profile(**{"0.5": (1.6, 1.0)})
    rows = [
        {"dtype": "bf16", "kernel": "nm24 cusparselt", "tokens": t, "sparsity": 0.5, "speedup": s}
        for t, s in ((1, 0.6), (4096, 1.6))
    ]
    # of a shape the faster backend, of shapes the median
    rows = [{**r, "shape": [4096, 4096]} for r in rows]
    for shape, name, fast in (
        ([1024, 1024], "cutlass", 0.9),
        ([1024, 1024], "cusparselt", 0.8),
        ([8192, 8192], "cutlass", 2.5),
    ):
        rows += [{**r, "shape": shape, "kernel": f"nm24 {name}", "speedup": fast} for r in rows[1:2]]
        rows += [{**r, "shape": shape, "kernel": f"nm24 {name}"} for r in rows[:1]]
    gpu = DeviceProfile("gpu", machine(), 1e12, {"bf16": 1e14}, here.rows + rows, {"device": "GPU"})
    found = of("2:4", gpu)
    assert found.kernel == "sparse tensor cores"
    # what is slower is not used
    assert (found.decode, found.prefill) == (1.0, pytest.approx(1 / 1.6))


def test_a_profile_without_the_dtype_says_what_to_run():
    with pytest.raises(PlanError, match="secateurs probe --dtype fp32"):
        of("0.5", profile(**{"0.5": (1.6, 1.0)}), "fp32")


@pytest.mark.parametrize(
    "text", ["", "1.5", "3:2", "shrink:", "shrink:latency=2x", "shrink:mlp:", "16x16", "unstructured", "half"]
)
def test_unreadable_candidates_are_refused(text):
    with pytest.raises(PlanError, match="cannot read|all of the dense"):
        Candidate.parse(text)


def test_width_and_depth_are_candidates():
    width = Candidate.parse("shrink:mlp+heads:params=0.8x")
    assert (width.units, width.budget, width.kept) == (("mlp", "heads"), "params=0.8x", 0.8)
    depth, usual = Candidate.parse("shrink:layers:params=0.8x"), Candidate.parse("shrink:params=0.7x")
    # more of one kind says nothing of another
    assert len({width.family, depth.family, usual.family}) == 3


@pytest.mark.parametrize("text", ["shrink:seconds=1.5", "shrink:mlp:seconds=1.5", "shrink:seconds=0.5"])
def test_nobody_knows_yet_what_a_budget_in_seconds_is_worth(text):
    assert of(text).pays
    assert Candidate.parse(text).kept == 1.0


def test_unknown_machines_are_refused():
    with pytest.raises(DeviceError, match="no profile 'b200'.*none of a100, h100"):
        machine_named("b200")
