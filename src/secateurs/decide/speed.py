"""The speed of a model on one machine, measured at a few lengths and batches, as functions of both.

prompt(L) = p * L + q * L^2       seconds of a prompt; o + p * L where long prompts cost no more a token than short ones
step(b, T) = base(b) + each * T   seconds between tokens of b sequences that hold T tokens of cache together
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.base.device import machine
from secateurs.base.errors import OutputError
from secateurs.base.run_directory import model_in
from secateurs.decide.queueing import Array
from secateurs.machine.profile import DeviceProfile

# tokens a second: median, and the low and the high end
Rates = tuple[float, float, float]


@dataclass(frozen=True)
class Pace:
    """Seconds at one end of a measured speed. prompts: of lengths to the powers 0, 1 and 2. bases: by batch. each: a held token."""

    prompts: tuple[float, float, float]
    batches: tuple[int, ...]
    bases: tuple[float, ...]
    each: float

    def prompt(self, lengths: Array) -> Array:
        """Seconds of one prompt of each length."""
        o, p, q = self.prompts
        return o + p * lengths + q * lengths**2

    def base(self, batch: int) -> float:
        """Seconds between tokens of `batch` sequences without what their cache takes; between measured batches interpolated."""
        return float(np.interp(batch, self.batches, self.bases))

    def step(self, batch: int, held: float) -> float:
        """Seconds between tokens of `batch` sequences that hold `held` tokens together."""
        return self.base(batch) + self.each * held


@dataclass(frozen=True)
class Speed:
    """What was measured of one model on one machine.

    prefill: {tokens of a prompt: prompt tokens a second}, one or more lengths. decode: {(sequences, tokens that each holds): tokens
    a second of all together}. kv_bytes_per_token: of one sequence's cache. memory_bytes: of the machine. bytes_per_second: of its
    memory, None if it was not probed. positions: the longest sequence of the model, None if it states none.
    """

    name: str
    prefill: dict[int, Rates]
    decode: dict[tuple[int, float], Rates]
    weights_bytes: int
    kv_bytes_per_token: int
    memory_bytes: int
    bytes_per_second: float | None = None
    positions: int | None = None

    @classmethod
    def of(cls, row: dict[str, Any], data: dict[str, Any]) -> "Speed":
        """From a variant of bench.json, and the whole file. Raises ValueError for what cannot have been measured."""

        def three(found: dict[str, Any]) -> Rates:
            median, low, high = (float(found[name]) for name in ("tokens_per_second", "low", "high"))
            if not (0 < low <= median <= high < math.inf):
                raise ValueError(f"{row['name']} has a speed of {median:g} [{low:g}, {high:g}] tokens a second")
            return median, low, high

        short, new = data.get("prompt", 64), data.get("new", 64)
        measured = [*row["batches"], *row.get("longer", [])]
        if not row["batches"] or min(b["batch"] for b in measured) < 1:
            raise ValueError(f"{row['name']} was measured with no sequence")
        prefill = {short: three(row["prefill"])}
        for cell in row.get("longer", []):
            if cell["batch"] == row["batches"][0]["batch"]:
                prefill[cell["prompt"]] = three(cell["prefill"])
        # while a sequence gets its new tokens it holds half of them on average
        decode = {(b["batch"], b.get("prompt", short) + new / 2): three(b["decode"]) for b in measured}
        found = cls(
            row["name"], prefill, decode, row["weights_bytes"], row["kv_bytes_per_token"], data["machine"]["memory_bytes"],
            data.get("bytes_per_second"), row.get("positions"),
        )  # fmt: skip
        for what in ("weights_bytes", "memory_bytes", "bytes_per_second", "positions"):
            value = getattr(found, what)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{row['name']} has {what} {value}")
        if not 0 <= found.kv_bytes_per_token < math.inf:
            raise ValueError(f"{row['name']} has kv_bytes_per_token {found.kv_bytes_per_token}")
        return found

    @property
    def contexts(self) -> list[float]:
        """Tokens that a sequence held when decoding was measured."""
        return sorted({context for _, context in self.decode})

    def pace(self, which: int = 0) -> Pace:
        """Fitted to the median (0), the low (1) or the high (2) end of what was measured."""
        batches = sorted({batch for batch, _ in self.decode})
        # by batch: tokens held together, and seconds
        cells = {
            b: np.array([(b * c, b / rates[which]) for (batch, c), rates in self.decode.items() if batch == b])
            for b in batches
        }
        each = self._each(list(cells.values()))
        bases = [max(0.0, float((seconds - each * held).mean())) for held, seconds in (c.T for c in cells.values())]
        return Pace(self._prompts(which), tuple(batches), tuple(bases), each)

    def _each(self, cells: Sequence[Array]) -> float:
        """Seconds of a held token in a step, the same for all batches: by least squares of relative errors, a base for each batch.

        Never less than memory takes to read it: what was measured may have lain in a cache, or been lost in noise.
        """
        least = self.kv_bytes_per_token / self.bytes_per_second if self.bytes_per_second else 0.0
        above = below = 0.0
        for held, seconds in (c.T for c in cells):
            apart = (held - held.mean()) / seconds.mean()
            above += float((apart * (seconds - seconds.mean()) / seconds.mean()).sum())
            below += float((apart**2).sum())
        fitted = max(least, above / below) if below else least
        return fitted or self.kv_bytes_per_token / self._reading

    @property
    def _reading(self) -> float:
        """Bytes a second at which the weights were read by the smallest batch."""
        batch, context = min(self.decode)
        return self.weights_bytes * self.decode[batch, context][0] / batch

    def _prompts(self, which: int) -> tuple[float, float, float]:
        lengths = np.array(sorted(self.prefill), dtype=np.float64)
        seconds = lengths / np.array([self.prefill[int(length)][which] for length in lengths])
        if len(lengths) == 1:
            return 0.0, float(seconds[0] / lengths[0]), 0.0
        from scipy.optimize import nnls

        # a token of a long prompt costs more where attention shows, and less where a call costs something by itself
        powers = (1, 2) if seconds[-1] / lengths[-1] > seconds[0] / lengths[0] else (0, 1)
        # relative errors count
        found, _ = nnls(np.stack([lengths**p / seconds for p in powers], 1), np.ones(len(lengths)))
        o, p, q = (float(found[powers.index(n)]) if n in powers else 0.0 for n in (0, 1, 2))
        return o, p, q

    @property
    def told(self) -> str:
        """What the functions of length are made of, for the user."""
        contexts, lengths = ([f"{v:g}" for v in values] for values in (self.contexts, sorted(self.prefill)))
        if len(contexts) > 1:
            tokens = f"time a token by decoding with {' and '.join(contexts)} tokens a sequence"
        else:
            rate, of = (self.bytes_per_second, "memory") if self.bytes_per_second else (self._reading, "its weights")
            tokens = (
                f"decoding was measured with {contexts[0]} tokens a sequence only; each token more is taken to cost the reading of "
                f"its {self.kv_bytes_per_token:,} bytes of cache at the {rate / 1e9:.3g} GB/s of {of}, which is the least it can"
            )
        if len(lengths) > 1:
            return f"{tokens}; prompts by lengths of {' and '.join(lengths)}"
        return f"{tokens}; prompts in proportion to {lengths[0]} tokens (`secateurs bench DIR --prompt 64,512` measures more)"


def _measurement(source: Path) -> Path:
    """The file of `secateurs bench`, or of a decision, that belongs to a path; of a decision, that of the candidate to ship."""
    if not source.is_dir():
        return source
    folders = [source, *([model_in(source).parent] if (source / "decide.json").is_file() else [])]
    files = [folder / name for folder in folders for name in ("bench.json", "timing.json")]
    return next((file for file in files if file.is_file()), files[0])


def read_speeds(source: Path) -> list[Speed]:
    """The variants of a bench.json, or of the one in a run directory; the first is dense. Raises OutputError.

    A file that does not state the bandwidth of memory gets this machine's, if it is of this machine and that was probed.
    """
    file = _measurement(source)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.get("bytes_per_second") is None and _here(data["machine"]):
            data["bytes_per_second"] = DeviceProfile.bandwidth()
        speeds = [Speed.of(row, data) for row in data["variants"]]
        if not speeds:
            raise ValueError("it has no variant")
        return speeds
    except OSError as error:
        raise OutputError(
            f"{file} cannot be read: {error.strerror}; `secateurs bench DIR --batch 1,4,16` measures speed and writes it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} is not a measurement of `secateurs bench`: {error}") from None


def _here(there: dict[str, Any]) -> bool:
    here = machine()
    return all(there.get(name) == here[name] for name in ("processor", "threads"))
