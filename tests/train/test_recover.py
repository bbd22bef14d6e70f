"""recover: zeros stay, the loss comes down, a kill loses nothing, two processes do what one does."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from plans import asked
from safetensors.torch import load_file

import secateurs as sc
from secateurs.base.errors import OutputError, PlanError
from secateurs.train import RecoverPlan, recover


@pytest.fixture(scope="module")
def pruned(llama, words, tmp_path_factory):
    """A finished run directory: half of the tiny Llama is gone."""
    from secateurs.prune.plan import Plan
    from secateurs.prune.run import Run

    out = tmp_path_factory.mktemp("pruned") / "run"
    plan = asked(
        Plan, str(llama), method="magnitude", sparsity=0.6, calibration=str(words), samples=4, seqlen=32, eval_windows=0
    )
    Run(plan, out).complete()
    return out


def plan(pruned, words, **options):
    options = {"steps": 24, "batch": 2, "samples": 24, "seqlen": 32, "eval_windows": 0, **options}
    return asked(RecoverPlan, str(pruned), calibration=str(words), **options)


def tensors(folder):
    found = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        found.update(load_file(file))
    return found


def zeros_kept(before, after):
    return all(not after[name][t == 0].any() for name, t in before.items() if t.dim() > 1)


@pytest.mark.parametrize("train", ["blocks", "all", "vectors", "lora"])
def test_the_loss_comes_down_and_zeros_stay(train, pruned, words, tmp_path):
    report = recover(plan(pruned, words, train=train), tmp_path / "run")
    before, after = tensors(pruned), tensors(tmp_path / "run")
    assert report["training"]["after"] < report["training"]["before"]
    assert zeros_kept(before, after)
    moved = {name for name, t in before.items() if not torch.equal(t, after[name])}
    assert moved
    if train == "vectors":
        assert all(before[name].dim() == 1 for name in moved)
    assert ("model.embed_tokens.weight" in moved) == (train == "all")
    assert {t.dtype for t in after.values()} == {t.dtype for t in before.values()}
    assert report["zeros"] == sum(int((t == 0).sum()) for n, t in before.items() if t.dim() > 1 and "layers" in n)


@pytest.mark.parametrize("options", [
    {"hidden": 1.0}, {"kl": 0.0, "labels": 1.0}, {"temperature": 2.0}, {"teacher": "none"}, {"checkpointing": True},
    {"dtype": "bf16"},
])  # fmt: skip
def test_every_loss_comes_down(options, pruned, words, tmp_path):
    report = recover(plan(pruned, words, **options), tmp_path / "run")
    assert report["training"]["after"] < report["training"]["before"]
    assert zeros_kept(tensors(pruned), tensors(tmp_path / "run"))


@pytest.mark.parametrize("loss_of", [{"kl": 0.5}, {"kl": 0.0, "labels": 3.0}, {"kl": 0.0, "hidden": 2.0}])
def test_the_gradient_is_that_of_the_loss_with_all_its_weights(loss_of, pruned, words, tmp_path, monkeypatch):
    """Along the gradient the loss climbs by the gradient's length."""
    slopes = []

    def checked(moving, loss, gradients, places, *_):
        for m in moving:
            m.parameter.requires_grad_(True)
        found = gradients(places[0])
        length = float(torch.cat([g.flatten() for g in found]).norm())
        ends = []
        for size in (1e-2, -2e-2):
            for m, gradient in zip(moving, found, strict=True):
                m.parameter.data.add_(gradient, alpha=size / length)
            ends.append(loss(places[0]))
        slopes.append(((ends[0] - ends[1]) / 2e-2, length))
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("secateurs.train.recover"), "tune", checked)
    with pytest.raises(KeyboardInterrupt):
        recover(plan(pruned, words, **loss_of), tmp_path / "run")
    ((slope, length),) = slopes
    assert slope == pytest.approx(length, rel=0.02)


def test_what_is_recovered_by_hand():
    module = importlib.import_module("secateurs.train.recover")

    def report(before, after):
        return {
            n: {"ppl": {"value": p}, "ppl_dense": {"value": 10.0}}
            for n, p in (("quality_before", before), ("quality", after))
        }

    # ln 4 nats too many, then ln 2
    assert module._recovered(report(40.0, 20.0)) == pytest.approx(0.5)
    assert module._recovered(report(40.0, 80.0)) == pytest.approx(-0.5)
    assert module._recovered(report(10.0, 10.0)) is None
    assert module._recovered({"quality_before": None}) is None


