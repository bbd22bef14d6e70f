import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import process
import pytest
import torch

from secateurs.base import device
from secateurs.machine.bench import Variant, _that_fit, bench, dense_variants, variants_of


def test_an_emulated_model_is_run_in_every_better_way(monkeypatch, tmp_path, llama):
    shutil.copytree(llama, tmp_path / "bf16")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "bf16" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    monkeypatch.setattr("secateurs.machine.bench.compute_dtype", lambda dtype: torch.float32)
    assert [v.name for v in dense_variants(str(llama))] == ["dense"]
    found = [(v.name, v.how, v.dtype) for v in dense_variants(str(tmp_path / "bf16"))]
    assert found == [("dense, fp32", "dense", "float32"), ("dense, our kernels", "accelerated dense", None)]


def test_a_shrunk_model_meets_the_same_rivals(monkeypatch, tmp_path, llama):
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((llama / "config.json").read_text())
    for folder in ("model", "dense"):
        shutil.copytree(llama, tmp_path / folder, dirs_exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (tmp_path / "plan.json").write_text(json.dumps({"model": str(tmp_path / "dense"), "units": ["mlp"]}))
    for computed, ways in (
        (torch.float32, [("dense", "float32"), ("accelerated dense", None), ("accelerated dense", None)]),
        (torch.bfloat16, [("dense", None), ("dense", None)]),
    ):
        monkeypatch.setattr("secateurs.machine.bench.compute_dtype", lambda dtype, computed=computed: computed)
        found = variants_of(tmp_path)
        assert [(v.how, v.dtype) for v in found] == ways
        assert found[-1].name == "shrunk"


def test_speedups_are_over_the_fastest_dense_way(llama):
    ways = [Variant("a", str(llama), "dense"), Variant("b", str(llama), "accelerated dense")]
    rows = bench(ways, (4,), new=3, repeats=2)["variants"]
    seconds = [4 / r["prefill"]["tokens_per_second"] + 2 / r["decode"]["tokens_per_second"] for r in rows]
    assert seconds[0] <= seconds[1]
    assert rows[0]["decode"]["speedup"] == rows[0]["prefill"]["speedup"] == 1


def test_a_way_that_memory_has_no_room_for_is_left_out_with_a_word(monkeypatch, llama):
    nbytes = sum(f.stat().st_size for f in llama.glob("*.safetensors"))
    ways = [Variant("wide", str(llama), "dense", "float32"), Variant("ours", str(llama), "accelerated dense")]
    for room, names in ((3 * nbytes, ["wide", "ours"]), (3 * nbytes - 1, ["ours"])):
        monkeypatch.setattr("secateurs.machine.bench.machine", lambda room=room: {"memory_bytes": room})
        kept, left_out = _that_fit(ways)
        assert [v.name for v in kept] == names
        assert len(left_out) == 2 - len(names)
    assert "wide was not run: all ways together take" in left_out[0]
    # a model's only way is tried
    assert _that_fit(ways[:1]) == (ways[:1], [])


def test_a_limit_is_in_the_report():
    code = "from secateurs.base.device import machine; print(machine()['limits'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**device.os.environ, "SECATEURS_MAX_ISA": "avx2"},
        capture_output=True,
        text=True,
    )
    assert "'SECATEURS_MAX_ISA': 'avx2'" in found.stdout


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="no /proc here to compare with")
def test_memory_is_in_bytes():
    here = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
    there = 1024 * int(re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert device.machine()["memory_bytes"] == pytest.approx(there, rel=0.05)
    # the kernel counts pages in lots
    assert 0.95 * here <= device.peak_memory() <= there


def test_memory_is_what_the_control_group_may_have(tmp_path):
    groups = tmp_path / "sys/fs/cgroup"
    (groups / "user/box").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/box\n")
    assert device._allowed(tmp_path) == []
    (groups / "user/box/memory.max").write_text("max\n")
    (groups / "user/memory.max").write_text("3000000000\n")
    assert device._allowed(tmp_path) == [3000000000]
    # in a container
    (groups / "memory.max").write_text("2000000000\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert device._allowed(tmp_path) == [2000000000]
    # the first version has a tree for memory
    (groups / "memory").mkdir()
    (groups / "memory/memory.limit_in_bytes").write_text("1000000000\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/box\n1:cpu:/\n")
    assert device._allowed(tmp_path) == [1000000000]
    assert 0 < device.memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_HOLES = """
import torch
from secateurs.base.device import return_at_once

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024

return_at_once()
# by itself glibc would keep what is smaller than this from now on
torch.ones(4 << 20)
before = held()
pairs = [(torch.ones(1 << 20), torch.ones(1000)) for _ in range(16)]
kept = [small for _, small in pairs]
del pairs
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux")
def test_freed_tensors_leave_no_holes():
    """16 tensors of 4 MB between small ones that stay."""
    done = process.execute(_HOLES, MALLOC_ARENA_MAX=1)
    assert done.code == 0, done.error
    assert int(done.out) < 16
