import functools
import importlib
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import process
import pytest
import tiny
import torch
from plans import asked, changed
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import secateurs as sc
from secateurs.base import precision, progress
from secateurs.base.errors import CalibrationError, CheckpointError, LayerError, OutputError, PlanError, VerifyError
from secateurs.base.files import fingerprint_of, trim
from secateurs.model.activations import OnDisk
from secateurs.model.blocks import blocks_of
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.layers import layers_of
from secateurs.prune import guide
from secateurs.prune import run as prune_run
from secateurs.prune.record import failure
from secateurs.quality import compare, evaluation, texts
from secateurs.quality.evaluation import quality
from secateurs.report.run_tables import print_report

FAST = {"samples": 4, "seqlen": 32, "eval_windows": 2, "eval_seqlen": 32}


def weights(folder):
    return {k: v for shard in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(shard).items()}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model_type", tiny.TINY)
def test_every_family_prunes_verifies_and_reloads_to_the_same_logits(model_type, pattern, tmp_path, words):
    import transformers

    source = tiny.save(tmp_path / "dense", model_type)
    plan = asked(sc.Plan, pattern=pattern, method="sparsegpt", calibration=str(words), eval_text=str(words), **FAST)
    report = sc.prune(source, plan, out=tmp_path / "run")
    assert report.totals["layers_skipped_by_shape"] == 0
    assert report.totals["layers_pruned"] == len(report.pruned) >= 12
    assert report.totals["sparsity"] == 0.5
    measured = {name for name in ("ppl", "kl", "agree", "cosine", "neighbours", "error") if report.quality[name]}
    other = {"bert": {"kl", "agree"}, "bert base": {"cosine"}}
    assert measured == other.get(model_type, {"ppl", "kl", "agree"})
    assert sc.verify(tmp_path / "run").status == "complete"

    cls = getattr(transformers, tiny.TINY[model_type][0])
    loaded, info = cls.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # the same pruning of the live module, in memory, must give the same function
    live = cls.from_pretrained(source)
    windows = texts.load(str(words), tiny.tokenizer(), 4, 32, 0).windows
    sc.prune(live, plan, calibration=windows)
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids)[0], live.eval()(ids)[0])
    assert set(weights(source)) == set(weights(tmp_path / "run" / "model"))


@functools.cache
def consumers(model_type):
    """Layers whose inputs can be reordered."""
    return {coupling.consumer.name for coupling in tiny.couplings(tiny.make(model_type))}


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("model_type", tiny.TINY)
def test_every_family_takes_the_best_effort(model_type, pattern, tmp_path, words):
    """Sensitivity, reordering, targets that see the error already made, tuning: pruned, verified, and still a plain model."""
    import transformers

    source = tiny.save(tmp_path / "dense", model_type)
    plan = asked(sc.Plan,
        effort="best", pattern=pattern, blend=0.5, reconstruct=8, distill=8, calibration=str(words), eval_text=str(words),
        samples=16, seqlen=32, eval_windows=2, eval_seqlen=32,
    )  # fmt: skip
    report = sc.prune(source, plan, out=tmp_path / "run")
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert sc.verify(tmp_path / "run").status == "complete"
    assert len(report.reconstruction) == 3
    assert all(0 < r["after"] <= r["before"] for r in report.reconstruction)
    if "bert base" in model_type:
        assert report.distillation is None
        assert any("it gives no logits" in warning for warning in report.warnings)
    else:
        assert "8 of the whole" in (tmp_path / "run" / "model" / "README.md").read_text()
        assert 0 < report.distillation["after"] <= report.distillation["before"]
    if pattern == "2:4":
        for r in report.pruned:
            not_known = r.note.startswith("inputs not reordered: they are not known")
            assert not_known == (r.name not in consumers(model_type)), r
        assert any(r.note.startswith("inputs reordered") for r in report.pruned)
    else:
        assert len({r.sparsity for r in report.pruned}) > 3
    cls = getattr(transformers, tiny.TINY[model_type][0])
    loaded, info = cls.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    live = cls.from_pretrained(source)
    flags = {name: p.requires_grad for name, p in live.named_parameters()}
    sc.prune(live, plan, calibration=texts.load(str(words), tiny.tokenizer(), 16, 32, 0).windows)
    assert {name: p.requires_grad for name, p in live.named_parameters()} == flags
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids)[0], live.eval()(ids)[0])


@pytest.mark.parametrize("allocation", ["erk", "owl", "alpha", "global", "measured"])
def test_every_allocation_gives_the_whole_its_zeros(allocation, tmp_path, llama, words):
    plan = asked(
        sc.Plan,
        method="sparsegpt",
        allocation=allocation,
        sensitivity=64,
        calibration=str(words),
        **{**FAST, "eval_windows": 0},
    )
    report = sc.prune(llama, plan, out=tmp_path / "run")
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert len({r.sparsity for r in report.pruned}) > 1
    assert all(0.29 < r.sparsity < 0.71 for r in report.pruned)
    assert sc.verify(tmp_path / "run")


