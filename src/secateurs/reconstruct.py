"""Tune what pruning left of a block against the dense block's output: masks frozen, a few dozen steps of Adam.

The loss is ||block(x) - target||^2 / ||target||^2, token by token. x comes from the pruned blocks before, and the target is what
the dense block makes of the same x. (What the dense model had there is no better: it cannot be known from x, so the
least error is a mean over what it may have been, and blocks that give means are worth less the deeper they lie:
docs/log.md.) Surviving weights, norms and biases move; everything else stands still.
A tenth of the windows is held out: the weights with the lowest held-out loss are kept, the given ones if none is lower.
Blockwise fine-tuning with frozen masks: Guo et al. 2024, EBFT, arXiv 2402.12419.

B sequences, S positions, C channels of the hidden state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
# of the steps, in which the learning rate climbs; after that it falls along a cosine to 0
_WARM = 0.1
_HELD_OUT = 0.1
# at most this many looks at the held-out windows, spread over the steps, and no more than one in four steps
_LOOKS = 4
# looks without a lower loss before it stops
_PATIENCE = 2


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before and after, steps taken of those planned."""

    before: float
    after: float
    steps: int

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def reconstruct(
    block: nn.Module,
    pruned: Sequence[nn.Parameter],
    forward: Callable[[nn.Module, int, slice], Tensor],
    target: Callable[[int, slice], Tensor],
    windows: Sequence[int],
    steps: int,
    rate: float,
    per_step: int = 1,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Tune the block in place. Zeros of the `pruned` parameters stay zero; so does everything that is not floating.

    forward(block, batch, part) runs windows `part` of a batch through the block, target gives what should come out;
    windows: how many windows each batch has. Trained are `pruned` and the block's vectors (norms, biases), in fp32
    copies whose products run in the block's dtype. rate: Adam's learning rate, times the root mean square of each tensor.
    Never raises the held-out loss. tick: after every step.
    """
    places = [(b, slice(i, min(i + per_step, n))) for b, n in enumerate(windows) for i in range(0, n, per_step)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator).tolist()
    held = max(1, round(len(places) * _HELD_OUT))
    held_out, training = [places[i] for i in order[:held]], [places[i] for i in order[held:]]
    if not training or steps < 1:
        return Outcome(0.0, 0.0, 0)
    named = {id(p) for p in pruned}
    trained = [p for p in block.parameters() if id(p) in named or (p.dim() == 1 and p.is_floating_point())]
    masters = [p.detach().float().clone() for p in trained]
    masks = [None if p.dim() == 1 else p.detach() != 0 for p in trained]
    scales = [max(float(m[k].square().mean().sqrt() if k is not None and k.any() else m.square().mean().sqrt()), 1e-6)
              for m, k in zip(masters, masks, strict=True)]  # fmt: skip

    def loss_of(place: tuple[int, slice]) -> Tensor:
        wanted = target(*place).float()
        error = forward(block, *place).float() - wanted
        # the next norm divides by a token's size, so an error counts relative to that: a few tokens are a thousand times as large
        error = error * wanted.square().mean(-1, keepdim=True).clamp(min=1e-30).rsqrt()
        return error.square().mean()

    def held_out_loss() -> float:
        with torch.no_grad():
            return sum(float(loss_of(place)) for place in held_out) / held

    before = best = held_out_loss()
    kept = [p.detach().clone() for p in trained]
    moments = [(torch.zeros_like(m), torch.zeros_like(m)) for m in masters]
    look = max(4, math.ceil(steps / _LOOKS))
    worse, step = 0, 0
    asked = [p.requires_grad for p in trained]
    for p in trained:
        p.requires_grad_(True)
    try:
        for step in range(1, steps + 1):
            if (step - 1) % len(training) == 0:
                shuffled = torch.randperm(len(training), generator=generator).tolist()
            with torch.enable_grad():
                loss = loss_of(training[shuffled[(step - 1) % len(training)]])
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            now = rate * min(step / max(1, _WARM * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            for p, g, m, mask, scale, (first, second) in zip(
                trained, gradients, masters, masks, scales, moments, strict=True
            ):
                if g is None:
                    continue
                g = g.float() if mask is None else g.float().mul_(mask)
                first.lerp_(g, 1 - BETAS[0])
                second.lerp_(g.square_(), 1 - BETAS[1])
                size = second.sqrt().div_(math.sqrt(1 - BETAS[1] ** step)).add_(1e-12)
                m.addcdiv_(first, size, value=-now * scale / (1 - BETAS[0] ** step))
                p.detach().copy_(m)
            tick()
            if step % look == 0 or step == steps:
                found = held_out_loss()
                if found < best:
                    best, worse = found, 0
                    kept = [p.detach().clone() for p in trained]
                else:
                    worse += 1
                    if worse == _PATIENCE:
                        break
    finally:
        for p, good, flag in zip(trained, kept, asked, strict=True):
            p.requires_grad_(flag)
            p.detach().copy_(good)
    return Outcome(before, best, step)
