"""How much of the whole each layer gives: ({name: LayerSummary}, sparsity, bounds) -> {name: sparsity}.

A new allocation is one function here and its name in ALLOCATIONS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.patterns import count_zeros


@dataclass(frozen=True)
class LayerSummary:
    """One layer as an allocation sees it. scores() gives its scores, higher = keep, in chunks of any shape, in order."""

    numel: int
    scores: Callable[[], Iterator[Tensor]]


Bounds = tuple[float, float]
Allocation = Callable[[dict[str, LayerSummary], float, Bounds], dict[str, float]]


def uniform(layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(layers, sparsity)


def global_threshold(layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds) -> dict[str, float]:
    """One threshold t over all scores: layer l loses its scores below t, at least bounds[0] and at most bounds[1] of it.

    Exact for any number of weights: a radix select over the bit patterns of the fp32 scores, three passes of 11, 10 and
    10 bits, one histogram a layer, one chunk in memory. Scores equal to t go in layer order, lower layers first, so that
    exactly round(sparsity * total) weights go. Raises ValueError for negative or NaN scores, or bounds that leave too
    few or too many weights.
    """
    numel = torch.tensor([layer.numel for layer in layers.values()])
    fewest = torch.tensor([count_zeros(int(n), bounds[0]) for n in numel])
    most = torch.tensor([count_zeros(int(n), bounds[1]) for n in numel])
    wanted = count_zeros(int(numel.sum()), sparsity)
    if not int(fewest.sum()) <= wanted <= int(most.sum()):
        raise ValueError(
            f"{wanted} zeros do not fit between the layers' bounds, {int(fewest.sum())} and {int(most.sum())}"
        )
    # scores are not negative, so their bit patterns are ordered as they are, sign bit always 0
    below = torch.zeros_like(numel)
    prefix = 0
    for shift, bits in ((20, 11), (10, 10), (0, 10)):
        histogram = torch.stack([_histogram(layer, prefix, shift, bits) for layer in layers.values()])
        # zeros of each layer if the threshold were the upper edge of each bucket
        upto = below[:, None] + histogram.cumsum(1)
        total = upto.clamp(min=fewest[:, None], max=most[:, None]).sum(0)
        bucket = int((total < wanted).sum())
        bucket = min(bucket, len(total) - 1)
        below = upto[:, bucket] - histogram[:, bucket]
        tied = histogram[:, bucket]
        prefix = prefix << bits | bucket
    zeros = below.clamp(min=fewest, max=most)
    room = (below + tied).clamp(min=fewest, max=most) - zeros
    left = wanted - int(zeros.sum())
    for i in range(len(zeros)):
        taken = min(left, int(room[i]))
        zeros[i] += taken
        left -= taken
    return {name: int(z) / int(n) for name, z, n in zip(layers, zeros, numel, strict=True)}


def _histogram(layer: LayerSummary, prefix: int, shift: int, bits: int) -> Tensor:
    """How many scores of a layer, of those whose upper bits are `prefix`, have each value of the next `bits` bits."""
    counts = torch.zeros(1 << bits, dtype=torch.int64)
    for scores in layer.scores():
        scores = scores.detach().float().reshape(-1).contiguous()
        if scores.isnan().any() or (scores < 0).any():
            raise ValueError("a global threshold needs scores that are not negative and not NaN")
        # -0.0 has the sign bit set
        pattern = (scores + 0.0).view(torch.int32)
        inside = pattern[(pattern >> (shift + bits)) == prefix]
        counts += torch.bincount((inside >> shift) & ((1 << bits) - 1), minlength=1 << bits)
    return counts


ALLOCATIONS: dict[str, Allocation] = {f.__name__: f for f in (uniform, global_threshold)}
