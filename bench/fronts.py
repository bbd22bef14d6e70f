"""Loss against bits a weight: dense models on grids of 8 to 2 bits, and zeros on top. Makes docs/fronts.svg and the tables of
docs/when-zeros-pay.md.

    .venv/bin/python bench/fronts.py [--model stories260K|small-lm|smollm2] [--points "int4;0.5+int3"] [--seconds] [--pages-only]

A point is `int4` (dense, groups of 64), `0.5+int4` (50% zeros), `0.5` (50% zeros, 16 bits), `2:4+int4`, `bits=3.3` (a budget: zeros
and bits of every layer are chosen), `bits=3.3, dense` (bits alone), any of these with `, best`; or a rival, written independently
in tests/matrix/gptq.py, each layer on the inputs that those before it give: `nearest int4`, `gptq int4`, `wanda, gptq 2:4+int4`
(the mask's errors stay), `wanda mask, gptq 2:4+int4` (GPTQ makes up for them too).

stories260K: shared/data/stories260K in fp32, calibrated on 96 windows of 256 tokens that it wrote itself (temperature 1, seed 0),
evaluated on shared/data/tinystories_30KB.txt. small-lm: what tools/small_lm.py trains, calibrated on 64 windows of 256 tokens of
its training text, evaluated on its held-out text. smollm2 (not run unless named): SmolLM2-135M-Instruct comes out of a 4-bit file,
so groups are of 128 and it is a second opinion at most; 64 windows of 512 tokens of C4, 24 of WikiText-2.

Seconds (--seconds) are of one token through a random 11008 x 4096 matrix in bf16 or on that grid, as it is packed, by our kernels;
each matrix is out of the caches because all others have been read since. Budgets have none: they mix.

Products are in fp32. Weights are those of the blocks: embedding and head stay as they are. Finished points of the results are not
run again: remove them where a method has changed.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.base.device import machine
from secateurs.base.estimate import Estimate, ratio_of
from secateurs.base.files import write_json, write_text
from secateurs.kernels.dispatch import Call, select
from secateurs.kernels.formats import Packed, pack, unpack
from secateurs.machine.timing import dense_runs, interleaved
from secateurs.matrix import grids, scores, solvers
from secateurs.prune.record import Report

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "matrix")]
import gptq  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
DENSE = ("int8", "int6", "int5", "int4", "int3", "int2", "int2/32", "int2/128", "int2/row")
ZEROS = [f"{s}+int{b}" for b in (4, 3, 2) for s in (0.5, 0.6, 0.7, 0.8)] + ["2:4+int4", "2:4+int8"]
SIXTEEN = ("0.5", "0.6", "0.7", "0.8")
BUDGETS = [f"bits={b}{more}" for b in (4.3, 3.3, 2.5, 2.4, 2.26) for more in ("", ", dense")]
RIVALS = ("nearest int4", "gptq int4", "gptq int3", "gptq int2", "wanda, gptq 2:4+int4", "wanda mask, gptq 2:4+int4")
ALL = [*DENSE, *RIVALS, *ZEROS, *BUDGETS, *SIXTEEN]
SHAPE = (11008, 4096)
# a point, and what its excess is divided by
RATIOS = (
    ("int4", "gptq int4"), ("int3", "gptq int3"), ("int3, best", "gptq int3"), ("int2", "gptq int2"), ("int2, best", "gptq int2"),
    ("2:4+int4", "wanda, gptq 2:4+int4"), ("2:4+int4", "wanda mask, gptq 2:4+int4"), ("bits=3.3", "int3"), ("bits=2.5", "int2/32"),
    ("bits=2.5", "0.6+int3"), ("bits=2.26", "int2"),
)  # fmt: skip
BEST = ["int3, best", "int2, best", "0.5+int3, best", "0.6+int2, best"]


@dataclass(frozen=True)
class Subject:
    """load: the model, its calibration windows and its evaluation windows. group: inputs that share a scale."""

    load: Callable[[], tuple[nn.Module, Tensor, Tensor]]
    points: list[str]
    group: int = 64


def windows_of(tokenizer: Any, text: str, length: int) -> Tensor:
    """[windows, length] of a text, without overlap; what is left at its end is left out."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def loaded(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        raise SystemExit(f"{folder} is absent; leave its model out with --model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def stories() -> tuple[nn.Module, Tensor, Tensor]:
    model, tokenizer = loaded(SHARED / "stories260K")
    torch.manual_seed(0)
    start = torch.full((96, 1), tokenizer.bos_token_id)
    seen = torch.ones_like(start)
    own = model.generate(
        start,
        attention_mask=seen,
        pad_token_id=0,
        do_sample=True,
        min_new_tokens=255,
        max_new_tokens=255,
        temperature=1.0,
        top_k=0,
    )
    return model, own, windows_of(tokenizer, (SHARED / "tinystories_30KB.txt").read_text(encoding="utf-8"), 256)


