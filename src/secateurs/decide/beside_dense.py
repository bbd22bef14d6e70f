"""Holds candidates with zeros, or with units less, against dense integers, which take fewer bytes and less time too.

Zeros pay if they are faster than the best dense candidate that holds the floor, or as fast and smaller, by more than noise. Where
they do not, compare() says what would have to change.
"""

from collections.abc import Callable
from typing import Any

from secateurs.decide.realize import GAIN, Candidate

Row = dict[str, Any]
# what a candidate would take by estimate: {"bytes_ratio", "seconds_ratio"}
Estimated = Callable[[Candidate], Row]
# sparsities that are looked at, in percent
_PERCENT = range(5, 96)


def pays(row: Row, dense: Row) -> bool:
    """True if a row is faster than a dense one, or as fast and smaller, by more than noise."""
    ours, theirs = row["seconds_ratio"], dense["seconds_ratio"]
    if ours["value"] < theirs["value"] / GAIN and ours["high"] < theirs["value"]:
        return True
    return bool(ours["value"] <= theirs["value"] * GAIN and row["bytes_ratio"] < dense["bytes_ratio"] / GAIN)


def compare(rows: list[Row], candidates: dict[str, Candidate], estimated: Estimated) -> tuple[Row | None, str]:
    """The row to ship, None if there is none, and a sentence on whether zeros pay ('' where nothing dense was measured).

    Writes into each row that is not dense: `beside`, what it takes of the dense candidate of the same bits and of the best one that
    holds the floor; and `reason`, of one that is fit to ship but does not pay beside the latter.
    """
    fit = [r for r in rows if r["status"] == "measured" and r["reason"] is None]
    plain = [r for r in rows if candidates[r["candidate"]].plain and r["status"] == "measured"]
    best_dense = min((r for r in plain if r in fit), key=_order, default=None)
    for row in rows:
        candidate = candidates[row["candidate"]]
        if candidate.plain:
            continue
        same = [r for r in plain if candidate.grid and candidates[r["candidate"]].grid == candidate.grid]
        same = same or [r for r in plain if candidates[r["candidate"]].bits == candidate.bits]
        row["beside"] = {"same_bits": _beside(row, same[0] if same else None), "best_dense": _beside(row, best_dense)}
        if row in fit and best_dense is not None and not pays(row, best_dense):
            told = row["beside"]["best_dense"]
            row["reason"] = (
                f"does not pay beside dense {told['candidate']}, which holds the floor too: {told['seconds']:.2f}x its seconds and "
                f"{told['bytes']:.2f}x its bytes"
            )
    fit = [r for r in fit if r["reason"] is None]
    best = min(fit, key=_order, default=None)
    return best, _sentence(best, best_dense, rows, candidates, estimated)


def _order(row: Row) -> tuple[float, float]:
    return row["seconds_ratio"]["value"], row["bytes_ratio"]


def _beside(row: Row, dense: Row | None) -> dict[str, Any] | None:
    """What a row takes of a dense one's seconds and bytes, and how much farther from the 16-bit model it is."""
    if dense is None:
        return None
    told = {
        "candidate": dense["candidate"],
        "seconds": row["seconds_ratio"]["value"] / dense["seconds_ratio"]["value"],
        "bytes": row["bytes_ratio"] / dense["bytes_ratio"],
        "kl": None,
    }
    if row["quality"] and dense["quality"] and row["quality"].get("kl") and dense["quality"].get("kl"):
        told["kl"] = row["quality"]["kl"]["value"] - dense["quality"]["kl"]["value"]
    return told


def _sentence(
    best: Row | None, dense: Row | None, rows: list[Row], candidates: dict[str, Candidate], estimated: Estimated
) -> str:
    with_zeros = [r for r in rows if not candidates[r["candidate"]].plain]
    if dense is None or not with_zeros:
        return ""
    if best is not None and best is not dense:
        told = best["beside"]["best_dense"]
        return (
            f"It takes {told['seconds']:.2f}x the seconds and {told['bytes']:.2f}x the bytes of dense {told['candidate']}, the "
            "best of those that have fewer bits alone."
        )
    told = "Zeros do not pay here. "
    faster = [r for r in with_zeros if r["status"] == "measured" and not r["passed"] and pays(r, dense)]
    if faster:
        nearest = min(faster, key=lambda r: r["quality"]["kl"]["value"] if r["quality"] else float("inf"))
        beside = nearest["beside"]["best_dense"]
        missed = next(g["missed"] for g in nearest["gate"] if not g["passed"])
        return told + (
            f"{nearest['candidate']} would, with {beside['seconds']:.2f}x the seconds and {beside['bytes']:.2f}x the bytes of "
            f"{dense['candidate']}, if it held the floor: {missed}."
        )
    return told + _sparsity_that_pays(dense, candidates, estimated)


def _sparsity_that_pays(dense: Row, candidates: dict[str, Candidate], estimated: Estimated) -> str:
    """From how many zeros on the estimate is better than the best dense candidate's, by what weights are stored as."""
    grids = {c.grid: f" on {c.grid}" if c.grid else " in 16 bits" for c in candidates.values() if c.kind == "mask"}
    theirs = estimated(candidates[dense["candidate"]])
    found: list[str] = []
    for grid, on in grids.items():
        for percent in _PERCENT:
            tried = Candidate(f"{percent}%", "mask", "unstructured", percent / 100, grid=grid)
            if pays(estimated(tried), theirs):
                found.append(f"from {percent}%{on}")
                break
        else:
            found.append(f"not below {_PERCENT[-1]}%{on}")
    return (
        f"By the measured products of single layers they would pay beside {dense['candidate']} {', '.join(found)}, if so many "
        "held the floor."
    )
