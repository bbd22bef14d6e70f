import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command import FAST, fails, run

from secateurs import cli
from secateurs.matrix.patterns import NM


def test_prune_verify_inspect_eval_end_to_end(tmp_path, llama, words):
    out = tmp_path / "run"
    text, bars = run(
        "prune", llama, "--out", out, "--pattern", "2:4", "--calibration", words, "--eval-text", words, *FAST
    )
    assert "Pruned 21 layers to 50.00% zeros (13,824 of 27,648 weights): 2:4, admm" in text
    assert "allocation uniform, effort balanced" in " ".join(text.split())
    assert "The zeros are still stored as zeros" in text
    assert "perplexity, pruned / dense" in text
    assert "pruning" in bars
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "complete"
    assert report["totals"]["sparsity"] == 0.5
    assert json.loads((out / "plan.json").read_text())["pattern"] == "2:4"
    card = (out / "model" / "README.md").read_text()
    assert "| pattern | 2:4 |" in card

    text, _ = run("verify", out)
    assert "holds what its report says" in " ".join(text.split())
    text, _ = run("inspect", out)
    assert "2:4 4:8 8:16 16:32" in text
    facts = json.loads(run("inspect", out, "--json")[0])
    assert len(facts["layers"]) == 21
    assert facts["layers"][0]["holds"] == ["2:4", "4:8", "8:16", "16:32"]
    quality = json.loads(run("eval", out, "--eval-text", words, "--eval-windows", 2, "--eval-seqlen", 32, "--json")[0])[
        "quality"
    ]
    assert quality == report["quality"]
    alone = json.loads(run("eval", llama, "--eval-text", words, "--eval-windows", 2, "--eval-seqlen", 32, "--json")[0])[
        "quality"
    ]
    assert alone["ppl_dense"] == quality["ppl_dense"]
    assert alone["ppl"] is None


def test_a_plan_file_is_the_same_run(tmp_path, llama, words):
    options = ["--method", "wanda", "--sparsity", "0.4", "--calibration", words, "--eval-text", words, *FAST]
    run("prune", llama, "--out", tmp_path / "a", *options, "--quiet")
    text, bars = run("prune", "--plan", tmp_path / "a" / "plan.json", "--out", tmp_path / "b", "--quiet")
    assert text == bars == ""
    a, b = (json.loads((tmp_path / x / "report.json").read_text()) for x in "ab")
    assert a["shards"] == b["shards"]
    run("prune", "--plan", tmp_path / "a" / "plan.json", "--sparsity", 0.6, "--out", tmp_path / "c", "--quiet")
    assert json.loads((tmp_path / "c" / "report.json").read_text())["totals"]["sparsity"] == pytest.approx(
        0.6, abs=0.01
    )


def test_a_choice_beside_a_plan_undoes_what_followed_from_the_old_one(tmp_path, llama, words):
    texts = ["--calibration", words, "--eval-text", words, *FAST]
    run("prune", llama, "--out", tmp_path / "a", *texts, "--quiet")
    again = ["prune", "--plan", tmp_path / "a" / "plan.json", "--quiet", "--out"]
    run(*again, tmp_path / "b", "--method", "wanda")
    run(*again, tmp_path / "c", "--pattern", "2:4")
    run(*again, tmp_path / "d", "--effort", "fast", "--sparsity", 0.9)
    a, b, c, d = (json.loads((tmp_path / x / "plan.json").read_text()) for x in "abcd")
    chosen = ("effort", "method", "sensitivity", "reconstruct", "allocation", "scope", "damping")
    assert [a[k] for k in chosen] == ["balanced", "admm", 4096, 0, "global", "layer", None]
    assert [b[k] for k in chosen] == ["plain", "wanda", 0, 0, "uniform", "row", 0.01]
    assert [d[k] for k in chosen] == ["fast", "wanda+refit", 0, 0, "uniform", "row", None]
    assert (c["pattern"], c["sparsity"], c["allocation"]) == ("2:4", 0.5, "uniform")
    assert (a["max_sparsity"], d["max_sparsity"]) == (0.7, pytest.approx(29 / 30))


def test_json_is_all_there_is_on_standard_output(tmp_path, llama):
    out, _ = run("prune", llama, "--out", tmp_path / "run", "--method", "magnitude", "--eval-windows", 0, "--json")
    assert json.loads(out)["status"] == "complete"
    found = json.loads(run("methods", "--json")[0])
    assert set(found) == {"efforts", "methods", "patterns", "allocations"}
    assert len(json.loads(run("lab", "magnitude", "--json")[0])["rows"]) == 5


