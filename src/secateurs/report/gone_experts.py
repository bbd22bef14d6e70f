"""What a report says of the experts that shrink removed: which went from each block, what they had to do, and what is left."""

from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Gone:
    """Of a block's mixture. block: its name; number: its place in report.json's `blocks`. removed: of `total` experts. share:
    of the choices that tokens of calibration text made, those of removed experts; None where they are not known. merged: {expert
    that stays: those merged into it}. left: of the error, what the refit left on held-out tokens; None where nothing was refit.
    """

    block: str
    number: int
    removed: list[int]
    total: int
    share: float | None
    merged: dict[str, list[int]]
    left: float | None


def gone(report: dict[str, Any]) -> list[Gone]:
    """Those of all blocks with a mixture, of report.json of shrink; none where no experts were to go."""
    found = []
    for number, record in enumerate(report.get("blocks") or []):
        done = record["units"].get("experts")
        if not done:
            continue
        tokens, refit = done["tokens"], done.get("refit")
        share = sum(tokens[e] for e in done["removed"]) / sum(tokens) if sum(tokens) else None
        left = refit["all"] if isinstance(refit, dict) else None
        found.append(
            Gone(
                record["block"], number, done["removed"], report["dense"]["experts"], share, done.get("merged", {}), left
            )
        )  # fmt: skip
    return found


def sentences(report: dict[str, Any]) -> list[str]:
    """What to say of all blocks together."""
    blocks = gone(report)
    if not blocks:
        return []
    several = f"each of {len(blocks)} blocks" if len(blocks) > 1 else "1 block"
    went, total = len(blocks[0].removed), blocks[0].total
    shares, left = (
        [x for x in values if x is not None] for values in zip(*((b.share, b.left) for b in blocks), strict=True)
    )
    found = []
    if went:
        had = (
            f"; on calibration text {sum(shares) / len(shares):.0%} of the tokens' choices had been theirs"
            if shares
            else ""
        )
        merged = ", merged into those that stay" if any(b.merged for b in blocks) else ""
        found.append(f"By {report['plan']['experts']} {went} of {total} experts went from {several}{merged}{had}")
        if len(blocks) > 1:
            found.append("All blocks keep equally many: config.json states one number")
    if left:
        span = f" ({min(left):.0%} to {max(left):.0%})" if len(left) > 1 else ""
        found.append(f"The refit left {median(left):.0%}{span} of their mixtures' error")
    return found
