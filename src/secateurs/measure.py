"""Honest timing: alternatives interleaved, weights rotated past the last cache, medians and spreads over all samples."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor, nn

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds: median, and the 10th and 90th percentile of the samples."""

    seconds: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        ordered = sorted(samples)
        return cls(median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10], len(ordered))


def interleaved(runs: dict[str, Sequence[Run]], rounds: int, budget_seconds: float = float("inf")) -> dict[str, Timing]:
    """Time every run in turn, `rounds` times over, the first untimed.

    runs: name -> the same work on different copies of its weights, one after the other, so that none finds its own in a
    cache. Stops early, after three rounds at least, when the budget is spent.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(rounds + 1):
        for name, copies in runs.items():
            for run in copies:
                begin = time.perf_counter()
                run()
                if number:
                    samples[name].append(time.perf_counter() - begin)
        if number >= 3 and time.perf_counter() - start > budget_seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def dense_runs(weights: Sequence[Tensor], x_TI: Tensor) -> dict[str, list[Run]]:
    """The dense products that this torch and we have for a dtype: plain, prepacked oneDNN, our own for few tokens."""
    import torch

    from secateurs.formats import DTYPES, pack_dense
    from secateurs.kernels import Call, kernels

    tokens = x_TI.shape[0]
    dtype = str(x_TI.dtype).removeprefix("torch.")
    runs: dict[str, list[Run]] = {f"torch {dtype}": [lambda w=w: nn.functional.linear(x_TI, w) for w in weights]}  # type: ignore[misc]
    try:
        ops = torch.ops.mkldnn
        packed = [ops._reorder_linear_weight(w, tokens) for w in weights]
        ops._linear_pointwise(x_TI, packed[0], None, "none", [], "")
        runs[f"oneDNN {dtype} prepacked"] = [
            lambda w=w: ops._linear_pointwise(x_TI, w, None, "none", [], "")  # type: ignore[misc]
            for w in packed
        ]
    except (RuntimeError, NotImplementedError, AttributeError):
        # a build without oneDNN, or a dtype that this CPU has no kernel for
        pass
    ours = next((k for k in kernels() if k.format == "dense" and k.dtype == DTYPES[x_TI.dtype] and not k.lacks), None)
    if ours is not None and tokens <= 8:
        index = ours.index
        calls = [Call([pack_dense(w)], [None]) for w in weights]
        runs[ours.name] = [lambda c=c: c(x_TI, index) for c in calls]  # type: ignore[misc]
    return runs