def test_a_budget_of_bytes_is_kept_and_patterns_are_chosen(tmp_path, llama, words):
    from secateurs.kernels.formats import bitmask_nbytes

    plan = asked(sc.Plan,
        method="sparsegpt", pattern="unstructured,2:4,1:4", budget="bytes=0.6", min_sparsity=0.0, max_sparsity=0.9,
        calibration=str(words), **{**FAST, "eval_windows": 0},
    )  # fmt: skip
    report = sc.prune(llama, plan, out=tmp_path / "run")
    spent = sum(min(r.numel * 4, bitmask_nbytes(r.shape, r.kept, torch.float32)) for r in report.pruned)
    # embedding, head and norms are part of the model
    whole, rest = report.parameters * 4, report.parameters * 4 - sum(r.numel * 4 for r in report.pruned)
    assert 0.58 * whole < rest + spent <= 0.6 * whole
    assert report.budget == {"asked": round(0.6 * whole), "weights": whole, "rest": rest, "stored": rest + spent}
    assert sc.verify(tmp_path / "run")
    # where nothing but N:M is offered, layers are left dense until the budget fits
    plan = changed(plan, pattern="2:4,1:4", budget="bytes=0.7", scope=None)
    report = sc.prune(llama, plan, out=tmp_path / "nm")
    assert {r.pattern for r in report.pruned} <= {"2:4", "1:4", "unstructured"}
    assert "2:4" in {r.pattern for r in report.pruned}
    assert sc.verify(tmp_path / "nm")
    with pytest.raises(PlanError, match=r"budget bytes=0.3 is 0.\d\d MB .* raise the budget"):
        sc.prune(llama, changed(plan, budget="bytes=0.3", scope=None), out=tmp_path / "little")


