"""What this machine does in a second, measured in a second: products, sums of Gram matrices, solvers, disk."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from secateurs.base.precision import widened
from secateurs.matrix import solvers
from secateurs.matrix.patterns import parse
from secateurs.matrix.stats import Stats

# of the matrices that are timed: what is larger takes as much longer as it has products more
_ROWS, _COLUMNS, _TOKENS = 256, 1024, 512
# the inverse that OBS changes, which no cache holds, and inputs that go together
_INVERSE, _TOGETHER = 2048, 32


@dataclass
class Rates:
    """product, gram: floating-point operations a second. disk: bytes a second, read or written.

    Solvers are timed when they are first asked for, on matrices of at most 256 x 1024.
    """

    product: float
    gram: float
    disk: float
    _known: dict[tuple[str, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Rates":
        """Those of this machine now, for weights of a dtype."""
        x, w = torch.randn(_TOKENS, _COLUMNS).to(dtype), torch.randn(2 * _COLUMNS, _COLUMNS).to(dtype)
        with widened():
            product = 2 * x.numel() * len(w) / _seconds(lambda: torch.nn.functional.linear(x, w))
        stats = Stats.zeros(_COLUMNS, True)
        gram = 1.2 * x.numel() * _COLUMNS / _seconds(lambda: stats.add_(x))
        return cls(product, gram, _disk())

    def products(self, flops: float) -> float:
        return flops / self.product

    def grams(self, flops: float) -> float:
        return flops / self.gram

    def moves(self, nbytes: float) -> float:
        return nbytes / self.disk

    def solve(self, method: str, outputs: int, inputs: int, kind: str) -> float:
        """Seconds of a layer with its factors: products go with rows and the square of inputs, factors with their cube."""
        width = min(inputs, _COLUMNS)
        more = inputs / width
        rows = self._once(f"rows by {method}", width, lambda: _rows(method, width)) * outputs / _ROWS
        if kind != "gram":
            return rows * more
        return rows * more**2 + self._once("factor", width, lambda: _factor(width)) * more**3

    def obs(self, inputs: int, count: int, rounds: int) -> float:
        """Seconds in which OBS makes a layer's inverse in fp64, and removes `count` inputs in rounds that read and write it all."""
        n = _INVERSE
        each, some = (self._once(f"{k} of the inverse", n, lambda k=k: _update(n, k)) for k in (1, _TOGETHER))  # type: ignore[misc]
        # a round takes what it moves, and so much for each input that goes in it
        own = max(0.0, some - each) / (_TOGETHER - 1)
        width = min(inputs, _COLUMNS)
        first = sum(self._once(what, width, lambda f=f: f(width)) for what, f in _FIRST.items())  # type: ignore[misc]
        return first * (inputs / width) ** 3 + (inputs / n) ** 2 * (rounds * max(0.0, each - own) + count * own)

    def _once(self, what: str, width: int, measure: Callable[[], float]) -> float:
        if (what, width) not in self._known:
            self._known[what, width] = measure()
        return self._known[what, width]


def _rows(method: str, width: int) -> float:
    """Seconds of a solver for _ROWS rows whose factors are there."""
    stats, weight_OI = Stats.of(torch.randn(2 * width, width)), torch.randn(_ROWS, width)
    solver, pattern = solvers.find(method), parse("unstructured", "layer")
    if solver.needs == "gram":
        stats.inverse_factor(solvers.DAMPING)
    return _seconds(lambda: solver.solve(weight_OI, stats, pattern, 0.5, solvers.DAMPING), 1)


def _factor(width: int) -> float:
    stats = Stats.of(torch.randn(2 * width, width))
    # another Stats, because factors are kept
    return _seconds(lambda: Stats(stats.tokens, stats.sqnorm_I, stats.gram_II).inverse_factor(solvers.DAMPING), 1)


def _inverse(width: int) -> float:
    upper_II = torch.randn(width, width, dtype=torch.float64)
    return _seconds(lambda: upper_II.T @ upper_II, 1)


# what is done before the first round of OBS
_FIRST = {"factor": _factor, "inverse": _inverse}


def _update(width: int, together: int) -> float:
    """Seconds of a round of OBS."""
    inverse_II = torch.randn(width, width, dtype=torch.float64)
    row_CI = torch.randn(together, width, dtype=torch.float64)
    return _seconds(lambda: inverse_II.addmm_(row_CI.T, row_CI, alpha=-1), 3)


def _seconds(run: Callable[[], object], times: int = 5) -> float:
    """The least of some runs, after one to warm up."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def _disk() -> float:
    """Bytes a second, of 32 MB that are written, flushed and read again, half of each."""
    data = os.urandom(1 << 25)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data"
        began = time.perf_counter()
        with file.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        file.read_bytes()
        return 2 * len(data) / (time.perf_counter() - began)
