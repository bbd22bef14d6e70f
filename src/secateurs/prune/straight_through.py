"""Tuning on a grid: weights move in fp32, the model runs on them rounded, and gradients pass the rounding straight through.

With w the moving weights and s the moving scales,  W = s * clip(round(w / s)),  and of the loss's gradient g by W:
    by w:  g where w / s lies within the grid's range, 0 outside
    by s:  sum over the group of g * (round(w / s) - w / s) within the range, of g * bound outside
The straight-through estimator, Bengio et al. 2013, arXiv 1308.3432; of scales, Esser et al. 2020, LSQ, arXiv 1902.08153, eq. 3.
Weights and scales of a block together: Chen et al. 2024, EfficientQAT, arXiv 2407.11062. O outputs, I inputs, G groups.
"""

import dataclasses

import torch
from torch import Tensor, nn

from secateurs.matrix.grids import Scales
from secateurs.model.layers import Layer

# a scale moves all weights of its group, so it takes shorter steps than they do (docs/log.md)
_PACE = 0.3


class StraightThrough:
    """One layer on a grid while it is tuned. copy: the fp32 copy of its parameter, which moves; scale_OG moves too."""

    def __init__(self, layer: Layer, scales: Scales, copy: Tensor) -> None:
        self.layer, self.scales = layer, scales
        self.moving = dataclasses.replace(layer, parameter=nn.Parameter(copy, requires_grad=False))
        self.scale_OG = scales.scale_OG.float().clone()
        self.kept_OG = scales.scale_OG.clone()
        # of its steps, times the rate
        self.size = max(_PACE * float(self.scale_OG.square().mean().sqrt()), 1e-9)

    def pull(self, gradient: Tensor) -> None:
        """Turn the gradient by the rounded parameter, in place, into that by the moving one, and set that by the scales."""
        grid, part = (
            self.scales.grid,
            dataclasses.replace(self.layer, parameter=nn.Parameter(gradient, requires_grad=False)),
        )
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
