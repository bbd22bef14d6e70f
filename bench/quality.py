"""What pruning costs in quality: methods and efforts at many sparsities, on one model. Makes docs/quality.md and its plot.

    .venv/bin/python bench/quality.py [MODEL] [--rows 0.5:balanced,2:4:best,...] [--limit 200] [--pages-only]

MODEL: default SmolLM2-135M. Calibrated on 64 x 512 tokens (`best`: 384 x 512) of shared/data/c4_sample.jsonl (documents shuffled
by random.Random(0)). Perplexity and KL on the first 24 windows of 2048 tokens of shared/data/wikitext-2-raw.test.txt and on 6
such windows of the C4 documents that come last in that order; LAMBADA, PIQA and ARC-easy by lm-eval on their first --limit
questions. A row is SPARSITY:METHOD or N:M:METHOD, or 0.7:ALLOCATION, which is `balanced` with its zeros shared out otherwise.
Rows run one after another, each stage in a process of its own. A finished row is run again only if what its method does has
changed since, or --limit or --samples. Seconds are of the pruning stage, memory is of the run with its evaluation.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from methods import ROOT, data, fetch

from secateurs.base.files import write_json, write_text
from secateurs.prune.plan import Plan
from secateurs.quality.settings import Calibration, Evaluation

SPARSITIES = ("0.3", "0.4", "0.5", "0.6", "0.7", "2:4", "4:8", "8:16")
METHODS = ("magnitude", "wanda", "sparsegpt", "fast", "balanced", "best")
EFFORTS = ("fast", "balanced", "best")
# `balanced` shares zeros out by `global`
ALLOCATIONS = ("uniform", "erk", "owl", "alpha", "measured")
ROWS = [f"{s}:{m}" for s in SPARSITIES for m in METHODS] + [f"0.7:{a}" for a in ALLOCATIONS]
# calibration windows; all blocks together are tuned once on each
SAMPLES = {"best": 384}
# of a resolved plan, what a method does
CHOICES = (
    "method",
    "sensitivity",
    "blend",
    "permute",
    "reconstruct",
    "distill",
    "allocation",
    "scope",
    "damping",
    "samples",
)
# of C4's documents, the last in shuffled order
HELD_OUT = 150
TASKS = {
    "lambada": ("lambada_openai_test.jsonl", "acc"),
    "piqa": ("raw_piqa.jsonl", "acc"),
    "arc_easy": ("raw_arc_easy.jsonl", "acc"),
}
LOCAL = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metric_list: [{{metric: acc}}]
"""
MULTIPLE_CHOICE = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
"""
LAST_WORD = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
"""


# arguments: the plan, the run directory, C4's held-out text
RUN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from secateurs.model.checkpoint import Checkpoint
from secateurs.prune.run import Run
from secateurs.prune.plan import Plan
from secateurs.quality.evaluation import quality

