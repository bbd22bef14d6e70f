"""How zeros are shared among layers: ({name: LayerSummary}, sparsity, bounds) -> {name: sparsity}.

A new allocation is one function here and a row in ALLOCATIONS. All but `measured` give sparsities whose zeros add up to
round(sparsity * total) exactly. O outputs, I inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateurs.matrix.grids import Grid, parse
from secateurs.matrix.patterns import count_zeros


@dataclass(frozen=True)
class LayerSummary:
    """One layer as an allocation sees it. scores() gives its scores, higher = keep, in chunks of any shape, in order;
    weight() its weight_OI. block: the name of the block that it lies in. kernel: a convolution's height and width, which are part
    of its I inputs.
    """

    shape: tuple[int, int]
    block: str
    scores: Callable[[], Iterator[Tensor]]
    weight: Callable[[], Tensor]
    kernel: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


Bounds = tuple[float, float]
Allocate = Callable[[dict[str, LayerSummary], float, Bounds], dict[str, float]]


def uniform(layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds) -> dict[str, float]:
    """The same sparsity for every layer."""
    return dict.fromkeys(layers, sparsity)


def erk(layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds) -> dict[str, float]:
    """Density proportional to (O + I) / (O I): small layers keep more. Of a convolution with C channels and an h x w kernel,
    (O + C + h + w) / (O C h w). Evci et al. 2020, RigL, arXiv 1911.11134, sec. 3.
    """

    def sizes(layer: LayerSummary) -> tuple[int, ...]:
        return layer.shape[0], layer.shape[1] // math.prod(layer.kernel), *layer.kernel

    density = {name: sum(sizes(layer)) / layer.numel for name, layer in layers.items()}

    # scaled until the whole fits; layers at a bound stay there
    def at(scale: float) -> dict[str, float]:
        return {name: 1 - min(1.0, scale * d) for name, d in density.items()}

    return _solved(layers, at, sparsity, bounds, falling=True)


def owl(
    layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds, multiple: float = 5.0, span: float = 0.08
) -> dict[str, float]:
    """Blocks with more outliers keep more. A block's outliers are its scores above `multiple` times their mean; densities
    lie within +- span of 1 - sparsity, alike for all layers of a block. Yin et al. 2024, OWL, arXiv 2310.05175, sec. 4.
    """
    blocks = _by_block(layers)
    ratio = {}
    for block, members in blocks.items():
        total = sum(float(s.double().sum()) for layer in members for s in layer.scores())
        count = sum(layer.numel for layer in members)
        bar = multiple * total / count
        ratio[block] = sum(int((s > bar).sum()) for layer in members for s in layer.scores()) / count
    low, high = min(ratio.values()), max(ratio.values())
    scaled = {b: 2 * span * (r - low) / (high - low) if high > low else 0.0 for b, r in ratio.items()}
    return _shifted(layers, {name: -scaled[layer.block] for name, layer in layers.items()}, sparsity, bounds)


def alpha(layers: dict[str, LayerSummary], sparsity: float, bounds: Bounds, span: float = 0.3) -> dict[str, float]:
    """Blocks whose weight spectra have heavier tails keep more. alpha = 1 + k / sum_i ln(lambda_i / lambda_k+1) over the
    larger half of the eigenvalues of W' W (Hill's estimator), averaged over a block; sparsities run linearly from
    (1 - span) to (1 + span) times the target. Lu et al. 2024, AlphaPruning, arXiv 2410.10912, sec. 3.
    """
    found: dict[str, float] = {}
    for block, members in _by_block(layers).items():
        found[block] = float(np.mean([_hill(layer.weight()) for layer in members]))
    low, high = min(found.values()), max(found.values())
    scaled = {b: sparsity * 2 * span * (a - low) / (high - low) if high > low else 0.0 for b, a in found.items()}
    return _shifted(layers, {name: scaled[layer.block] for name, layer in layers.items()}, sparsity, bounds)


def _hill(weight_OI: Tensor) -> float:
    eigenvalues = torch.linalg.svdvals(weight_OI.float()).square().clamp(min=1e-30)
    k = max(1, len(eigenvalues) // 2)
    tail = (eigenvalues[:k] / eigenvalues[min(k, len(eigenvalues) - 1)]).log().sum()
    return 1 + k / max(float(tail), 1e-12)


def _by_block(layers: dict[str, LayerSummary]) -> dict[str, list[LayerSummary]]:
    blocks: dict[str, list[LayerSummary]] = {}
    for layer in layers.values():
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def _shifted(
    layers: dict[str, LayerSummary], wished: Mapping[str, float], sparsity: float, bounds: Bounds
) -> dict[str, float]:
    """wished + one shift for all, clipped to the bounds."""
    return _solved(
        layers, lambda shift: {name: w + shift for name, w in wished.items()}, sparsity, bounds, falling=False
    )


def _solved(
    layers: dict[str, LayerSummary],
    at: Callable[[float], dict[str, float]],
    sparsity: float,
    bounds: Bounds,
    falling: bool,
) -> dict[str, float]:
    """The member of a one-parameter family, clipped to the bounds, whose zeros add up; found by bisection, then counted."""
    wanted = count_zeros(sum(layer.numel for layer in layers.values()), sparsity)
    _check_room(layers, wanted, bounds)

    def zeros(parameter: float) -> dict[str, float]:
        found = at(parameter)
        return {n: min(max(found[n], bounds[0]), bounds[1]) * layer.numel for n, layer in layers.items()}

    low, high = (0.0, 1e12) if falling else (-4.0, 4.0)
    for _ in range(200):
        middle = (low + high) / 2
        if (sum(zeros(middle).values()) < wanted) != falling:
            low = middle
        else:
            high = middle
    exact = zeros(high if not falling else low)
    counts = {n: int(z) for n, z in exact.items()}
    left = wanted - sum(counts.values())
    for name, layer in layers.items():
        most, fewest = count_zeros(layer.numel, bounds[1]), count_zeros(layer.numel, bounds[0])
        step = max(fewest - counts[name], min(left, most - counts[name]))
        counts[name] += step
        left -= step
    return {n: counts[n] / layer.numel for n, layer in layers.items()}


def _check_room(layers: dict[str, LayerSummary], wanted: int, bounds: Bounds) -> None:
    fewest, most = (sum(count_zeros(layer.numel, b) for layer in layers.values()) for b in bounds)
    if not fewest <= wanted <= most:
        raise ValueError(f"{wanted} zeros do not fit between the layers' bounds, {fewest} and {most}")


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
    _check_room(layers, wanted, bounds)
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
        counts += torch.bincount((inside >> shift) & ((1 << bits) - 1), minlength=1 << bits).cpu()
    return counts


class Share(NamedTuple):
    """What a layer becomes: its pattern, its sparsity, and the grid of its weights or None for weights as they are."""

    pattern: str
    sparsity: float
    grid: str | None = None

    @property
    def on(self) -> Grid | None:
        """The grid, parsed."""
        return None if self.grid is None else parse(self.grid)


Shares = dict[str, Share]


@dataclass(frozen=True)
class Option:
    """What one layer could become, what that costs and how much of the model's loss."""

    share: Share
    cost: float
    loss: float


