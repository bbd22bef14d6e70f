"""A DeviceProfile: what `secateurs probe` measured on one machine, as a JSON file that other commands read."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError
from secateurs.base.files import cache_folder, write_json
from secateurs.kernels.dispatch import kernels
from secateurs.matrix.grids import Grid

FORMAT = 1
_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}


def default_file() -> Path:
    """Where `secateurs probe` leaves the profile of this machine."""
    return cache_folder() / "profile.json"


@dataclass(frozen=True)
class DeviceProfile:
    """rows: one measured product each: shape, dtype, pattern, sparsity, tokens, kernel, seconds, nbytes, dense, dense_seconds,
    speedup (dense seconds / seconds), verdict; of integers also grid, integers (the kernel of all integers of these bits),
    integers_seconds and over_integers (integers_seconds / seconds); pattern 'dense' is all integers. bytes_per_second: streaming
    reads. flops_per_second: by dtype, multiply-adds as two.
    """

    name: str
    machine: dict[str, Any]
    bytes_per_second: float
    flops_per_second: dict[str, float]
    rows: list[dict[str, Any]]
    accelerator: dict[str, Any]

    def speedup(self, numbers: str, sparsity: float, tokens: int, pairs: bool = False) -> float | None:
        """Measured speedup of what is stored without zeros over the best dense of the same numbers; None if none was measured.

        numbers: bf16, fp16, fp32, or int8, ..., int2, whose dense is all integers. pairs: no four inputs keep more than two of them
        (2:4), which kernels of their own may multiply. The median over shapes, at the nearest token
        count that was measured. Between sparsities seconds are interpolated, since
        they go with the weights that are left. At sparsity 0 the speedup is 1; above the highest sparsity measured it stays as
        there; and a higher sparsity never gets a lower speedup than a lower one.
        """
        rows = [r for r in self.rows if _numbers(r) == numbers and r["kernel"].startswith("bitmask")]
        if not rows:
            return None
        nearest = _nearest(rows, tokens)
        by_sparsity: dict[float, list[float]] = {}
        for r in [r for r in nearest if r["kernel"].endswith("_pairs") == pairs] or nearest:
            by_sparsity.setdefault(r["sparsity"], []).append(r.get("over_integers", r["speedup"]))
        known = sorted(by_sparsity)
        # fewer survivors never take longer; a row that says so was measured in a slow moment
        found = np.maximum.accumulate([median(by_sparsity[s]) for s in known])
        if 0.0 not in known:
            known, found = [0.0, *known], np.array([1.0, *found])
        return float(1 / np.interp(sparsity, known, 1 / found))

    def leaves_zeros_out(self, dtype: str, grid: Grid | None, sparsity: float, pairs: bool = False) -> bool | None:
        """True if `pack` stores such a layer without its zeros here: that is smaller, and not slower for one token. None where no
        row says."""
        numbers, bits = (dtype, _BITS[dtype]) if grid is None else (f"int{grid.bits}", grid.bits)
        speedup = self.speedup(numbers, sparsity, 1, pairs)
        return None if speedup is None else speedup >= 1 and 1 + bits * (1 - sparsity) < bits

    def relative(
        self, dtype: str, grid: Grid | None, sparsity: float, tokens: int, pairs: bool = False
    ) -> float | None:
        """Seconds of a layer as `pack` stores it here, over those of the best dense product of dtype; None where no row says.

        Integers were measured in groups of 64; other groups are taken to be as fast.
        """
        dense = 1.0
        if grid is not None:
            numbers = f"int{grid.bits}"
            rows = [
                r
                for r in self.rows
                if r["dtype"] == dtype and _numbers(r) == numbers and r["kernel"].startswith("dense")
            ]
            if not rows:
                return None
            dense = float(median(1 / r["speedup"] for r in _nearest(rows, tokens)))
            if not sparsity:
                return dense
        else:
            numbers = dtype
        left_out = self.leaves_zeros_out(dtype, grid, sparsity, pairs)
        if left_out is None:
            return None
        return dense / (self.speedup(numbers, sparsity, tokens, pairs) or 1.0) if left_out else dense

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **{k: getattr(self, k) for k in self.__dataclass_fields__}}

    def write(self, file: Path) -> None:
        write_json(file, self.as_dict())

    @classmethod
    def read(cls, file: Path) -> "DeviceProfile":
        """Raises DeviceError if the file is missing or no profile."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise DeviceError(f"{file} is of another profile format than {FORMAT}; run `secateurs probe` again")
            return cls(**data)
        except OSError as error:
            raise DeviceError(
                f"{file} cannot be read: {error.strerror}; `secateurs probe --out {file}` makes it"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DeviceError(f"{file} is not a profile of `secateurs probe`: {error}") from None

    @classmethod
    def at_hand(cls) -> "DeviceProfile | None":
        """The profile that `secateurs probe` left, if it was measured on this machine as it is now; else None."""
        if not default_file().is_file():
            return None
        profile = cls.read(default_file())
        return profile if profile.of_here else None

    @classmethod
    def bandwidth(cls) -> float | None:
        """Bytes a second of this machine's memory, if it was probed as it is now; a profile of another format is none."""
        try:
            profile = cls.at_hand()
        except DeviceError:
            return None
        return profile.bytes_per_second if profile else None

    @property
    def of_here(self) -> bool:
        """True if it was measured on this processor, with these instruction sets and kernels and as many threads."""
        here = {**machine(), "kernels": [k.name for k in kernels() if not k.lacks]}
        return all(self.machine.get(k) == here[k] for k in ("processor", "isa", "limits", "kernels", "threads"))


def _numbers(row: dict[str, Any]) -> str:
    """What a row's weights are stored as: its dtype, or int8, ..., int2."""
    return str(row["grid"]).partition("/")[0] if row.get("grid") else str(row["dtype"])


def _nearest(rows: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The rows of the token count that is nearest."""
    nearest = min({r["tokens"] for r in rows}, key=lambda t: abs(t - tokens))
    return [r for r in rows if r["tokens"] == nearest]