def test_methods_lists_every_row_and_what_it_costs():
    text, _ = run("methods")
    found = json.loads(run("methods", "--json")[0])
    for kind in ("methods", "allocations"):
        assert all(name in text for name in found[kind]), kind
    for word in ("+refit", "+swaps", "N:M", "RxC"):
        assert word in text
    for name, effort in found["efforts"].items():
        assert re.fullmatch(r"([\d.]+ to )?[\d.]+x", effort["cost"]), name
        assert re.fullmatch(r"([\d.]+ to )?[\d.]+x", effort["fixed_cost"]), name
    cells = {}
    for line in text.splitlines():
        name, *rest = re.split(r"\s{2,}", line.strip())
        cells.setdefault(name, rest)
    assert cells["sensitivity, tokens"] == ["0", "0", "4096", "0", "8192", "0"]
    assert cells["block tuning, steps"] == ["0", "0", "0", "24", "32", "32"]
    assert cells["inputs reordered"] == ["no", "no", "no", "yes", "no", "yes"]
    costs = [(e["cost"], e["fixed_cost"]) for e in found["efforts"].values()]
    assert cells["time, SparseGPT 1x"] == [cost for pair in costs for cost in pair]


def test_an_interrupt_says_that_nothing_is_lost(monkeypatch, capsys):
    from secateurs.matrix import lab

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "magnitude", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main(["lab", "magnitude"])
    assert "what was finished is kept, rerun the same command" in capsys.readouterr().err


def test_lab_prints_and_explains():
    assert "sort(|w|)[k]" in run("lab", "magnitude")[0]
    assert "one-shot wins on held-out inputs" in run("lab", "iterative")[0]


def test_bad_requests_are_one_sentence(capsys, tmp_path, llama):
    out = tmp_path / "run"
    prune = ("prune", llama, "--out", out)
    assert "unknown pattern 'blok_4x4'" in fails(capsys, 2, *prune, "--pattern", "blok_4x4")
    assert "sparsity 1.5 is not a fraction" in fails(capsys, 2, *prune, "--sparsity", "1.5")
    assert "keeps 1 of 4, which is sparsity 0.75; sparsity 0.5 was asked" in fails(
        capsys, 2, *prune, "--pattern", "1:4", "--sparsity", "0.5"
    )
    assert "unknown method 'magic'" in fails(capsys, 2, *prune, "--method", "magic")
    assert "cannot read gate 'ppl<5%'" in fails(capsys, 2, *prune, "--gate", "ppl<5%")
    assert "unknown scope 'model'" in fails(capsys, 2, *prune, "--scope", "model")
    assert "fixes every layer's" in fails(capsys, 2, *prune, "--allocation", "global", "--pattern", "2:4")
    assert "unknown effort 'heroic'; write fast, balanced, best" in fails(capsys, 2, *prune, "--effort", "heroic")
    assert "unknown allocation 'fair'" in fails(capsys, 2, *prune, "--allocation", "fair")
    assert "leave a choice for every layer" in fails(capsys, 2, *prune, "--pattern", "2:4,unstructured")
    assert "cannot read budget 'bytes=2'" in fails(capsys, 2, *prune, "--budget", "bytes=2")
    assert "a budget is kept by --allocation measured" in fails(
        capsys, 2, *prune, "--budget", "bytes=0.5", "--allocation", "owl"
    )
    assert "blend 1.5 is not between 0" in fails(capsys, 2, *prune, "--blend", "1.5")
    assert "wanda does not; leave it out" in fails(capsys, 2, *prune, "--blend", "0.5", "--method", "wanda")
    assert "reconstruct -1 is too small" in fails(capsys, 2, *prune, "--reconstruct", "-1")
    assert "bounds 0.3..0.4 of a layer's sparsity do not hold 0.5" in fails(capsys, 2, *prune, "--max-sparsity", "0.4")
    assert "propagate dense hides them" in fails(capsys, 2, *prune, "--propagate", "dense", "--reconstruct", "8")
    assert "cannot propagate 'sideways'" in fails(capsys, 2, *prune, "--propagate", "sideways")
    assert "a gate needs an evaluation" in fails(capsys, 2, *prune, "--gate", "kl<=1", "--eval-windows", "0")
    assert "damping 0 is not above 0" in fails(capsys, 2, *prune, "--damping", "0")
    assert "samples 0 is too small" in fails(capsys, 2, *prune, "--samples", "0")
    assert "no model: give a folder" in fails(capsys, 2, "prune", "--out", out)
    assert "no place for the result" in fails(capsys, 2, "prune", llama)
    assert "windows of 4096 tokens were asked for, the model has 128" in fails(capsys, 2, *prune, "--seqlen", "4096")
    assert "no text file 'nothing.txt'" in fails(
        capsys, 1, "prune", llama, "--out", tmp_path / "r2", "--calibration", "nothing.txt"
    )
    # nothing was made, so nothing is in the way of the corrected command
    assert not (tmp_path / "r2").exists()
    shrink = (
        "shrink", llama, "--budget", "params=0.9x", "--units", "layers", "--seqlen", "32", "--out", tmp_path / "r3"
    )  # fmt: skip
    assert "no text file 'nothing.txt'" in fails(capsys, 1, *shrink, "--calibration", "nothing.txt")
    assert not (tmp_path / "r3").exists()
    assert "cannot be a hub id" in fails(capsys, 1, "prune", "./nowhere/at/all", "--out", out)
    bad = tmp_path / "plan.json"
    bad.write_text('{"sparsty": 0.5}')
    assert "unknown key 'sparsty'" in fails(capsys, 2, *prune, "--plan", bad)
    bad.write_text("{")
    assert "is not JSON" in fails(capsys, 2, *prune, "--plan", bad)
    bad.write_text('{"sparsity": "half"}')
    assert "wrong type" in fails(capsys, 2, *prune, "--plan", bad)
    assert "is this a run directory?" in fails(capsys, 1, "verify", tmp_path)


