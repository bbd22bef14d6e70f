"""Holds candidates against what people would run instead: the dense model under torch.compile, and in llama.cpp.

Rivals that run its weights as they are count among the dense ways, of which the fastest is 1x. Those of 8 and 4 bits are held to
the floor: a candidate ships only if it is faster than each of them that holds it, or as fast and smaller, by more than noise.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateurs.base.files import write_json
from secateurs.base.progress import Progress
from secateurs.decide.plan import DecidePlan
from secateurs.decide.realize import GAIN
from secateurs.machine.bench import Variant, dense_variants
from secateurs.machine.timing import Timing
from secateurs.model.checkpoint import Checkpoint
from secateurs.pack import rivals
from secateurs.quality import evaluation

Row = dict[str, Any]
# torch.compile is run again beside the next candidate if it took no more of the fastest dense way's seconds
_NEAR = 1.1


def ways(
    variants: Sequence[Variant], plan: DecidePlan, out: Path, progress: Progress
) -> tuple[list[Variant], list[str]]:
    """The variants with the rivals before the last one, and sentences on what is missing."""
    if not plan.rivals:
        return list(variants), []
    dense = variants[0].folder
    found, said = rivals.in_llama_cpp(dense, out / "rivals", progress)
    if (slow := _slow_compiled(out)) is None:
        found.insert(0, rivals.in_torch_compile(dense))
    else:
        said.append(slow)
    return [*variants[:-1], *found, variants[-1]], said


def _slow_compiled(out: Path) -> str | None:
    """Why torch.compile is not timed once more: beside another candidate it was far from the fastest dense way."""
    for file in sorted(out.glob("candidates/*/timing.json")):
        timed = json.loads(file.read_text())
        fastest = timed["variants"][0]
        for row in timed["variants"][1:]:
            share = Timing.of(_over(row, fastest, timed)).seconds
            if row["how"] == "compiled" and share > _NEAR:
                return (
                    f"{row['name']} was timed once, beside {file.parent.name}: there it took {share:.2f}x the seconds of "
                    f"{fastest['name']}"
                )
    return None


def seconds(row: Row, timed: Row) -> list[float]:
    """Seconds of a request in every run of a variant of bench."""
    stages = (row[stage]["samples"] for stage in ("prefill", "decode"))
    return [timed["prompt"] / a + (timed["new"] - 1) / b for a, b in zip(*stages, strict=True)]


def _over(row: Row, other: Row, timed: Row) -> list[float]:
    return [a / b for a, b in zip(seconds(row, timed), seconds(other, timed), strict=True)]


def ratio(row: Row, other: Row, timed: Row) -> dict[str, float]:
    """A variant's seconds of a request over another's of the same moment."""
    found = Timing.of(_over(row, other, timed))
    return {"value": found.seconds, "low": found.low, "high": found.high}


def _words(row: Row) -> str:
    """A rival within a sentence: 'under torch.compile', 'in llama.cpp at 8 bits'."""
    return "under torch.compile" if row["how"] == "compiled" else f"in {row['name'].replace(', ', ' at ')}"


def beside(timed: Row) -> list[Row]:
    """What the last variant takes of each rival's seconds and bytes (`seconds`, `bytes`), and what each rival takes of the fastest
    dense way's seconds and of the dense model's bytes."""
    base, ours = timed["variants"][0], timed["variants"][-1]
    dense = next(row["weights_bytes"] for row in timed["variants"] if not row.get("rival"))
    return [
        {
            "name": row["name"],
            "words": _words(row),
            "same_weights": row["same_weights"],
            "seconds": ratio(ours, row, timed),
            "bytes": ours["weights_bytes"] / row["weights_bytes"],
            "seconds_ratio": ratio(row, base, timed),
            "bytes_ratio": row["weights_bytes"] / dense,
            "engine": row["engine"],
            "folder": row["folder"],
        }
        for row in timed["variants"][:-1]
        if row.get("rival")
    ]


def of_rows(rows: Sequence[Row], plan: DecidePlan, out: Path, progress: Progress) -> list[Row]:
    """The rivals that were timed, each beside the first candidate, with its quality and floors; rows that do not pay beside one
    that holds the floor get their reason. Rivals that round are measured on their files, once; the others are the dense model.
    """
    file = out / "rivals.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    timed: dict[str, Row] = {}
    for row in rows:
        for rival in row["rivals"]:
            timed.setdefault(rival["name"], rival)
    for rival in timed.values():
        if not rival["same_weights"] and rival["name"] not in known:
            known[rival["name"]] = _measured(out / "rivals" / Path(rival["folder"]).name, plan, out, progress)
            write_json(file, known)
    same: Row = {"quality": None, "gate": [], "passed": True}
    found = [{**rival, **(same if rival["same_weights"] else known[name])} for name, rival in timed.items()]
    _judge(rows, found)
    return found


def _measured(gguf: Path, plan: DecidePlan, out: Path, progress: Progress) -> Row:
    if not gguf.is_file():
        rivals.in_llama_cpp(dense_variants(plan.model)[0].folder, gguf.parent, progress)
    dense, rounded = Checkpoint(plan.model), Checkpoint(gguf)

    def told(what: str, done: int, total: int) -> None:
        progress(f"{gguf.name}: {what}", done, total)

    found = evaluation.measured(
        dense,
        rounded,
        plan.evaluation,
        plan.calibration.seed,
        told,
        beside=out / "work",
        calibration=plan.calibration.source,
    )
    # its plain copy, as large as the model in 16 bits
    shutil.rmtree(rounded.folder, ignore_errors=True)
    return {"quality": found.quality, "gate": found.gate, "passed": all(g["passed"] for g in found.gate)}


def pays(seconds: dict[str, float], nbytes: float) -> bool:
    """True if that is faster, or as fast and smaller, by more than noise. seconds, nbytes: over another's."""
    if seconds["value"] < 1 / GAIN and seconds["high"] < 1:
        return True
    return seconds["value"] <= GAIN and nbytes < 1 / GAIN


