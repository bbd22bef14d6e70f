"""One-shot pruning of SmolLM2-135M by every method: perplexity against the dense model, seconds, peak memory.

    .venv/bin/python bench/methods.py [--rows sparsegpt:unstructured,...] [--out bench/results/methods.json]

Calibrated on 64 x 512 tokens of shared/data/c4_sample.jsonl (documents shuffled by random.Random(0)), evaluated on the
first 24 windows of 2048 tokens of shared/data/wikitext-2-raw.test.txt, in bf16. Rows run one after another, each in its
own process; finished rows of the output file are not run again. `seconds` is the pruning stage, without evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from smollm2 import fetch  # noqa: E402

ROWS = (
    "magnitude:unstructured",
    "wanda:unstructured",
    "ria:unstructured",
    "sparsegpt:unstructured",
    "wanda+refit:unstructured",
    "sparsegpt+refit:unstructured",
    "sparsegpt:2:4",
    "sparsegpt+refit:2:4",
)


def data(shared: Path) -> tuple[Path, Path]:
    files = shared / "data" / "c4_sample.jsonl", shared / "data" / "wikitext-2-raw.test.txt"
    for file in files:
        if not file.is_file():
            raise SystemExit(f"skipped: {file} is absent; it is not part of the project")
    return files


def run(row: str, shared: Path, windows: int, folder: Path) -> dict:
    """Prune in a fresh process; its report."""
    method, pattern = row.split(":", 1)
    c4, wikitext = data(shared)
    command = [
        sys.executable, "-m", "secateurs", "prune", fetch(), "--out", folder / "run", "--json",
        "--method", method, "--pattern", pattern,
        "--calibration", f"{c4}:prefix+gold_completion", "--samples", 64, "--seqlen", 512,
        "--eval-text", wikitext, "--eval-windows", windows, "--eval-seqlen", 2048,
    ]  # fmt: skip
    return json.loads(subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="METHOD:PATTERN, separated by commas")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "methods.json")
    arguments = parser.parse_args()
    done = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for row in arguments.rows.split(","):
        if row not in done:
            with tempfile.TemporaryDirectory() as folder:
                report = run(row, arguments.shared, arguments.windows, Path(folder))
            quality = report["quality"]
            done[row] = {
                "sparsity": report["totals"]["sparsity"],
                "ppl_dense": quality["ppl_dense"],
                "ppl": quality["ppl"],
                "kl": quality["kl"],
                "agree": quality["agree"],
                "seconds": report["seconds"],
                "peak_memory_bytes": report["peak_memory_bytes"],
                "machine": report["machine"],
            }
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(done, indent=1) + "\n")
        r = done[row]
        print(
            f"{row:28s} ppl {r['ppl_dense']['value']:.2f} -> {r['ppl']['value']:.2f} "
            f"[{r['ppl']['low']:.2f}, {r['ppl']['high']:.2f}], KL {r['kl']['value']:.3f}, prune {r['seconds']['prune']:.0f} s, "
            f"evaluate {r['seconds']['evaluate']:.0f} s, {r['peak_memory_bytes'] / 1e9:.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
