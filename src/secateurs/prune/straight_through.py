"""Tuning on a grid: weights move in fp32, the model runs on them rounded, and gradients pass the rounding straight through.

With w the moving weights and s the moving scales,  W = s * clip(round(w / s)),  and of the loss's gradient g by W:
    by w:  g where w / s lies within the grid's range, 0 outside
    by s:  sum over the group of g * (round(w / s) - w / s) within the range, of g * bound outside
The straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; of scales, Esser et al. 2020, LSQ, arXiv 1902.08153, eq. 3.
Weights and scales of a block together: Chen et al. 2024, EfficientQAT, arXiv 2407.11062. O outputs, I inputs, G groups.

Where the dense weights are known, w starts as near to them as it still rounds to the integers that were chosen: from the middle
of a step it takes half a step to change an integer, and a few dozen steps of Adam do not go so far.
"""

import dataclasses

import torch
from torch import Tensor, nn

from secateurs.matrix.grids import Scales
from secateurs.model.layers import Layer

# a scale moves all weights of its group, so it takes shorter steps than they do (docs/log.md)
_PACE = 0.3
# how far from the middle of its step a weight may start, in steps
_LEAN = 0.499


@dataclasses.dataclass(frozen=True)
class OnGrid:
    """A layer whose weights lie on a grid. dense_OI: the weights before, if the moving ones are to start towards them."""

    layer: Layer
    scales: Scales
    dense_OI: Tensor | None = None


class StraightThrough:
    """One layer on a grid while it is tuned. copy: the fp32 copy of its parameter, which moves; scale_OG moves too."""

    def __init__(self, on: OnGrid, copy: Tensor, mask: Tensor | None) -> None:
        """mask: where the copy may move; elsewhere it stays zero."""
        self.layer, self.scales = on.layer, on.scales
        self.moving = self._with(copy)
        self.scale_OG = on.scales.scale_OG.float().clone()
        self.kept_OG = on.scales.scale_OG.clone()
        # of its steps, times the rate
        self.size = max(_PACE * float(self.scale_OG.square().mean().sqrt()), 1e-9)
        if on.dense_OI is not None:
            here_OI = self.moving.read()
            step_OI = on.scales.grid.spread(self.scale_OG, here_OI.shape[1])
            integer_OI = on.scales.integers(here_OI).float()
            lean_OI = ((on.dense_OI.float() / step_OI).nan_to_num(0, 0, 0) - integer_OI).clamp(-_LEAN, _LEAN)
            free_OI = True if mask is None else self._with(mask).read()
            self.moving.write((integer_OI + lean_OI * free_OI) * step_OI)

    def _with(self, values: Tensor) -> Layer:
        """The layer with other values of its parameter."""
        return dataclasses.replace(self.layer, parameter=nn.Parameter(values, requires_grad=False))

    def pull(self, gradient: Tensor) -> None:
        """Turn the gradient by the rounded parameter, in place, into that by the moving one, and set that by the scales."""
        grid, part = self.scales.grid, self._with(gradient)
        by_weight_OI = part.read()
        wanted_OGN = (grid.grouped(self.moving.read()) / self.scale_OG[..., None]).nan_to_num(0, 0, 0)
        low, high = (bound[..., None].float() for bound in self.scales.low_high())
        integer_OGN = wanted_OGN.round().clamp(low, high)
        inside_OGN = (wanted_OGN - integer_OGN).abs() <= 0.5
        slope_OGN = torch.where(inside_OGN, integer_OGN - wanted_OGN, integer_OGN)
        self.scale_OG.grad = (grid.grouped(by_weight_OI) * slope_OGN).sum(-1)
        inside_OI = inside_OGN.flatten(1)[:, : by_weight_OI.shape[1]]
        part.write(by_weight_OI * inside_OI)

    def write(self) -> None:
        """Round the moving weights into the parameter."""
        self.scale_OG.grad = None
        now = dataclasses.replace(self.scales, scale_OG=self.scale_OG.to(self.scales.grid.scale_dtype))
        self.layer.write(now.rounded(self.moving.read()))

    def keep(self) -> None:
        self.kept_OG.copy_(self.scale_OG)

    def restore(self) -> None:
        self.scales.scale_OG.copy_(self.kept_OG)