def _judge(rows: Sequence[Row], found: Sequence[Row]) -> None:
    """Give rows that are fit to ship a reason where they do not pay beside a rival that holds the floor. found: of held()."""
    holds = {r["name"] for r in found if r["passed"]}
    for row in rows:
        if row["status"] != "measured" or row["reason"] is not None:
            continue
        better = [r for r in row["rivals"] if r["name"] in holds and not pays(r["seconds"], r["bytes"])]
        if better:
            worst = max(better, key=lambda r: r["seconds"]["value"])
            row["reason"] = (
                f"does not pay beside the dense model {worst['words']}, which holds the floor too: "
                f"{worst['seconds']['value']:.2f}x its seconds and {worst['bytes']:.2f}x its bytes"
            )


def to_ship(found: Sequence[Row]) -> Row | None:
    """The fastest rival that holds the floor and takes less time than the fastest way to run the weights as they are, or is it."""

    def faster(rival: Row) -> bool:
        seconds: float = rival["seconds_ratio"]["value"]
        return seconds <= 1 if rival["same_weights"] else pays(rival["seconds_ratio"], rival["bytes_ratio"])

    fit = [r for r in found if r["passed"] and faster(r)]
    return min(fit, key=lambda r: r["seconds_ratio"]["value"], default=None)


def lacks(plan: DecidePlan, estimated: bool) -> list[str]:
    """Why nothing is said of rivals, where that was decided before anything was timed."""
    if not plan.rivals:
        return [
            "rivals were left out, as asked (--no-rivals): whether the dense model is faster in llama.cpp is not known"
        ]
    return [
        "nothing was timed, so nothing is said of llama.cpp and torch.compile, in which the dense model may be faster"
    ] * estimated


def sentence(best: Row | None, found: Sequence[Row]) -> str:
    """What the decision says of rivals; '' where none was run."""
    if best is None or not best["rivals"]:
        return ""
    holds = {r["name"] for r in found if r["passed"]}
    near = max((r for r in best["rivals"] if r["name"] in holds), key=lambda r: r["seconds"]["value"], default=None)
    if near is None:
        return "No rival holds the floor."
    return (
        f"It takes {near['seconds']['value']:.2f}x the seconds and {near['bytes']:.2f}x the bytes of the dense model "
        f"{near['words']}, the fastest rival that holds the floor."
    )
