"""What pruning costs in quality: methods and efforts at many sparsities, on one model. Makes docs/quality.md and its plot.

    .venv/bin/python bench/quality.py [MODEL] [--rows 0.5:balanced,2:4:best,...] [--limit 200] [--pages-only]

MODEL: default SmolLM2-135M. Calibrated on 64 x 512 tokens of shared/data/c4_sample.jsonl (documents shuffled by
random.Random(0)). Perplexity and KL on the first 24 windows of 2048 tokens of shared/data/wikitext-2-raw.test.txt and on 6 such
windows of the C4 documents that come last in that order; LAMBADA, PIQA and ARC-easy by lm-eval on their first --limit
questions. A row is
SPARSITY:METHOD or N:M:METHOD; rows run one after another, each stage in a process of its own. Finished rows of
bench/results/quality.json are not run again. Seconds are of the pruning stage, memory is of the run with its evaluation.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from methods import ROOT, data, fetch

SPARSITIES = ("0.3", "0.4", "0.5", "0.6", "0.7", "2:4", "4:8", "8:16")
METHODS = ("magnitude", "wanda", "sparsegpt", "fast", "balanced", "best")
EFFORTS = ("fast", "balanced", "best")
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
CHOICES = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
"""
LAST_WORD = """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
"""


def secateurs(*arguments) -> dict:
    command = [sys.executable, "-m", "secateurs.cli", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def tasks(folder: Path, shared: Path, limit: int, work: Path) -> dict:
    """{task: [accuracy, standard error]} of a model folder, in a fresh process."""
    definitions = work / "tasks"
    definitions.mkdir(exist_ok=True)
    for name, (file, _) in TASKS.items():
        text = LOCAL.format(name=name, file=shared / "data" / file)
        (definitions / f"{name}.yaml").write_text(text + (LAST_WORD if name == "lambada" else CHOICES))
    code = (
        "import json, sys; from secateurs.tasks import run_tasks; "
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


def run(row: str, model: str, shared: Path, limit: int, samples: int) -> dict:
    c4, wikitext = data(shared)
    pattern, _, method = row.rpartition(":")
    chosen = ["--pattern", pattern] if ":" in pattern else ["--sparsity", pattern]
    chosen += ["--effort" if method in EFFORTS else "--method", method]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        report = secateurs(
            "prune", model, "--out", work / "run", *chosen, "--calibration", f"{c4}:prefix+gold_completion",
            "--samples", samples, "--seqlen", 512, "--eval-text", wikitext, "--eval-windows", 24, "--eval-seqlen", 2048,
        )  # fmt: skip
        c4_quality = secateurs(
            "eval", work / "run", "--text", held_out(c4, work), "--windows", 6, "--seqlen", 2048
        )["quality"]  # fmt: skip
        result = {
            "samples": samples,
            "sparsity": report["totals"]["sparsity"],
            "wikitext": report["quality"],
            "c4": c4_quality,
            "seconds": report["seconds"]["prune"],
            "peak_memory_bytes": report["peak_memory_bytes"],
            "machine": report["machine"],
        }
        if limit:
            result["limit"], result["tasks"] = limit, tasks(work / "run" / "model", shared, limit, work)
    return result


def excess(quality: dict) -> float:
    """Nats a token above the dense model."""
    from math import log

    return log(quality["ppl"]["value"] / quality["ppl_dense"]["value"])


def page(done: dict, file: Path, plot: Path, command: str) -> None:
    rows = {key: row for key, row in done.items() if key != "dense"}
    setup = (__doc__ or "").split("MODEL: default SmolLM2-135M. ")[1].split(" A row is")[0]
    lines = [
        "# Quality against sparsity",
        "",
        f"SmolLM2-135M-Instruct, made by `{command}`, which runs whatever rows are missing. {setup}",
        "",
        "*Excess* is the loss above the dense model, in nats a token on WikiText-2; *ratio* is that over SparseGPT's at the same",
        "sparsity. Intervals (95%) are in bench/results/quality.json; accuracies carry their standard error.",
        "",
        "| pattern | method | perplexity, WikiText-2 | C4 | KL | excess | ratio | LAMBADA | PIQA | ARC-easy | prune s | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def accuracies(row: dict) -> str:
        found = row.get("tasks") or {}
        return " | ".join(f"{found[n][0]:.3f} ± {found[n][1]:.3f}" if n in found else "" for n in TASKS)

    if rows:
        first = next(iter(rows.values()))
        lines.append(
            f"| | dense | {first['wikitext']['ppl_dense']['value']:.2f} | {first['c4']['ppl_dense']['value']:.2f} | | | | "
            f"{accuracies(done.get('dense', {}))} | | |"
        )
    for pattern in SPARSITIES:
        base = rows.get(f"{pattern}:sparsegpt")
        for method in METHODS:
            row = rows.get(f"{pattern}:{method}")
            if row is None:
                continue
            ratio = f"{excess(row['wikitext']) / excess(base['wikitext']):.2f}x" if base else ""
            name = pattern if ":" in pattern else f"{float(pattern):.0%}"
            # the text above says 64 windows
            how = method if row["samples"] == 64 else f"{method}, {row['samples']} windows"
            lines.append(
                f"| {name} | {how} | {row['wikitext']['ppl']['value']:.2f} | {row['c4']['ppl']['value']:.2f} | "
                f"{row['wikitext']['kl']['value']:.3f} | {excess(row['wikitext']):.3f} | {ratio} | {accuracies(row)} | "
                f"{row['seconds']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} GB |"
            )
    lines += ["", f"![Excess loss against sparsity, one line a method]({plot.name})", ""]
    file.write_text("\n".join(lines))
    draw(rows, plot)


def draw(rows: dict, plot: Path) -> None:
    """Excess loss against sparsity, one line a method; N:M patterns as marks."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateurs"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    # Okabe and Ito's palette, told apart by the colour-blind as well
    colours = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00")
    for method, colour in zip(METHODS, colours, strict=True):
        found = [(p, rows.get(f"{p}:{method}")) for p in SPARSITIES if ":" not in p]
        points = [(float(p), excess(row["wikitext"])) for p, row in found if row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=method)
        for mark, pattern in (("s", "2:4"), ("^", "4:8"), ("v", "8:16")):
            row = rows.get(f"{pattern}:{method}")
            if row:
                axes.plot(
                    [0.5], [excess(row["wikitext"])], marker=mark, color=colour, fillstyle="none", linestyle="none"
                )
    axes.set(xlabel="zeros", ylabel="excess loss on WikiText-2, nats a token", yscale="log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_title("Lower is better; open marks are N:M (square 2:4, up 4:8, down 8:16)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--rows", default=",".join(f"{s}:{m}" for s in SPARSITIES for m in METHODS))
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task; 0 for none")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quality.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--pages-only", action="store_true", help="write the page from what is there")
    arguments = parser.parse_args()
    done = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}

    def save() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(done, indent=1) + "\n")
        page(done, arguments.page, arguments.page.with_suffix(".svg"), "bench/quality.py")

    if not arguments.pages_only:
        model = arguments.model or str(fetch())
        known = {f"{s}:{m}" for s in SPARSITIES for m in METHODS}
        unknown = [row for row in arguments.rows.split(",") if row not in known]
        if unknown:
            raise SystemExit(f"unknown row '{unknown[0]}'; write SPARSITY:METHOD of {SPARSITIES} and {METHODS}")
        if arguments.limit and "dense" not in done:
            data(arguments.shared)
            with tempfile.TemporaryDirectory() as name:
                done["dense"] = {
                    "limit": arguments.limit,
                    "tasks": tasks(Path(model), arguments.shared, arguments.limit, Path(name)),
                }
            save()
        for row in arguments.rows.split(","):
            if row not in done:
                done[row] = run(row, model, arguments.shared, arguments.limit, arguments.samples)
                save()
            found = done[row]
            quality = found["wikitext"]
            print(
                f"{row:18s} ppl {quality['ppl']['value']:.2f}, excess {excess(quality):.3f}, {found['seconds']:.0f} s",
                flush=True,
            )
    save()


if __name__ == "__main__":
    main()
