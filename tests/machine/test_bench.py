"""Tokens a second by hand: workers that state their seconds in place of processes that take them."""

import importlib
import json
import subprocess

import pytest
import tiny
import torch
from gridded import nearest, on_grid

from secateurs.base.errors import CheckpointError, PlanError
from secateurs.machine.bench import Variant, load
from secateurs.matrix.grids import parse
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.pack.folder import pack

module = importlib.import_module("secateurs.machine.bench")


class Stated:
    """A worker whose prompt of 8 takes 2 s and whose other tokens take 3 s; twice that for prompts of 16, half of it if it is packed.

    The machine is slower at times.
    """

    positions, engine, note = 128, None, None

    def __init__(self, variant, new):
        self.variant = variant
        self.share = {"packed": 0.5, "llama.cpp": 0.2}.get(variant.how, 1.0)
        # the first run warms up
        self.slower = {prompt: iter((50.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0)) for prompt in (8, 16, 64)}
        self.kv_bytes_per_token = 8

    def ready(self):
        pass

    def run(self, batch, prompt):
        seconds = self.share * next(self.slower[prompt]) * prompt / 8
        return {"first": 2 * seconds, "all": 5 * seconds}

    def finish(self):
        return 7

    def end(self):
        self.ended = True


@pytest.fixture
def ways(llama, monkeypatch):
    monkeypatch.setattr(module, "_Worker", Stated)
    return [Variant("dense", str(llama), "dense"), Variant("packed", str(llama), "packed")]


def test_rates_by_hand(ways):
    dense, packed = module.bench(ways, (8,), new=4, repeats=3, batches=(3,))["variants"]
    # three prompts of 8 tokens in 2 s; three tokens after the first one of each in 3 s
    assert (dense["prefill"]["tokens_per_second"], dense["decode"]["tokens_per_second"]) == (12, 3)
    assert (packed["prefill"]["tokens_per_second"], packed["decode"]["tokens_per_second"]) == (24, 6)
    assert dense["prefill"]["samples"] == [12, 6, 12]
    # both were slower at the same moment
    for stage in ("prefill", "decode"):
        assert [packed[stage][name] for name in ("speedup", "speedup_low", "speedup_high")] == [2, 2, 2]


def test_the_fastest_way_to_run_the_dense_weights_is_1x_in_whatever_engine(ways, llama):
    dense, packed = ways
    same = Variant("theirs", str(llama / "config.json"), "llama.cpp", weights=str(llama), rival=True)
    rounded = Variant("theirs, 4 bits", str(llama / "config.json"), "llama.cpp", rival=True)
    found = module.bench([dense, same, rounded, packed], (8,), new=4, repeats=3)["variants"]
    assert [r["name"] for r in found] == ["theirs", "dense", "theirs, 4 bits", "packed"]
    assert [r["same_weights"] for r in found] == [True, True, False, False]
    assert [r["rival"] for r in found] == [True, False, True, False]
    # Stated: the engine takes a fifth of the dense way's time, packed half
    assert [r["decode"]["speedup"] for r in found] == [1, pytest.approx(0.2), 1, pytest.approx(0.4)]


@pytest.mark.parametrize(("stage", "calls"), [("ready", 0), ("run", 0), ("run", 2), ("finish", 0)])
def test_a_rival_that_does_not_run_is_left_out_with_its_reason_and_another_way_is_an_error(
    ways, llama, monkeypatch, stage, calls
):
    def fails(self, *_):
        if self.variant.how == "compiled":
            self.called = getattr(self, "called", 0) + 1
            # the first run warms up, the second is timed
            if self.called > calls:
                raise CheckpointError("no compiler here")
        return was(self, *_)

    def starts(*given):
        started.append(Stated(*given))
        return started[-1]

    was, started = getattr(Stated, stage), []
    monkeypatch.setattr(Stated, stage, fails)
    monkeypatch.setattr(module, "_Worker", starts)
    dense, packed = ways
    found = module.bench([dense, Variant("frozen", str(llama), "compiled", rival=True), packed], (8,), new=4, repeats=3)
    assert [r["name"] for r in found["variants"]] == ["dense", "packed"]
    assert found["variants"][1]["decode"]["speedup"] == 2
    assert found["left_out"] == ["frozen was not run: no compiler here"]
    with pytest.raises(CheckpointError, match="no compiler here"):
        module.bench([dense, Variant("frozen", str(llama), "compiled"), packed], (8,), new=4, repeats=3)
    # no process outlives the measurement, whoever failed and when
    assert len(started) == (5 if stage == "ready" else 6)
    assert all(worker.ended for worker in started)


@pytest.mark.parametrize(("end", "why"), [("", "no more words"), ("kill -9 $$", r"it was killed \(signal 9\)")])
def test_a_worker_that_died_between_two_runs_is_an_error_with_what_it_said(monkeypatch, end, why):
    def dies(command, **streams):
        facts = '{"kv_bytes_per_token": 8, "positions": 128}'
        return started(f"echo '{facts}'; echo no more words >&2; {end}", shell=True, **streams)

    started = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", dies)
    worker = module._Worker(Variant("dense", "a folder", "dense"), 4)
    worker.ready()
    # nobody reads its input any more
    worker.process.wait()
    with pytest.raises(CheckpointError, match=r"a folder \(dense\) does not run: " + why):
        worker.run(1, 8)
    worker.end()


