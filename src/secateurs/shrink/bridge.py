"""What removed blocks did, given to the last matrix of the block before them: least squares, kept where it helps.

The block before ends in a matrix W whose product is added to the residual stream (its MLP's down projection). With a_T its
inputs and D_T what the removed blocks would add to what now leaves the block,
    W + argmin_V sum_t ||D_t - V a_t||^2 + damping * mean diag(A'A) * ||V||^2
takes their place as far as a linear map of a can. ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) fits a map of the
hidden state instead. Where a block norms that product before it adds it, this is a guess for the held-out windows to judge.
O outputs, I inputs, T tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateurs.model.layers import Layer
from secateurs.model.walk import Step

Block = Callable[[Tensor, int], Tensor]
"""A block in the place that it had: (hidden states of some windows of a batch, batch) -> hidden states."""

# every so manieth window is held out, and decides
_HELD = 8


def bridge(step: Step, layer: Layer, gone: Sequence[Block], damping: float) -> float | None:
    """Change the layer's weight in place; return the squared distance that is left on held-out windows, as a fraction of what
    the removed blocks did there. None, and nothing changed, if that is no less than 1. Raises ValueError if it is singular.
    """
    seen: list[Tensor] = []
    inputs = layer.shape[1]
    gram_II = torch.zeros(inputs, inputs)
    cross_OI = torch.zeros(layer.shape)
    held: list[tuple[int, Tensor, Tensor]] = []
    total = sum(step.windows)
    done = 0
    hook = layer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        with step.evaluating():
            for batch, windows in enumerate(step.windows):
                seen.clear()
                x = step.inputs(batch)
                left = step.call(x, batch)
                wanted = through(gone, left, batch)
                number = torch.arange(done, done + windows)
                done += windows
                out = (number % _HELD == _HELD - 1) | ((number == total - 1) & (total < _HELD))
                # OPT's comes as one row of tokens
                a_TI = seen[0].reshape(windows, -1, inputs)[~out].flatten(0, 1).float()
                d_TO = (wanted.float() - left.float())[~out].reshape(-1, layer.shape[0])
                gram_II.addmm_(a_TI.T, a_TI)
                cross_OI.addmm_(d_TO.T, a_TI)
                if out.any():
                    held.append((batch, out, wanted[out]))
    finally:
        hook.remove()
    mean = gram_II.diagonal().mean()
    if not mean > 0:
        # the only window is held out
        return None
    gram_II.diagonal().add_(damping * mean)
    lower_II, failed = torch.linalg.cholesky_ex(gram_II.double())
    if failed:
        raise ValueError(f"the Gram matrix of its inputs is singular at damping {damping:g}; raise --damping")
    change_OI = torch.cholesky_solve(cross_OI.double().T, lower_II).T.float()
    weight_OI = layer.read().clone()
    before = _distance(step, held)
    layer.write((weight_OI.float() + change_OI).to(weight_OI.dtype))
    after = _distance(step, held)
    if not after < before:
        layer.write(weight_OI)
        return None
    return after / before


def through(blocks: Sequence[Block], hidden: Tensor, batch: int) -> Tensor:
    """What blocks, one after another, make of some windows of a batch."""
    for block in blocks:
        hidden = block(hidden, batch)
    return hidden


def _distance(step: Step, held: Sequence[tuple[int, Tensor, Tensor]]) -> float:
    """Squared, of what leaves the block from what is wanted."""
    total = 0.0
    with step.evaluating():
        for batch, out, wanted in held:
            left = step.call(step.inputs(batch), batch)[out]
            total += float((wanted.float() - left.float()).square().sum())
    return total
