"""llama.cpp's own times, as bench's workers give them: a package that states them stands in for llama.cpp."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from secateurs.base.errors import PlanError
from secateurs.machine import llama_cpp
from secateurs.machine.bench import Variant, _nbytes


@pytest.fixture
def file(tmp_path):
    """A model of 3 blocks with 2 KV heads of 8 numbers for 4 query heads; 60 words, 96 positions."""
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(3)
    writer.add_context_length(96)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_tensor("token_embd.weight", np.zeros((60, 32), np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return tmp_path / "model.gguf"


@pytest.fixture
def asked(monkeypatch):
    """What the package was asked for; it says 200 ms for a prompt and 9 ms for all new tokens but the first."""
    said = {}

    class Server:
        def __init__(self, settings):
            said.setdefault("settings", []).append(settings)

        def handle_completions(self, request):
            said.setdefault("requests", []).append(request)
            later = 100.0 * said["requests"].index(request)
            return {
                "timings": {
                    "prompt_ms": 200.0 + later,
                    "predicted_ms": 9.0 + later,
                    "predicted_n": request["n_predict"],
                }
            }

    package = ModuleType(llama_cpp.PACKAGE)
    package.CommonParams = lambda: SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )
    package.__version__ = "1.2"
    package.get_system_info = lambda: "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | "
    package.Server, package.__spec__ = Server, ModuleSpec(llama_cpp.PACKAGE, None)
    monkeypatch.setitem(sys.modules, llama_cpp.PACKAGE, package)
    return said


def test_its_clock_is_read_by_hand(file, asked):
    seconds, facts = llama_cpp.load(str(file), 10)
    assert seconds(1, 16) == {"first": 0.2, "all": pytest.approx(0.209)}
    (request,) = asked["requests"]
    assert len(request["prompt"]) == 16
    assert max(request["prompt"]) < 60
    # a prompt of which it remembers a part would cost nothing, and an end of the text would end the run
    assert (request["n_predict"], request["cache_prompt"], request["ignore_eos"]) == (10, False, True)
    # keys and values of 3 blocks with 2 heads of 8 numbers, fp16
    assert (facts["kv_bytes_per_token"], facts["positions"]) == (2 * 3 * 2 * 8 * 2, 96)


def test_its_version_and_what_it_was_built_for_are_told(file, asked, monkeypatch):
    monkeypatch.setattr(llama_cpp, "cpu_flags", lambda: {"avx2", "avx512f"})
    _, facts = llama_cpp.load(str(file), 10)
    assert facts["engine"] == "llama.cpp of xllamacpp 1.2, built with SSE3, AVX2"
    assert facts["note"].startswith("llama.cpp of xllamacpp 1.2 is built without AVX-512, which this CPU has")
    monkeypatch.setattr(llama_cpp, "cpu_flags", lambda: {"avx2"})
    assert llama_cpp.load(str(file), 10)[1]["note"] is None


def test_it_has_the_threads_that_torch_has(file, asked):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        llama_cpp.load(str(file), 10)[0](1, 4)
    finally:
        torch.set_num_threads(threads)
    (settings,) = asked["settings"]
    assert (settings.cpuparams.n_threads, settings.cpuparams_batch.n_threads, settings.n_ctx) == (3, 3, 96)


def test_without_the_package_one_sentence_says_what_to_install(file, monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"model\.gguf runs in llama\.cpp.*pip install xllamacpp"):
        llama_cpp.load(str(file), 10)


def test_several_prompts_at_once_have_a_place_each_and_the_median_ones_time(file, asked):
    seconds, _ = llama_cpp.load(str(file), 10)
    found = seconds(3, 16)
    # prompts of 200, 300 and 400 ms, then 9, 109 and 209 ms for the other nine tokens
    assert found == {"first": 0.3, "all": pytest.approx(0.409)}
    assert len({tuple(r["prompt"]) for r in asked["requests"]}) == 3
    seconds(3, 16)
    assert [(s.n_parallel, s.n_ctx) for s in asked["settings"]] == [(3, 3 * 96)]


def test_a_gguf_weighs_what_its_file_does(file):
    assert _nbytes(Variant("llama.cpp", str(file), "llama.cpp")) == file.stat().st_size