def small_lm() -> tuple[nn.Module, Tensor, Tensor]:
    import small_lm

    model, tokenizer = loaded(small_lm.fetch())
    train, held_out = ((small_lm.root() / name).read_text(encoding="utf-8") for name in ("train.txt", "held_out.txt"))
    windows = windows_of(tokenizer, train, 256)
    return model, windows[random.Random(0).sample(range(len(windows)), 64)], windows_of(tokenizer, held_out, 256)


def smollm2() -> tuple[nn.Module, Tensor, Tensor]:
    import smollm2

    from secateurs.quality import texts

    model, tokenizer = loaded(smollm2.fetch())
    c4 = texts.load(f"{SHARED / 'c4_sample.jsonl'}:prefix+gold_completion", tokenizer, 64, 512, 0).windows
    text = (SHARED / "wikitext-2-raw.test.txt").read_text(encoding="utf-8")
    return model, c4, windows_of(tokenizer, text, 512)[:24]


SUBJECTS = {
    "stories260K": Subject(stories, ALL + BEST),
    "small-lm": Subject(small_lm, ALL),
    "smollm2": Subject(smollm2, ["int4", "int3", "2:4+int4", "gptq int4", "gptq int3"], group=128),
}


def grid_of(point: str, group: int) -> grids.Grid | None:
    """The grid that a point names, or None for 16 bits and budgets."""
    last = point.removesuffix(", best").replace("+", " ").split(" ")[-1]
    return grids.parse(last if "/" in last else f"{last}/{group}") if last.startswith("int") else None


def plan_of(point: str, group: int) -> sc.Plan:
    """What is run for a point; a rival is a method of its name."""
    name, best = point.removesuffix(", best"), point.endswith(", best")
    chosen: dict[str, Any] = {"effort": "best" if best else "balanced", "group": str(group)}
    grid = grid_of(point, group)
    if point in RIVALS:
        solvers.SOLVERS["rival"] = rival(point, group)
        pattern, _, _ = name.split(" ")[-1].rpartition("+")
        return sc.Plan(method="rival", **({"pattern": pattern} if pattern else {"sparsity": 0}))
    if name.startswith("bits="):
        budget, dense, _ = name.partition(", dense")
        return sc.Plan(budget=budget, **chosen, **({"sparsity": 0, "max_sparsity": 0} if dense else {}))
    if grid is None:
        return sc.Plan(sparsity=float(name), effort=chosen["effort"])
    chosen |= {"bits": str(grid.bits), "group": str(grid.group or "row")}
    zeros = name.rpartition("+")[0]
    return sc.Plan(**({"pattern": zeros} if ":" in zeros else {"sparsity": float(zeros or 0)}), **chosen)


def rival(point: str, group: int) -> solvers.Solver:
    """A rival as a method: its weights leave it on their grid."""
    grid = grid_of(point, group)
    solve = RIVAL_METHODS[" ".join(point.split(" ")[:-1])]

    def solved(weight_OI: Tensor, stats: Any, pattern: Any, sparsity: float, damping: float) -> Tensor:
        return solve(weight_OI, stats.gram_II, grid.bits, grid.group).float()

    return solvers.Solver("rival", "gram", solved, scores.wanda, "layer", "a rival")


