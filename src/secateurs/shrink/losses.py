"""Estimates the loss of removing units, before any is removed: nats a token, on calibration text.

Neurons and heads: OBS on the consumer's Gram matrix, rows weighted by E[g^2], so that half the summed error estimates the loss
(sensitivity.py). Blocks: the measured loss of the model without them, removed greedily. For a model that is no causal language
model, its distance from the dense one (quality/outputs.py) is the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from secateurs.base.precision import widened
from secateurs.model.activations import InMemory
from secateurs.model.batches import Batch, batched
from secateurs.model.blocks import AllLoaded, leave
from secateurs.model.layers import Layer
from secateurs.model.walk import stream
from secateurs.quality import outputs
from secateurs.quality.compare import measure, surprise
from secateurs.quality.outputs import Subject
from secateurs.shrink import columns, experts
from secateurs.shrink.cuts import Cuts
from secateurs.shrink.passes import asking
from secateurs.shrink.units import COLUMNS, COUNTED, Shape, Units

Tick = Callable[[], None]

# the largest share of units that may go
_MOST = 0.75
# groups that OBS removes before it computes costs again, as a fraction of all
_AT_ONCE = 1 / 192
# blocks that are tried again after the first one is removed
_TRIED_AGAIN = 10


@dataclass(frozen=True)
class Losses:
    """Estimated losses of all units.

    curves: {kind: [block][number removed]}, from 0 removed; 'hidden' has one curve for the whole model. blocks: the order in which
    blocks are removed; after: the loss after each. truth: {kind: [[estimate, measured loss], ...]}, rising, of models with all
    blocks cut alike. Curves hold for small changes; estimates of large ones are corrected by interpolation between these points.
    """

    curves: dict[str, list[list[float]]]
    blocks: list[int]
    after: list[float]
    truth: dict[str, list[list[float]]] = field(default_factory=dict)

    def at(self, shape: Shape, dense: Shape) -> float:
        """Estimated loss of a shape: nats a token above the dense model's."""
        return self.of({kind: dense.steps(kind) - shape.steps(kind) for kind in COUNTED}, dense.layers - shape.layers)

    def of(self, kinds: dict[str, int], gone: int) -> float:
        """Estimated loss with `kinds[kind]` removals in every block that is left and `gone` blocks fewer."""
        total = self.after[gone - 1] if gone else 0.0
        for kind, removed in kinds.items():
            if removed:
                # the residual width has one curve, for the whole model
                blocks = self.curves[kind]
                estimate = sum(
                    curve[removed] for i, curve in enumerate(blocks) if len(blocks) == 1 or i not in self.blocks[:gone]
                )
                total += self._true(kind, estimate)
        return total

    def _true(self, kind: str, estimate: float) -> float:
        """An estimate corrected on the lines through 0 and the measured points; beyond the last, in its proportion.

        A larger cut that was measured to lose less than a smaller one counts as losing the same: the difference is noise. Where
        nothing was measured to be lost, the estimate beyond grows as it is.
        """
        below = (0.0, 0.0)
        for at, found in self.truth.get(kind, ()):
            measured = max(found, below[1])
            if estimate <= at:
                share = (estimate - below[0]) / (at - below[0]) if at > below[0] else 1.0
                return below[1] + share * (measured - below[1])
            below = (at, measured)
        return estimate * below[1] / below[0] if below[1] > 0 and below[0] > 0 else estimate - below[0]


