"""What removing experts costs, by criterion and calibration text, on the mixture that tools/tiny_moe.py trains. Writes a table.

    OMP_NUM_THREADS=1 .venv/bin/python bench/experts.py [--gone 4,8] [--windows 256] [--evaluate 200] [--recover STEPS] [--out FILE]

Excess loss over the dense model in nats a token, on held-out text of each domain; no training after, or with --recover the same
steps of `secateurs recover` for every row. `published` is REAP as its paper has it, written without secateurs
(tests/shrink/reap.py): saliencies of the dense model, nothing refit. `reap` measures them on what the blocks before give, as all
our rows do. --windows: of calibration, 128 tokens each, shared by the domains that are calibrated on.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "shrink")]

import reap  # noqa: E402
import tiny_moe  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from secateurs.model.activations import InMemory  # noqa: E402
from secateurs.model.batches import batched, first_windows  # noqa: E402
from secateurs.model.blocks import AllLoaded  # noqa: E402
from secateurs.model.walk import stream  # noqa: E402
from secateurs.prune.sensitivity import sensitivity  # noqa: E402
from secateurs.quality import texts  # noqa: E402
from secateurs.quality.settings import Calibration, Evaluation  # noqa: E402
from secateurs.shrink import cut_experts, losses  # noqa: E402
from secateurs.shrink.cuts import cuts_of  # noqa: E402
from secateurs.train.recover import recover  # noqa: E402
from secateurs.train.recover_plan import RecoverPlan  # noqa: E402

DOMAINS = ("stories", "code", "encyclopedia")
# tokens of a window, as the model was trained; those on which sensitivities are taken; windows of a step of --recover
WINDOW, SENSITIVITY, BATCH = 128, 4096, 8


@dataclass(frozen=True)
class Way:
    """A criterion, whether what is left is refit, and to how many experts a token is sent then."""

    criterion: str
    refit: bool
    active: int | None = None

    def __str__(self) -> str:
        sent = f", {self.active} of a token" if self.active else ""
        return f"{self.criterion}{' + refit' if self.refit else ''}{sent}"


WAYS = (
    Way("published", False), Way("reap", False), Way("frequency", False), Way("ream", False), Way("loss", False),
    Way("reap", True), Way("ream", True), Way("loss", True),
)  # fmt: skip


def load(folder: Path) -> Any:
    """The mixture in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_of(folder: Path, part: str, domains: tuple[str, ...]) -> str:
    """The text of some domains, as --calibration takes it. part: train or held_out."""
    return "; ".join(str(folder.parent / f"{part}-{name}.txt") for name in domains)


def windows_of(folder: Path, part: str, domains: tuple[str, ...], count: int) -> Tensor:
    """Token windows of some domains, mixed. part: train or held_out."""
    return texts.load(text_of(folder, part, domains), AutoTokenizer.from_pretrained(folder), count, WINDOW, 0).windows


def recovered(folder: Path, model: Any, domains: tuple[str, ...], steps: int) -> Any:
    """The cut mixture after so many steps of `secateurs recover` against the dense one, on the training text of some domains."""
    with tempfile.TemporaryDirectory(prefix="experts-") as work:
        cut_folder, run = Path(work) / "cut", Path(work) / "recovered"
        mixture = model.model.layers[0].mlp
        model.config.num_experts, model.config.num_experts_per_tok = mixture.experts.num_experts, mixture.gate.top_k
        model.save_pretrained(cut_folder)
        AutoTokenizer.from_pretrained(folder).save_pretrained(cut_folder)
        text = Calibration(text_of(folder, "train", domains), None, WINDOW, 0)
        plan = RecoverPlan(
            str(cut_folder), str(folder), text, steps=steps, batch=BATCH, evaluation=Evaluation(windows=0)
        )
        recover(plan, run)
        return load(run / "model")


def cut(folder: Path, windows: Tensor, gone: int, way: Way, damping: float = 0.01) -> tuple[Any, list[Any]]:
    """The mixture without so many experts of every block, calibrated on windows, and a record of each block."""
    model = load(folder)
    if way.criterion == "published":
        return model, [reap.prune(model, windows, gone)]
    cuts, how = cuts_of(model), cut_experts.How(way.criterion, gone, way.active, way.refit, damping)
    part = first_windows(batched(windows), SENSITIVITY)
    sensitive = sensitivity(model, part, AllLoaded(), InMemory(), 0, lambda: None)[0]
    records = []
    for step in stream(model, batched(windows)):
        layers = list(cuts.layers(step.block, step.name).values())
        couplings = cuts.couplings.of(step.name, step.block, layers, cuts.config)
        records.append(cut_experts.cut(step, cuts.fused, sensitive.get(step.name), how, lambda found=couplings: found))
    return model, records


def excess(model: Any, dense: dict[str, float], held_out: dict[str, Tensor]) -> dict[str, float]:
    """The loss above the dense model's by domain, and their mean."""
    found = {name: losses.nll((model, AllLoaded()), windows) - dense[name] for name, windows in held_out.items()}
    return {**found, "mean": sum(found.values()) / len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gone", default="4,8", help="experts of 16 that go (default 4,8)")
    parser.add_argument("--windows", type=int, default=256, help="calibration windows (default 256)")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out windows of each domain (default 200)")
    parser.add_argument("--recover", type=int, default=0, help="steps of training after (default 0)")
    parser.add_argument("--out", type=Path, help="a file for the numbers")
    arguments = parser.parse_args()
    folder = tiny_moe.fetch()
    held_out = {name: windows_of(folder, "held_out", (name,), arguments.evaluate) for name in DOMAINS}
    whole = load(folder)
    dense = {name: losses.nll((whole, AllLoaded()), windows) for name, windows in held_out.items()}
    print("dense", {name: round(value, 4) for name, value in dense.items()}, flush=True)
    found: list[dict[str, Any]] = []

    def row(calibrated: tuple[str, ...], gone: int, way: Way) -> None:
        start = time.monotonic()
        model, records = cut(folder, windows_of(folder, "train", calibrated, arguments.windows), gone, way)
        if arguments.recover:
            model = recovered(folder, model, calibrated, arguments.recover)
        lost = excess(model, dense, held_out)
        found.append(
            {
                "calibrated": calibrated, "gone": gone, "way": str(way), "excess": lost, "records": records,
                "seconds": time.monotonic() - start,
            }
        )  # fmt: skip
        cells = " | ".join(f"{lost[name]:.4f}" for name in (*DOMAINS, "mean"))
        print(f"| {', '.join(calibrated)} | {gone} | {way} | {cells} | {found[-1]['seconds']:.0f} |", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps({"dense": dense, "rows": found}, indent=1) + "\n")

    counts = [int(n) for n in arguments.gone.split(",")]
    print(f"| calibrated on | experts gone | by | {' | '.join(DOMAINS)} | mean | seconds |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for gone in counts:
        for way in WAYS:
            # what is trained after is compared for those that a user would take
            if not arguments.recover or way.refit or way.criterion == "published":
                row(DOMAINS, gone, way)
    if arguments.recover:
        return
    for name in DOMAINS:
        for way in (WAYS[0], WAYS[-1]):
            row((name,), counts[-1], way)
    for refit in (False, True):
        row(DOMAINS, 0, Way("loss", refit, 1))


if __name__ == "__main__":
    main()