RIVAL_METHODS: dict[str, Callable[..., Tensor]] = {
    "nearest": lambda w, gram, bits, group: gptq.rounded(w, bits, group),
    "gptq": gptq.gptq,
    "wanda, gptq": lambda w, gram, bits, group: gptq.wanda_gptq(w, gram, bits, group, 2, 4),
    "wanda mask, gptq": lambda w, gram, bits, group: gptq.gptq(w, gram, bits, group, gptq.wanda_mask(w, gram, 2, 4)),
}


@torch.no_grad()
def losses_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats a token of every window, float64."""
    found = []
    for ids in windows.split(8):
        chance = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        found.append(-chance.gather(-1, ids[:, 1:, None])[..., 0].double().mean(1))
    return torch.cat(found)


def stored_bits(report: Report, grid: grids.Grid | None) -> float:
    """Bits a weight of the pruned layers: on a grid as the report counts them, else what the dense values or a bit a position and
    the survivors take, whichever is less. grid: of a rival, which the report knows nothing of.
    """
    if report.totals["bits"] is not None:
        return float(report.totals["bits"])
    total = 0.0
    for r in report.pruned:
        if grid is None:
            total += min(16 * r.numel, r.numel + 16 * r.kept)
        else:
            total += grids.least_bits(grid, r.shape, r.kept)
    return total / sum(r.numel for r in report.pruned)


def checked(model: nn.Module, report: Report, grid: grids.Grid | None, point: str) -> None:
    """Raises SystemExit unless the weights are what the point says: on their grid, with the zeros that were asked for."""
    for record in report.pruned:
        weight_OI = model.get_submodule(record.name).weight.detach()
        kept = int((weight_OI != 0).sum())
        off = None
        if record.grid:
            off = report.scales[record.name].off(weight_OI)
        elif grid:
            # the last group of a row is filled up with zeros, which are on every grid
            levels = max(len(part.unique()) for part in grid.grouped(weight_OI).flatten(0, 1))
            off = f"a group has {levels} values" if levels > grid.levels else None
        if off or kept != record.kept or kept > record.numel * (1 - record.sparsity) + 1:
            raise SystemExit(f"{point}: {record.name}: {off or f'{kept} of {record.numel} weights are left'}")


def run(subject: Subject, loaded: tuple[nn.Module, Tensor, Tensor], dense_W: Tensor, point: str) -> dict[str, Any]:
    """A point, measured. The model gets its weights back."""
    model, calibration, evaluation = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grid = grid_of(point, subject.group)
    plan, began = plan_of(point, subject.group), time.perf_counter()
    report = sc.prune(model, plan, calibration=calibration)
    seconds = time.perf_counter() - began
    checked(model, report, grid, point)
    excess_W = losses_of(model, evaluation) - dense_W
    model.load_state_dict(before)
    if not excess_W.isfinite().all():
        raise SystemExit(f"{point}: its loss is not finite")
    return {
        "bits": stored_bits(report, grid),
        "zeros": report.totals["sparsity"],
        "layers_with_zeros": sum(r.sparsity > 0 for r in report.pruned),
        "layers": len(report.pruned),
        "excess": asdict(estimate(excess_W)),
        "excess_by_window": [round(x, 5) for x in excess_W.tolist()],
        "seconds": seconds,
    }


def estimate(value_W: Tensor) -> Estimate:
    return ratio_of(value_W.numpy(), torch.ones_like(value_W).numpy())


def packed_of(point: str, shape: tuple[int, int]) -> Packed:
    """A random matrix as pack stores a layer of that point."""
    plan, grid = plan_of(point, 64), grid_of(point, 64)
    zero = plan.target > 0
    # without zeros of its own, so that the mask alone decides
    high = grid.middle if grid else 128
    integer_OI = torch.randint(1, high, shape, dtype=torch.int16) * (
        1 - 2 * torch.randint(0, 2, shape, dtype=torch.int16)
    )
    pattern = plan.layer_patterns[0]
    if zero:
        chance_OI = torch.rand(shape)
        # sorting 45 million numbers takes seconds, and the share of zeros need only be close
        integer_OI *= (
            chance_OI > plan.target if pattern.fixed_sparsity is None else pattern.keep(chance_OI, plan.target)
        )
    if grid is None:
        return pack(integer_OI.bfloat16(), "bitmask")
    scale_OG = torch.full((shape[0], grid.groups(shape[1])), 1 / grid.levels, dtype=grid.scale_dtype)
    scales = grids.Scales(grid, scale_OG)
    return pack(scales.weights(integer_OI).bfloat16(), "bitmask" if zero else "dense", scales)


def seconds_of(points: list[str]) -> dict[str, Any]:
    """Every point's product of one token, and the best dense one in bf16, interleaved. Raises SystemExit if one is wrong."""
    torch.manual_seed(0)
    x = torch.randn(1, SHAPE[1]).bfloat16()
    runs: dict[str, Any] = dense_runs([torch.randn(SHAPE).bfloat16()], x)
    dense, sizes = set(runs), {}
    for point in points:
        packed = packed_of(point, SHAPE)
        kernel, call = select(packed, 1), Call([packed], [None])
        want = nn.functional.linear(x.float(), unpack(packed).float())
        error = float((call(x, kernel.index).view(1, -1).float() - want).norm() / want.norm())
        # beside integers a token is rounded to 8 bits, half a percent off
        if not error < 0.02:
            raise SystemExit(f"{point}: {kernel.name} is wrong by {error:.3g}")
        runs[point] = [lambda call=call, index=kernel.index: call(x, index)]
        sizes[point] = {"kernel": kernel.name, "nbytes": packed.nbytes}
    found = interleaved(runs, rounds=31, droppable=dense)
    best = min(dense, key=lambda name: found[name].seconds)
    rows = {point: asdict(found[point]) | sizes[point] for point in points}
    return {"machine": machine(), "shape": list(SHAPE), "dense": asdict(found[best]) | {"kernel": best}, "points": rows}


