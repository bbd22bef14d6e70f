"""Tunes the survivors of a block against the dense block's output: masks frozen, dozens of steps of Adam.

The loss is ||block(x) - target||^2 / ||target||^2, token by token. x comes from the pruned blocks before, and the target is what
the dense block makes of the same x. (What the dense model had there is no better: it cannot be known from x, so the
least error is a mean over what it may have been, and blocks that give means are worth less the deeper they lie:
docs/log.md.) Surviving weights, norms and biases move; everything else stands still.
Blockwise fine-tuning with frozen masks: Guo et al. 2024, EBFT, arXiv 2402.12419.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateurs.base.processes import ALONE, Ranks
from secateurs.prune.tuning import Moving, Outcome, loss_scale, tune, unscaled

# Adam's rate, times the size of each tensor's survivors (docs/log.md)
RATE = 8e-3

Place = tuple[int, slice]
"""Windows of a batch."""


def reconstruct(
    moving: Sequence[Moving],
    forward: Callable[[int, slice], Tensor],
    target: Callable[[int, slice], Tensor],
    windows: Sequence[int],
    steps: int,
    rate: float = RATE,
    per_step: int = 1,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Tune a block in place: what of it is `moving` (tuning.movable()), as tune() does.

    forward(batch, part) runs windows `part` of a batch through the block, target gives what should come out;
    windows: how many windows each batch has, of all ranks, each of which is asked for its own. An effort's few dozen steps are
    too few for an early stop; longer tunings have one.
    """
    places = [(b, slice(i, min(i + per_step, n))) for b, n in enumerate(windows) for i in range(0, n, per_step)]
    trained = [m.parameter for m in moving]

    def error(place: Place) -> Tensor:
        return apart(forward(*place), target(*place))

    def apart(found: Tensor, wanted: Tensor) -> Tensor:
        wanted = wanted.float()
        difference = found.float() - wanted
        # the next norm divides by a token's size, so an error counts relative to that: a few tokens are a thousand times as large
        difference = difference * wanted.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
        return difference.square().mean()

    def gradients(place: Place) -> Sequence[Tensor | None]:
        found = forward(*place)
        scale = loss_scale(found.dtype, found.numel())
        loss = apart(found, target(*place)) * scale
        return unscaled(torch.autograd.grad(loss, trained, allow_unused=True), scale)

    return tune(
        moving, lambda place: float(error(place)), gradients, places, steps, rate, seed, tick, ranks=ranks,
        owner=lambda place: ranks.owner(place[0]),
    )  # fmt: skip
