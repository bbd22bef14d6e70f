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

from secateurs.model.layers import Layer
from secateurs.model.walk import Step

# one window in so many is held out, and decides whether the fit is kept
_HELD = 8


def bridge(step: Step, layer: Layer, wanted: Callable[[int], Tensor], damping: float) -> float | None:
    """Fit a layer's weight, in place, to do what the removed blocks did; return how much of it is still missing.

    wanted: for a batch, what the removed blocks make of what leaves the block now. The result is the squared distance on held-out
    windows, as a fraction of the one before the fit; None if it did not fall, and the weight is then unchanged. Raises ValueError
    if the Gram matrix is singular.
    """
    seen: list[Tensor] = []
    inputs = layer.shape[1]
    gram_II = torch.zeros(inputs, inputs)
    cross_OI = torch.zeros(layer.shape)
    held: list[tuple[int, Tensor]] = []
    total = sum(step.windows)
    done = 0
    hook = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with step.evaluating():
            for batch, windows in enumerate(step.windows):
                seen.clear()
                x = step.inputs(batch)
                left = step.call(x, batch)
                number = torch.arange(done, done + windows)
                done += windows
                out = (number % _HELD == _HELD - 1) | ((number == total - 1) & (total < _HELD))
                # OPT flattens windows and tokens
                a_TI = seen[0].reshape(windows, -1, inputs)[~out].flatten(0, 1).float()
                d_TO = (wanted(batch).float() - left.float())[~out].reshape(-1, layer.shape[0])
                gram_II.addmm_(a_TI.T, a_TI)
                cross_OI.addmm_(d_TO.T, a_TI)
                if out.any():
                    held.append((batch, out))
    finally:
        hook.remove()
    mean = gram_II.diagonal().mean()
    if not mean > 0:
        # there is one window, and it is held out
        return None
    gram_II.diagonal().add_(damping * mean)
    lower_II, failed = torch.linalg.cholesky_ex(gram_II.double())
    if failed:
        raise ValueError(f"the Gram matrix of its inputs is singular at damping {damping:g}; raise --damping")
    change_OI = torch.cholesky_solve(cross_OI.double().T, lower_II).T.float()
    weight_OI = layer.read().clone()
    before = _distance(step, wanted, held)
    layer.write((weight_OI.float() + change_OI).to(weight_OI.dtype))
    after = _distance(step, wanted, held)
    if not after < before:
        layer.write(weight_OI)
        return None
    return after / before


def _distance(step: Step, wanted: Callable[[int], Tensor], held: Sequence[tuple[int, Tensor]]) -> float:
    """The squared distance between the block's output and the wanted one, on held-out windows."""
    total = 0.0
    with step.evaluating():
        for batch, out in held:
            left = step.call(step.inputs(batch), batch)[out]
            total += float((wanted(batch)[out].float() - left.float()).square().sum())
    return total