def test_what_is_written_loads_elsewhere_and_is_measured(pruned, words, tmp_path):
    chosen = plan(
        pruned,
        words,
        seqlen=64,
        samples=999,
        eval_windows=4,
        eval_seqlen=64,
        eval_text=str(words),
        gate=("kl<=0.000001",),
    )
    report = recover(chosen, tmp_path / "run")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert report["quality"]["kl"]["value"] < report["quality_before"]["kl"]["value"]
    ratio = [report[n]["ppl"]["value"] / report[n]["ppl_dense"]["value"] for n in ("quality_before", "quality")]
    before, after = torch.tensor(ratio).log().tolist()
    if before > 0:
        assert report["recovered"] == pytest.approx(1 - after / before, rel=1e-4)
    assert report["gate"][0]["missed"]
    assert report["status"] == "complete"
    assert any("share a run of 50 tokens" in w for w in report["warnings"])
    assert not (tmp_path / "run" / "work").exists()
    # complete: nothing is done again
    assert recover(chosen, tmp_path / "run") == json.loads((tmp_path / "run" / "report.json").read_text())


@pytest.mark.parametrize("train", ["blocks", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(train, pruned, words, tmp_path, monkeypatch):
    from secateurs.prune.tuning import Noted

    monkeypatch.setattr(Noted, "due", lambda self: True)
    chosen = plan(pruned, words, train=train, batch=3)
    recover(chosen, tmp_path / "whole")

    def killed(label, done, total):
        if label == "training" and done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(chosen, tmp_path / "killed", killed)
    seen = []
    recover(chosen, tmp_path / "killed", lambda label, done, total: seen.append((label, done)))
    assert min(done for label, done in seen if label == "training") == 11
    assert not any(label == "looking at the teacher" for label, _ in seen)
    whole, again = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(t, again[name]) for name, t in whole.items())


@pytest.mark.parametrize("changed", ["model", "teacher", "text"])
def test_a_killed_run_does_not_go_on_with_what_has_changed(changed, pruned, words, tmp_path, monkeypatch):
    run, teacher, text = tmp_path / "pruned", tmp_path / "dense", tmp_path / "text.txt"
    shutil.copytree(pruned, run)
    shutil.copytree(json.loads((run / "plan.json").read_text())["model"], teacher)
    text.write_text(words.read_text())
    chosen = plan(run, text, teacher=str(teacher))
    module = importlib.import_module("secateurs.train.recover")
    monkeypatch.setattr(module, "tune", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recover(chosen, tmp_path / "run")
    if changed == "text":
        text.write_text(words.read_text()[100:])
    else:
        os.utime((run / "model" if changed == "model" else teacher) / "config.json", (1, 1))
    with pytest.raises(OutputError, match=r"has changed since .* was begun; delete"):
        recover(chosen, tmp_path / "run")


def test_two_processes_do_what_one_does(pruned, words, tmp_path):
    one = recover(plan(pruned, words, batch=4), tmp_path / "one")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateurs", "recover", str(pruned), "--out", str(tmp_path / "two"),
        "--calibration", str(words), "--steps", "24", "--batch", "4", "--samples", "24", "--seqlen", "32", "--eval-windows", "0", "--quiet",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["training"]["ranks"] == 2
    for name in ("before", "after"):
        assert two["training"][name] == pytest.approx(one["training"][name], rel=1e-4)
    a, b = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    # Adam's first steps are signs of gradients, so round-off may turn one that is nearly 0
    off = torch.cat([(t - b[name]).flatten().abs() for name, t in a.items()])
    assert off.median() < 1e-6
    assert zeros_kept(a, b)


def test_lora_is_masked_at_every_point(llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    linear = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        linear.weight[torch.rand(linear.weight.shape) < 0.5] = 0
    zeros = linear.weight.detach() == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        was = model(ids).logits
    low = sc.train.lora(model, rank=4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, was)
    optimizer = torch.optim.AdamW(low.parameters(), 0.1)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not linear.weight[zeros].any()
    with torch.no_grad():
        trained = model(ids).logits
    low.merge()
    assert isinstance(linear.weight, torch.nn.Parameter)
    assert set(linear._parameters) == {"weight", "bias"}
    assert bool(((linear.weight == 0) == zeros).all())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trained)
    assert not torch.allclose(trained, was, atol=1e-2)
    names = [n for n, _ in model.named_parameters()]
    assert not any("parametrizations" in n for n in names)


def test_a_recovered_run_is_packed_measured_and_timed_like_any_other(pruned, words, tmp_path, capsys):
    from secateurs import cli
    from secateurs.base.errors import CheckpointError, VerifyError
    from secateurs.base.run_directory import models_of
    from secateurs.machine.bench import variants_of
    from secateurs.report.page import write

    run = tmp_path / "run"
    recover(plan(pruned, words, steps=1), run)
    dense = json.loads((pruned / "plan.json").read_text())["model"]
    assert models_of(run) == (*models_of(pruned)[:1], run / "model") == (dense, run / "model")
    with pytest.raises(CheckpointError, match="has no packed model; make one with `secateurs pack"):
        variants_of(run)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["pack", str(run), "--quiet"])
    packed = json.loads((run / "report.json").read_text())["packed"]
    assert packed["totals"]["layers_packed"] > 0
    assert json.loads((run / "report.json").read_text())["bytes"].keys() == {"dense", "pruned", "packed"}
    assert "positions (a bit a weight)" in write([run], None).read_text()
    assert [v.folder for v in variants_of(run)] == [dense, str(run / "packed")]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["eval", str(run), "--eval-text", str(words), "--eval-windows", "2", "--eval-seqlen", "32", "--json"])
    assert json.loads(capsys.readouterr().out)["quality"]["ppl_ratio"]["value"] != 1
    with pytest.raises(VerifyError, match="no run of `secateurs prune`"):
        sc.verify(run)
    # trained on the text alone, it is held against what it was
    alone = tmp_path / "alone"
    recover(plan(pruned, words, steps=1, teacher="none"), alone)
    assert models_of(alone) == (str(pruned / "model"), alone / "model")


