"""What a decision says of its candidates: the front, and the sentence."""

from typing import Any

from secateurs.decide import beside_rivals
from secateurs.decide.plan import INTEGERS
from secateurs.decide.realize import Candidate

LEFT_OUT = (
    f"dense {' and '.join(INTEGERS)} were left out, as asked (--no-integers): whether zeros beat them is not known"
)


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured candidates that no other beats in both perplexity and seconds, the fastest first."""
    known = [r for r in rows if r["status"] == "measured" and r["quality"]]

    def point(row: dict[str, Any]) -> tuple[float, float]:
        return row["seconds_ratio"]["value"], row["quality"]["ppl_ratio"]["value"]

    kept = []
    for row in known:
        seconds, quality = point(row)
        others = [point(o) for o in known if o is not row]
        if not any(s <= seconds and q <= quality and (s, q) != (seconds, quality) for s, q in others):
            kept.append(row)
    return sorted(kept, key=point)


def sentence(
    best: dict[str, Any] | None,
    candidates: dict[str, Candidate],
    rows: list[dict[str, Any]],
    zeros: str,
    rivals: list[dict[str, Any]],
    where: str,
    estimated: bool,
) -> str:
    """The decision in words: what to ship and what it gains and loses, or why nothing pays. best: None for the dense model. zeros:
    what is said of them. rivals: those that were timed.
    """
    how = f"by estimate for {where}" if estimated else f"measured on {where}"
    if best is None:
        reasons = "; ".join(f"{r['candidate']}: {r['reason']}" for r in rows)
        rival = beside_rivals.to_ship(rivals)
        way = "" if rival is None else f" {rival['words']}"
        takes = (
            ""
            if rival is None or rival["same_weights"]
            else (
                f" It takes {rival['seconds_ratio']['value']:.2f}x the time of the fastest way to run it unrounded and "
                f"{rival['bytes_ratio']:.2f}x the bytes, and holds the floor."
            )
        )
        return f"Ship the dense model{way}: no candidate both passes the floor and pays ({how}).{takes} {reasons}."
    seconds, quality = best["seconds_ratio"], best["quality"]
    time = f"{seconds['value']:.2f}x the time" + (
        "" if estimated else f" (10th to 90th percentile {seconds['low']:.2f} to {seconds['high']:.2f})"
    )
    lost = ""
    if quality:
        ratio = quality["ppl_ratio"]
        change = f"{ratio['value'] - 1:+.1%}, 95% interval {ratio['low'] - 1:+.1%} to {ratio['high'] - 1:+.1%}"
        lost = f" Perplexity against the dense model's: {change}."
    passed = ", ".join(g["gate"] for g in best["gate"])
    more = " ".join(told for told in (beside_rivals.sentence(best, rivals), zeros) if told)
    dense = "dense " if candidates[best["candidate"]].plain else ""
    nbytes = f"{best['bytes_ratio']:.2f}x the bytes"
    gains = (
        f"a request takes {time} and the weights {nbytes} ({how})"
        if seconds["value"] < 1
        else f"the weights take {nbytes}; a request is no faster, {time} ({how})"
    )
    return f"Ship {dense}{best['candidate']}: {gains}, and it passes {passed}.{lost}{f' {more}' if more else ''}"
