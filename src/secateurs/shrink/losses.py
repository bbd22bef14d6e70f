"""Estimates the loss of removing units, before any is removed: nats a token, on calibration text.

Neurons and heads: OBS on the consumer's Gram matrix, rows weighted by E[g^2], so that half the summed error estimates the loss
(sensitivity.py). Blocks: the measured loss of the model without them, removed greedily. For a model that is no causal language
model, its distance from the dense one (quality/outputs.py) is the loss.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from secateurs.base.files import write_json
from secateurs.base.processes import ALONE, Ranks
from secateurs.model.activations import Activations, InMemory, OnDisk, note_place, read_place
from secateurs.model.batches import Batch, batched
from secateurs.model.blocks import AllLoaded, Loader, blocks_of, leave, pieces
from secateurs.model.layers import Layer
from secateurs.model.walk import Step, stream
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
    blocks cut alike. active: the measured loss if tokens are sent to as few experts as the plan says. Curves hold for small
    changes; estimates of large ones are corrected by interpolation between these points.
    """

    curves: dict[str, list[list[float]]]
    blocks: list[int]
    after: list[float]
    truth: dict[str, list[list[float]]] = field(default_factory=dict)
    active: float = 0.0

    def at(self, shape: Shape, dense: Shape) -> float:
        """Estimated loss of a shape: nats a token above the dense model's."""
        fewer = self.active if shape.active != dense.active else 0.0
        return fewer + self.of(
            {kind: dense.steps(kind) - shape.steps(kind) for kind in COUNTED}, dense.layers - shape.layers
        )

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
    damping: float, tick: Tick, criterion: str = "loss", loader: Loader | None = None, folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, list[list[float]]]:  # fmt: skip
    """Losses.curves of a dense model, for some kinds of units. sensitivity: {layer: E[g^2] of its outputs}.

    criterion: of experts. folder: where hidden states and the curves so far are kept, so that a killed walk goes on; None for in
    memory. ranks: those that walk together, each with batches of its own; all return the same.
    """
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    shape = cuts.shape
    if not kinds:
        return found
    of_columns = [kind for kind in kinds if kind in COLUMNS]
    store: Activations = InMemory() if folder is None else OnDisk(folder, ranks)
    place = None if folder is None else folder / "place.json"
    start = ranks.tell(read_place(place))
    if start:
        assert place
        found = ranks.tell(json.loads(place.read_text())["curves"])
    for step in stream(model, batches, loader, store, start, "dense", tick=tick, ranks=ranks):
        note_place(place, step.index, ranks, curves=found)
        here = [cuts.units(kind, step.block, step.name, shape) for kind in of_columns]
        if "experts" in kinds:
            found["experts"].append(
                experts.curve(step, cuts.fused, sensitivity.get(step.name), criterion, most_experts(cuts))
            )
        # a pass is needed in any case: it makes the next block's inputs
        stats = step.observe([units.consumer for units in here] or step.layers[:1], gram=bool(here))
        mine: dict[str, list[float]] = {}
        for units in (units for units in here if step.mine([units.consumer])):
            weight_OI = weighted(units, sensitivity.get(units.consumer.name))
            each = len(units.groups_GC) // shape.steps(units.kind)
            seen = stats[units.consumer.name]
            side = columns.Side(weight_OI, seen, units.groups_GC)
            count = each * most(shape.steps(units.kind))
            _, losses = columns.removal([side], count, damping, at_once(len(units.groups_GC)), units.parents_G)
            mine[units.kind] = [0.0, *(losses[each - 1 :: each] / (2 * seen.tokens)).tolist()]
        for kind, curve in (item for theirs in ranks.gather(mine) for item in theirs.items()):
            found[kind].append(curve)
    return found


