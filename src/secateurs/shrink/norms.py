"""Statistics of batch norms, measured again on the inputs that a cut module gives them.

A layer that lost channels gives outputs of another mean and variance than those that the norm behind it was trained with.
C channels, P places of all examples of a call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateurs.shrink.outputs import Inputs, Objective

Statistics = dict[str, tuple[Tensor, Tensor]]
"""{batch norm: mean_C and variance_C}."""

# how far statistics may go from the old ones to the new ones
_SHARES = (0.25, 0.5, 1.0)


def norms_of(model: nn.Module) -> dict[str, Any]:
    """{name: batch norm that has running statistics}."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@torch.no_grad()
def measured(model: nn.Module, batches: Sequence[Inputs]) -> Statistics:
    """Mean and unbiased variance over all batches of what reaches each batch norm. The module is left as it was.

    One pass in evaluation mode, so without dropout: on the way a norm uses the statistics of the batch at hand, so that those
    behind it see normalized inputs.
    """
    norms = norms_of(model)
    sums: dict[str, list[Any]] = {}
    before = {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}

    def watch(name: str) -> Callable[..., None]:
        def seen(norm: Any, args: tuple[Tensor, ...]) -> None:
            x_CP = args[0].detach().double().movedim(1, 0).flatten(1)
            if x_CP.shape[1] < 2:
                return
            total = sums.setdefault(name, [0, 0.0, 0.0])
            for i, part in enumerate((x_CP.shape[1], x_CP.sum(1), x_CP.square().sum(1))):
                total[i] = total[i] + part
            old = before[name][0]
            norm.running_mean, norm.running_var = x_CP.mean(1).to(old), x_CP.var(1).to(old)

        return seen

    hooks = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    try:
        for batch in batches:
            model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
        for name, (mean_C, variance_C) in before.items():
            norms[name].running_mean, norms[name].running_var = mean_C, variance_C
    found = {}
    for name, (count, sum_C, square_C) in sums.items():
        mean_C = sum_C / count
        found[name] = (mean_C, (square_C - count * mean_C.square()) / (count - 1))
    return found


@contextmanager
def _moved(model: nn.Module, new: Statistics, share: float) -> Iterator[Callable[[], None]]:
    """Batch norms with statistics that are `share` of the way to the new ones. Yields what keeps them; otherwise they go back."""
    norms = norms_of(model)
    before = {name: (norms[name].running_mean.clone(), norms[name].running_var.clone()) for name in new}
    for name, both in new.items():
        for old_C, new_C in zip((norms[name].running_mean, norms[name].running_var), both, strict=True):
            old_C.copy_(torch.lerp(old_C.double(), new_C, share))
    try:
        yield before.clear
    finally:
        for name, (mean_C, variance_C) in before.items():
            norms[name].running_mean.copy_(mean_C)
            norms[name].running_var.copy_(variance_C)


@torch.no_grad()
def recalibrate(model: nn.Module, dense: nn.Module, used: Objective, held: Objective | None) -> dict[str, Any]:
    """Move a cut module's batch norms towards statistics measured on `used`, as far as that lowers the error on `held`.

    Returns what was done. Shares of the way that are tried: 0.25, 0.5 and 1. share 0: they stay as they were.
    """
    count = len(norms_of(model))
    if not count:
        return {"count": 0}
    if held is None:
        return {"count": count, "share": 0.0, "why": "too few examples to hold some out"}
    new = measured(model, used.batches)
    errors = {0.0: held.error(model, dense)}
    for share in _SHARES:
        with _moved(model, new, share):
            errors[share] = held.error(model, dense)
    # a NaN is no lower error
    best = min(errors, key=lambda share: (not errors[share] <= errors[0.0], errors[share]))
    with _moved(model, new, best) as keep:
        keep()
    return {
        "count": count, "share": best, "held_out": held.examples,
        "error": {"before": errors[0.0], "after": errors[best]},
    }  # fmt: skip
