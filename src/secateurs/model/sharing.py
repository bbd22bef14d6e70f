"""Which rank solves which layer, and sums of all ranks' statistics. O outputs, I inputs."""

import copy
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from secateurs.base.errors import LayerError
from secateurs.base.processes import Ranks
from secateurs.matrix.stats import Stats
from secateurs.model.layers import Layer


class _Told(NamedTuple):
    """What a rank tells of a layer's Stats. like: the first layer that shares them. drift: they have products with dense inputs."""

    like: str
    drift: bool


def dealt(groups: Sequence[Sequence[Layer]], ranks: int) -> dict[str, int]:
    """{layer: the rank that solves it}. Layers of a group share a Gram matrix, so one rank solves them all.

    The costliest group goes first, each to the rank that has least to do so far; of equal ranks to the first.
    """
    load = [0.0] * ranks
    found: dict[str, int] = {}
    # sorted() keeps the order of equal ones, so all ranks find the same
    for group in sorted(groups, key=_cost, reverse=True):
        rank = load.index(min(load))
        load[rank] += _cost(group)
        found.update((layer.name, rank) for layer in group)
    return found


def _cost(group: Sequence[Layer]) -> float:
    """Multiplications of a solver, without its constant: I^3 for the factors of a Gram matrix, O I^2 for a layer on it."""
    return float(sum(layer.shape[0] * layer.shape[1] ** 2 for layer in group) + group[0].shape[1] ** 3)


def summed(
    found: dict[str, Stats], layers: Sequence[Layer], gram: bool, ranks: Ranks
) -> tuple[dict[str, Stats], dict[str, int]]:
    """Finished sums over all ranks, and {layer: the rank that solves it}, which alone gets Gram matrices. found: of a Watch.

    Layers share Stats that share them on every rank. A rank where a layer was not called adds nothing to it. Raises LayerError if
    an input was not finite.
    """
    mine: dict[str, _Told] = {}
    first: dict[int, str] = {}
    for name, stats in found.items():
        mine[name] = _Told(first.setdefault(id(stats), name), stats.drifts)
    told = ranks.gather(mine)
    alike: dict[tuple[str | None, ...], list[Layer]] = {}
    for layer in layers:
        if any(layer.name in other for other in told):
            key = tuple(other[layer.name].like if layer.name in other else None for other in told)
            alike.setdefault(key, []).append(layer)
    owner = dealt(list(alike.values()), ranks.size)
    total: dict[str, Stats] = {}
    # summing uses Stats up; those that another rank does not share are needed once more
    left = Counter(id(found[group[0].name]) for group in alike.values() if group[0].name in found)
    for group in alike.values():
        name, width = group[0].name, group[0].shape[1]
        drift = any(other[name].drift for other in told if name in other)
        stats = found.get(name) or Stats.zeros(width, gram)
        left[id(stats)] -= 1
        stats = (copy.deepcopy(stats) if left[id(stats)] > 0 else stats).summed(ranks, owner[name], drift)
        if not torch.isfinite(stats.sqnorm_I).all():
            bad = int((~torch.isfinite(stats.sqnorm_I)).sum())
            raise LayerError(f"{name}: {bad} of {width} inputs were NaN or infinite on calibration text")
        total.update((layer.name, stats) for layer in group)
    return total, owner
