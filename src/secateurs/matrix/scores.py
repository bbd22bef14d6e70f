"""How much each weight matters: (weight_OI, stats) -> score_OI, higher = keep.

O outputs, I inputs. A new criterion is one function here and its name in SCORES; a row in solvers.SOLVERS makes it a method.

Example: the second weight is smaller, but its input is larger.

    >>> import torch, secateurs as sc
    >>> stats = sc.Stats.of(torch.tensor([[1.0, 4.0]]))
    >>> sc.scores.wanda(torch.tensor([[3.0, -2.0]]), stats).tolist()
    [[3.0, 8.0]]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.matrix.stats import Stats

Score = Callable[[Tensor, Stats | None], Tensor]


def _norms(stats: Stats | None) -> Tensor:
    if stats is None:
        raise ValueError("this score needs calibration: the norms of the layer's inputs")
    return stats.sqnorm_I.sqrt()


def random(weight_OI: Tensor, stats: Stats | None) -> Tensor:
    """Uniform noise, as a control. Draws from torch's global generator, which a run seeds by the layer's name."""
    return torch.rand(weight_OI.shape).to(weight_OI.device)


def magnitude(weight_OI: Tensor, stats: Stats | None) -> Tensor:
    """|W|. Han et al. 2015, arXiv 1506.02626. Needs no calibration; collapses on language models from 50%."""
    return weight_OI.abs()


def wanda(weight_OI: Tensor, stats: Stats | None) -> Tensor:
    """|W| * ||x_i||_2. Sun et al. 2023, arXiv 2306.11695, eq. 1."""
    return weight_OI.abs() * _norms(stats)


def ria(weight_OI: Tensor, stats: Stats | None) -> Tensor:
    """(|W| / row sum + |W| / column sum) * ||x_i||_2^0.5. Zhang et al. 2024, relative importance and activations, eq. 4."""
    size_OI = weight_OI.abs()
    tiny = torch.finfo(size_OI.dtype).tiny
    row_O1 = size_OI.sum(1, keepdim=True).clamp(min=tiny)
    column_1I = size_OI.sum(0, keepdim=True).clamp(min=tiny)
    return (size_OI / row_O1 + size_OI / column_1I) * _norms(stats).sqrt()


SCORES: dict[str, Score] = {f.__name__: f for f in (random, magnitude, wanda, ria)}
