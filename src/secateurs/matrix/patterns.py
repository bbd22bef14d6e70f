"""Patterns of zeros: (score_OI, sparsity) -> mask of the weights that stay. Knows nothing of where scores come from.

O outputs (rows), I inputs (columns). `sparsity` is the fraction of zeros. Kept counts are exact and ties go to
the lower index, so a mask depends on the scores alone. A new pattern is a dataclass here and a line in parse().

Example, 2 kept of 4:

    >>> import torch, secateurs as sc
    >>> sc.patterns.parse("2:4").keep(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 0.5).tolist()
    [[False, True, True, False]]
"""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateurs.base.errors import nearest

# an unstructured or block mask is decided for about this many inputs at a time by solvers that go left to right:
# on the anchor layer 32 to 64 gives the lowest error, 128 costs 1%, 512 costs 6% (docs/log.md)
MASK_BLOCK = 64

# groups of up to this many are ranked by comparing pairs
_COMPARE = 8


def count_zeros(numel: int, sparsity: float) -> int:
    """How many of `numel` weights are zero at this sparsity: numel * sparsity, rounded half to even."""
    return round(numel * sparsity)


def top(score: Tensor, kept: int) -> Tensor:
    """Keep exactly `kept` of the last axis, the highest scores; equal scores keep the lower index.

    score: [..., N], finite or infinite, NaN raises ValueError. Returns bool [..., N].
    """
    _refuse_nan(score)
    size = score.shape[-1]
    if kept <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if kept >= size:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, size - kept + 1)
    keep = score >= threshold
    if bool((keep.sum(-1) == kept).all()):
        return keep
    # a threshold alone keeps all tied scores or none; counting the ties keeps exactly as many as are missing
    above = score > threshold
    missing = kept - above.sum(-1, keepdim=True)
    tied = keep ^ above
    return above | (tied & (tied.cumsum(-1) <= missing))


def _refuse_nan(score: Tensor) -> None:
    # a sum is NaN if a score is, and costs a tenth of a mask; infinities of both signs also give NaN, hence the second test
    if score.sum().isnan() and score.isnan().any():
        raise ValueError(f"{int(score.isnan().sum())} of {score.numel()} scores are NaN")


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) along the last axis, [..., 1]. numpy's partition is 3 to 6 times as fast as kthvalue."""
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(k, dim=-1, keepdim=True).values
    if score.numel() == score.shape[-1] > _SAMPLE:
        found = _kth_by_sample(score.reshape(-1), k)
        if found is not None:
            return found.reshape(*score.shape[:-1], 1)
    return torch.from_numpy(np.partition(score.numpy(), k - 1, axis=-1)[..., k - 1 : k])


# scores that are sorted to bracket a threshold
_SAMPLE = 8192