def test_an_unwritable_folder_is_one_sentence(capsys, llama):
    error = fails(capsys, 1, "prune", llama, "--out", "/proc/self/none", "--method", "magnitude")
    assert "cannot make /proc/self/none" in error
    assert "choose another folder" in error


def test_missed_gates_and_skips_have_their_own_codes(tmp_path, llama, words):
    options = ["--method", "magnitude", "--sparsity", 0.9, "--eval-text", words, *FAST]
    _, error = run("prune", llama, "--out", tmp_path / "a", *options, "--gate", "kl<=0.0001", code=3)
    assert "gate kl<=0.0001 missed: kl is" in error
    assert "the results are kept" in error
    assert (tmp_path / "a" / "report.json").is_file()
    _, error = run(
        "prune",
        llama,
        "--out",
        tmp_path / "b",
        "--method",
        "magnitude",
        "--pattern",
        "3:64",
        "--eval-windows",
        0,
        code=4,
    )
    assert "layers cannot take 3:64 and stay dense" in error
    run(
        "prune",
        llama,
        "--out",
        tmp_path / "c",
        "--method",
        "magnitude",
        "--pattern",
        "3:64",
        "--eval-windows",
        0,
        "--allow-skips",
    )
    run(
        "eval",
        tmp_path / "a",
        "--eval-text",
        words,
        "--eval-windows",
        2,
        "--eval-seqlen",
        32,
        "--gate",
        "agree>=0.999",
        code=3,
    )


def test_debug_shows_the_traceback(llama):
    from secateurs.base.errors import PlanError

    with pytest.raises(PlanError):
        cli.main(["--debug", "prune", str(llama), "--pattern", "x", "--out", "y"])


def test_sampling_from_the_model_itself(tmp_path, llama):
    run(
        "prune", llama, "--out", tmp_path / "run", "--calibration", "self", "--samples", 4, "--seqlen", 16,
        "--eval-windows", 0, "--quiet",
    )  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["calibration"]["source"] == "self: sampled from the model"
    assert report["calibration"]["tokens"] == 64