def kind_of(name: str, point: dict[str, Any]) -> str:
    if name in RIVALS:
        return "rival"
    return ("best " if name.endswith(", best") else "") + ("zeros" if point["layers_with_zeros"] else "dense")


def front(points: dict[str, dict[str, Any]], cost: str = "bits") -> list[str]:
    """The points that no other beats in cost and loss, from the dearest to the cheapest."""
    kept, least = [], float("inf")
    for name, point in sorted(points.items(), key=lambda p: (p[1][cost], p[1]["excess"]["value"])):
        if point["excess"]["value"] < least:
            kept.append(name)
            least = point["excess"]["value"]
    return kept[::-1]


def of_kind(points: dict[str, dict[str, Any]], *kinds: str) -> dict[str, dict[str, Any]]:
    return {name: point for name, point in points.items() if kind_of(name, point) in kinds}


def dense_beside(points: dict[str, dict[str, Any]], bits: float) -> str | None:
    """The best dense point that takes no more than so many bits, or 1% more: two budgets of 2.5 end at 2.48 and 2.49."""
    fits = {n: p for n, p in of_kind(points, "dense").items() if p["bits"] <= 1.01 * bits}
    return min(fits, key=lambda n: fits[n]["excess"]["value"], default=None)


def less(point: dict[str, Any], other: dict[str, Any]) -> Estimate:
    """The loss of a point less another's, on the same windows."""
    a, b = (torch.tensor(p["excess_by_window"], dtype=torch.float64) for p in (point, other))
    return estimate(a - b)


