"""Replaces removed blocks by a change of the last matrix before them: a least-squares fit, kept where it helps.

The block before the removed ones ends in a matrix W whose product is added to the residual stream (its MLP's down projection).
With a_t its inputs and D_t what the removed blocks would add to the block's output,
    W + argmin_V sum_t ||D_t - V a_t||^2 + damping * mean diag(A'A) * ||V||^2
replaces them as far as a linear map of a can. ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) fits a map of the hidden state
instead. Some blocks normalize the product before they add it; the fit is then only approximate, and held-out windows decide
whether it is kept. O outputs, I inputs, T tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateurs.base.processes import Ranks
from secateurs.model.layers import Layer
from secateurs.model.walk import Step

# one window in so many is held out, and decides whether the fit is kept
_HELD = 8


def bridge(step: Step, layer: Layer, wanted: Callable[[int], Tensor], damping: float) -> float | None:
    """Fit a layer's weight, in place, to do what the removed blocks did; return how much of it is still missing.

    wanted: for a batch, what the removed blocks make of what leaves the block now. The result is the squared distance on held-out
    windows, as a fraction of the one before the fit; None if it did not fall, and the weight is then unchanged. Of several ranks
    each passes over its batches, and the first one solves. Raises ValueError if the Gram matrix is singular.
    """
    seen: list[Tensor] = []
    inputs, ranks = layer.shape[1], step.ranks
    # in fp64, so that it does not matter who adds in which order
    gram_II = torch.zeros(inputs, inputs, dtype=torch.float64)
    cross_OI = torch.zeros(layer.shape, dtype=torch.float64)
    held: list[Tensor] = []
    every = ranks.merged(step.windows)
    total = sum(every)
    hook = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with step.evaluating():
            for batch, windows in enumerate(step.windows):
                seen.clear()
                x = step.inputs(batch)
                left = step.call(x, batch)
                number = torch.arange(windows) + sum(every[: ranks.number(batch)])
                out = (number % _HELD == _HELD - 1) | ((number == total - 1) & (total < _HELD))
                # OPT flattens windows and tokens
                a_TI = seen[0].reshape(windows, -1, inputs)[~out].flatten(0, 1).float()
                d_TO = (wanted(batch).float() - left.float())[~out].reshape(-1, layer.shape[0])
                gram_II += a_TI.T @ a_TI
                cross_OI += d_TO.T @ a_TI
                held.append(out)
    finally:
        hook.remove()
    ranks.sum(gram_II, to=0)
    ranks.sum(cross_OI, to=0)
    mean = ranks.tell(float(gram_II.diagonal().mean()))
    if not mean > 0:
        # there is one window, and it is held out
        return None
    weight_OI = layer.read().clone()
    new_OI = weight_OI.contiguous().clone()
    if ranks.first:
        gram_II.diagonal().add_(damping * mean)
        lower_II, failed = torch.linalg.cholesky_ex(gram_II)
        if failed:
            raise ValueError(f"the Gram matrix of its inputs is singular at damping {damping:g}; raise --damping")
        change_OI = torch.cholesky_solve(cross_OI.T, lower_II).T.float()
        new_OI.copy_(weight_OI.float() + change_OI)
    ranks.hand_out(new_OI, owner=0)
    before = _distance(step, wanted, held, ranks)
    layer.write(new_OI)
    after = _distance(step, wanted, held, ranks)
    if not after < before:
        layer.write(weight_OI)
        return None
    return after / before


def _distance(step: Step, wanted: Callable[[int], Tensor], held: Sequence[Tensor], ranks: Ranks) -> float:
    """The squared distance between the block's output and the wanted one, on the held-out windows of all batches."""
    found = []
    with step.evaluating():
        for batch, out in enumerate(held):
            found.append(0.0)
            if out.any():
                left = step.call(step.inputs(batch), batch)[out]
                found[-1] = float((wanted(batch)[out].float() - left.float()).square().sum())
    # added in one order, whoever has found them
    return sum(ranks.merged(found))