def most_experts(cuts: Cuts) -> int:
    """How many experts may go: at least as many stay as a token is sent to, of every group if they are chosen among groups."""
    number, groups = cuts.shape.experts, cuts.groups
    least = groups * max(2, cuts.shape.active) if groups > 1 else cuts.shape.active
    return min(most(number), number - least) // groups * groups


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
    may_keep: Callable[[Sequence[int]], bool] = lambda kept_layers: True, loader: Loader | None = None,
    folder: Path | None = None, ranks: Ranks = ALONE,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """The order in which to remove up to `count` blocks, and the loss above the dense model's after each, on windows [N, S].

    subject: as in Job. may_keep: False for blocks that make no model; there may then be fewer in the order.
    Greedy: the block whose removal costs least goes next; after the first, only the cheapest ten are tried again. influence: in
    the order of 1 - mean cos(hidden before, hidden after), without a search (ShortGPT, Men et al. 2024, arXiv 2403.03853).
    folder: where hidden states and the order so far are kept, so that a killed search goes on; None for in memory. tick: called for
    every block of a walk; walks() says how many there are. ranks: those that share the sets of a walk.
    """
    # each walks by itself
    store = InMemory() if folder is None else OnDisk(folder / f"trial-{ranks.rank}")
    trial = _Trial(model, windows, loader, store, subject, tick, ranks)
    total = trial.total
    count = min(count, total - 1)
    file = None if folder is None else folder / "order.json"
    order: list[int] = []
    after: list[float] = []

    def may_go(i: int) -> bool:
        return i not in order and may_keep([k for k in range(total) if k != i and k not in order])

    if influence:
        (dense,), cosines = trial.losses([frozenset()])
        sets = []
        for _ in range(count):
            left = [i for i in range(total) if may_go(i)]
            if not left:
                break
            order.append(max(left, key=lambda i: cosines[i]))
            sets.append(frozenset(order))
        (_, *lost), _ = trial.losses([frozenset(), *sets])
        return order, [loss - dense for loss in lost]
    tried = list(range(total))
    known = ranks.tell(json.loads(file.read_text()) if file is not None and file.is_file() else None)
    if known is not None:
        order, after, tried = known["order"], known["after"], known["tried"]
    while len(order) < count:
        going = [i for i in tried if may_go(i)] or [i for i in range(total) if may_go(i)]
        if not going:
            break
        (dense, *found), _ = trial.losses([frozenset(), *(frozenset({*order, i}) for i in going)])
        best = min(range(len(going)), key=lambda k: found[k])
        order.append(going[best])
        after.append(found[best] - dense)
        if len(order) == 1:
            tried = [i for _, i in sorted(zip(found, going, strict=True))][: max(_TRIED_AGAIN, count)]
        if file is not None and ranks.first:
            write_json(file, {"order": order, "after": after, "tried": tried})
    return order, after


def walks(total: int, count: int, influence: bool = False) -> int:
    """How often blocks() walks through a model of `total` blocks."""
    return 2 if influence else min(count, total - 1)


