"""SparseGPT of SmolLM2-135M by llm-compressor and by us, side by side: seconds, peak memory, perplexity.

    python3 -m venv PEER; echo torch==2.13.0 > c.txt; PEER/bin/pip install -c c.txt llmcompressor==0.14.0.1
    .venv/bin/python bench/llmcompressor.py PEER/bin/python [--rounds 3]

The same 64 x 512 tokens of shared/data/c4_sample.jsonl, 50% unstructured, damping 1%, all linears of the blocks; rounds
alternate. A process's whole life is timed, imports, loading and saving included. Perplexity: 24 windows of 2048
tokens of shared/data/wikitext-2-raw.test.txt, both models by the same evaluation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from methods import ROOT, data, fetch

# what llm-compressor's users write, with its defaults but for the damping that both sides share
_PEER = """
import sys
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
source, tokens, out = sys.argv[1:]
windows = load_file(tokens)["windows"]
rows = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": [[1] * windows.shape[1]] * len(windows)})
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
recipe = SparseGPTModifier(sparsity=0.5, mask_structure="0:0", dampening_frac=0.01, ignore=["re:.*lm_head"])
oneshot(model=model, dataset=rows, recipe=recipe, num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1], shuffle_calibration_samples=False)
model.save_pretrained(out)
"""


# a small process waits for the measured one: what the kernel calls its peak includes that of whoever started it
_LAUNCH = """
import os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9)
sys.exit(status != 0)
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak gigabytes of a process."""
    launch = [sys.executable, "-c", _LAUNCH, *(str(c) for c in command)]
    done = subprocess.run(launch, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    seconds, gigabytes = done.stdout.split()
    return float(seconds), float(gigabytes)


def perplexity(model: Path, wikitext: Path) -> float:
    command = [sys.executable, "-m", "secateurs", "eval", model, "--eval-text", wikitext, "--json"]
    out = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)["quality"]["ppl_dense"]["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="the interpreter of a virtual environment that has llm-compressor")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "llmcompressor.json")
    arguments = parser.parse_args()
    c4, wikitext = data(arguments.shared)
    source = fetch()
    calibration = f"{c4}:prefix+gold_completion"

    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from secateurs.quality import texts

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = texts.load(calibration, AutoTokenizer.from_pretrained(source), 64, 512, 0).windows
        save_file({"windows": windows}, folder / "tokens.safetensors")
        ours = [sys.executable, "-m", "secateurs", "prune", source, "--calibration", calibration, "--quiet",
                "--samples", 64, "--seqlen", 512, "--eval-windows", 0]  # fmt: skip
        commands = {
            "llm-compressor SparseGPT": lambda out: [
                arguments.peer,
                "-c",
                _PEER,
                source,
                folder / "tokens.safetensors",
                out,
            ],
            "secateurs sparsegpt": lambda out: [*ours, "--method", "sparsegpt", "--out", out],
            "secateurs wanda": lambda out: [*ours, "--method", "wanda", "--out", out],
        }
        samples: dict[str, list[tuple[float, float]]] = {row: [] for row in commands}
        for i in range(arguments.rounds):
            for row, command in commands.items():
                samples[row].append(timed(command(folder / f"{row.replace(' ', '-')}-{i}")))
                print(f"round {i}: {row} {samples[row][-1][0]:.1f} s, {samples[row][-1][1]:.2f} GB", flush=True)
        results = {}
        for row in commands:
            made = folder / f"{row.replace(' ', '-')}-0"
            model = made / "model" if (made / "model").is_dir() else made
            if not (model / "tokenizer.json").is_file():
                for file in source.glob("tokenizer*"):
                    (model / file.name).write_bytes(file.read_bytes())
            seconds, memory = zip(*samples[row], strict=True)
            results[row] = {
                "seconds": seconds, "median_seconds": statistics.median(seconds), "peak_gigabytes": max(memory),
                "ppl": perplexity(model, wikitext),
            }  # fmt: skip
    base = results["llm-compressor SparseGPT"]
    for row, r in results.items():
        ratio = r["median_seconds"] / base["median_seconds"]
        print(
            f"{row:28s} {r['median_seconds']:6.1f} s ({ratio:.2f}x)  {r['peak_gigabytes']:.2f} GB  ppl {r['ppl']:.2f}"
        )
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
