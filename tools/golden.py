"""A table of results, to see that a change of the code changed none: the hash of every tensor that a set of small runs writes.

    python tools/golden.py before.json          make the table (about 10 minutes on one core)
    python tools/golden.py after.json before.json        make it and compare; exit 1 if any tensor differs

Bits depend on the CPU and on torch, so both tables must come from one machine. Runs are of stories260K (../shared/data; left out by
name where it is absent) and of one tiny random model of every family of tests/tiny.py.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# sums must have one order, whatever else the machine does
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SECATEURS_CACHE"] = tempfile.mkdtemp(prefix="golden-cache-")

ROOT = Path(__file__).parent.parent
STORIES = ROOT.parent / "shared" / "data" / "stories260K"
sys.path.insert(0, str(ROOT / "tests"))

TEXT = ["--samples", "8", "--seqlen", "64", "--eval-windows", "4", "--eval-seqlen", "64"]
METHODS = ("magnitude", "wanda", "sparsegpt")
EFFORTS = ("balanced", "best")
PATTERNS = ("unstructured", "2:4", "4:8", "16x16")
ALLOCATIONS = ("uniform", "owl", "global", "measured")
# of a tiny model: what every family runs
TINY_RUNS = {
    "balanced": ["--effort", "balanced"],
    "best": ["--effort", "best", "--distill", "4", "--reconstruct", "4"],
    "wanda 2:4": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt 4:8": ["--method", "sparsegpt", "--pattern", "4:8", "--permute"],
    "magnitude 16x16": ["--method", "magnitude", "--pattern", "16x16"],
    "measured": ["--method", "sparsegpt", "--allocation", "measured"],
}


def prunes() -> Iterator[tuple[str, list[str]]]:
    """Runs of `secateurs prune` on stories260K: a name, and arguments."""
    for pattern in PATTERNS:
        for method in METHODS:
            yield f"{method} {pattern}", ["--method", method, "--pattern", pattern]
        for effort in EFFORTS:
            few = ["--distill", "4", "--reconstruct", "4"] if effort == "best" else []
            yield f"{effort} {pattern}", ["--effort", effort, "--pattern", pattern, *few]
    for allocation in ALLOCATIONS:
        yield f"sparsegpt {allocation}", ["--method", "sparsegpt", "--allocation", allocation]


def tensors(folder: Path) -> dict[str, str]:
    """Of every safetensors file of a folder: {tensor: hash of its dtype, shape and bytes}."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name).contiguous()
                head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
                found[name] = hashlib.sha256(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def run(table: dict[str, dict[str, str]], name: str, folder: Path, *arguments: str) -> bool:
    """One command; a refusal is a result too."""
    from typer.testing import CliRunner

    from secateurs.cli import app

    began = time.monotonic()
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    fine = folder.is_dir() and done.exit_code in (0, 3, 4)
    refused = hashlib.sha256(type(done.exception).__name__.encode()).hexdigest()
    table[name] = tensors(folder) if fine else {f"refused: {type(done.exception).__name__}": refused}
    print(f"{name}: {len(table[name])} tensors, {time.monotonic() - began:.1f} s", flush=True)
    if not fine:
        print(f"    {done.exception}", flush=True)
    return fine


def make(work: Path) -> dict[str, dict[str, str]]:
    import tiny

    text = ["--calibration", str(tiny.text(work / "text")), "--eval-text", str(tiny.text(work / "text", seed=1))]
    table: dict[str, dict[str, str]] = {}
    models: list[tuple[str, Path, list[tuple[str, list[str]]]]] = []
    if STORIES.is_dir():
        models.append(("stories260K", STORIES, list(prunes())))
    else:
        print(f"left out: {STORIES} is absent")
    for family in tiny.TINY:
        models.append((family, tiny.save(work / "models" / family.replace(" ", "-"), family), list(TINY_RUNS.items())))
    for model, folder, runs in models:
        for name, arguments in runs:
            out = work / "runs" / f"{model} {name}".replace(" ", "-").replace(":", "of")
            common = ["--allow-skips", "--sensitivity", "256"] if "--effort" in arguments else ["--allow-skips"]
            ran = run(
                table, f"{model}: prune {name}", out / "model",
                "prune", str(folder), "--out", str(out), *common, *arguments, *TEXT, *text,
            )  # fmt: skip
            if ran:
                run(table, f"{model}: pack {name}", out / "packed", "pack", str(out))
            if ran and name in ("balanced", "balanced unstructured"):
                recovered = out.with_name(out.name + "-recovered")
                run(
                    table, f"{model}: recover", recovered / "model",
                    "recover", str(out), "--out", str(recovered), "--calibration", text[1], "--eval-text", text[3], "--steps", "4",
                    "--seqlen", "64", "--eval-windows", "4", "--eval-seqlen", "64",
                )  # fmt: skip
        shrunk = work / "runs" / f"{model}-shrunk".replace(" ", "-")
        run(
            table, f"{model}: shrink", shrunk / "model",
            "shrink", str(folder), "--budget", "params=0.8x", "--out", str(shrunk), "--multiple", "8", *TEXT, *text,
        )  # fmt: skip
    return table


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """A line for each run whose tensors are not those of the other table."""
    lines = []
    for name in sorted({*before, *after}):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            lines.append(f"{name}: only {'after' if was is None else 'before'}")
        elif was != now:
            changed = sorted(t for t in {*was, *now} if was.get(t) != now.get(t))
            lines.append(f"{name}: {len(changed)} of {len(now)} tensors differ, first {changed[0]}")
    return lines


def main(out: str, before: str | None = None) -> int:
    work = Path(tempfile.mkdtemp(prefix="golden-"))
    try:
        table = make(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(os.environ["SECATEURS_CACHE"], ignore_errors=True)
    Path(out).write_text(json.dumps(table, indent=1))
    print(f"{out}: {len(table)} runs, {sum(map(len, table.values()))} tensors")
    if before is None:
        return 0
    lines = differences(json.loads(Path(before).read_text()), table)
    print("\n".join(lines) or f"the same as {before}, bit for bit")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