class _Trial:
    """Losses of a model without some of its blocks, for many sets of blocks in one walk, with one block in memory.

    Two sets that agree on all blocks so far have the same hidden states, which are made once.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        loader: Loader | None,
        store: Activations,
        subject: Subject | None,
        tick: Tick,
        ranks: Ranks,
    ) -> None:
        self.model, self.loader, self.store, self.ranks = model, loader or AllLoaded(), store, ranks
        self.batch: Batch = {"input_ids": windows}
        self.subject, self.tick = subject, tick
        self.total = len(blocks_of(model)[0])

    def losses(self, sets: Sequence[frozenset[int]]) -> tuple[list[float], list[float]]:
        """The loss without the blocks of each set, and the mean cosine between what enters and what leaves each dense block.

        The first set must be the empty one. Of a subject the loss is the distance from the dense model. Ranks share the other sets.
        """
        found, cosines = self._losses([sets[0], *self.ranks.share(sets[1:])])
        return [found[0], *self.ranks.merged(found[1:])], cosines

    def _losses(self, sets: Sequence[frozenset[int]]) -> tuple[list[float], list[float]]:
        # the dense states are those of the walk; others have slots of their own behind its slots
        slots: dict[frozenset[int], int] = {}
        cosines: list[float] = []
        entering: Tensor | None = None
        for step in stream(self.model, [self.batch], self.loader, self.store, keep_last=True):
            hidden = step.inputs(0)
            if entering is not None:
                cosines.append(float(cosine_similarity(entering, hidden, -1).mean()))
            entering = hidden
            slots = self._through(step, sets, slots)
            self.tick()
        last = self.store.read(self.total, 0)
        assert entering is not None
        cosines.append(float(cosine_similarity(entering, last, -1).mean()))
        found: list[float] = []
        dense: Any = None
        self.loader.load_outside(self.model)
        for gone in sets:
            hidden = self.store.read(slots[gone], 0) if gone else last
            if self.subject is None:
                found.append(surprise(self.model, self.loader, hidden, self.batch))
                continue
            with torch.no_grad():
                output = leave(self.model, self.loader, hidden, self.batch)
            dense = output if dense is None else dense
            read = outputs.READERS[self.subject.kind.predicts]
            found.append(outputs.distance(read([dense, output], self.batch, self.subject), self.subject))
        self.loader.release(self.model)
        for slot in {*slots.values(), self.total, self.total - 1}:
            self.store.drop(slot)
        return found, cosines

    def _through(
        self, step: Step, sets: Sequence[frozenset[int]], slots: dict[frozenset[int], int]
    ) -> dict[frozenset[int], int]:
        """Take the hidden states of all sets through a block. slots: of the blocks gone so far; returns them with this block."""
        free = (self.total + 1 + n for n in range(2 * len(sets) + 2) if self.total + 1 + n not in slots.values())
        out: dict[frozenset[int], int] = {}
        with step.evaluating():
            for gone in {frozenset(i for i in chosen if i <= step.index) for chosen in sets} - {frozenset()}:
                before = gone - {step.index}
                hidden = self.store.read(slots[before], 0) if before else step.inputs(0)
                out[gone] = next(free)
                self.store.write(out[gone], 0, hidden if step.index in gone else step.call(hidden, 0))
        for slot in slots.values():
            self.store.drop(slot)
        return out


def taylor(
    model: nn.Module, windows: Tensor, consumers: Callable[[Step], Sequence[Layer]], tick: Tick,
    loader: Loader | None = None, store: Activations | None = None, ranks: Ranks = ALONE,
) -> dict[str, Tensor]:  # fmt: skip
    """{layer: [N, I]}: W dL/dW summed over outputs, for every window and input. L is the mean loss of a window's next tokens.

    consumers: says which layers of a block are wanted. Forward block by block and back, a window at a time, as sensitivity() goes.
    tick: called for each window and block forward, for each window at the head, for each window and block backward. ranks: those
    that share the windows; all return the same.
    """
    loader, store = loader or AllLoaded(), store or InMemory()
    batches: list[Batch] = [{"input_ids": ids[None]} for ids in ranks.share(list(windows))]
    last = len(blocks_of(model)[0])
    for _ in stream(model, batches, loader, store, keep_last=True, keep_all=True, tick=tick):
        pass
    gradients = []
    for i, batch in enumerate(batches):
        gradients.append(_of_next_tokens(model, loader, store.read(last, i), batch))
        tick()
    loader.release(model)
    found: dict[str, Tensor] = {}
    for step in stream(model, batches, loader, store, backwards=True):
        layers = consumers(step)
        mine: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        with asking(step.block, [layer.parameter for layer in layers]):
            for i in range(len(batches)):
                hidden = step.inputs(i).detach().requires_grad_(True)
                with step.evaluating(), torch.enable_grad():
                    out = step.call(hidden, i)
                asked = [hidden, *(layer.parameter for layer in layers)]
                gradients[i], *by_layer = torch.autograd.grad(out, asked, gradients[i])
                for layer, gradient in zip(layers, by_layer, strict=True):
                    product = layer.parameter.detach().float() * gradient.float()
                    mine[layer.name].append((product.T if layer.kind == "conv1d" else product).sum(0))
                tick()
        found |= {name: torch.stack(ranks.merged(parts)) for name, parts in mine.items()}
        store.drop(step.index + 1)
    return found


def _of_next_tokens(model: nn.Module, loader: Loader, hidden: Tensor, batch: Batch) -> Tensor:
    """The gradient of the mean loss of a window's next tokens by what left the last block, [1, S, D]."""
    found = torch.zeros_like(hidden)
    labels = batch["input_ids"][0, 1:]
    for at in pieces(model, batch):
        piece = hidden[:, at].detach().requires_grad_(True)
        wanted = labels[at]
        logits = leave(model, loader, piece, batch, at).logits[0, : len(wanted)]
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(logits.float(), wanted, reduction="sum") / len(labels)
        (found[:, at],) = torch.autograd.grad(loss, piece)
    return found


Pair = tuple[nn.Module, Loader]
"""A model, and what loads its blocks."""


def above(
    dense: Pair, windows: Tensor, subject: Subject | None = None, ranks: Ranks = ALONE
) -> Callable[[Pair], float]:
    """A function that gives a model's loss above the dense one's on windows [N, S], 0 or more. subject: as in Job. ranks: those
    that share the windows; all get the same.
    """
    if subject is None:
        whole = nll(dense, windows, ranks)
        return lambda model: max(0.0, nll(model, windows, ranks) - whole)

    def apart(model: Pair) -> float:
        return outputs.distance(outputs.measure(dense, model, batched(windows), subject, ranks=ranks), subject)

    return apart


def nll(model: Pair, windows: Tensor, ranks: Ranks = ALONE) -> float:
    """A model's loss on windows [N, S], nats a token."""
    found = measure(model, None, windows, ranks=ranks)
    return sum(w.nll_dense for w in found) / sum(w.tokens for w in found)
