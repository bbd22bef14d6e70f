"""Structured pruning of SmolLM2-135M: what each way of it costs, beside Torch-Pruning; and budgets in seconds against the clock.

    .venv/bin/python bench/structured.py [--only quality|latency] [MODEL]

quality: a quarter of every MLP's neurons goes (1536 to 1152), calibrated on 64 x 512 tokens of shared/data/c4_sample.jsonl,
measured on 24 windows of 2048 tokens of WikiText-2. Torch-Pruning removes as many from each block by its own importance, on
the same calibration windows where it asks for gradients; `pip install torch-pruning==1.6.1`, left out by name without it.
Finished rows of bench/results/structured.json are not run again.

latency: shrink to 0.8x and 0.6x, a prompt of 512 tokens and each of 32 after it; the finished model is timed anew beside the
dense one.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from methods import ROOT, data, fetch

QUARTER = ["--budget", "params=0.853x", "--units", "mlp", "--multiple", "128"]
OURS = {
    "obs+refit": [], "magnitude": ["--criterion", "magnitude", "--no-refit"], "obs": ["--no-refit"],
    "magnitude+refit": ["--criterion", "magnitude"], "taylor+refit": ["--criterion", "taylor"],
    "taylor": ["--criterion", "taylor", "--no-refit"],
}  # fmt: skip
PEERS = ("torch-pruning magnitude", "torch-pruning taylor", "torch-pruning hessian")
WIDTH = 1152


def spent(report):
    """Seconds of a run without its evaluation."""
    return sum(seconds for stage, seconds in report["seconds"].items() if stage != "evaluate")


def secateurs(*arguments):
    command = [sys.executable, "-m", "secateurs", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def shrink(model, out, *more):
    c4, wikitext = data(ROOT.parent / "shared")
    return secateurs(
        "shrink", model, "--out", out, "--calibration", f"{c4}:prefix+gold_completion", "--samples", 64, "--seqlen", 512,
        "--eval-text", wikitext, "--eval-windows", 24, "--eval-seqlen", 2048, *more,
    )  # fmt: skip


def peer(model, kind, folder):
    """Torch-Pruning's groups of gate_proj's outputs, the least important quarter of every block removed; a model folder."""
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateurs.quality import texts

    c4, _ = data(ROOT.parent / "shared")
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = texts.load(f"{c4}:prefix+gold_completion", tokenizer, 64, 512, 0).windows
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    net.config.use_cache = False
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[kind]()  # fmt: skip
    if kind != "magnitude":
        for ids in windows:
            if kind == "hessian":
                net.zero_grad()
            net(input_ids=ids[None], labels=ids[None]).loss.backward()
            if kind == "hessian":
                importance.accumulate_grad(net)
    graph = tp.DependencyGraph().build_dependency(net, example_inputs={"input_ids": windows[:1, :16]})
    for block in net.model.layers:
        whole = graph.get_pruning_group(block.mlp.gate_proj, tp.prune_linear_out_channels, list(range(1536)))
        score = importance(whole)
        gone = score.argsort()[: 1536 - WIDTH].tolist()
        graph.get_pruning_group(block.mlp.gate_proj, tp.prune_linear_out_channels, gone).prune()
    net.config.intermediate_size = WIDTH
    net.config.use_cache = True
    net.zero_grad()
    net.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in net.parameters())


def quality(model, found, save):
    rows = found.setdefault("quality", {})
    known = importlib.util.find_spec("torch_pruning")
    if not known:
        print("torch-pruning is not installed: its rows are left out", file=sys.stderr)
    # the two of the comparison first
    order = [*list(OURS)[:2], *(PEERS if known else ()), *list(OURS)[2:]]
    for method in order:
        if method not in rows:
            with tempfile.TemporaryDirectory() as name:
                rows[method] = measured(model, method, Path(name) / "run", rows)
            save()
        say(method, rows[method])
    best = min((row for method, row in rows.items() if method in PEERS), key=lambda row: row["ppl"], default=None)
    if best:
        print(f"obs+refit's excess: {excess(rows['obs+refit']) / excess(rows['magnitude']):.3f}x magnitude's, "
              f"{excess(rows['obs+refit']) / excess(best):.3f}x Torch-Pruning's best")  # fmt: skip


def measured(model, method, folder, rows):
    """{parameters, ppl, dense, seconds}"""
    if method in OURS:
        report = shrink(model, folder, *QUARTER, *OURS[method])
        return {
            "parameters": report["left"]["parameters"], "ppl": report["quality"]["ppl"]["value"],
            "dense": report["quality"]["ppl_dense"]["value"], "seconds": spent(report),
        }  # fmt: skip
    began = time.perf_counter()
    parameters = peer(model, method.removeprefix("torch-pruning "), folder)
    seconds = time.perf_counter() - began
    _, wikitext = data(ROOT.parent / "shared")
    report = secateurs("eval", folder, "--eval-text", wikitext, "--eval-windows", 24, "--eval-seqlen", 2048)
    ppl = report["quality"]["ppl_dense"]["value"]
    return {"parameters": parameters, "ppl": ppl, "dense": rows["magnitude"]["dense"], "seconds": seconds}


def excess(row):
    return math.log(row["ppl"] / row["dense"])


def say(method, row):
    print(
        f"{method:24s} ppl {row['ppl']:9.2f}  excess {excess(row):.3f}  {row['parameters']:,}  {row['seconds']:.0f} s",
        flush=True,
    )


def latency(model, found, save):
    from transformers import AutoModelForCausalLM

    from secateurs.shrink.latency import measure

    rows = {}
    for share in (0.8, 0.6):
        with tempfile.TemporaryDirectory() as name:
            began = time.perf_counter()
            report = shrink(model, Path(name) / "run", "--budget", f"latency={share}x")
            seconds = time.perf_counter() - began
            pair = [
                AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval()
                for f in (model, Path(name) / "run" / "model")
            ]
            dense, left = measure(pair, 512, 32, rounds=15)
            ratio = left.over(dense)
            rows[share] = {
                "left": report["left"], "ratio": {"prefill": ratio.prefill, "decode": ratio.decode},
                "ppl": report["quality"]["ppl"]["value"], "dense": report["quality"]["ppl_dense"]["value"],
                "shrink_seconds": spent(report), "all_seconds": seconds, "tried": report["tried"],
            }  # fmt: skip
            shape = {k: report["left"][k] for k in ("layers", "mlp", "heads", "queries", "parameters")}
            print(
                f"latency {share}x: prefill {ratio.prefill:.3f}x, decode {ratio.decode:.3f}x, {shape}, ppl "
                f"{rows[share]['ppl']:.2f}, shrink {report['seconds']['shrink']:.0f} s, with evaluation {seconds:.0f} s",
                flush=True,
            )  # fmt: skip
    found["latency"] = rows
    save()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--only", choices=("quality", "latency"))
    arguments = parser.parse_args()
    model = arguments.model or str(fetch())
    file = ROOT / "bench" / "results" / "structured.json"
    found = json.loads(file.read_text()) if file.is_file() else {}

    def save():
        file.write_text(json.dumps(found, indent=1) + "\n")

    for name, job in (("quality", quality), ("latency", latency)):
        if arguments.only in (None, name):
            job(model, found, save)


if __name__ == "__main__":
    main()