def three(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def models_of(found: dict[str, Any]) -> list[str]:
    """The models that have points, in the order of SUBJECTS."""
    return [name for name in SUBJECTS if name in found["models"]]


def tables(found: dict[str, Any]) -> str:
    """Two tables a model."""
    lines = []
    for model in models_of(found):
        subject = found["models"][model]
        points = subject["points"]
        on = front(of_kind(points, "dense", "zeros"))
        lines += [
            f"### {model}", "", f"Dense: {subject['dense']['value']:.3f} nats a token, {subject['dense']['n']} windows.", "",
            "| point | bits | zeros | excess, nats a token | front | seconds to make |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, point in sorted(points.items(), key=lambda p: (-p[1]["bits"], p[1]["excess"]["value"])):
            lines.append(
                f"| {name} | {point['bits']:.2f} | {point['zeros']:.0%} | {three(point['excess'])} | "
                f"{'yes' if name in on else ''} | {point['seconds']:.0f} |"
            )
        lines += [
            "", "Each point with zeros and the best dense one, of one grid or several, that takes no more bits (1% at most):", "",
            "| with zeros | bits | excess | dense | bits | excess | difference | zeros |", "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, point in sorted(of_kind(points, "zeros").items(), key=lambda p: -p[1]["bits"]):
            lines.append(
                f"| {name} | {point['bits']:.2f} | {point['excess']['value']:.3f} | {beside_dense(points, point)} |"
            )
        lines.append("")
    return "\n".join([ratios(found), *lines, *([speeds(found)] if "seconds" in found else [])])


def ratios(found: dict[str, Any]) -> str:
    """A table of RATIOS, where a model has both points."""
    models = models_of(found)
    lines = [
        "### Excess over another's",
        "",
        f"| point | over | {' | '.join(models)} |",
        f"|---|---|{'---|' * len(models)}",
    ]
    for name, other in RATIOS:
        cells = []
        for model in models:
            a, b = (found["models"][model]["points"].get(n, {}).get("excess") for n in (name, other))
            cells.append(f"{a['value']:.4f} / {b['value']:.4f} = {a['value'] / b['value']:.2f}x" if a and b else "")
        if any(cells):
            lines.append(f"| {name} | {other} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def milliseconds(timing: dict[str, Any]) -> str:
    return f"{timing['seconds'] * 1e3:.2f} [{timing['low'] * 1e3:.2f}, {timing['high'] * 1e3:.2f}]"


def speeds(found: dict[str, Any]) -> str:
    """A table of products, with every model's excess, in bold where it is on the front of loss and seconds."""
    timed, models = found["seconds"]["points"], models_of(found)
    threads = found["seconds"]["machine"]["threads"]
    on = {}
    for model in models:
        points = of_kind(found["models"][model]["points"], "dense", "zeros")
        on[model] = front({n: p | timed[n] for n, p in points.items() if n in timed}, "seconds")
    dense, (rows, inputs) = found["seconds"]["dense"], found["seconds"]["shape"]
    lines = [
        "### Seconds", "",
        f"One token, {rows} x {inputs}, threads: {threads}; median [p10, p90] of {dense['samples']}, "
        f"cold, interleaved. Best dense bf16 product, {dense['kernel']}: {milliseconds(dense)} ms. In bold: on the front of loss "
        "and seconds.", "",
        f"| point | MB | ms | {' | '.join(f'excess, {m}' for m in models)} |",
        "|---|---|---|" + "---|" * len(models),
    ]  # fmt: skip
    for name, row in sorted(timed.items(), key=lambda p: p[1]["seconds"]):
        cells = [f"{row['nbytes'] / 1e6:.1f}", milliseconds(row)]
        for model in models:
            point = found["models"][model]["points"].get(name)
            value = f"{point['excess']['value']:.3f}" if point else ""
            cells.append(f"**{value}**" if name in on[model] else value)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def beside_dense(points: dict[str, dict[str, Any]], point: dict[str, Any]) -> str:
    beside = dense_beside(points, point["bits"])
    if beside is None:
        return "none is so small | | | | alone"
    other, gap = points[beside], less(point, points[beside])
    verdict = "lose" if gap.low > 0 else "pay" if gap.high < 0 else "undecided"
    return f"{beside} | {other['bits']:.2f} | {other['excess']['value']:.3f} | {three(asdict(gap))} | {verdict}"


def draw(found: dict[str, Any], plot: Path) -> None:
    """Excess loss against bits a weight: one panel a model, a line for each front."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "secateurs"
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(found["models"]), figsize=(5.5 * len(found["models"]), 5), layout="constrained", squeeze=False
    )
    # Okabe and Ito's palette, told apart by the colour-blind as well
    marks = {
        "dense": ("#0072B2", "o", "dense, integers"), "zeros": ("#D55E00", "s", "with zeros"),
        "rival": ("#999999", "x", "plain GPTQ, rounding to nearest"), "best dense": ("#56B4E9", "*", "dense, effort best"),
        "best zeros": ("#E69F00", "*", "with zeros, effort best"),
    }  # fmt: skip
    for axes, model in zip(panels[0], models_of(found), strict=True):
        subject = found["models"][model]
        for kind, (colour, marker, label) in marks.items():
            points = of_kind(subject["points"], kind)
            places = {n: (p["bits"], p["excess"]["value"]) for n, p in points.items()}
            if not places:
                continue
            axes.scatter(
                *zip(*places.values(), strict=True),
                color=colour,
                marker=marker,
                s=60 if marker == "*" else 22,
                label=label,
            )
            if kind in ("dense", "zeros"):
                on = front(points)
                axes.plot(*zip(*(places[n] for n in on), strict=True), color=colour, alpha=0.6)
                for n in on:
                    axes.annotate(
                        n.removesuffix(", dense"), places[n], fontsize=6, textcoords="offset points", xytext=(3, 3)
                    )
        axes.set(title=model, xlabel="bits a weight as stored", xscale="log")
        # linear about 0, on either side of which int8 may fall
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=min(0.0, *(p["excess"]["value"] for p in subject["points"].values())))
        axes.set_xticks([1.5, 2, 2.5, 3, 4, 5, 6, 8], labels=["1.5", "2", "2.5", "3", "4", "5", "6", "8"], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("excess loss on held-out text, nats a token")
    panels[0][0].legend(loc="lower left")
    figure.suptitle("Lower and further left is better", fontsize=9)
    figure.savefig(plot, metadata={"Date": None})


# the tables lie between them
_MARKS = ("<!-- tables of bench/fronts.py -->", "<!-- end of the tables -->")


def page(found: dict[str, Any], file: Path) -> None:
    """Writes the picture, and the tables into the page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draw(found, file.parent / "fronts.svg")
    text = file.read_text(encoding="utf-8") if file.is_file() else "\n".join(_MARKS)
    head, tail = text.split(_MARKS[0])[0], text.split(_MARKS[1])[1]
    write_text(file, f"{head}{_MARKS[0]}\n\n{tables(found)}\n{_MARKS[1]}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, help="default: the first two")
    parser.add_argument("--points", help="of one model, with ; between them; default: all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fronts.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "when-zeros-pay.md")
    parser.add_argument("--seconds", action="store_true", help="time products instead of running points")
    parser.add_argument("--pages-only", action="store_true", help="write tables and picture from what is there")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"models": {}}
    if arguments.seconds:
        found["seconds"] = seconds_of([*DENSE, *ZEROS, *SIXTEEN])
        write_json(arguments.out, found)
    elif not arguments.pages_only:
        for name in [arguments.model] if arguments.model else list(SUBJECTS)[:2]:
            subject = SUBJECTS[name]
            points = arguments.points.split(";") if arguments.points else subject.points
            if unknown := [p for p in points if p not in subject.points]:
                raise SystemExit(f"unknown point '{unknown[0]}' of {name}; write some of {'; '.join(subject.points)}")
            rows = found["models"].setdefault(name, {"points": {}})
            model, calibration, evaluation = subject.load()
            dense_W = losses_of(model, evaluation)
            rows["dense"], rows["machine"] = asdict(estimate(dense_W)), machine()
            for point in points:
                if point not in rows["points"]:
                    rows["points"][point] = run(subject, (model, calibration, evaluation), dense_W, point)
                    write_json(arguments.out, found)
                done = rows["points"][point]
                print(
                    f"{name:12s} {point:22s} {done['bits']:.2f} bits, {three(done['excess'])}, {done['seconds']:.0f} s",
                    flush=True,
                )
    if not found["models"]:
        raise SystemExit(f"{arguments.out} has no points; leave --pages-only out")
    page(found, arguments.page)


if __name__ == "__main__":
    main()
