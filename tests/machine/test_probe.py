import json

import pytest
import torch
from command import fails, run

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError
from secateurs.kernels import dispatch, semi_structured
from secateurs.machine import timing
from secateurs.machine.probe import Question, check, probe, read_shapes, shapes_of
from secateurs.machine.profile import DeviceProfile, default_file
from secateurs.machine.timing import Timing, dense_runs, interleaved
from secateurs.matrix.grids import parse

SMALL = ["--shapes", "64x128", "--tokens", "1,20", "--sparsity", "0.5", "--dtype", "fp32"]


def test_probe_answers_every_cell_and_the_textbook(tmp_path):
    file = tmp_path / "profile.json"
    data = json.loads(run("probe", *SMALL, "--out", file, "--json")[0])
    assert json.loads(file.read_text()) == data
    profile = DeviceProfile.read(file)
    packed = [r for r in profile.rows if r["kernel"].startswith("bitmask_fp32")]
    assert {(r["pattern"], r["sparsity"], r["tokens"]) for r in packed} == {
        (p, 0.5, t) for p in ("unstructured", "2:4") for t in (1, 20)
    }
    for row in packed:
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["dense_seconds"] == min(row["all_dense_seconds"].values())
        assert ("no gain" in row["verdict"]) == (row["speedup"] < 1.05)
    integers = [r for r in profile.rows if r.get("grid")]
    assert {(r["grid"], r["pattern"], r["sparsity"], r["tokens"]) for r in integers} == {
        (f"int{b}/64", *cell, t)
        for b in (8, 4) for cell in (("dense", 0.0), ("unstructured", 0.5), ("2:4", 0.5)) for t in (1, 20)
    }  # fmt: skip
    for row in integers:
        assert row["kernel"].startswith("dense_int" if row["pattern"] == "dense" else "bitmask_int")
        assert row["integers"].startswith("dense_" + row["grid"].partition("/")[0])
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        assert row["over_integers"] == pytest.approx(row["integers_seconds"] / row["seconds"])
        # a scale for 64 inputs, two groups of them, and 64 bytes behind the last integer; of half of them also a bit a position
        bits = int(row["grid"][3])
        held = bits if row["pattern"] == "dense" else 1 + bits / 2
        # the integers of a row and word begin at a byte
        assert 0 <= row["nbytes"] - (64 * 128 * held / 8 + 64 * 2 * 2 + 64) <= 64 * 2 / 2
    stored = {r["pattern"]: r for r in profile.rows if r["kernel"] == "stored densely"}
    assert stored["unstructured"]["sparsity"] == 0.95
    assert "needs a packed format" in stored["unstructured"]["verdict"]
    assert "sparse tensor cores" in stored["2:4"]["verdict"]
    assert profile.bytes_per_second > 1e8
    assert set(profile.flops_per_second) == {"bf16", "fp16", "fp32"}
    assert profile.machine["kernels"]


def test_probe_prints_a_table(tmp_path):
    text, _ = run("probe", *SMALL, "--out", tmp_path / "p.json")
    assert "GB/s from memory" in text
    assert "64x128" in text
    assert "stored densely: no gain: stored as zeros and multiplied as numbers" in " ".join(text.split())
    assert "GPU: " in text


def test_probe_takes_the_shapes_of_a_model(tmp_path, llama):
    found = json.loads(
        run("probe", llama, "--tokens", "1", "--pattern", "2:4", "--out", tmp_path / "p.json", "--json")[0]
    )
    assert {tuple(r["shape"]) for r in found["rows"]} == {(64, 32), (32, 64), (32, 32)}


def test_shapes_that_hold_most_weights_are_probed(llama):
    # of three blocks: gate and up 12288 weights, q and o 6144, down 6144, k and v 3072
    assert shapes_of(str(llama), 4) == ((64, 32), (32, 32), (32, 64), (16, 32))
    assert shapes_of(str(llama), 1) == ((64, 32),)