def test_a_budget_that_no_choice_reaches_is_refused_before_text_is_read(tmp_path, llama):
    plan = asked(
        sc.Plan, budget="bits=0.8", bits="8", method="sparsegpt", max_sparsity=0.9, calibration="no such text", **FAST
    )
    with pytest.raises(
        PlanError, match=r"budget bits=0.8 is below bits=(\S+), the least that the layers can take"
    ) as said:
        sc.prune(llama, plan, out=tmp_path / "run")
    # a bit a position, a tenth of them in 8 bits, and 16 for each group of 64
    shapes = [p.shape for n, p in tiny.make("llama").named_parameters() if "layers" in n and p.dim() == 2]
    bits = sum(o * i + 8 * (o * i - round(0.9 * o * i)) + 16 * o * -(-i // 64) for o, i in shapes)
    least = float(str(said.value).split("below bits=")[1].split(",")[0])
    assert least == pytest.approx(bits / sum(o * i for o, i in shapes), abs=2e-3)
    assert not (tmp_path / "run" / "model").exists()


def test_a_budget_of_seconds_needs_a_profile_and_follows_it(tmp_path, llama, words, monkeypatch):
    from secateurs.machine import profile

    plan = asked(sc.Plan,
        method="sparsegpt", budget="seconds=0.6", min_sparsity=0.0, max_sparsity=0.9, calibration=str(words),
        **{**FAST, "eval_windows": 0},
    )  # fmt: skip
    with pytest.raises(PlanError, match="needs a profile of this machine, and there is none; run `secateurs probe`"):
        sc.prune(llama, plan, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    rows = [
        {"shape": [64, 32], "dtype": "fp32", "pattern": "unstructured", "sparsity": s, "tokens": 1, "kernel": "bitmask_x",
         "seconds": 1.0, "nbytes": 1, "dense": "d", "dense_seconds": v, "speedup": v, "verdict": ""}
        for s, v in ((0.5, 1.5), (0.7, 2.5), (0.9, 5.0))
    ]  # fmt: skip
    made = profile.DeviceProfile("test", {}, 1e9, {}, rows, {})
    monkeypatch.setattr(profile.DeviceProfile, "at_hand", classmethod(lambda cls: made))
    report = sc.prune(llama, plan, out=tmp_path / "run")
    seconds = sum(
        r.numel / (max(1.0, made.speedup("fp32", r.sparsity, 1)) if r.sparsity else 1.0) for r in report.pruned
    )
    assert 0.5 < seconds / sum(r.numel for r in report.pruned) <= 0.6


@pytest.mark.parametrize("method", ["random", "magnitude", "wanda", "ria", "magnitude+refit", "sparsegpt+refit"])
def test_every_method_runs_on_a_folder(method, tmp_path, llama, words):
    plan = asked(sc.Plan, method=method, calibration=str(words), eval_text=str(words), **FAST)
    report = sc.prune(llama, plan, out=tmp_path / "run")
    assert report.totals["sparsity"] == 0.5
    assert (report.calibration is None) == (method in ("random", "magnitude"))
    before, after = weights(llama), weights(tmp_path / "run" / "model")
    pruned = {r.name + ".weight" for r in report.pruned}
    assert all(torch.equal(before[k], after[k]) for k in before if k not in pruned)
    for name in pruned:
        survivors = after[name] != 0
        assert int(survivors.sum()) == survivors.numel() // 2
        if "refit" not in method:
            assert torch.equal(after[name][survivors], before[name][survivors])


def test_bf16_stays_bf16(tmp_path, words):
    source = tiny.save(tmp_path / "dense", dtype=torch.bfloat16)
    plan = asked(sc.Plan, method="sparsegpt", calibration=str(words), eval_text=str(words), **FAST)
    sc.prune(source, plan, out=tmp_path / "run")
    assert {t.dtype for t in weights(tmp_path / "run" / "model").values()} == {torch.bfloat16}


def test_global_allocation_is_one_threshold_over_the_model(tmp_path, llama):
    plan = asked(
        sc.Plan, method="magnitude", allocation="global", sparsity=0.6, min_sparsity=0, max_sparsity=1, eval_windows=0
    )
    report = sc.prune(llama, plan, out=tmp_path / "run")
    before = weights(llama)
    names = [r.name + ".weight" for r in report.pruned]
    sizes = torch.cat([before[n].abs().flatten() for n in names])
    zeros = round(0.6 * sizes.numel())
    assert report.totals["zeros"] == zeros
    threshold = sizes.sort().values[zeros - 1]
    after = weights(tmp_path / "run" / "model")
    assert all(torch.equal(after[n] == 0, before[n].abs() <= threshold) for n in names)
    bounded = changed(plan, min_sparsity=0.59, max_sparsity=0.61)
    report = sc.prune(llama, bounded, out=tmp_path / "bounded")
    assert report.totals["zeros"] == zeros
    assert all(0.589 < 1 - r.kept / r.numel < 0.611 for r in report.pruned)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_global_allocation_with_calibration(method, tmp_path, llama, words):
    plan = asked(sc.Plan, method=method, allocation="global", calibration=str(words), **{**FAST, "eval_windows": 0})
    report = sc.prune(llama, plan, out=tmp_path / "run")
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert len({r.kept / r.numel for r in report.pruned}) > 5
    assert sc.verify(tmp_path / "run")


def test_an_expert_that_saw_no_token_is_pruned_by_magnitude_and_reported(tmp_path, words):
    source = tiny.save(tmp_path / "dense", "qwen3_moe")
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.gate.weight"):
                # expert 2's router row is a copy of expert 1's: ties go to the lower index, so it is never chosen
                tensor[2:] = 0
                tensor[:2] = tensor[:2].abs() * 0
                tensor[0], tensor[1] = 0, 0
        from safetensors.torch import save_file

        save_file(tensors, shard, metadata={"format": "pt"})
    plan = asked(sc.Plan, method="sparsegpt", calibration=str(words), **{**FAST, "eval_windows": 0})
    report = sc.prune(source, plan, out=tmp_path / "run")
    starved = [r for r in report.layers if r.note and "no calibration token" in r.note]
    assert len(starved) == 4
    assert all(".layers.1." in r.name and r.tokens == 0 and r.kept * 2 == r.numel for r in starved)


def test_skips_are_recorded_with_who_asked(tmp_path, llama, words):
    plan = asked(sc.Plan, method="magnitude", pattern="3:64", skip=("*.k_proj", "model.layers.2.*"), eval_windows=0)
    report = sc.prune(llama, plan, out=tmp_path / "run")
    by = {r.name: r.skipped_by for r in report.layers}
    assert by["model.layers.0.self_attn.k_proj"] == "plan"
    assert by["model.layers.2.mlp.down_proj"] == "plan"
    assert by["model.layers.0.mlp.gate_proj"] == "shape"
    assert by["model.layers.0.mlp.down_proj"] is None
    assert report.totals["layers_skipped_by_plan"] == 2 + 7
    failed = failure(report)
    assert failed.exit_code == 4
    assert "cannot take 3:64 and stay dense, first model.layers.0.self_attn.q_proj: 32 inputs" in str(failed)
    allowed = sc.prune(llama, changed(plan, allow_skips=True), out=tmp_path / "allowed")
    assert failure(allowed) is None


def test_a_missed_gate_keeps_the_results(tmp_path, llama, words):
    plan = asked(sc.Plan,
        method="magnitude", sparsity=0.9, eval_text=str(words), gate=("kl<=0.001", "agree>=0"),
        **{**FAST, "eval_windows": 8},
    )  # fmt: skip
    report = sc.prune(llama, plan, out=tmp_path / "run")
    assert [g["passed"] for g in report.gate] == [False, True]
    assert failure(report).exit_code == 3
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_propagate_dense_calibrates_on_dense_inputs(tmp_path, llama, words):
    plan = asked(sc.Plan, method="wanda", sparsity=0.8, calibration=str(words), **{**FAST, "eval_windows": 0})
    reports = {p: sc.prune(llama, changed(plan, propagate=p), out=tmp_path / p) for p in ("pruned", "dense")}
    first, last = 0, -1
    assert reports["pruned"].pruned[first].error == reports["dense"].pruned[first].error
    assert reports["pruned"].pruned[last].error != reports["dense"].pruned[last].error


def test_overlapping_text_is_warned_about(tmp_path, llama, words):
    plan = asked(
        sc.Plan,
        method="wanda",
        calibration=str(words),
        eval_text=str(words),
        samples=9999,
        seqlen=64,
        eval_windows=3,
        eval_seqlen=64,
    )
    report = sc.prune(llama, plan, out=tmp_path / "run")
    assert any("100% of the evaluation windows share" in w for w in report.warnings)
    assert any("9999 were asked for" in w for w in report.warnings)
    other = tiny.text(tmp_path, seed=1)
    report = sc.prune(llama, changed(plan, eval_text=str(other), samples=4), out=tmp_path / "other")
    assert report.warnings == []


# ------------------------------------------------------------------------------------------------------ a live module


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, image):
        hidden = self.norm(self.depthwise(self.conv(image))).relu()
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt+refit"])
def test_any_module_is_pruned_in_place(method):
    torch.manual_seed(0)
    net = Net().eval()
    images = torch.randn(8, 3, 12, 12)
    dense = net(images)
    plan = asked(sc.Plan, method=method, sparsity=0.3, skip=("conv",))
    report = sc.prune(net, plan, calibration=[{"image": images[:4]}, {"image": images[4:]}])
    assert [r.name for r in report.layers if r.skipped is None] == ["head"]
    assert {r.name: r.skipped_by for r in report.layers} == {"conv": "plan", "depthwise": "shape", "head": None}
    assert int((net.head.weight == 0).sum()) == (10 * round(16 * 0.3) if method == "wanda" else round(160 * 0.3))
    assert not torch.equal(net(images), dense)
    assert isinstance(net.head.weight, nn.Parameter)
    assert net.head.weight.requires_grad


def test_convolutions_take_n_of_m_along_input_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 3))
    sc.prune(net, asked(sc.Plan, pattern="2:4", method="magnitude"))
    groups = net[0].weight.permute(0, 2, 3, 1).reshape(-1, 4)
    assert bool(((groups != 0).sum(1) == 2).all())


