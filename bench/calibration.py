"""What calibration text is worth: prose and code, each pruned on both, measured on both. Makes docs/calibration.md.

    .venv/bin/python bench/calibration.py [MODEL] [--shared SHARED]

MODEL: default SmolLM2-135M, at 50%, effort fast, 64 x 512 tokens. Prose is shared/data/c4_sample.jsonl (evaluation: the WikiText-2
test split), code is every third module of this Python's standard library (evaluation: the next ones). 12 windows of 2048.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from methods import ROOT, data, fetch

PAGE = """# Calibration text matters

Made by `.venv/bin/python bench/calibration.py`. SmolLM2-135M, 50% zeros, `--effort fast`, 64 x 512 tokens. Prose is C4 for
calibration and WikiText-2's test split for evaluation; code is modules of Python's standard library, different ones for the two.
Evaluation: 12 windows of 2048 tokens. Intervals are 95%.

| calibrated on | evaluated on | perplexity, dense | perplexity | ratio | overlap | within one kind | warned |
|---|---|---|---|---|---|---|---|
{rows}

*Overlap* compares the two texts' token frequencies p and q: the sum over tokens of min(p, q), 1 if they are equal. *Within one
kind* is the overlap between two halves of the same text, the smaller of the two texts' values: at this length even text of one kind
overlaps by less than 1. `prune` and `decide` warn where the overlap is below half of *within one kind*. The warning gives both
numbers, and the dense model's perplexity on both texts.
"""


def code(work: Path, offset: int) -> Path:
    """Every third module of the standard library, as a text file."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[offset::3]
    file = work / f"code-{offset}.txt"
    file.write_text("\n\n".join(f.read_text(encoding="utf-8", errors="ignore") for f in files))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder; default SmolLM2-135M")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    arguments = parser.parse_args()
    c4, wikitext = data(arguments.shared)
    model = arguments.model or fetch()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        calibrations = {"prose": f"{c4}:prefix+gold_completion", "code": code(work, 0)}
        evaluations = {"prose": wikitext, "code": code(work, 1)}
        for asked, calibration in calibrations.items():
            for of, text in evaluations.items():
                command = [
                    sys.executable, "-m", "secateurs", "prune", model, "--out", work / f"{asked}-{of}", "--effort", "fast",
                    "--calibration", calibration, "--samples", 64, "--seqlen", 512, "--eval-text", text, "--eval-windows", 12,
                    "--eval-seqlen", 2048, "--json",
                ]  # fmt: skip
                done = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE)
                report = json.loads(done.stdout)
                warned = [w for w in report["warnings"] if "unlike" in w]
                rows.append((asked, of, report["quality"], report["distance"], warned))
                print(asked, of, report["quality"]["ppl_ratio"]["value"], report["distance"], flush=True)
    table = []
    for asked, of, quality, apart, warned in rows:
        ratio, ppl = quality["ppl_ratio"], quality["ppl"]["value"]
        table.append(
            f"| {asked} | {of} | {quality['ppl_dense']['value']:.2f} | {ppl:.2f} | {ratio['value']:.2f} [{ratio['low']:.2f}, "
            f"{ratio['high']:.2f}] | {apart['overlap']:.2f} | {apart['within']:.2f} | {'yes' if warned else 'no'} |"
        )
    (ROOT / "docs" / "calibration.md").write_text(PAGE.format(rows="\n".join(table)))


if __name__ == "__main__":
    main()