def test_tasks_of_one_s_own_run_offline(tmp_path, llama):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    rows = [
        {"question": f"{a} plus {b} is", "answers": [" small", " large"], "gold": int(a + b > 9)}
        for a in range(6)
        for b in range(6)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path}/sums.jsonl\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{answers}}'\ndoc_to_target: '{{gold}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    folder = tmp_path / "run"
    run(
        "prune",
        llama,
        "--out",
        folder,
        "--method",
        "magnitude",
        "--eval-windows",
        0,
        "--tasks",
        "sums",
        "--tasks-path",
        tmp_path / "tasks",
        "--gate",
        "sums>=0.01",
        "--gate",
        "sums>=0.99",
        "--quiet",
        code=3,
    )
    report = json.loads((folder / "report.json").read_text())
    tasks = report["tasks"]
    for results in (tasks["dense"], tasks["pruned"]):
        assert 0 <= results["sums"]["acc"] <= 1
        assert results["sums"]["acc_stderr"] > 0
    # by question: the difference of means is the mean of differences, and its interval is paired
    compared = report["compared"]["sums"]
    assert compared["difference"]["value"] == pytest.approx(
        tasks["pruned"]["sums"]["acc"] - tasks["dense"]["sums"]["acc"]
    )
    assert compared["pruned"]["n"] == 36
    assert [g["verdict"] for g in report["gate"]] == ["passed", "missed"]
    assert "over 36 questions, the limit is 0.99" in report["gate"][1]["missed"]
    _, error = run(
        "eval", llama, "--eval-windows", 1, "--tasks", "none", "--tasks-path", tmp_path / "tasks", "--quiet", code=1
    )
    assert "no task 'none' in" in error


def test_inspect_finds_the_patterns_that_hold(tmp_path):
    from secateurs.model.inspect import inspect

    model = tiny.make("gpt2")
    with torch.no_grad():
        weight = model.transformer.h[1].mlp.c_fc.weight
        weight.copy_((weight.T * NM(4, 8).keep(torch.rand(weight.T.shape), 0.5)).T)
    model.save_pretrained(tmp_path)
    facts = {layer.name: layer for layer in inspect(tmp_path).layers}
    layer = facts["transformer.h.1.mlp.c_fc"]
    assert layer.holds == ("4:8", "8:16", "16:32")
    assert (layer.shape, layer.zeros, layer.nbytes) == ((128, 32), 2048, 128 * 32 * 4)
    assert facts["transformer.h.0.mlp.c_fc"].holds == ()


def test_shrink_then_recover_from_the_command_line(tmp_path, llama, words, capsys):
    small, out = tmp_path / "small", tmp_path / "out"
    evaluation = ["--eval-text", words, "--eval-windows", "2", "--eval-seqlen", "32"]
    text, _ = run(
        "shrink", llama, "--out", small, "--budget", "params=0.9x", "--units", "mlp", "--multiple", "4", "--calibration", words,
        "--samples", "8", "--seqlen", "32", *evaluation,
    )  # fmt: skip
    assert "MLP neurons a block" in text
    training = ["--calibration", words, "--samples", "24", "--seqlen", "32", "--batch", "2", "--steps"]
    text, bars = run("recover", small, "--out", out, *training, "24", *evaluation)
    assert "24 steps of 2 windows on" in text
    assert "After:" in text
    assert "training" in bars
    error = fails(
        capsys, 3, "recover", small, "--out", tmp_path / "gated", *training, "1", *evaluation, "--gate", "kl<=0"
    )
    assert "gate kl<=0 undecided, so not passed" in error
    assert (tmp_path / "gated" / "model" / "config.json").is_file()


@pytest.mark.parametrize(("command", "message"), [
    (("recover", "{llama}", "--teacher", "none", "--train", "heads"), "unknown train 'heads'"),
    (("recover", "{llama}"), "give --teacher, or --teacher none"),
    (("recover", "{llama}", "--teacher", "none", "--gate", "ppl"), "cannot read gate 'ppl'"),
    (("shrink", "{llama}", "--budget", "params=1.2x"), "is all of the dense model"),
    (("shrink", "{llama}", "--budget", "params=0.9x", "--units", "wings"), "unknown unit 'wings'"),
])  # fmt: skip
def test_bad_requests_to_shrink_and_recover(command, message, tmp_path, llama, capsys):
    arguments = [part.format(llama=llama) for part in command]
    assert message in fails(capsys, 2, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BENCH = {
    "machine": {"memory_bytes": 24 * 10**9},
    "variants": [
        {
            "name": name, "weights_bytes": 10**8, "kv_bytes_per_token": 10**4,
            "prefill": {"tokens_per_second": 1000, "low": 950, "high": 1050},
            "batches": [{"batch": b, "decode": {"tokens_per_second": rate * b, "low": 0.9 * rate * b, "high": 1.1 * rate * b}} for b in (1, 4)],
        }
        for name, rate in (("dense", 20), ("packed", 40))
    ],
}  # fmt: skip
TRAFFIC = ("--rate", "5", "--price", "2 USD", "--prompt", "100", "--output", "50", "--requests", "2000")


def test_a_fleet_is_sized_written_and_shown(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(BENCH))
    text, _ = run("fleet", file, *TRAFFIC)
    found = json.loads((tmp_path / "fleet.json").read_text())
    dense, packed = found["variants"]
    assert packed["replicas"] < dense["replicas"]
    assert f"{packed['saved_a_year']:,.0f} [" in text
    assert "2 USD a node-hour; 2,000 requests simulated" in " ".join(text.split())
    # no length and no bandwidth is stated
    assert "Speed of dense: decoding was measured with 96 tokens a sequence only" in " ".join(text.split())
    assert json.loads(run("fleet", file, *TRAFFIC, "--json")[0]) == found


@pytest.mark.parametrize(("options", "message"), [
    (("--rate", "0"), "traffic of 0 requests a second needs no fleet"),
    (("--rate", "-3"), "traffic of -3 requests a second needs no fleet"),
    (("--rate", "5", "--percentile", "100"), "percentile 100 cannot be kept"),
    (("--rate", "5", "--price", "2"), "price '2' cannot be read; write an amount and its currency"),
    (("--rate", "5", "--fits", "0"), "fits 0 is no percentage of moments"),
    (("--trace", "{trace}"), "line 2 is no request"),
    ((), "no traffic: give --rate"),
])  # fmt: skip
def test_bad_requests_to_fleet(options, message, tmp_path, capsys):
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "trace.jsonl").write_text('{"time": 0, "prompt": 1, "output": 1}\nbroken\n')
    arguments = [part.format(trace=tmp_path / "trace.jsonl") for part in options]
    price = () if "--price" in options else ("--price", "2 USD")
    assert message in fails(capsys, 2, "fleet", tmp_path / "bench.json", *price, *arguments)
    assert not (tmp_path / "fleet.json").exists()


def test_what_zeros_are_worth_elsewhere():
    text = " ".join(run("realize", "0.9", "2:4", "shrink:flops=0.7x", "--profile", "a100")[0].split())
    assert "published figures, not measured; fractions of the dense model: nominal" in text
    rows = json.loads(run("realize", "0.9", "2:4", "shrink:flops=0.7x", "--profile", "a100", "--json")[0])["rows"]
    assert [row["candidate"] for row in rows] == ["2:4", "shrink:flops=0.7x", "0.9"]


def test_decide_and_report_end_to_end(tmp_path, llama, words):
    """On a machine that was never probed, with candidates of which none can pay: a random net of 32 channels."""
    options = ["--calibration", words, "--eval-text", words, *FAST, "--candidates", "0.5,shrink:params=0.9x", "--multiple", "8",
               "--prompt", "8", "--new", "8", "--repeats", "2", "--effort", "fast", "--no-rivals"]  # fmt: skip
    _, error = run("decide", llama, "--out", tmp_path / "run", "--gate", "kl<=0", *options, code=5)
    assert "Ship the dense model: no candidate both passes the floor and pays" in " ".join(error.split())
    found = json.loads((tmp_path / "run" / "decide.json").read_text())
    assert found["recommended"] == "dense"
    assert (tmp_path / "run" / "profile.json").is_file()
    run("report", tmp_path / "run")
    assert "Ship the dense model" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("command", "code", "message"), [
    (("decide", "{llama}", "--out", "{out}"), 2, "a decision needs a floor"),
    (("decide", "{llama}", "--out", "{out}", "--gate", "kl<=1", "--candidates", "many"), 2, "cannot read candidate 'many'"),
    (("decide", "{llama}", "--out", "{out}", "--gate", "kl<=1", "--budget", "2"), 2, "cannot read budget '2'"),
    (("decide", "{llama}", "--out", "{out}", "--gate", "kl<=1", "--prompt", "16", "--profile", "b200"), 1, "no profile 'b200'"),
    (("report", "{out}"), 1, "no run directory: it has no plan.json"),
    (("realize", "--profile", "none.json"), 1, "no profile 'none.json'"),
    (("realize", "3:2", "--profile", "a100"), 2, "cannot read candidate '3:2'"),
])  # fmt: skip
def test_bad_requests_to_decide_and_report(command, code, message, tmp_path, llama, capsys):
    arguments = [part.format(llama=llama, out=tmp_path / "out") for part in command]
    assert message in fails(capsys, code, *arguments)
    assert not (tmp_path / "out").exists()


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("secateurs")
    done = subprocess.run(
        [command, "prune", "nowhere", "--out", "x", "--sparsity", "2"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "sparsity" in done.stderr
    assert "Traceback" not in done.stderr