def test_live_modules_say_what_they_need():
    with pytest.raises(CalibrationError, match="pass calibration="):
        sc.prune(Net(), asked(sc.Plan, method="wanda"))
    with pytest.raises(PlanError, match="no gate"):
        sc.prune(Net(), asked(sc.Plan, method="magnitude", gate=("kl<=1",)))
    with pytest.raises(PlanError, match="has no Linear"):
        sc.prune(nn.ReLU(), asked(sc.Plan, method="magnitude"))
    with pytest.raises(PlanError, match="needs a folder for the result"):
        sc.prune("somewhere", asked(sc.Plan))


@pytest.mark.parametrize(("model_type", "skipped"), [
    ("llama", "model.layers.1.mlp.up_proj"), ("mixtral", "model.layers.1.mlp.experts.gate_up_proj.2"),
])  # fmt: skip
def test_a_layer_that_is_left_dense_stands_still_in_every_tuning(model_type, skipped, tmp_path, words):
    import transformers

    tiny.save(tmp_path / "plain", model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    dense = {layer.name: layer for i in range(3) for layer in layers_of_block(model, i)}[skipped].read()
    # a zero that nobody made
    dense[0, 0] = 0
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    plan = asked(sc.Plan,
        effort="best", sparsity=0.7, skip=(skipped,), reconstruct=24, distill=96, calibration=str(words), samples=32, seqlen=32,
        eval_windows=0,
    )  # fmt: skip
    report = sc.prune(tmp_path / "dense", plan, out=tmp_path / "run")
    assert report.distillation["after"] < report.distillation["before"]
    assert sc.verify(tmp_path / "run").status == "complete"
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal({y.name: y for y in layers_of_block(after, 1)}[skipped].read(), dense)


def layers_of_block(model, i):
    names, experts = blocks_of(model)
    return layers_of(model.get_submodule(names[i]), names[i], experts)


def test_a_whole_model_that_memory_cannot_hold_is_refused_first(tmp_path, llama, words, monkeypatch):
    monkeypatch.setattr(guide, "memory_bytes", lambda: 300_000)
    plan = asked(sc.Plan, effort="best", calibration=str(words), **FAST)
    with pytest.raises(PlanError, match=r"takes at least 0.\d GB of memory, this machine has 0.0; leave it out with"):
        sc.prune(llama, plan, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    sc.prune(llama, changed(plan, distill=0, eval_windows=0), out=tmp_path / "run")


def test_what_an_effort_cannot_do_for_a_model_is_a_warning(tmp_path, words):
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    batches = [{"input": torch.randn(64, 16)}]
    for pattern, wanted in (
        ("unstructured", "left out: sensitivities, tuning of blocks, tuning of the whole; only a Hugging Face model's"),
        ("2:4", "left out: reordering, tuning of blocks, tuning of the whole; only a Hugging Face model's"),
    ):
        (warning,) = sc.prune(net, asked(sc.Plan, effort="best", pattern=pattern), calibration=batches).warnings
        assert warning.startswith(wanted)
    assert sc.prune(net, asked(sc.Plan, method="wanda"), calibration=batches).warnings == []
    source = tiny.save(tmp_path / "dense", "bert base")
    report = sc.prune(
        source, asked(sc.Plan, calibration=str(words), **{**FAST, "eval_windows": 0}), out=tmp_path / "run"
    )
    # of its embeddings
    assert not any("sensitivities" in warning for warning in report.warnings)
    assert len({record.sparsity for record in report.pruned}) > 3


def test_weights_that_the_dtype_cannot_hold_are_an_error(monkeypatch):
    net = nn.Linear(8, 8).half()
    monkeypatch.setattr(sc.solvers, "masked", lambda *a: torch.full((8, 8), 1e6))
    with pytest.raises(LayerError, match="torch.float16 cannot hold"):
        sc.prune(net, asked(sc.Plan, method="magnitude", sparsity=0.0))


# ------------------------------------------------------------------------------------------------- kill and resume

_RUN = """
import importlib, sys, secateurs as sc
from plans import asked
prune, tuning, evaluation, activations = map(
    importlib.import_module,
    ("secateurs.prune.run", "secateurs.prune.tuning", "secateurs.quality.evaluation", "secateurs.model.activations"),
)
source, words, out, method = sys.argv[1:]
how = {"effort": "best", "sparsity": 0.8, "reconstruct": 8, "distill": 96} if method == "best" else {"method": method}
if method == "measured":
    how = {"method": "sparsegpt", "budget": "bytes=0.6", "blend": 0.5}
if method == "grid":
    how = {"effort": "best", "budget": "bits=2.3", "reconstruct": 8, "distill": 96, "embedding_bits": 3, "head_bits": 4}
plan = asked(sc.Plan, **how, calibration=words, eval_text=words, samples=8, seqlen=64, eval_windows=12, eval_seqlen=64)
slow = prune.write_json
def write_json(file, data):
    slow(file, data)
    print(file.name, len(data["windows"]) if file.name == "windows.json" else data.get("next_block"), flush=True)
prune.write_json = evaluation.write_json = write_json
slow_place = activations.write_json
def note_place(file, data):
    slow_place(file, data)
    print(file.name, data["block"], flush=True)
activations.write_json = note_place
slow_tensors = prune.write_tensors
def write_tensors(file, tensors):
    slow_tensors(file, tensors)
    print(file.name, int(tensors["step"]) if "step" in tensors else None, flush=True)
prune.write_tensors = tuning.write_tensors = write_tensors
slow_shard = prune.shards.write_shard
def write_shard(folder, index, count, tensors):
    slow_shard(folder, index, count, tensors)
    print("shard", index, flush=True)
prune.shards.write_shard = write_shard
sc.prune(source, plan, out=out)
print("finished", flush=True)
"""


def _start(source, words, out, method="sparsegpt+refit"):
    # what one run leaves in the cache must not help another
    return process.Running(_RUN, source, words, out, method, SECATEURS_CACHE=out.with_name(f"{out.name}-cache"))


@pytest.mark.parametrize("method", ["sparsegpt+refit", "random", "best", "measured", "grid"])
def test_a_killed_run_resumes_and_ends_bit_identical(method, tmp_path, llama, words):
    lines = _start(llama, words, tmp_path / "whole", method).all()
    assert lines[-1] == "finished", lines
    # die after each thing that is written, in one run directory, then go on
    kills = 0
    # what `best` finds out beforehand is kept, too
    early = {"best": ["shares.json None"], "measured": ["options.json 0", "options.json 2"]}
    early = {**early, "grid": ["options.json 1", "shares.json None"]}.get(method, [])
    # and what it has tuned of the whole, also while that is being written
    late = ["ends.json 2", "ends.json 3", "distill.safetensors 24", "distill.safetensors 48", "state.json 3, shard 2"]
    # embedding and head before that
    late = [*(["state.json 3, shard 0"] if method == "grid" else []), *late] if method in ("best", "grid") else []
    for wanted in (*early, "state.json 0", "state.json 1", "state.json 2", *late, "windows.json 8"):
        running = _start(llama, words, tmp_path / "killed", method)
        state = ""
        for line in running.lines():
            state = line if line.startswith("state.json") else state
            if wanted in (line, f"{state}, {line}"):
                running.kill()
                kills += 1
                break
    assert kills == 4 + len(early) + len(late)
    state = json.loads((tmp_path / "killed" / "work" / "windows.json").read_text())
    assert len(state["windows"]) == 8
    assert _start(llama, words, tmp_path / "killed", method).all()[-1] == "finished"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert sorted(f.name for f in whole.iterdir()) == sorted(f.name for f in killed.iterdir())
    for file in sorted((whole / "model").iterdir()):
        if file.name != "README.md":
            assert file.read_bytes() == (killed / "model" / file.name).read_bytes(), file.name
    reports = [json.loads((run / "report.json").read_text()) for run in (whole, killed)]
    for report in reports:
        for key in ("seconds", "peak_memory_bytes"):
            report.pop(key)
        for record in report["layers"]:
            record.pop("seconds")
    assert reports[0] == reports[1]
    if method in ("best", "grid"):
        assert reports[0]["distillation"]["after"] < reports[0]["distillation"]["before"]


def test_a_kill_before_zeros_are_shared_out_leaves_what_the_last_block_saw(tmp_path, llama, words):
    module = importlib.import_module("secateurs.prune.assign")
    plan = asked(sc.Plan, method="sparsegpt", budget="bytes=0.6", calibration=str(words), **{**FAST, "eval_windows": 0})

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "cheapest_loss", killed)
        sc.prune(llama, plan, out=tmp_path / "run")
    whole = sc.prune(llama, plan, out=tmp_path / "whole")
    again = sc.prune(llama, plan, out=tmp_path / "run")
    assert [(r.sparsity, r.kept) for r in again.layers] == [(r.sparsity, r.kept) for r in whole.layers]


def test_a_kill_at_any_time_leaves_a_run_that_goes_on(tmp_path, llama, words):
    whole = _start(llama, words, tmp_path / "whole", "wanda")
    began = time.time()
    assert whole.all()[-1] == "finished"
    seconds = time.time() - began
    for part in (0.55, 0.7, 0.8, 0.9):
        running = _start(llama, words, tmp_path / "killed", "wanda")
        time.sleep(seconds * part)
        running.kill()
    assert _start(llama, words, tmp_path / "killed", "wanda").all()[-1] == "finished"
    for shard in sorted((tmp_path / "whole" / "model").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "killed" / "model" / shard.name).read_bytes()


def test_a_run_killed_while_it_wrote_its_plan_goes_on(tmp_path, llama):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json.part").write_text('{"model"')
    sc.prune(llama, asked(sc.Plan, method="magnitude", eval_windows=0), out=tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()
    assert not (tmp_path / "run" / "plan.json.part").exists()


def test_a_finished_run_is_not_done_again(tmp_path, llama):
    plan = asked(sc.Plan, method="magnitude", eval_windows=0)
    first = sc.prune(llama, plan, out=tmp_path / "run")
    again = sc.prune(llama, plan, out=tmp_path / "run")
    assert again.as_dict() == first.as_dict()


# --------------------------------------------------------------------------------------------- the run directory


def test_foreign_folders_and_other_plans_are_left_alone(tmp_path, llama):
    plan = asked(sc.Plan, method="magnitude", eval_windows=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="is not empty and holds no plan.json of ours"):
        sc.prune(llama, plan, out=tmp_path / "full")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    sc.prune(llama, plan, out=tmp_path / "run")
    with pytest.raises(OutputError, match=r"another plan \(sparsity is 0\.5 there, 0\.6 here\)"):
        sc.prune(llama, changed(plan, sparsity=0.6), out=tmp_path / "run")


def test_a_wrong_model_makes_no_folder(tmp_path):
    with pytest.raises(CheckpointError):
        sc.prune(tmp_path / "none", asked(sc.Plan), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_in_one_folder_do_not_mix(tmp_path, llama):
    import fcntl

    plan = asked(sc.Plan, method="magnitude", eval_windows=0)
    sc.prune(llama, plan, out=tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "work").mkdir()
    with (tmp_path / "run" / "work" / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another secateurs is at work"):
            sc.prune(llama, plan, out=tmp_path / "run")


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tmp_path, llama, words, monkeypatch):
    from secateurs.base import files

    plan = asked(sc.Plan, method="wanda", calibration=str(words), **{**FAST, "eval_windows": 0})
    real, count = files.replace, 0

    def full(file, write):
        nonlocal count
        count += file.suffix == ".safetensors" and "model-0000" in file.name
        if count == 3:

            def write(part):
                part.write_bytes(b"half")
                raise OSError(28, "No space left on device")

        real(file, write)

    monkeypatch.setattr(files, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*model-00003-of-00004\.safetensors: No space left on device"):
        sc.prune(llama, plan, out=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.part"))
    monkeypatch.undo()
    resumed = sc.prune(llama, plan, out=tmp_path / "run")
    fresh = sc.prune(llama, plan, out=tmp_path / "fresh")
    assert resumed.shards == fresh.shards


def test_a_source_that_changed_is_noticed(tmp_path, llama, words, monkeypatch):
    source = shutil.copytree(llama, tmp_path / "source")
    plan = asked(sc.Plan, method="wanda", calibration=str(words), **{**FAST, "eval_windows": 0})

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateurs.model.shards.write_index", stop)
    with pytest.raises(KeyboardInterrupt):
        sc.prune(source, plan, out=tmp_path / "run")
    monkeypatch.undo()
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(OutputError, match="has changed since"):
        sc.prune(source, plan, out=tmp_path / "run")


def test_activations_that_are_nan_stop_the_run_with_the_layer_s_name(tmp_path, llama, words):
    source = shutil.copytree(llama, tmp_path / "source")
    from safetensors.torch import save_file

    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"][:] = 1e38
        save_file(tensors, shard, metadata={"format": "pt"})
    plan = asked(sc.Plan, method="sparsegpt", calibration=str(words), **FAST)
    with pytest.raises(LayerError, match=r"model\.layers\.1\.self_attn\.q_proj: .* NaN or infinite"):
        sc.prune(source, plan, out=tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ verify


@pytest.fixture
def run(tmp_path, llama):
    sc.prune(llama, asked(sc.Plan, pattern="2:4", method="magnitude", eval_windows=0), out=tmp_path / "run")
    return tmp_path / "run"


def tamper(run, edit, checksums=True):
    from safetensors.torch import save_file

    from secateurs.model.shards import checksum

    report = json.loads((run / "report.json").read_text())
    for shard in (run / "model").glob("*.safetensors"):
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
        if checksums:
            report["shards"][shard.name] = checksum(shard)
    (run / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("model.layers.0.mlp.up_proj.weight", 1.0, "up_proj keeps 2048 weights, report.json says 1024"),
        ("model.norm.weight", 2.0, "model.norm.weight was not to be pruned and differs"),
        ("model.layers.1.input_layernorm.weight", float("nan"), "NaN or infinite"),
    ],
)
def test_verify_finds_what_was_changed(run, name, value, match):
    tamper(run, lambda tensors: tensors[name].fill_(value) if name in tensors else None)
    with pytest.raises((VerifyError, CheckpointError), match=match):
        sc.verify(run)


def test_verify_finds_a_mask_that_moved(run):
    name = "model.layers.0.mlp.up_proj.weight"

    def swap(tensors):
        if name in tensors:
            row = tensors[name][0]
            # the count stays, the groups break
            kept, gone = row[:4].nonzero()[0, 0], (row[4:8] != 0).nonzero()[0, 0] + 4
            spare = (row[:4] == 0).nonzero()[0, 0]
            row[spare], row[gone] = row[kept], 0

    tamper(run, swap)
    with pytest.raises(VerifyError, match=r"up_proj does not hold 2:4: 1 of 512 groups"):
        sc.verify(run)


def test_verify_finds_a_flipped_bit_and_a_lost_shard(run):
    shard = sorted((run / "model").glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerifyError, match="its sha256 differs"):
        sc.verify(run)
    shard.unlink()
    with pytest.raises(VerifyError, match="is missing"):
        sc.verify(run)


def changed_one_by_one(folder, names, match):
    """verify() after a number of each tensor was changed, one tensor at a time."""
    from safetensors.torch import save_file

    run = folder.parent
    for shard in sorted(folder.glob("*.safetensors")):
        intact, tensors = shard.read_bytes(), load_file(shard)
        for name in sorted(names & set(tensors)):
            other = tensors[name].clone()
            other.view(-1)[0] += 1
            save_file({**tensors, name: other}, shard, metadata={"format": "pt"})
            with pytest.raises(VerifyError, match=rf"{re.escape(name)} {match}"):
                sc.verify(run)
            yield name
        shard.write_bytes(intact)


def test_verify_looks_at_every_tensor(run, llama, monkeypatch):
    records = json.loads((run / "report.json").read_text())["layers"]
    pruned = {r["name"] + ".weight" for r in records if not r["skipped"]}
    others = set(weights(llama)) - pruned
    # embeddings, head, last norm and two a block; a file that is not the one that was written would be found before
    assert len(others) == 3 + 2 * 3
    module = importlib.import_module("secateurs.prune.verify")
    known = json.loads((run / "report.json").read_text())["shards"]
    monkeypatch.setattr(module, "checksum", lambda file: known[file.name])
    assert set(changed_one_by_one(run / "model", others, "was not to be pruned and differs")) == others
    assert sc.verify(run).status == "complete"


def test_verify_looks_at_every_packed_tensor(run):
    sc.pack_run(run)
    names = set(weights(run / "model"))
    assert set(changed_one_by_one(run / "packed", names, "in .* is not what .* has; pack it again")) == names
    assert sc.verify(run).status == "complete"


def test_verify_without_the_dense_model_says_so(tmp_path, llama):
    source = shutil.copytree(llama, tmp_path / "source")
    sc.prune(source, asked(sc.Plan, method="magnitude", eval_windows=0), out=tmp_path / "run")
    shutil.rmtree(source)
    assert any("not compared with the dense model" in w for w in sc.verify(tmp_path / "run").warnings)


def test_activations_live_on_disk_while_a_run_is_under_way(tmp_path, llama, words, monkeypatch):
    held = []
    write = OnDisk.write

    def watched(self, block, batch, hidden, more=()):
        write(self, block, batch, hidden, more)
        held.append(len(list(self.folder.glob("block-*"))))

    monkeypatch.setattr(OnDisk, "write", watched)
    plan = asked(sc.Plan, method="wanda", calibration=str(words), **{**FAST, "eval_windows": 0})
    sc.prune(llama, plan, out=tmp_path / "run")
    assert max(held) == 2
    assert not (tmp_path / "run" / "work").exists()


# ------------------------------------------------------------------------------------------- what runs leave for others


def test_the_dense_model_is_walked_once_for_all_that_is_measured_against_it(tmp_path, llama, words, monkeypatch):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    walked, stream = [], compare.stream
    monkeypatch.setattr(compare, "stream", lambda model, *a, **k: walked.append(1) or stream(model, *a, **k))

    def measured(text=words, windows=2, seqlen=64):
        walked.clear()
        found, _ = quality(Checkpoint(llama), Checkpoint(llama), sc.Evaluation(str(text), windows, seqlen))
        return found.as_dict(), len(walked)

    first, twice = measured()
    assert measured() == (first, twice - 1)
    # the same tokens in other windows, another text, dtype of products or place that cannot be written has its own
    assert measured(windows=4, seqlen=32)[1] == twice
    assert measured(tiny.text(tmp_path, seed=7))[1] == twice
    monkeypatch.setattr(evaluation, "compute_dtype", lambda stored: "another")
    assert measured()[1] == twice
    monkeypatch.setenv("SECATEURS_CACHE", str(words))
    assert measured() == (first, twice)


def test_the_same_tokens_in_longer_windows_are_another_text():
    ids = torch.arange(128)
    assert fingerprint_of(ids.view(2, 64)) != fingerprint_of(ids.view(4, 32))
    assert fingerprint_of(ids.view(2, 64)) == fingerprint_of(ids.view(2, 64).clone())


def test_the_cache_keeps_what_was_used_last(tmp_path):
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "tensor").write_bytes(bytes(10))
        os.utime(tmp_path / str(number), (number, number))
    trim(tmp_path, 20)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["1", "2"]


def test_seconds_are_by_stage_and_survive_a_kill(tmp_path, llama, words, monkeypatch):
    plan = asked(
        sc.Plan,
        calibration=str(words),
        samples=2,
        seqlen=32,
        eval_windows=0,
        sensitivity=64,
        allocation="global",
        method="wanda",
    )
    clock = itertools.count()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as inside:
        inside.setattr(prune_run, "prune_block", killed)
        with pytest.raises(KeyboardInterrupt):
            sc.prune(llama, plan, tmp_path / "run")
    seconds = sc.prune(llama, plan, tmp_path / "run").seconds
    assert list(seconds)[:4] == ["calibration", "sensitivity", "allocation", "prune"]
    # once for each of what was done before the kill, and again for what only read it
    assert seconds["sensitivity"] == seconds["allocation"] == 1
    assert seconds["calibration"] == 2


def test_a_report_says_in_what_products_were_formed(tmp_path, words, monkeypatch, capsys):
    folder = tiny.save(tmp_path / "model", dtype=torch.bfloat16)
    for has, computed in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "_has", lambda stored, has=has: has)
        report = sc.prune(
            folder, asked(sc.Plan, method="magnitude", eval_text=str(words), eval_windows=1), tmp_path / computed
        )
        assert report.compute["stored"] == "bfloat16"
        assert report.compute["products"] == computed
        print_report(report, Console(width=200), "run")
        said = (
            "Weights are bfloat16; matrices were multiplied in float32: this CPU has no instructions"
            in capsys.readouterr().out
        )
        assert said is not has