def test_lora_leaves_tied_matrices_alone():
    """Two modules would add two changes to one matrix."""
    model = tiny.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight[0] = 0
        model.model.layers[0].mlp.up_proj.weight[0] = 0
    found = sc.train.lora(model, 2)
    assert [type(module).__name__ for module, _ in found.places] == ["ParametrizedLinear"]
    assert found.places[0][0] is model.model.layers[0].mlp.up_proj


def test_recomputing_opt_leaves_dropout_off():
    recompute = importlib.import_module("secateurs.train.recover").recompute
    model = tiny.make("opt")
    for layer in model.model.decoder.layers:
        layer.dropout = 0.5
    recompute(model)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_gradient_checkpointing_gives_the_same_bits(pruned, words, tmp_path):
    for name, options in (("plain", {}), ("again", {"checkpointing": True})):
        recover(plan(pruned, words, steps=6, **options), tmp_path / name)
    a, b = tensors(tmp_path / "plain"), tensors(tmp_path / "again")
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize(("options", "message"), [
    ({"train": "heads"}, "unknown train 'heads'; write blocks, all, vectors, lora"),
    ({"steps": 0}, "steps 0 is too small"),
    ({"batch": 0}, "batch 0 is too small"),
    ({"rate": -1.0}, "rate -1 is not above 0"),
    ({"temperature": 0.0}, "temperature 0 is not above 0"),
    ({"hidden": -1.0}, "hidden -1 is below 0"),
    ({"dtype": "fp8"}, "unknown dtype 'fp8'; write bf16 or fp32"),
    ({"samples": 1}, "one window is held out"),
    ({"gate": ("ppl",)}, "cannot read gate 'ppl'"),
    ({"kl": 0.0}, "there is nothing to train for"),
    ({"teacher": "none", "hidden": 1.0}, "there is none; give --teacher"),
])  # fmt: skip
def test_bad_plans_get_a_sentence(options, message, pruned, words, tmp_path):
    with pytest.raises(PlanError, match=message):
        recover(plan(pruned, words, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_teach_or_learn(pruned, llama, words, tmp_path, monkeypatch):
    def another(name, **changes):
        kind, arguments = tiny.TINY["llama"]
        with monkeypatch.context() as patch:
            patch.setitem(tiny.TINY, "llama", (kind, {**arguments, **changes}))
            return tiny.save(tmp_path / name)

    with pytest.raises(PlanError, match="give --teacher, or --teacher none"):
        recover(asked(RecoverPlan, str(llama), calibration=str(words)), tmp_path / "run")
    other = another("other", vocab_size=300)
    with pytest.raises(PlanError, match="has another vocabulary"):
        recover(plan(pruned, words, teacher=str(other)), tmp_path / "run")
    shallow = another("shallow", num_hidden_layers=2)
    with pytest.raises(PlanError, match="compares block with block: the teacher has 2 of width 32"):
        recover(plan(pruned, words, teacher=str(shallow), hidden=1.0), tmp_path / "run")
    bert = tiny.save(tmp_path / "bert", "bert")
    with pytest.raises(PlanError, match="predicts no next token"):
        recover(plan(bert, words, teacher="none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(PlanError, match="the model has no zeros to keep"):
        sc.train.lora(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with pytest.raises(PlanError, match="LoRA of rank 0"):
        sc.train.lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), rank=0)


def test_another_plan_in_the_same_folder(pruned, words, tmp_path):
    recover(plan(pruned, words, steps=2), tmp_path / "run")
    with pytest.raises(OutputError, match=r"another plan \(steps is 2 there, 3 here\)"):
        recover(plan(pruned, words, steps=3), tmp_path / "run")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_that_it_is_called_in_changes_nothing(mode, pruned, words, tmp_path):
    few = plan(pruned, words, steps=2, samples=4)
    recover(few, tmp_path / "run")
    with mode():
        recover(few, tmp_path / "other")
    before, after = tensors(tmp_path / "run"), tensors(tmp_path / "other")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(pruned).items())