@pytest.mark.parametrize(("model_type", "notes"), [("llama", []), ("gemma2", ["packed decodes module by module, "])])
def test_a_packed_model_whose_blocks_do_not_decode_in_one_call_is_named(tmp_path, model_type, notes):
    pack(on_grid(tiny.save(tmp_path / "plain", model_type, torch.float32), "int8/32"), tmp_path / "packed")
    way = Variant("packed", str(tmp_path / "packed"), "packed")
    told = module.bench([way], (8,), new=2, repeats=1)["left_out"]
    assert [said[: len(note)] for said, note in zip(told, notes, strict=True)] == notes


def test_rivals_give_way_to_memory(ways, llama, monkeypatch):
    dense, packed = ways
    rival = Variant("theirs", str(llama), "llama.cpp", rival=True)
    nbytes = module._nbytes(dense)
    monkeypatch.setattr(module, "machine", lambda: {"memory_bytes": 2.5 * nbytes})
    kept, said = module._that_fit([dense, rival, packed])
    assert kept == [dense, packed]
    assert said[0].startswith("theirs was not run: all ways together take ")
    monkeypatch.setattr(module, "machine", lambda: {"memory_bytes": 3 * nbytes})
    assert module._that_fit([dense, rival, packed]) == ([dense, rival, packed], [])


def test_longer_prompts_stand_beside_the_first(ways):
    found = module.bench(ways, (8, 16), new=4, repeats=3, batches=(3,))
    dense = found["variants"][0]
    assert found["prompt"] == 8
    assert [(b["batch"], b["prompt"]) for b in dense["batches"]] == [(3, 8)]
    assert [(b["batch"], b["prompt"]) for b in dense["longer"]] == [(3, 16)]
    # three prompts of 16 tokens in 4 s; three tokens of each in 6 s
    longer = dense["longer"][0]
    assert (longer["prefill"]["tokens_per_second"], longer["decode"]["tokens_per_second"]) == (12, 1.5)
    assert (dense["decode"]["tokens_per_second"], dense["positions"]) == (3, 128)


def test_a_longer_prompt_has_three_runs_and_gives_way_to_the_positions(ways):
    ticks = []
    found = module.bench(ways, (8, 16, 200), 4, 6, lambda *_, done=ticks: done.append(_[1:]), fit=True)
    dense = found["variants"][0]
    assert [b["prompt"] for b in dense["longer"]] == [16]
    assert (len(dense["decode"]["samples"]), len(dense["longer"][0]["decode"]["samples"])) == (6, 3)
    # of two ways 6 + 3 runs, and one of each to warm up
    assert ticks[-1] == (22, 22)
    assert found["repeats"] == 6


def test_a_longer_prompt_is_measured_where_the_model_has_room(ways, monkeypatch):
    # 128 positions hold no prompt of 512, and one of 124 is not twice the usual 64
    found = module.bench(ways, None, new=4, repeats=3)
    assert found["prompt"] == 64
    assert found["variants"][0]["longer"] == []
    assert module._within(1024, None, 64) == (64, 512)
    assert module._within(256, None, 64) == (64, 192)
    assert module._within(None, None, 64) == (64, 512)


def test_prompts_beyond_the_positions_are_refused(ways):
    with pytest.raises(
        PlanError, match="a prompt of 125 tokens and 4 new ones were asked for, the model has 128 positions"
    ):
        module.bench(ways, (8, 125), new=4)
    with pytest.raises(PlanError, match="prompt 8, 0, new 4"):
        module.bench(ways, (8, 0), new=4)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_cache_holds_keys_and_values_of_the_kv_heads(dtype, size):
    model = tiny.make("llama", dtype)
    # keys and values of 3 blocks with 2 KV heads of 8 numbers, for 4 query heads
    assert module._kv_bytes_per_token(model) == 2 * 3 * 2 * 8 * size
    # a width that the config states is not that of the hidden states over the heads
    model.config.head_dim = 24
    assert module._kv_bytes_per_token(model) == 2 * 3 * 2 * 24 * size


def test_integers_weigh_what_they_take_as_packed_and_their_cache_does_not_shrink(tmp_path):
    plain = on_grid(tiny.save(tmp_path / "plain", "llama", torch.bfloat16), "int4")
    pack(plain, tmp_path / "packed")
    files = sum(f.stat().st_size for f in (tmp_path / "packed").glob("*.safetensors"))
    nbytes = Checkpoint(tmp_path / "packed", packed=True).nbytes
    # what `fleet` takes from memory for the weights: all of the files but their headers, and less than the plain weights
    assert 0.5 * files < nbytes <= files
    assert nbytes < 0.8 * Checkpoint(plain).nbytes
    assert module._kv_bytes_per_token(load(str(tmp_path / "packed"), "packed")) == module._kv_bytes_per_token(
        load(str(plain), "dense")
    )


def test_prompts_of_a_packed_embedding_are_of_its_words(tmp_path, monkeypatch, capsys):
    plain = on_grid(tiny.save(tmp_path / "plain", "llama", torch.bfloat16), "int4")
    model = load(str(plain), "dense")
    words = model.get_input_embeddings().weight.data
    scales = read_scales(plain / SCALES_FILE)
    scales["model.embed_tokens"] = nearest(words, parse("int4"))
    words.copy_(scales["model.embed_tokens"].rounded(words.float()))
    model.save_pretrained(plain)
    write_scales(plain / SCALES_FILE, scales)
    pack(plain, tmp_path / "packed")
    assert load(str(tmp_path / "packed"), "packed").get_input_embeddings().weight.ndim == 1
    monkeypatch.setattr("sys.stdin", ["1 8\n", "finish\n"])
    module._work({"folder": str(tmp_path / "packed"), "how": "packed", "dtype": None, "new": 3})
    run = json.loads(capsys.readouterr().out.splitlines()[1])
    assert 0 < run["first"] < run["all"]