def test_pack_reads_the_profile_that_probe_left(tmp_path, monkeypatch, llama):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    assert DeviceProfile.at_hand() is None
    run("probe", *SMALL)
    profile = DeviceProfile.at_hand()
    assert profile is not None
    assert run("pack", llama, "--out", tmp_path / "packed", "--json")[0].count(profile.name) >= 1
    # of another machine
    DeviceProfile(**{**vars(profile), "machine": {**profile.machine, "processor": "Z80"}}).write(default_file())
    assert DeviceProfile.at_hand() is None


def test_bad_questions_are_one_sentence(tmp_path, capsys, llama):
    out = ["--out", tmp_path / "p.json"]
    for arguments, words in (
        (["--shapes", "11008"], "shapes '11008' cannot be read"),
        (["--shapes", "0x12"], "shape 0x12 cannot be measured"),
        (["--sparsity", "1.5"], "sparsity 1.5 is not a fraction"),
        (["--sparsity", "half"], "sparsity 'half' cannot be read"),
        (["--tokens", "0"], "0 tokens cannot be measured"),
        (["--bits", "7"], "integers of 7 bits cannot be measured; known: 8, 6, 5, 4, 3, 2"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: bf16, fp16, fp32"),
        (["--pattern", "4:2"], "unknown pattern '4:2'"),
        (["--pattern", "2:4", "--shapes", "8x9"], "pattern 2:4 on 8x9"),
    ):
        assert words in fails(capsys, 2, "probe", *arguments, *out)
    assert "no folder" in fails(capsys, 1, "probe", tmp_path / "none", *out)
    assert not (tmp_path / "p.json").exists()


def test_speedups_between_sparsities_by_hand():
    rows = [
        {"dtype": "bf16", "sparsity": s, "tokens": t, "kernel": k, "speedup": v}
        for s, t, k, v in (
            (0.5, 1, "bitmask_a", 1.6), (0.5, 1, "bitmask_a", 1.8), (0.9, 1, "bitmask_a", 4.7),
            (0.5, 256, "bitmask_b", 0.9), (0.95, 1, "stored densely", 1.0),
        )
    ]  # fmt: skip
    profile = DeviceProfile("m", {}, 1.0, {}, rows, {})
    assert profile.speedup("bf16", 0.5, 1) == pytest.approx(1.7)
    # half of 1 / 1.7 and 1 / 4.7 each
    assert profile.speedup("bf16", 0.7, 1) == pytest.approx(2 / (1 / 1.7 + 1 / 4.7))
    assert profile.speedup("bf16", 0.99, 1) == pytest.approx(4.7)
    # a fifth of the way from a dense layer to one at 50%
    assert profile.speedup("bf16", 0.1, 2) == pytest.approx(1 / (0.8 + 0.2 / 1.7))
    assert profile.speedup("bf16", 0.0, 1) == 1.0
    assert profile.speedup("bf16", 0.6, 500) == pytest.approx(0.9)


def test_two_of_four_have_rows_of_their_own():
    rows = [
        {"dtype": "bf16", "grid": "int8/64", "kernel": k, "sparsity": 0.5, "tokens": t, "speedup": 1.0, "over_integers": v}
        for k, t, v in (("dense_int8", 1, 1.0), ("bitmask_int8_pairs", 1, 1.5), ("bitmask_int8_stream", 1, 0.5),
                        ("bitmask_int8_tile", 64, 0.9))
    ]  # fmt: skip
    profile, grid = DeviceProfile("m", {}, 1.0, {}, rows, {}), parse("int8")
    assert profile.speedup("int8", 0.5, 1, pairs=True) == pytest.approx(1.5)
    assert profile.speedup("int8", 0.5, 1) == pytest.approx(0.5)
    # many tokens have one kernel for all
    assert profile.speedup("int8", 0.5, 64, pairs=True) == profile.speedup("int8", 0.5, 64) == pytest.approx(0.9)
    assert [profile.leaves_zeros_out("bf16", grid, 0.5, pairs) for pairs in (True, False)] == [True, False]
    assert [profile.relative("bf16", grid, 0.5, 1, pairs) for pairs in (True, False)] == pytest.approx([1 / 1.5, 1.0])


def test_seconds_of_integers_by_hand():
    def row(grid, kernel, sparsity, tokens, speedup, over=1.0):
        return {"dtype": "bf16", "grid": grid, "kernel": kernel, "sparsity": sparsity, "tokens": tokens, "speedup": speedup,
                "over_integers": over}  # fmt: skip

    rows = [
        row("int8/64", "dense_int8", 0.0, 1, 1.5), row("int8/64", "dense_int8", 0.0, 1, 2.5), row("int8/64", "dense_int8", 0.0, 64, 0.8),
        row("int8/64", "bitmask_int8", 0.5, 1, 3.0, 1.25), row("int8/64", "bitmask_int8", 0.5, 64, 0.4, 0.5),
        row("int4/64", "dense_int4", 0.0, 1, 4.0), row("int4/64", "bitmask_int4", 0.5, 1, 3.6, 0.9),
        row("int4/64", "bitmask_int4", 0.9, 1, 6.0, 1.5),
        {"dtype": "bf16", "kernel": "bitmask_bf16", "sparsity": 0.5, "tokens": 1, "speedup": 1.6},
    ]  # fmt: skip
    profile = DeviceProfile("m", {}, 1.0, {}, rows, {})
    int8, int4 = parse("int8"), parse("int4/128")
    # the median of two shapes, 1 / 1.5 and 1 / 2.5
    dense = (1 / 1.5 + 1 / 2.5) / 2
    assert profile.relative("bf16", int8, 0.0, 1) == pytest.approx(dense)
    assert profile.relative("bf16", int8, 0.5, 1) == pytest.approx(dense / 1.25)
    # what is stored without zeros for the sake of one token is so for many
    assert profile.relative("bf16", int8, 0.5, 64) == pytest.approx(1 / 0.8 / 0.5)
    # half of int4 without its zeros is slower: pack stores all integers; so are few zeros, which take more bytes
    assert profile.relative("bf16", int4, 0.5, 1) == pytest.approx(1 / 4)
    assert profile.relative("bf16", int8, 0.1, 1) == pytest.approx(dense)
    assert profile.relative("bf16", int4, 0.9, 1) == pytest.approx(1 / 4 / 1.5)
    assert profile.leaves_zeros_out("bf16", int4, 0.9)
    assert not profile.leaves_zeros_out("bf16", int4, 0.5)
    # rows of integers are none of bf16's
    assert profile.relative("bf16", None, 0.5, 1) == pytest.approx(1 / 1.6)
    assert profile.relative("bf16", parse("int3"), 0.0, 1) is None
    assert profile.relative("fp32", int8, 0.0, 1) is None


def test_more_zeros_are_never_promised_less():
    """A slow moment of the machine is not a property of 70%."""
    rows = [
        {"dtype": "bf16", "sparsity": s, "tokens": 1, "kernel": "bitmask_a", "speedup": v}
        for s, v in ((0.5, 1.3), (0.7, 0.9), (0.9, 2.0))
    ]
    profile = DeviceProfile("m", {}, 1.0, {}, rows, {})
    assert [profile.speedup("bf16", s, 1) for s in (0.5, 0.7, 0.9)] == pytest.approx([1.3, 1.3, 2.0])
    # that packed layers are slower at 50% is believed
    slow = DeviceProfile("m", {}, 1.0, {}, [{**rows[0], "speedup": 0.8}], {})
    assert slow.speedup("bf16", 0.5, 1) == pytest.approx(0.8)
    assert profile.speedup("fp32", 0.5, 1) is None


def test_a_bad_profile_is_one_sentence(tmp_path):
    file = tmp_path / "p.json"
    for text, words in (
        ("{", "is not a profile"),
        ("[]", "is not a profile"),
        ('{"format": 7}', "another profile format"),
    ):
        file.write_text(text)
        with pytest.raises(DeviceError, match=words):
            DeviceProfile.read(file)


def test_a_machine_of_many_threads_has_a_rate():
    from secateurs.kernels.dispatch import kernels
    from secateurs.kernels.library import library

    kernel = next(k for k in kernels() if not k.lacks and k.strategy == "tile")
    alone = library().secateurs_spin(kernel.index, 10, 1)
    assert alone > 0
    assert library().secateurs_spin(kernel.index, 10, 96) == 96 * alone


def test_interleaved_takes_turns():
    order = []
    found = interleaved({"a": [lambda: order.append("a")] * 2, "b": [lambda: order.append("b")]}, rounds=3)
    assert order == ["a", "a", "b"] * 4
    assert (found["a"].samples, found["b"].samples) == (6, 3)
    assert Timing.of([3, 1, 2]).seconds == 2


def test_a_hopeless_run_is_timed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def taking(seconds):
        return [lambda: now.__setitem__(0, now[0] + seconds)]

    runs = {"slow": taking(0.02), "fast": taking(0.001), "ours": taking(0.02)}
    found = interleaved(runs, rounds=4, droppable={"slow", "fast"})
    assert {n: t.samples for n, t in found.items()} == {"slow": 1, "fast": 4, "ours": 4}
    assert found["slow"].seconds == pytest.approx(0.02)


def test_every_dense_way_is_timed():
    weights = [torch.randn(32, 64).bfloat16() for _ in range(2)]
    ours = {k.strategy for k in dispatch.kernels() if k.format == "dense" and k.dtype == "bf16" and not k.lacks}
    for tokens, strategies in ((1, {"stream"}), (16, {"stream", "tile"}), (64, {"tile"})):
        x = torch.randn(tokens, 64).bfloat16()
        runs = dense_runs(weights, x)
        assert {"torch bfloat16", "torch float32"} <= runs.keys()
        assert {n.rsplit("_")[-1] for n in runs if n.startswith("dense_")} == strategies & ours
        assert all(len(copies) == 2 for copies in runs.values())
        # each is a product of its own copy
        for copies in runs.values():
            for multiply, weight in zip(copies, weights, strict=True):
                assert torch.allclose(multiply().view(tokens, 32).float(), x.float() @ weight.float().T, atol=0.3)


def test_a_profile_of_fewer_kernels_is_of_another_machine(monkeypatch):
    here = {**machine(), "kernels": [k.name for k in dispatch.kernels() if not k.lacks]}
    assert DeviceProfile("m", here, 1.0, {}, [], {}).of_here
    assert not DeviceProfile("m", {**here, "kernels": here["kernels"][1:]}, 1.0, {}, [], {}).of_here
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert not DeviceProfile("m", here, 1.0, {}, [], {}).of_here


def test_a_profile_of_other_threads_is_of_another_machine():
    here = {**machine(), "kernels": [k.name for k in dispatch.kernels() if not k.lacks]}
    assert not DeviceProfile("m", {**here, "threads": here["threads"] + 1}, 1.0, {}, [], {}).of_here


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    call = dispatch.Call.__call__
    monkeypatch.setattr(dispatch.Call, "__call__", lambda self, x, kernel=None: call(self, x, kernel) * 1.1)
    with pytest.raises(DeviceError, match="is wrong on 8x64, 1 tokens"):
        probe(Question(shapes=((8, 64),), tokens=(1,), patterns=("2:4",)))


def test_inputs_rounded_to_8_bits_are_not_taken_for_a_wrong_kernel():
    """The rows of small matrices are four, eight times over; their products may be more than 2% off by that rounding alone."""
    torch.manual_seed(0)
    far = 0
    for _ in range(400):
        weight = torch.randn(4, 32).repeat(8, 1)
        x = torch.randn(1, 32)
        step = x.abs().max() / 127
        rounded = (x / step).round() * step
        want, found = x @ weight.T, rounded @ weight.T
        far += float((found - want).norm() / want.norm()) > 0.02
        check("dense_int8_scalar_stream", found, weight, x)
        with pytest.raises(DeviceError, match="is wrong on 32x32, 1 tokens"):
            check("dense_int8_scalar_stream", found * 1.1, weight, x)
        with pytest.raises(DeviceError, match="is wrong on 32x32, 1 tokens"):
            check("dense_fp32_scalar_stream", want * 1.02, weight, x)
    assert far


def test_gpus_say_why_not():
    reason = semi_structured.lacks()
    assert reason is None or "CUDA" in reason or "2:4" in reason
    row = next(k for k in dispatch.kernels() if k.isa == "cuda")
    assert reason is None or row.accepts(None, 1) == reason


def test_shapes_are_read():
    assert read_shapes("2x3, 11008x4096") == ((2, 3), (11008, 4096))
    with pytest.raises(PlanError):
        read_shapes("2x")