# the budget is divided into this many parts: costs are rounded up to whole ones
_PARTS = 10_000


def cheapest_loss(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """One option a layer, the lowest sum of losses whose costs stay within the budget: the multiple-choice knapsack.

    Dynamic programming over the layers and _PARTS parts of the budget; costs are rounded so that their sum is never over.
    Raises ValueError if even the cheapest options do not fit. Frantar and Alistarh 2022, SPDY, arXiv 2201.13096, sec. 3.
    """
    least = sum(min(o.cost for o in found) for found in options.values())
    if least > budget * (1 + 1e-9):
        raise ValueError(f"the cheapest choice for every layer costs {least:.4g}, the budget is {budget:.4g}")
    # what is left above the cheapest choices is what there is to share out, so that rounding cannot make it unreachable
    part = max((budget - least) / _PARTS, 1e-300)
    best = np.zeros(_PARTS + 1)
    chosen = []
    for found in options.values():
        cheapest = min(o.cost for o in found)
        extra = [int(np.ceil(max(0.0, (o.cost - cheapest) / part - 1e-9))) for o in found]
        tried = np.full((len(found), _PARTS + 1), np.inf)
        for row, option, parts in zip(tried, found, extra, strict=True):
            if parts <= _PARTS:
                row[parts:] = best[: _PARTS + 1 - parts] + option.loss
        chosen.append((tried.argmin(0), extra))
        best = tried.min(0)
    place = _PARTS
    picked: dict[str, Option] = {}
    for name, (choice, extra) in zip(reversed(list(options)), reversed(chosen), strict=True):
        index = int(choice[place])
        picked[name] = options[name][index]
        place -= extra[index]
    return {name: picked[name] for name in options}


@dataclass(frozen=True)
class Allocation:
    """A row of `secateurs methods`. needs: 'nothing' (shapes), 'weights', 'scores', or 'curves' (each layer's loss at several
    sparsities, which cheapest_loss() chooses from; share is None).
    """

    name: str
    needs: str
    share: Allocate | None
    about: str


ALLOCATIONS: dict[str, Allocation] = {
    a.name: a
    for a in (
        Allocation("uniform", "nothing", uniform, "the same for every layer"),
        Allocation("erk", "nothing", erk, "by shape: small layers keep more (ERK)"),
        Allocation("owl", "scores", owl, "blocks with more outlying scores keep more (OWL)"),
        Allocation("alpha", "weights", alpha, "blocks whose spectra have heavier tails keep more (AlphaPruning)"),
        Allocation("global", "scores", global_threshold, "one threshold over all scores, in units of the model's loss"),
        Allocation("measured", "curves", None, "losses measured at several sparsities, shared out under a budget"),
    )
}
