"""Fair timing: alternatives interleaved, weights rotated past the last cache, medians and spreads over all samples."""

import time
from collections.abc import Callable, Collection, Sequence
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


# a run that took so many times as long as the fastest one in the first round cannot be the best
HOPELESS = 3.0


def interleaved(
    runs: dict[str, Sequence[Run]],
    rounds: int,
    budget_seconds: float = float("inf"),
    droppable: Collection[str] = (),
) -> dict[str, Timing]:
    """Time every run in turn, `rounds` times over, the first untimed.

    runs: name -> the same work on different copies of its weights, done one after the other, so that no copy is still in a
    cache. Stops early, after three rounds at least, when the budget is spent. droppable: of these runs, one that took HOPELESS
    times as long as the fastest of them is timed once only, since an emulated product takes seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    first: dict[str, float] = {}
    start = time.perf_counter()
    for number in range(rounds + 1):
        for name, copies in runs.items():
            if number and name in droppable and first[name] > HOPELESS * min(first[n] for n in droppable):
                samples[name] = [first[name]]
                continue
            for run in copies:
                begin = time.perf_counter()
                run()
                seconds = time.perf_counter() - begin
                if number:
                    samples[name].append(seconds)
                else:
                    first[name] = min(seconds, first.get(name, seconds))
        if number >= 3 and time.perf_counter() - start > budget_seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def dense_runs(weights: Sequence[Tensor], x_TI: Tensor, wide: Sequence[Tensor] | None = None) -> dict[str, list[Run]]:
    """Every dense way to multiply here: torch and prepacked oneDNN, in the stored dtype and in fp32, and our kernels.

    On a CPU without 16-bit instructions torch emulates them, and the model in fp32 is faster: a gain over the emulation alone
    would mean nothing. wide: the weights in fp32, if the caller has them. fp32 products get their x in fp32, as
    a model in fp32 would. Our own kernels read the stored dtype: stream for few tokens, tile for more than one.
    """
    import torch

    from secateurs.kernels.dispatch import Call, kernels
    from secateurs.kernels.formats import DTYPES, pack_dense

    tokens = x_TI.shape[0]
    ways = [(weights, x_TI)]
    if x_TI.dtype != torch.float32:
        ways.append(([w.float() for w in weights] if wide is None else wide, x_TI.float()))
    runs: dict[str, list[Run]] = {}
    for stored, x in ways:
        dtype = str(x.dtype).removeprefix("torch.")
        runs[f"torch {dtype}"] = [lambda w=w, x=x: nn.functional.linear(x, w) for w in stored]  # type: ignore[misc]
        try:
            ops = torch.ops.mkldnn
            packed = [ops._reorder_linear_weight(w, tokens) for w in stored]
            ops._linear_pointwise(x, packed[0], None, "none", [], "")
            runs[f"oneDNN {dtype} prepacked"] = [
                lambda w=w, x=x, ops=ops: ops._linear_pointwise(x, w, None, "none", [], "")  # type: ignore[misc]
                for w in packed
            ]
        except (RuntimeError, NotImplementedError, AttributeError):
            # a build without oneDNN, or a dtype that this CPU has no kernel for
            pass
    calls = [Call([pack_dense(w)], [None]) for w in weights]
    found = set()
    for k in kernels():
        if k.format != "dense" or k.dtype != DTYPES[x_TI.dtype] or k.lacks or k.strategy in found:
            continue
        # for each strategy only the kernel of the fastest instruction set, which comes first
        found.add(k.strategy)
        if tokens <= 16 if k.strategy == "stream" else tokens > 1:
            runs[k.name] = [lambda c=c, i=k.index: c(x_TI, i) for c in calls]  # type: ignore[misc]
    return runs
