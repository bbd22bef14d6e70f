"""GPTQ as its paper states it (Frantar et al. 2022, arXiv 2210.17323, algorithm 1), in float64 and one column at a time: a rival and an
oracle that shares no code with src/.

O outputs, I inputs. Grids are symmetric: scale = absmax / (2^(bits - 1) - 1) for `group` neighbouring inputs of a row, integers
-2^(bits - 1) .. 2^(bits - 1) - 1. No search for a smaller scale, no reordering of columns.
"""

import torch
from torch import Tensor

DAMPING = 0.01


def scale_of(part_OI: Tensor, bits: int) -> Tensor:
    """The scale of every row of a group, [O]."""
    return part_OI.abs().amax(1) / (2 ** (bits - 1) - 1)


def nearest(value_O: Tensor, scale_O: Tensor, bits: int) -> Tensor:
    """Every row's value on its grid; a group that is 0 stays 0."""
    integer_O = torch.where(scale_O > 0, value_O / scale_O.where(scale_O > 0, 1), 0).round()
    return integer_O.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale_O


def rounded(weight_OI: Tensor, bits: int, group: int) -> Tensor:
    """Rounding to nearest, float64."""
    new_OI = weight_OI.double().clone()
    for first in range(0, new_OI.shape[1], group):
        scale_O = scale_of(new_OI[:, first : first + group], bits)
        for i in range(first, min(first + group, new_OI.shape[1])):
            new_OI[:, i] = nearest(new_OI[:, i], scale_O, bits)
    return new_OI


def gptq(weight_OI: Tensor, gram_II: Tensor, bits: int, group: int, mask_OI: Tensor | None = None) -> Tensor:
    """The weights on the grid, float64. mask_OI: True where a weight may be other than 0. What a weight loses, to the grid or to the
    mask, is made up for by the columns after it. A group's scale is that of its weights as they are when its first column is due.
    """
    w_OI, gram_II = weight_OI.double().clone(), gram_II.double().clone()
    mask_OI = torch.ones_like(w_OI, dtype=torch.bool) if mask_OI is None else mask_OI
    inputs = len(gram_II)
    # a mean of 0 is a layer that saw nothing: rounding to nearest
    gram_II += torch.eye(inputs, dtype=torch.double) * (float(DAMPING * gram_II.diagonal().mean()) or 1.0)
    # U with U' U = H^-1: row i holds what column i's error costs the columns after it
    factor_II = torch.linalg.cholesky(torch.linalg.inv(gram_II), upper=True)
    new_OI = torch.empty_like(w_OI)
    for i in range(inputs):
        if i % group == 0:
            part = slice(i, i + group)
            scale_O = scale_of(w_OI[:, part] * mask_OI[:, part], bits)
        new_OI[:, i] = nearest(w_OI[:, i], scale_O, bits) * mask_OI[:, i]
        error_O = (w_OI[:, i] - new_OI[:, i]) / factor_II[i, i]
        w_OI[:, i:] -= error_O[:, None] * factor_II[i, i:]
    return new_OI


def wanda_mask(weight_OI: Tensor, gram_II: Tensor, kept: int, of: int) -> Tensor:
    """True for the `kept` of every `of` neighbouring weights of a row with the largest |W| * ||x_i|| (Sun et al. 2023, arXiv
    2306.11695), the lower input of two that are equal.
    """
    score_OI = weight_OI.double().abs() * gram_II.double().diagonal().sqrt()
    groups_OGI = score_OI.unflatten(1, (-1, of))
    order_OGI = groups_OGI.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(groups_OGI, dtype=torch.bool).scatter(2, order_OGI[..., :kept], True).flatten(1)


def wanda_gptq(weight_OI: Tensor, gram_II: Tensor, bits: int, group: int, kept: int, of: int) -> Tensor:
    """Wanda's weights, then GPTQ of them with the mask frozen: what Wanda removed is not made up for."""
    mask_OI = wanda_mask(weight_OI, gram_II, kept, of)
    return gptq(weight_OI * mask_OI, gram_II, bits, group, mask_OI)


def relative_error(new_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> float:
    """||X (W' - W)|| / ||X W||, Frobenius, from X'X."""
    weight_OI, gram_II = weight_OI.double(), gram_II.double()
    delta_OI = new_OI - weight_OI
    return float((((delta_OI @ gram_II) * delta_OI).sum() / ((weight_OI @ gram_II) * weight_OI).sum()).sqrt())
