"""Nominal against realizable: the textbook's exercise, published machines, measured profiles."""

import pytest

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError
from secateurs.decide.plan import DecidePlan
from secateurs.decide.realize import Candidate, machine_named, rank, realize, usual
from secateurs.machine.hardware import HARDWARE
from secateurs.machine.profile import DeviceProfile
from secateurs.quality.settings import Evaluation


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


@pytest.mark.parametrize(
    ("text", "kind", "pattern", "sparsity", "grid"),
    [
        ("int4", "mask", "unstructured", 0.0, "int4/64"),
        ("int4/128", "mask", "unstructured", 0.0, "int4/128"),
        ("0.5+int8", "mask", "unstructured", 0.5, "int8/64"),
        ("2:4+int4/row/asymmetric", "mask", "2:4", 0.5, "int4/row/asymmetric"),
        ("16x16:0.5+q4_0", "mask", "16x16", 0.5, "q4_0"),
        ("shrink:mlp+heads:params=0.8x+int4", "shrink", "", 0.0, "int4/64"),
        ("bits=3.3", "bits", "", 0.0, "None"),
    ],
)
def test_candidates_have_bits(text, kind, pattern, sparsity, grid):
    found = Candidate.parse(text)
    assert (found.kind, found.pattern, found.sparsity, str(found.grid)) == (kind, pattern, sparsity, grid)
    assert found.plain == text.startswith("int")


@pytest.mark.parametrize("text", ["0.5+int7", "int4+int4", "dense+int4", "bits=3+int4", "bits=", "0.5+", "+int4+"])
def test_bits_that_cannot_be_are_refused(text):
    with pytest.raises(PlanError, match="cannot read candidate|unknown grid|bits=B with B"):
        plan_for(text)


def plan_for(text):
    return DecidePlan("m", Evaluation(gates=("ppl<=+5%",)), (text,))


def test_plans_of_candidates_say_their_bits():
    plan = plan_for("2:4+int4/128")
    asked = plan.plan_of(Candidate.parse("2:4+int4/128"))
    assert (asked.pattern, asked.sparsity, str(asked.layer_grids[0])) == ("2:4", 0.5, "int4/128")
    assert [c.text for c in plan.parsed] == ["int8", "int4", "2:4+int4/128"]
    plain = plan.plan_of(plan.parsed[0])
    assert (plain.sparsity, str(plain.layer_grids[0])) == (0.0, "int8/64")
    assert str(plan.plan_of(Candidate.parse("0.5+q4_0")).layer_grids[0]) == "q4_0"
    assert str(plan.plan_of(Candidate.parse("int3/row/asymmetric")).layer_grids[0]) == "int3/row/asymmetric"
    assert plan.plan_of(Candidate.parse("bits=3.3")).budgeted == ("bits", 3.3)
    # what a smaller model is held against is the decision's to say
    assert plan.plan_of(Candidate.parse("shrink:params=0.8x+int4")).evaluation.gates == ()


def test_milder_is_less_of_the_same():
    def milder(a, b):
        return Candidate.parse(a).milder(Candidate.parse(b))

    for a, b in (
        ("0.5", "0.7"), ("0.5", "0.5+int8"), ("0.5+int8", "0.5+int4"), ("int8", "int4"), ("int4", "2:4+int4"), ("int8", "0.5+int4"),
        ("shrink:params=0.8x", "shrink:params=0.8x+int4"), ("int4", "shrink:params=0.8x+int4"), ("bits=4", "bits=3"),
    ):  # fmt: skip
        assert milder(a, b)
        assert not milder(b, a)
    # more zeros and more bits, other kinds of zeros, other groups
    for a, b in (
        ("0.5+int4", "0.7+int8"),
        ("0.5", "2:4"),
        ("0.4", "2:4"),
        ("int4", "int4/128"),
        ("int4", "bits=3"),
        ("int4", "0.5+int8"),
    ):
        assert not milder(a, b)
        assert not milder(b, a)


def on_integers():
    rows = [
        {"dtype": "bf16", "grid": "int4/64", "kernel": kernel, "tokens": t, "sparsity": s, "speedup": v, "over_integers": o}
        for kernel, t, s, v, o in (
            ("dense_int4", 1, 0.0, 4.0, 1.0), ("dense_int4", 256, 0.0, 0.5, 1.0), ("bitmask_int4", 1, 0.5, 3.6, 0.9),
            ("bitmask_int4", 256, 0.5, 0.5, 1.0), ("bitmask_int4", 1, 0.9, 8.0, 2.0), ("bitmask_int4", 256, 0.9, 0.5, 1.0),
        )
    ]  # fmt: skip
    return DeviceProfile("here", machine(), 1e10, {"bf16": 1e11}, rows, {"device": None})


def test_integers_are_worth_what_their_rows_say():
    dense = of("int4", on_integers())
    # 4 bits and a scale of 16 for 64 weights
    assert (dense.nbytes, dense.decode, dense.prefill) == pytest.approx((4.25 / 16, 1 / 4, 2.0))
    # half of them zeros: all integers are faster, so they are stored
    half = of("0.5+int4", on_integers())
    assert (half.nbytes, half.decode, half.kernel) == (dense.nbytes, dense.decode, "integers")
    assert not half.pays_beside(dense)
    assert "is 0.90x as fast for one token as all integers, and takes 0.76x the bytes" in half.why
    most = of("0.9+int4", on_integers())
    assert (most.nbytes, most.decode, most.kernel) == (pytest.approx((1 + 0.4 + 0.25) / 16), 1 / 8, "bitmask")
    assert most.pays_beside(dense)
    smaller = of("shrink:params=0.8x+int4", on_integers())
    assert (smaller.nbytes, smaller.decode) == pytest.approx((0.8 * 4.25 / 16, 0.8 / 4))
    # of a mixture: between the bits that were measured and 16
    assert of("bits=10", on_integers()).decode == pytest.approx((1 / 4 + 1) / 2)
    with pytest.raises(PlanError, match="no row for int8 beside bf16; run `secateurs probe --dtype bf16 --bits 8`"):
        of("int8", on_integers())


def test_a_profile_without_integers_leaves_them_out_and_says_so():
    found, said = usual(profile(**{"0.5": (1.6, 1.0)}), "bf16")
    assert not any(c.grid for c in found)
    assert (
        said
        == "here has no rows for 0.5+int8, 0.7+int4, 2:4+int4, int4, int8 beside bf16; `secateurs probe` measures them"
    )
    found, said = usual(on_integers(), "bf16")
    assert {c.text for c in found if c.grid} == {"int4", "2:4+int4", "0.7+int4"}
    assert usual(HARDWARE["a100"], "bf16")[1] is None


def test_published_machines_have_no_integer_kernels_to_count():
    there = of("int4", "a100")
    assert (there.nbytes, there.decode) == (pytest.approx(4.25 / 16), 1.0)
    assert "no figure is published for integer kernels on a100" in there.why
    assert not of("0.5+int4", "a100").pays_beside(there)
    assert of("int4", "avx2").decode == pytest.approx(4.25 / 16)
