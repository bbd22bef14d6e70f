"""What a report says of layers on a grid: grids, bits a weight of the layers and of the whole file, zeros that rounding made; and
of the trial of a budget."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

_WIDTH = {"float32": 32}


def trial_words(trial: dict[str, Any]) -> str:
    """What the trial of a budget found: which shares were tried, how far each was from the dense model, which was taken."""
    unit = "KL {:.4g} nats a token" if trial["unit"] == "nats a token" else "squared distance {:.4g} a token"
    told = [
        f"{row['share'] + ' for all layers' if row['share'] else 'shares by layer'}: {unit.format(row['apart'])}"
        for row in trial["candidates"]
    ]
    taken = next(row["share"] for row in trial["candidates"] if row["taken"])
    what = f"so all layers are {taken}" if taken else "so each layer has its own share"
    return f"Tried on the model before tuning, on {trial['tokens']:,} calibration tokens: {'; '.join(told)}; {what}"


@dataclass(frozen=True)
class Bits:
    """grids: of how many layers each is. asked: False where no zeros were asked for. zeros: their share of the integers. rounded:
    survivors that became zero by rounding, None where no zeros were asked for, since all did. layers, file: bits a weight; of the
    file by what packing would take, and None where the report does not say.
    """

    grids: Counter[str]
    asked: bool
    zeros: float
    rounded: int | None
    layers: float
    file: float | None

    @classmethod
    def of(cls, report: dict[str, Any]) -> "Bits | None":
        """Of report.json, None where no layer is on a grid."""
        totals = report.get("totals") or {}
        if not totals.get("bits"):
            return None
        plan, nbytes = report["plan"], report.get("bytes") or {}
        asked = bool(plan["sparsity"] or plan["budget"])
        width = _WIDTH.get((report.get("compute") or {}).get("stored", ""), 16)
        stored = nbytes.get("packed") or nbytes.get("stored")
        return cls(
            Counter(r["grid"] for r in report["layers"] if r.get("grid") and not r["skipped"]),
            asked, totals["sparsity"], totals["rounded_to_zero"] if asked else None, totals["bits"],
            width * stored / nbytes["dense"] if stored else None,
        )  # fmt: skip

    @property
    def grid(self) -> str:
        """'int4/64', or of several '3 layers int8/64, 20 int4/64'."""
        if len(self.grids) == 1:
            return next(iter(self.grids))
        return ", ".join(f"{n} {'layer' if n == 1 else 'layers'} {grid}" for grid, n in self.grids.most_common())

    @property
    def words(self) -> str:
        """'4.26 bits a weight, 5.10 in the whole file'."""
        return f"{self.layers:.2f} bits a weight" + (f", {self.file:.2f} in the whole file" if self.file else "")