def _kth_by_sample(score_N: Tensor, k: int) -> Tensor | None:
    """The k-th smallest of a long vector: a sample brackets it, and only what lies inside is partitioned.

    Exact, because the scores below the bracket are counted. None if the bracket missed, which is rare at four standard
    deviations. Floyd and Rivest 1975, "Expected time bounds for selection".
    """
    size = score_N.numel()
    # an odd step does not sample the same few columns of a matrix again and again
    sample = score_N[:: size // _SAMPLE | 1].sort().values
    n = sample.numel()
    place, spread = k / size * n, 2 * n**0.5
    low, high = sample[max(0, int(place - spread))], sample[min(n - 1, int(place + spread))]
    inside = score_N[(score_N >= low) & (score_N <= high)]
    rank = k - int((score_N < low).sum())
    if not 1 <= rank <= inside.numel():
        return None
    return torch.from_numpy(np.partition(inside.numpy(), rank - 1)[rank - 1 : rank])


class Pattern(Protocol):
    """What every pattern provides."""

    @property
    def step(self) -> int:
        """Neighbouring inputs that are decided together; a solver that goes left to right asks for a mask this many at a time."""

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that the pattern implies, or None where it is a choice."""

    @property
    def trades(self) -> int | None:
        """Neighbouring inputs among which a survivor and a removed weight of one row may trade places: 0 for the whole
        row, None where weights cannot move one by one.
        """

    def refuses(self, rows: int, columns: int) -> str | None:
        """Why a weight of this shape cannot take the pattern, or None."""

    def zeros(self, rows: int, columns: int, sparsity: float) -> int:
        """How many weights keep() removes from a matrix of this shape."""

    def keep(self, score_OI: Tensor, sparsity: float) -> Tensor:
        """Bool mask of the weights that stay, [O, I]: the highest scores, or the tiles with the highest sums of scores."""

    def violation(self, mask_OI: Tensor, sparsity: float) -> str | None:
        """None if the mask keeps no more than the pattern allows, else the first bad place."""


@dataclass(frozen=True)
class Unstructured:
    """Any positions; the same count in every row (scope 'row') or one count for the layer (scope 'layer')."""

    scope: str = "row"

    step = MASK_BLOCK
    fixed_sparsity = None
    trades = 0

    def __str__(self) -> str:
        return "unstructured"

    def refuses(self, rows: int, columns: int) -> str | None:
        return None

    def zeros(self, rows: int, columns: int, sparsity: float) -> int:
        if self.scope == "row":
            return rows * count_zeros(columns, sparsity)
        return count_zeros(rows * columns, sparsity)

    def keep(self, score_OI: Tensor, sparsity: float) -> Tensor:
        rows = score_OI if self.scope == "row" else score_OI.reshape(1, -1)
        mask = top(rows, rows.shape[1] - count_zeros(rows.shape[1], sparsity))
        return mask.reshape(score_OI.shape)

    def violation(self, mask_OI: Tensor, sparsity: float) -> str | None:
        rows = mask_OI if self.scope == "row" else mask_OI.reshape(1, -1)
        allowed = rows.shape[1] - count_zeros(rows.shape[1], sparsity)
        kept_O = rows.sum(1)
        bad = (kept_O > allowed).nonzero()
        if not len(bad):
            return None
        where = f"row {int(bad[0])}" if self.scope == "row" else "the layer"
        return f"{where} keeps {int(kept_O[bad[0]])} of {rows.shape[1]} weights, {allowed} are allowed"


@dataclass(frozen=True)
class NM:
    """At most n *kept* of every m neighbouring inputs of a row (NVIDIA's meaning: 1:4 is 75% zeros)."""

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def step(self) -> int:
        return self.m

    @property
    def trades(self) -> int | None:
        return self.m

    @property
    def fixed_sparsity(self) -> float | None:
        return 1 - self.n / self.m

    def refuses(self, rows: int, columns: int) -> str | None:
        if columns % self.m:
            return f"{columns} inputs are not a multiple of {self.m}"
        return None

    def zeros(self, rows: int, columns: int, sparsity: float) -> int:
        return rows * columns // self.m * (self.m - self.n)

    def keep(self, score_OI: Tensor, sparsity: float) -> Tensor:
        _refuse_nan(score_OI)
        if self.m > _COMPARE:
            return top(score_OI.reshape(-1, self.m), self.n).reshape(score_OI.shape)
        # count for each weight how many of its group beat it, pair by pair: 20 times as fast as sorting groups of four
        places = [place.contiguous() for place in score_OI.reshape(-1, self.m).unbind(1)]
        beaten_by = [torch.zeros_like(place, dtype=torch.uint8) for place in places]
        for i in range(self.m):
            for j in range(i + 1, self.m):
                # among equals the lower index wins
                later = places[j] > places[i]
                beaten_by[i] += later
                beaten_by[j] += ~later
        return torch.stack([b < self.n for b in beaten_by], 1).reshape(score_OI.shape)

    def violation(self, mask_OI: Tensor, sparsity: float) -> str | None:
        per_row = mask_OI.shape[1] // self.m
        kept = mask_OI.reshape(-1, self.m).sum(1)
        bad = (kept > self.n).nonzero()
        if not len(bad):
            return None
        row, group = divmod(int(bad[0]), per_row)
        return (
            f"{len(bad)} of {len(kept)} groups keep more than {self.n}; first at row {row}, "
            f"inputs {group * self.m}..{group * self.m + self.m - 1} keeps {int(kept[bad[0]])}"
        )


@dataclass(frozen=True)
class Block:
    """Whole tiles of `rows` x `columns` weights; the same count in every row of tiles, or one count for the layer."""

    rows: int
    columns: int
    scope: str = "layer"

    fixed_sparsity = None
    trades = None

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def step(self) -> int:
        return self.columns * max(1, MASK_BLOCK // self.columns)

    def refuses(self, rows: int, columns: int) -> str | None:
        if rows % self.rows or columns % self.columns:
            return f"{rows}x{columns} is not a whole number of {self.rows}x{self.columns} tiles"
        return None

    def zeros(self, rows: int, columns: int, sparsity: float) -> int:
        tiles = Unstructured(self.scope).zeros(rows // self.rows, columns // self.columns, sparsity)
        return tiles * self.rows * self.columns

    def keep(self, score_OI: Tensor, sparsity: float) -> Tensor:
        tiles = self._tiles(score_OI).sum((1, 3))
        tile_mask = Unstructured(self.scope).keep(tiles, sparsity)
        return tile_mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def violation(self, mask_OI: Tensor, sparsity: float) -> str | None:
        found = Unstructured(self.scope).violation(self._tiles(mask_OI).any(3).any(1), sparsity)
        return found and found.replace("weights", f"{self} tiles").replace("row ", "row of tiles ")

    def _tiles(self, matrix_OI: Tensor) -> Tensor:
        height, width = matrix_OI.shape
        return matrix_OI.reshape(height // self.rows, self.rows, width // self.columns, self.columns)


def parse(text: str, scope: str | None = None) -> Pattern:
    """'unstructured', 'N:M' or 'RxC' -> Pattern. scope: 'row' or 'layer', None for the pattern's own default.

    Raises ValueError naming what was written and what may be.
    """
    if text == "unstructured":
        return Unstructured(scope or "row")
    if (found := re.fullmatch(r"(\d+):(\d+)", text)) and 0 < int(found[1]) < int(found[2]):
        return NM(int(found[1]), int(found[2]))
    if (found := re.fullmatch(r"(\d+)x(\d+)", text)) and int(found[1]) > 0 and int(found[2]) > 0:
        return Block(int(found[1]), int(found[2]), scope or "layer")
    raise ValueError(
        f"unknown pattern '{text}'; write 'unstructured', 'N:M' with 0 < N < M (N kept, e.g. '2:4'), "
        f"or 'RxC' (e.g. '16x16'){nearest(text, ('unstructured', '2:4', '4:8', '1:4', '8:16', '16x16'))}"
    )


# texts for `secateurs methods`; parse() reads the patterns themselves
PATTERNS = {
    "unstructured": "any positions; --scope row or layer says where counts are equal",
    "N:M": "N kept of every M neighbouring inputs, e.g. 2:4 (50% zeros), 1:4 (75%), 4:8, 8:16, 16:32",
    "RxC": "whole tiles of R outputs by C inputs, e.g. 16x16",
}