def curves(
    model: nn.Module, batches: Sequence[Batch], cuts: Cuts, kinds: Sequence[str], sensitivity: dict[str, Tensor],
    damping: float, tick: Tick,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Losses.curves of a dense model, for some kinds of units. sensitivity: {layer: E[g^2] of its outputs}."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    shape = cuts.shape
    if not kinds:
        return found
    of_columns = [kind for kind in kinds if kind in COLUMNS]
    for step in stream(model, batches, propagate="dense", tick=tick):
        here = [cuts.units(kind, step.block, step.name, shape) for kind in of_columns]
        x_TH = experts.inputs(step, cuts.fused) if "experts" in kinds else None
        # a pass is needed in any case: it makes the next block's inputs
        stats = step.observe([units.consumer for units in here] or step.layers[:1], gram=bool(here))
        for units in here:
            weight_OI = weighted(units, sensitivity.get(units.consumer.name))
            each = len(units.groups_GC) // shape.steps(units.kind)
            seen = stats[units.consumer.name]
            side = columns.Side(weight_OI, seen, units.groups_GC)
            count = each * most(shape.steps(units.kind))
            _, losses = columns.removal([side], count, damping, at_once(len(units.groups_GC)), units.parents_G)
            found[units.kind].append([0.0, *(losses[each - 1 :: each] / (2 * seen.tokens)).tolist()])
        if x_TH is not None:
            count = most_experts(cuts)
            found["experts"].append(
                [0.0, *experts.removal(step.block, cuts.fused, x_TH, sensitivity.get(step.name), count)[1]]
            )
    return found


def most_experts(cuts: Cuts) -> int:
    """How many experts may go: at least as many stay as a token is sent to."""
    return min(most(cuts.shape.experts), cuts.shape.experts - cuts.active)


def most(steps: int) -> int:
    """How many of `steps` units may go."""
    return min(max(1, int(_MOST * steps)), steps - 1)


def at_once(units: int) -> int:
    """How many units OBS may remove at a time where only the loss is wanted."""
    return max(1, round(units * _AT_ONCE))


def weighted(units: Units, sensitivity_O: Tensor | None) -> Tensor:
    """The consumer's weights, each row times the root of its E[g^2] where that is known."""
    weight_OI = units.consumer.read().float()
    return weight_OI if sensitivity_O is None else weight_OI * sensitivity_O.sqrt()[:, None]


def blocks(
    model: nn.Module, windows: Tensor, count: int, tick: Tick, influence: bool = False, subject: Subject | None = None,
    may_keep: Callable[[Sequence[int]], bool] = lambda kept_layers: True,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """The order in which to remove up to `count` blocks, and the loss above the dense model's after each, on windows [N, S].

    subject: as in Job. may_keep: False for blocks that make no model; there may then be fewer in the order.
    Greedy: the block whose removal costs least goes next; after the first, only the cheapest ten are tried again. influence: in
    the order of 1 - mean cos(hidden before, hidden after), without a search (ShortGPT, Men et al. 2024, arXiv 2403.03853).
    """
    batches: list[Batch] = [{"input_ids": windows}]
    store = InMemory()
    steps = list(stream(model, batches, AllLoaded(), store, keep_last=True, keep_all=True))
    total = len(steps)
    count = min(count, total - 1)

    def loss(gone: set[int]) -> float:
        first = min(gone, default=total)
        hidden = store.read(first, 0)
        with steps[0].evaluating():
            for i in range(first, total):
                if i not in gone:
                    hidden = steps[i].call(hidden, 0)
        return end(hidden)

    @torch.no_grad()
    def output(hidden: Tensor) -> Any:
        return leave(model, AllLoaded(), hidden, batches[0])

    wanted = None if subject is None else output(store.read(total, 0))

    def end(hidden: Tensor) -> float:
        if subject is None:
            return surprise(model, AllLoaded(), hidden, batches[0])
        read = outputs.READERS[subject.kind.predicts]
        return outputs.distance(read([wanted, output(hidden)], batches[0], subject), subject)

    def may_go(i: int) -> bool:
        return i not in order and may_keep([k for k in range(total) if k != i and k not in order])

    dense = loss(set())
    order: list[int] = []
    after: list[float] = []
    if influence:
        cosines = [float(cosine_similarity(store.read(i, 0), store.read(i + 1, 0), -1).mean()) for i in range(total)]
        for _ in range(count):
            left = [i for i in range(total) if may_go(i)]
            if not left:
                break
            order.append(max(left, key=lambda i: cosines[i]))
            after.append(loss(set(order)) - dense)
            tick()
        return order, after
    tried = list(range(total))
    for _ in range(count):
        found = {}
        for i in [i for i in tried if may_go(i)] or [i for i in range(total) if may_go(i)]:
            found[i] = loss({*order, i})
            tick()
        if not found:
            break
        best = min(found, key=lambda i: found[i])
        order.append(best)
        after.append(found[best] - dense)
        if len(order) == 1:
            tried = sorted(found, key=lambda i: found[i])[: max(_TRIED_AGAIN, count)]
    return order, after


def taylor(model: nn.Module, windows: Tensor, layers: Sequence[Layer], tick: Tick) -> dict[str, Tensor]:
    """{layer: [N, I]}: W dL/dW summed over outputs, for every window and input. L is the mean loss of a window's next tokens.

    The whole model runs forward and back, a window at a time.
    """
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    with asking(model, [layer.parameter for layer in layers]):
        for ids in windows:
            with torch.enable_grad(), widened():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                loss = nn.functional.cross_entropy(logits.float(), ids[1:])
            gradients = torch.autograd.grad(loss, [layer.parameter for layer in layers])
            for layer, gradient in zip(layers, gradients, strict=True):
                product = layer.parameter.detach().float() * gradient.float()
                found[layer.name].append((product.T if layer.kind == "conv1d" else product).sum(0))
            tick()
    return {name: torch.stack(parts) for name, parts in found.items()}


def tries(total: int, count: int, influence: bool = False) -> int:
    """How often blocks() calls its tick."""
    count = min(count, total - 1)
    if influence:
        return count
    again = min(total, max(_TRIED_AGAIN, count))
    return total + sum(max(0, again - n) for n in range(1, count))


def above(dense: nn.Module, windows: Tensor, subject: Subject | None = None) -> Callable[[nn.Module], float]:
    """A function that gives a model's loss above the dense one's on windows [N, S], 0 or more. subject: as in Job."""
    if subject is None:
        whole = nll(dense, windows)
        return lambda model: max(0.0, nll(model, windows) - whole)

    def apart(model: nn.Module) -> float:
        found = outputs.measure((dense, AllLoaded()), (model, AllLoaded()), batched(windows), subject)
        return outputs.distance(found, subject)

    return apart


def nll(model: nn.Module, windows: Tensor) -> float:
    """A model's loss on windows [N, S], nats a token."""
    found = measure((model, AllLoaded()), None, windows)
    return sum(w.nll_dense for w in found) / sum(w.tokens for w in found)
