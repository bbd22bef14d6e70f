"""tools/gpu_check.py, as far as a machine without a card can run it: its sections on the CPU, in small."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from secateurs.kernels.formats import layout_of, pack

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def log(script, tmp_path):
    return script.Log(tmp_path / "out.json", {"machine": {}})


def written(log):
    return json.loads(log.file.read_text())["results"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
def test_without_a_card_it_says_so_and_is_content(script, capsys, tmp_path):
    assert script.main(["--out", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out.startswith("Nothing was checked: ")
    assert not (tmp_path / "out.json").exists()


def test_it_runs_from_a_source_tree_without_kernels(tmp_path):
    """No metadata, no library: a copy of the sources is all there is."""
    program = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "Scikit" not in type(f).__name__]
sys.path.insert(0, {str(tmp_path)!r})
import importlib.metadata, torch
found = importlib.metadata.version
def version(name):
    if name == "secateurs":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
import secateurs as sc
from secateurs.base.device import machine
from secateurs.kernels.library import library
assert sc.__file__.startswith({str(tmp_path)!r}), sc.__file__
model = torch.nn.Sequential(torch.nn.Linear(16, 8))
report = sc.prune(model, sc.Plan(method="sparsegpt", pattern="2:4"), calibration=[{{"input": torch.randn(64, 16)}}])
sc.train.hold(model, torch.optim.AdamW(model.parameters())).masks
assert library.cache_info().misses == 0
assert report.machine["versions"]["secateurs"] == sc.__version__
try:
    sc.accelerate(model)
except sc.SecateursError as error:
    print(error)
"""
    (tmp_path / "secateurs").symlink_to(ROOT / "src" / "secateurs")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no libsecateurs_kernels.so in ")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("methods", [("sparsegpt",), ("magnitude", "wanda", "balanced")])
def test_masks_of_one_device_are_alike(script, log, methods, llama):
    """Of random weights, and of a folder."""
    script.masks(log, "cpu", llama if len(methods) > 1 else None, windows=4, seqlen=32, methods=methods)
    found = written(log)
    assert len(found) == 2 * len(methods)
    for row in found:
        assert row["status"] == "passed", row
        assert row["alike"] == 1
        assert row["error"] == row["error_cpu"] > 0


def test_masks_that_differ_fail(script, log, monkeypatch):
    real = script.pruned

    def wrong(model, ids, plan, device):
        found, errors, seconds = real(model, ids, plan, "cpu")
        return ({n: m.flip(0) for n, m in found.items()} if device == "card" else found), errors, seconds

    monkeypatch.setattr(script, "pruned", wrong)
    model = script.llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    script.compare(log, "x", model, script.tokens(2, 16, 512), script.sc.Plan(method="magnitude"), "card", 1.0, "")
    assert [r["status"] for r in written(log)] == ["failed"]


def test_a_block_pair_in_small(script, log):
    script.block_pair(log, "cpu", hidden=64, mlp=96, windows=2, seqlen=32)
    assert [r["status"] for r in written(log)] == ["passed"] * 3


def test_two_four_names_every_refusal(script, log):
    script.two_four(log, "cpu", shapes=((64, 128),), counts=(1, 32))
    found = {(r["dtype"], r["tokens"]): r for r in written(log)}
    assert len(found) == 6
    for (dtype, tokens), row in found.items():
        assert set(row["why_not"]) | set(row["seconds"]) == {"dense", "cusparselt", "cutlass"}
        assert ("dense" in row["seconds"]) == (dtype != "int8" or tokens == 32)
    assert found["int8", 1]["status"] == "skipped"
    assert "more than 16 tokens, asked for 1" in found["int8", 1]["text"]


def test_a_wrong_product_is_a_failure(script, log, monkeypatch):
    monkeypatch.setattr(script.semi_structured, "_sparse", lambda name, x, weights: [lambda: torch.zeros(32, 64)])
    script.two_four(log, "cpu", shapes=((64, 128),), counts=(32,))
    assert all(r["status"] == "failed" and "relative error 1" in r["text"] for r in written(log))


def test_zeros_are_held(script, log):
    script.held(log, "cpu", width=32, steps=30)
    found = written(log)
    assert [r["status"] for r in found] == ["passed"] * 4, found
    assert all(r["broken"] == 0 and r["last"] < r["first"] for r in found)


def test_zeros_that_move_are_seen(script):
    *_, broken, _ = script.trained("cpu", 32, 3, torch.bfloat16, False, False, hold=False)
    assert broken == 3


def test_kernels_are_checked_or_skipped(script, log):
    script.library(log)
    assert written(log)[0]["status"] in ("passed", "skipped")


@pytest.mark.parametrize("kind", ["int8 50%", "int8 dense", "int4 2:4", "int4 dense", "bf16 2:4"])
def test_what_is_stored_without_the_library_is_the_format(script, kind):
    weight, parts, layouts = script.stored((8, 128), kind)
    grid, masked = script.kinds()[kind][1:]
    scales = None
    if grid is not None:
        by_row = parts[2].transpose(1, 2).reshape(-1, parts[2].shape[1])
        scales = script.Scales(grid, by_row.view(grid.scale_dtype), None)
    want = pack(weight, "bitmask" if masked else "dense", scales)
    assert torch.equal(parts[0], want.values)
    assert (parts[1] is None and want.mask_PJ4 is None) or torch.equal(parts[1], want.mask_PJ4)
    assert layouts == layout_of((8, 128), grid)


def test_packed_layers_in_the_interpreter(script, log):
    script.packed(log, "cpu", shapes=((8, 128),), counts=(1, 17))
    script.packed_speed(log, "cpu", shapes=((4, 64),), counts=(17,), graph=False, rounds=1)
    script.decode(log, "cpu", layers=1, width=8, inner=8, graph=False, rounds=1)
    script.compiled(log, "cpu", backend="eager")
    found = written(log)
    count = len(script.kinds())
    assert [r["status"] for r in found] == ["passed"] * count + ["measured"] * count + ["passed"] * 2, found
    assert set(found[0]["errors"]) == {"few_tokens", "many_tokens", "expanded"}


def test_a_wrong_kernel_fails(script, log, monkeypatch):
    """And NaN, which is less than nothing."""
    for wrong in (0.0, torch.nan):
        monkeypatch.setitem(script.on_gpu.WAYS, "many_tokens", lambda m, x, bias, y, wrong=wrong: y.fill_(wrong))
        script.packed(log, "cpu", shapes=((4, 64),), counts=(1, 17))
    assert {r["status"] for r in written(log)} == {"failed"}


def test_a_failing_section_is_a_result_and_no_end(script, log, capsys):
    def broken():
        raise ValueError("no such thing")

    code = script.run(log, "cpu", [("a", broken), ("b", lambda: log.add("b", "measured", "fine"))])
    assert code == 1
    first, second = written(log)
    assert first["status"] == "failed"
    assert first["text"] == "ValueError: no such thing"
    assert "in broken" in "\n".join(first["traceback"])
    assert second["status"] == "measured"
    assert "1 failed" in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_up(script, tmp_path):
    log = script.Log(tmp_path / "out.json", {}, minutes=-1)
    script.held(log, "cpu")
    script.masks(log, "cpu", None, 1, 8)
    script.two_four(log, "cpu")
    script.block_pair(log, "cpu")
    script.packed(log, "cpu")
    script.packed_speed(log, "cpu")
    script.decode(log, "cpu")
    script.compiled(log, "cpu")
    assert [r["status"] for r in written(log)] == ["skipped"] * 8