plan, out = Plan.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
report = Run(plan, out).complete().as_dict()
other = replace(plan.evaluation, text=sys.argv[3], windows=6)
c4 = quality(Checkpoint(plan.model), Checkpoint(out / "model"), other)
print(json.dumps([report, c4[0].as_dict()]))
"""


def plan_of(row: str, model: str, shared: Path, samples: int | None) -> Plan:
    c4, wikitext = data(shared)
    pattern, _, method = row.rpartition(":")
    chosen = {"pattern": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    if method in ALLOCATIONS:
        chosen |= {"effort": "balanced", "allocation": method}
    else:
        chosen["effort" if method in EFFORTS else "method"] = method
    return Plan(
        model,
        **chosen,
        calibration=Calibration(f"{c4}:prefix+gold_completion", samples or SAMPLES.get(method, 64), seqlen=512),
        evaluation=Evaluation(str(wikitext), windows=24, seqlen=2048),
    )


def tasks(folder: Path, shared: Path, limit: int, work: Path) -> dict:
    """{task: [accuracy, standard error]} of a model folder, in a fresh process."""
    definitions = work / "tasks"
    definitions.mkdir(exist_ok=True)
    for name, (file, _) in TASKS.items():
        text = LOCAL.format(name=name, file=shared / "data" / file)
        (definitions / f"{name}.yaml").write_text(text + (LAST_WORD if name == "lambada" else MULTIPLE_CHOICE))
    code = (
        "import json, sys; from secateurs.quality.tasks import run_tasks; "
        f"print(json.dumps(run_tasks({str(folder)!r}, {list(TASKS)!r}, {str(definitions)!r}, {limit})))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout
    found = json.loads(out.splitlines()[-1])
    return {name: [found[name][metric], found[name][f"{metric}_stderr"]] for name, (_, metric) in TASKS.items()}


def held_out(c4: Path, work: Path) -> Path:
    """The C4 documents that calibration reaches last, as a text file."""
    rows = [json.loads(line) for line in c4.read_text().splitlines()]
    documents = [row["prefix"] + row["gold_completion"] for row in rows]
    random.Random(0).shuffle(documents)
    file = work / "c4-held-out.txt"
    file.write_text("\n\n".join(documents[-HELD_OUT:]))
    return file


def choices(plan: Plan) -> dict:
    return {name: getattr(plan.calibration if name == "samples" else plan, name) for name in CHOICES}


def run(plan: Plan, shared: Path, limit: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        held = held_out(data(shared)[0], work)
        command = [sys.executable, "-c", RUN, json.dumps(plan.as_dict()), str(work / "run"), str(held)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        report, c4 = json.loads(out)
        return {
            "choices": choices(plan),
            "sparsity": report["totals"]["sparsity"],
            "wikitext": report["quality"],
            "c4": c4,
            "seconds": sum(s for stage, s in report["seconds"].items() if stage != "evaluate"),
            "peak_memory_bytes": report["peak_memory_bytes"],
            "machine": report["machine"],
            "limit": limit,
            "tasks": tasks(work / "run" / "model", shared, limit, work) if limit else {},
        }


def excess(quality: dict) -> float:
    """Nats a token above the dense model."""
    from math import log

    return log(quality["ppl"]["value"] / quality["ppl_dense"]["value"])


def page(done: dict, file: Path, plot: Path) -> None:
    rows, dense = done["rows"], done["dense"]
    setup = (__doc__ or "").split("MODEL: default SmolLM2-135M. ")[1].split(" A row is")[0]
    lines = [
        "# Quality against sparsity",
        "",
        f"{done['model']}, made by `bench/quality.py`, which runs whatever rows are missing.",
        *setup.replace("--limit", str(dense["limit"])).splitlines(),
        "",
        "*Excess* is the loss above the dense model's, in nats a token on WikiText-2; *ratio* is that excess over SparseGPT's at",
        "the same sparsity. Intervals (95%) are in bench/results/quality.json; accuracies carry their standard error.",
        "",
        *_HEAD,
    ]
    if rows:
        first = next(iter(rows.values()))
        lines.append(
            f"| | dense | {first['wikitext']['ppl_dense']['value']:.2f} | {first['c4']['ppl_dense']['value']:.2f} | | | | "
            f"{accuracies(dense)} | | |"
        )
    lines += [line(rows, p, m) for p in SPARSITIES for m in METHODS if f"{p}:{m}" in rows]
    lines += ["", f"![Excess loss against sparsity, one line a method]({plot.name})", ""]
    shares = [m for m in (*ALLOCATIONS, "balanced") if f"0.7:{m}" in rows]
    if len(shares) > 1:
        lines += [
            "## Allocations compared", "",
            "`balanced` at 70%, and the same with other allocations of zeros to layers. `balanced` itself uses `global`: one",
            "threshold over all scores, in units of the model's loss.", "", *_HEAD, *(line(rows, "0.7", m) for m in shares), "",
        ]  # fmt: skip
    write_text(file, "\n".join(lines))
    draw(rows, plot)


_HEAD = (
    "| pattern | method | perplexity, WikiText-2 | C4 | KL | excess | ratio | LAMBADA | PIQA | ARC-easy | prune s | memory |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def accuracies(row: dict) -> str:
    found = row.get("tasks") or {}
    return " | ".join(f"{found[n][0]:.3f} ± {found[n][1]:.3f}" if n in found else "" for n in TASKS)


def label(method: str, row: dict) -> str:
    # the page says 64 windows
    samples = row["choices"]["samples"]
    return method if samples == 64 else f"{method}, {samples} windows"


def line(rows: dict, pattern: str, method: str) -> str:
    row, base = rows[f"{pattern}:{method}"], rows.get(f"{pattern}:sparsegpt")
    ratio = f"{excess(row['wikitext']) / excess(base['wikitext']):.2f}x" if base else ""
    name = pattern if ":" in pattern else f"{float(pattern):.0%}"
    return (
        f"| {name} | {label(method, row)} | {row['wikitext']['ppl']['value']:.2f} | {row['c4']['ppl']['value']:.2f} | "
        f"{row['wikitext']['kl']['value']:.3f} | {excess(row['wikitext']):.3f} | {ratio} | {accuracies(row)} | "
        f"{row['seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} GB |"
    )


def draw(rows: dict, plot: Path) -> None:
    """Excess loss against sparsity, one line a method, and beside it by N:M."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateurs"
    from matplotlib import pyplot as plt

    figure, (free, fixed) = plt.subplots(1, 2, figsize=(8, 4.5), width_ratios=(5, 3), sharey=True, layout="constrained")
    # Okabe and Ito's palette, told apart by the colour-blind as well
    colours = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00")
    for method, colour in zip(METHODS, colours, strict=True):
        for axes, wanted in ((free, False), (fixed, True)):
            found = [(p, rows[f"{p}:{method}"]) for p in SPARSITIES if (":" in p) == wanted and f"{p}:{method}" in rows]
            points = [(p if wanted else float(p), excess(row["wikitext"])) for p, row in found]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label(method, found[0][1]))
    free.set(xlabel="zeros, anywhere", ylabel="excess loss on WikiText-2, nats a token", yscale="log")
    free.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    free.set_xticks([float(p) for p in SPARSITIES if ":" not in p])
    fixed.set(xlabel="50% zeros, N kept of M")
    figure.suptitle("Lower is better", fontsize=9)
    for axes in (free, fixed):
        axes.grid(alpha=0.3)
    free.legend()
    figure.savefig(plot, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task; 0 for none")
    parser.add_argument("--samples", type=int, help="calibration windows of 512 tokens; default 64, best 384")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quality.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--pages-only", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows.split(",") if row not in ROWS]
    if unknown:
        raise SystemExit(f"unknown row '{unknown[0]}'; write SPARSITY:METHOD of {SPARSITIES} and {METHODS}")
    done = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    if arguments.pages_only and not done:
        raise SystemExit(f"{arguments.out} has no rows; leave --pages-only out")

    if not arguments.pages_only:
        model = arguments.model or str(fetch())
        name = Path(model).resolve().name
        if done.setdefault("model", name) != name:
            raise SystemExit(
                f"{arguments.out} holds rows of {done['model']}; give --out and --page for those of {name}"
            )
        rows = done.setdefault("rows", {})
        with tempfile.TemporaryDirectory() as work:
            if done.get("dense", {}).get("limit") != arguments.limit:
                found = tasks(Path(model), arguments.shared, arguments.limit, Path(work)) if arguments.limit else {}
                done["dense"] = {"limit": arguments.limit, "tasks": found}
            for row in arguments.rows.split(","):
                plan = plan_of(row, model, arguments.shared, arguments.samples)
                known = rows.get(row, {})
                if (known.get("choices"), known.get("limit")) != (choices(plan), arguments.limit):
                    rows[row] = run(plan, arguments.shared, arguments.limit)
                    write_json(arguments.out, done)
                    page(done, arguments.page, arguments.page.with_suffix(".svg"))
                found = rows[row]
                quality = found["wikitext"]
                print(
                    f"{row:18s} ppl {quality['ppl']['value']:.2f}, excess {excess(quality):.3f}, {found['seconds']:.0f} s",
                    flush=True,
                )
    page(done, arguments.page, arguments.page.with_suffix(".svg"))


if __name__ == "__main__":
    main()
