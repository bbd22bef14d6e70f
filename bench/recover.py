"""Recovery of SmolLM2-135M after one-shot pruning: what 300 steps of distillation win back, at 70% zeros and at 2:4.

    .venv/bin/python bench/recover.py [MODEL] [--rows 0.7:blocks,...] [--steps 300] [--batch 4]

A row is PATTERN:TRAINED, PATTERN of 0.7 and 2:4, TRAINED of blocks, vectors, lora and hidden (blocks, with hidden states compared).
The model is pruned by `balanced` on 64 x 512 tokens of shared/data/c4_sample.jsonl and trained on 600 windows of 512 tokens of the
same documents, shuffled by random.Random(0). Held out are the last 150 documents in that order (6 windows of 2048 tokens) and
WikiText-2's test text (24 windows). Finished rows of bench/results/recover.json are not run again.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from methods import ROOT, data, fetch
from quality import held_out, secateurs

ROWS = ("0.7:blocks", "2:4:blocks", "0.7:hidden", "0.7:lora", "0.7:vectors", "2:4:lora", "2:4:vectors")
SAMPLES = 600


def excess(quality: dict) -> float:
    return math.log(quality["ppl"]["value"] / quality["ppl_dense"]["value"])


def pruned(pattern: str, model: str, folder: Path, c4: str) -> Path:
    """A run directory of `balanced`, made once."""
    run = folder / pattern.replace(":", "-")
    chosen = ["--pattern", pattern] if ":" in pattern else ["--sparsity", pattern]
    secateurs(
        "prune",
        model,
        "--out",
        run,
        *chosen,
        "--calibration",
        c4,
        "--samples",
        64,
        "--seqlen",
        512,
        "--eval-windows",
        0,
    )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, help="where runs are kept; default: a folder that goes again")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows.split(",") if row not in ROWS]
    if unknown:
        raise SystemExit(f"unknown row '{unknown[0]}'; write some of {', '.join(ROWS)}")
    model = arguments.model or str(fetch())
    file = ROOT / "bench" / "results" / "recover.json"
    done = json.loads(file.read_text()) if file.is_file() else {}
    c4_file, wikitext = data(arguments.shared)
    c4 = f"{c4_file}:prefix+gold_completion"
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        other_text = held_out(c4_file, work)
        for row in arguments.rows.split(","):
            if row not in done:
                pattern, _, kind = row.rpartition(":")
                run = pruned(pattern, model, work, c4)
                train = ["--train", "blocks", "--hidden", 1] if kind == "hidden" else ["--train", kind]
                out = work / row.replace(":", "-")
                report = secateurs(
                    "recover", run, "--out", out, "--calibration", c4, "--samples", SAMPLES, "--steps", arguments.steps, "--batch",
                    arguments.batch, *train, "--eval-text", wikitext, "--eval-windows", 24, "--eval-seqlen", 2048,
                )  # fmt: skip
                c4_quality = {
                    when: secateurs(
                        "eval", folder, "--eval-text", other_text, "--eval-windows", 6, "--eval-seqlen", 2048
                    )["quality"]
                    for when, folder in (("dense", model), ("before", run / "model"), ("after", out / "model"))
                }
                ppl = {when: quality["ppl_dense"] for when, quality in c4_quality.items()}
                done[row] = {
                    "training": report["training"], "zeros": report["zeros"], "of_weights": report["of_weights"],
                    "wikitext": {"before": report["quality_before"], "after": report["quality"]},
                    "c4": ppl, "seconds": report["seconds"], "peak_memory_bytes": report["peak_memory_bytes"],
                    "machine": report["machine"], "steps": arguments.steps, "batch": arguments.batch,
                }  # fmt: skip
                file.write_text(json.dumps(done, indent=1) + "\n")
            say(row, done[row])


def say(row: str, found: dict) -> None:
    wikitext = [excess(found["wikitext"][when]) for when in ("before", "after")]
    c4 = [math.log(found["c4"][when]["value"] / found["c4"]["dense"]["value"]) for when in ("before", "after")]
    ppl = [found["wikitext"][when]["ppl"]["value"] for when in ("before", "after")]
    print(
        f"{row:14s} WikiText-2 {ppl[0]:.2f} -> {ppl[1]:.2f}, {1 - wikitext[1] / wikitext[0]:.0%} of the excess; C4 "
        f"{found['c4']['before']['value']:.2f} -> {found['c4']['after']['value']:.2f}, {1 - c4[1] / c4[0]:.0%}; "
        f"{found['training']['steps']} steps in {found['seconds']['train'] / 60:.0f} min",
        flush=True,
    )


if __name__ == "__main__":
    main()
