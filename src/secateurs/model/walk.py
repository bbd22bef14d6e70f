"""Walks through a model block by block, with the weights of one block in memory.

    for step in stream(model, batches):      # one block is loaded; the Hugging Face module itself is not changed
        stats = step.observe(...)            # statistics of its layers' inputs
        ...edit step.layers in place...      # the next block's inputs come from the edited block

It knows nothing of pruning. Hooks are in watch.py, the storage of weights in layers.py, the model's other parts in parts.py.

T tokens, O outputs, I inputs, B sequences, S positions.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.base.device import memory_bytes
from secateurs.base.errors import CheckpointError, LayerError
from secateurs.base.processes import ALONE, Ranks
from secateurs.matrix.stats import Stats
from secateurs.model.activations import Activations, InMemory
from secateurs.model.batches import Batch
from secateurs.model.blocks import (
    AllLoaded,
    Call,
    HandsOnMore,
    Loader,
    Outputs,
    Stop,
    blocks_of,
    called,
    enter_all,
    enter_block,
    enter_list,
    evaluation_mode,
    first,
    inside,
    run,
    shape_of,
    shared,
)
from secateurs.model.discover import STEPPED, THROUGH, WHOLE, Layout, assume, layout_of
from secateurs.model.layers import EXPERTS, Layer, layers_of
from secateurs.model.sharing import dealt, summed
from secateurs.model.watch import Uncalled, Unlike, Watch, idle

# Gram matrices of experts may take this part of the memory
OF_MEMORY = 4


@dataclass
class Step:
    """One block of a walk: its layers, to be edited in place, and passes over its inputs. windows: how many each batch has.

    Of a walk of several ranks each has its own batches; observe() is of all of them.
    """

    index: int
    count: int
    name: str
    block: nn.Module
    layers: list[Layer]
    windows: list[int]
    ranks: Ranks
    _model: nn.Module = field(repr=False)
    _forward: Callable[[int], Any] = field(repr=False)
    _keep_output: Callable[[int, Any], None] | None = field(default=None, repr=False)
    _tick: Callable[[], None] = field(default=lambda: None, repr=False)
    _call: Callable[..., Any] | None = field(default=None, repr=False)
    _teacher: Activations | None = field(default=None, repr=False)
    _store: Activations | None = field(default=None, repr=False)
    _targets: Activations | None = field(default=None, repr=False)
    _seen: set[int] = field(default_factory=set, repr=False)
    _kept: set[int] = field(default_factory=set, repr=False)
    # {layer: the rank that has its Gram matrix}
    _owner: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def can_tune(self) -> bool:
        """True if this walk stores the dense block's outputs."""
        return self._targets is not None and self._call is not None

    @property
    def can_drift(self) -> bool:
        """True if this walk has the inputs that the dense block would get."""
        return self._teacher is not None and self._call is not None

    @property
    def batches(self) -> int:
        return len(self.windows)

    def owner(self, layer: Layer) -> int:
        """The rank that solves a layer: the one that observe() left its Gram matrix with."""
        if layer.name not in self._owner:
            self._owner = dealt([[other] for other in self.layers], self.ranks.size) | self._owner
        return self._owner[layer.name]

    def mine(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that this rank solves."""
        return [layer for layer in layers if self.owner(layer) == self.ranks.rank]

    def hand_out(self, layers: Sequence[Layer]) -> None:
        """Give all ranks the weights that the layers' owners have written."""
        if self.ranks.size > 1:
            for layer in layers:
                # a copy, because it may lie in memory the other way round
                weight_OI = layer.read().contiguous()
                self.ranks.hand_out(weight_OI, self.owner(layer))
                layer.write(weight_OI)

    def evaluating(self) -> AbstractContextManager[None]:
        """The model in evaluation mode and without gradients, as calls of the block expect it."""
        return evaluation_mode(self._model)

    def call(self, hidden: Tensor, batch: int, part: slice | None = None) -> Tensor:
        """Run the block, as it now is, on the hidden states of a batch's windows, or of `part` of them: what leaves it."""
        assert self._call
        found: Tensor = first(self._call(hidden, batch, part))
        return found

    def inputs(self, batch: int) -> Tensor:
        """The hidden states that enter the block, made by the blocks before it as they were left."""
        assert self._store
        return self._store.read(self.index, batch)

    def see_targets(self) -> None:
        """Store the outputs of the block, which must still be dense; batches that observe() has stored are left out."""
        assert self._targets
        with self.evaluating():
            for batch in range(self.batches):
                if batch not in self._seen:
                    self._targets.write(self.index, batch, first(self._forward(batch)))
                    self._seen.add(batch)

    def targets(self, batch: int) -> Tensor:
        """The dense block's outputs for the inputs that it gets in this walk; needs stream(targets=...)."""
        assert self._targets
        return self._targets.read(self.index, batch)

    def observe(self, layers: Sequence[Layer], gram: bool, drift: bool = False, some: bool = False) -> dict[str, Stats]:
        """Stats of each layer's inputs, by layer name, from one pass over all batches.

        All calls of a layer count. Layers called on the same tensors share one Stats. An expert's Stats hold the tokens routed
        to it, possibly none. drift: also how far the inputs have moved from the dense model's (Stats.drift_II); needs
        stream(teacher=...), leaves experts out. some: the layers are some of the experts, of which no token may reach any. Of
        several ranks each passes over its batches, the sums are over all, and Gram matrices are the owner()'s only.
        The block's outputs are stored for targets() if stream() was given a store for them.

        A layer that is never called, nor its weight multiplied by a function, has none. Raises LayerError if an input is not
        finite.
        """
        if not layers and self._keep_output is None and self._targets is None:
            return {}
        apart: frozenset[str] = frozenset()
        uncalled: frozenset[str] = frozenset()
        # a whole model may call a layer as often as its tokens say
        may_stop = self._keep_output is None and self._targets is None and self._call is not None
        while True:
            watch = Watch(layers, gram, may_stop, apart, uncalled, some)
            try:
                self._look(watch, drift)
                found, owner = summed(watch.finish(), layers, gram, self.ranks)
                self._owner |= owner
                return found
            except Unlike as found:
                apart |= {found.name}
            except Uncalled as found:
                uncalled = frozenset(found.names)

    def observe_in_turn(
        self, layers: Sequence[Layer], gram: bool, drift: bool = False
    ) -> Iterator[tuple[list[Layer], dict[str, Stats]]]:
        """observe() by groups of layers: several where the Gram matrices of all experts would take too much memory.

        First all that are no experts; then experts, each with all of its layers. Solving one of these changes no other's inputs, so
        these groups may be solved as they come, and the first one last. All ranks have the same groups.
        """
        first, *groups = _in_turn(layers, self.ranks) if gram else [list(layers)]
        yield first, self.observe(first, gram, drift)
        worked = not groups
        for group in groups:
            found = self.observe(group, gram, some=True)
            worked = worked or any(stats.tokens for stats in found.values())
            yield group, found
        if not worked:
            raise LayerError(idle(groups[0][0]))

    def _look(self, watch: Watch, drift: bool) -> None:
        weights = {layer.tensor_name: layer.parameter for layer in watch.layers if not layer.parameter.is_inference()}
        before = {name: parameter._version for name, parameter in weights.items()}
        with evaluation_mode(self._model), watch.hooks():
            for batch in range(self.batches):
                if drift:
                    assert self._teacher
                    with watch.looking_at_dense():
                        dense = self.call(self._teacher.read(self.index, batch), batch)
                    self._teacher.write(self.index + 1, batch, dense)
                    self._tick()
                try:
                    output = self._forward(batch)
                    # of several passes the first is of the block as it was given
                    if self._keep_output and batch not in self._kept:
                        self._keep_output(batch, output)
                        self._kept.add(batch)
                    if self._targets and batch not in self._seen:
                        self._targets.write(self.index, batch, first(output))
                        self._seen.add(batch)
                except Stop:
                    pass
                watch.next_batch()
                self._tick()
        changed = [name for name, parameter in weights.items() if parameter._version != before[name]]
        if changed:
            raise LayerError(f"{changed[0]} changes while the model runs, so what is stored is not what is multiplied")


def _in_turn(layers: Sequence[Layer], ranks: Ranks) -> list[list[Layer]]:
    """The groups of observe_in_turn()."""
    rest = [layer for layer in layers if layer.kind not in EXPERTS]
    apart: dict[tuple[int, int], list[Layer]] = {}
    for layer in layers:
        if layer.kind in EXPERTS:
            apart.setdefault((id(layer.module), layer.index), []).append(layer)
    # a Gram matrix and its factor, in fp32
    sizes = {key: sum(8 * layer.shape[1] ** 2 for layer in mine) for key, mine in apart.items()}
    # every rank of a machine has sums of its own, and those of one machine may have less memory than another's
    room, left = ranks.tell(memory_bytes() // ranks.here // OF_MEMORY), 0
    if sum(sizes.values()) <= room:
        return [list(layers)]
    groups = [rest]
    for key, mine in apart.items():
        if sizes[key] > left:
            groups.append([])
            left = room
        groups[-1] += mine
        left -= sizes[key]
    return groups


def stream(
    model: nn.Module,
    batches: Sequence[Batch],
    loader: Loader | None = None,
    store: Activations | None = None,
    start: int = 0,
    propagate: str = "pruned",
    keep_last: bool = False,
    tick: Callable[[], None] = lambda: None,
    teacher: Activations | None = None,
    targets: Activations | None = None,
    keep_all: bool = False,
    backwards: bool = False,
    ranks: Ranks = ALONE,
    only: Collection[int] | None = None,
) -> Iterator[Step]:
    """Yield the model's blocks in order, each with the inputs that the blocks before it give.

    batches: what the model is called with; if empty, blocks are yielded without inputs. store: where the blocks' inputs are
    kept, in memory by default. propagate: 'pruned' makes the next block's inputs by each block as the caller left it, 'dense' by
    the block as it was when observed. start > 0 goes on from the inputs of that block, which `store` holds from an earlier walk:
    a block's inputs are dropped only after the next block was yielded and done, so a caller that notes its place before editing a
    block can always return to it. keep_last also stores what leaves the last block, for leave(). tick is called after every batch
    of every pass. teacher: a second store, for the inputs that the dense blocks would have; observe(drift=True) of every block
    fills it. targets: a store for a block's dense outputs, kept until the next block. keep_all drops no block's inputs; backwards
    then goes through the same blocks from the last to the first. A model that cannot be walked in blocks (layout.how is WHOLE) is
    one block, and has no keep_last. ranks: those that walk together, each with batches of its own. only: the blocks that are
    walked, by their places; what leaves one enters the next of them. teacher, backwards and only need layout.simple. Raises
    CheckpointError otherwise.
    """
    loader = loader or AllLoaded()
    store = store or InMemory()
    layout = layout_of(model)
    names, _ = blocks_of(model)
    whole = layout.how == WHOLE
    if (whole and keep_last) or ((backwards or teacher is not None or only is not None) and not layout.simple):
        why = layout.why or "it has several lists of blocks"
        raise CheckpointError(f"{type(model).__name__} cannot be walked in this way: {why}")
    blocks = [model.get_submodule(name) for name in names]
    walked = sorted(range(len(names)) if only is None else only)
    indices = [index for index in walked if index >= start]
    lists = _Lists(
        model, layout, batches, loader, [] if backwards else [store] if teacher is None else [store, teacher],
        walked[0],
    )  # fmt: skip
    # of a walk that goes on, all blocks may be done
    if batches and layout.how == THROUGH and not backwards and indices:
        try:
            lists.enter(indices[0], store)
        except HandsOnMore as error:
            _walk_otherwise(model, error)
            yield from stream(
                model,
                batches,
                loader,
                store,
                start,
                propagate,
                keep_last,
                tick,
                teacher,
                targets,
                keep_all,
                ranks=ranks,
                only=only,
            )
            return

    # the slots before and after each block's
    before = dict(zip(walked, [walked[0] - 1, *walked], strict=False))
    after = dict(zip(walked, [*walked[1:], len(names)], strict=True))
    for index in reversed(indices) if backwards else indices:
        block = blocks[index]
        if batches and not whole:
            lists.enter(index, store)
        loader.load(model, names[index])
        is_called = ranks.total(whole or not batches or lists.is_called(index)) > 0

        def call(
            hidden: Tensor, batch: int, part: slice | None = None, index: int = index, block: nn.Module = block
        ) -> Any:
            return called(block, lists.calls[batch][index], hidden, batches[batch], part)

        def forward(batch: int, index: int = index, call: Callable[..., Any] = call) -> Any:
            return run(model, batches[batch]) if whole else call(store.read(index, batch), batch)

        def keep_output(batch: int, output: Any, index: int = index) -> None:
            lists.keep(index, batch, output, store, after[index])

        wanted = not whole and not backwards and (keep_last or after[index] < len(names))
        early = keep_output if wanted and is_called and propagate == "dense" else None
        layers = layers_at(model, names[index])
        if not is_called:
            layers = [replace(y, refused=f"{names[index]} is not called on calibration inputs") for y in layers]
        yield Step(
            index, len(names), names[index], block, layers, [shape_of(b)[0] for b in batches], ranks, model, forward, early, tick,
            call if is_called and not whole else None, teacher, store, targets if is_called else None,
        )  # fmt: skip
        if not keep_all and not backwards:
            store.drop(before[index])
        if teacher is not None:
            teacher.drop(index - 1)
        if targets is not None:
            targets.drop(index)
        if wanted and not early:
            with evaluation_mode(model):
                for batch in range(len(batches)):
                    keep_output(batch, forward(batch) if is_called else None)
                    tick()
        loader.release(model)


def settle(model: nn.Module, batches: Sequence[Batch], loader: Loader | None = None) -> Layout:
    """The layout of a model after a look at the real one: some do more between blocks only where they have many.

    batches: one is enough.
    """
    layout = layout_of(model)
    if layout.how == THROUGH and batches:
        loader = loader or AllLoaded()
        loader.load_outside(model)
        try:
            with evaluation_mode(model):
                enter_list(model, layout, layout.lists[0], batches[0], {})
        except HandsOnMore as error:
            _walk_otherwise(model, error)
        loader.release(model)
    return layout_of(model)


def _walk_otherwise(model: nn.Module, error: HandsOnMore) -> None:
    """Let a model have another layout than THROUGH, proved on a small instance of as many blocks."""
    from secateurs.model.proof import prove

    found = prove(model, blocks=len(inside(model, layout_of(model))))
    # a small instance of all blocks may still hide it
    assume(model, found if found.how != THROUGH else replace(found, how=STEPPED, why=str(error), in_pieces=False))


class _Lists:
    """The arguments of the blocks that a walk is at, and what leaves blocks, in slots of its store.

    Slot i holds what enters block i, the slot after the last block what leave() needs, those after it what left each list. stores:
    those that get the inputs of a list. begin: the first block of the walk.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, batches: Sequence[Batch], loader: Loader,
        stores: Sequence[Activations], begin: int,
    ) -> None:  # fmt: skip
        self.model, self.layout, self.batches, self.loader, self.stores = model, layout, batches, loader, stores
        self.begin = begin
        sizes = [(path, len(list(model.get_submodule(path).children()))) for path in layout.lists]
        # {index of a block: its list, and its place there}
        self.at = [(path, i) for path, size in sizes for i in range(size)]
        self.calls: list[dict[int, Call]] = [{} for _ in batches]
        self.entered = ""

    def is_called(self, index: int) -> bool:
        return any(index in calls for calls in self.calls)

    def enter(self, index: int, store: Activations) -> None:
        """Find what block `index` is called with: of a whole list at once, or of this block from what the one before returned."""
        path, place = self.at[index]
        if self.layout.how == THROUGH and path == self.entered:
            return
        self.loader.load_outside(self.model)
        ends = [self._ends(path, batch, store) for batch in range(len(self.batches))]
        if self.layout.how == THROUGH:
            first_block = index - place
            # of a walk that goes on, the store has what enters the block where it goes on
            stores = [(s, index) for s in self.stores] if place == 0 or index == self.begin else []
            found = enter_all(self.model, path, self.batches, ends, stores)
            self.calls = [{first_block + i: call for i, call in calls.items()} for calls in found]
            self.entered = path
        else:
            self._enter_block(index, ends, store)
        self.loader.release(self.model)

    def _enter_block(self, index: int, ends: Sequence[Outputs], store: Activations) -> None:
        path, place = self.at[index]
        spec = self.layout.forms[path].spec
        first_of: dict[tuple[int, ...], dict[int, Call]] = {}
        with evaluation_mode(self.model):
            for i, batch in enumerate(self.batches):
                more = store.more(index, i) if place else []
                before = tree_unflatten(more, spec) if more else None
                found = enter_block(self.model, self.layout, path, place, batch, before, ends[i])
                calls = {} if found is None else {index: found[1]}
                self.calls[i] = shared(calls, first_of.setdefault(shape_of(batch), calls))
                hidden = found[0] if found else store.read(index, i) if place else torch.empty(shape_of(batch)[0], 0)
                store.write(index, i, hidden, more)

    def keep(self, index: int, batch: int, output: Any, store: Activations, to: int) -> None:
        """Store what a block returned for a batch in slot `to`; None of a block that is not called, which changes nothing."""
        path, _ = self.at[index]
        if output is None:
            hidden, more = store.read(index, batch), store.more(index, batch)
        else:
            hidden, more = first(output), tree_flatten(output)[0] if self.layout.how == STEPPED else []
        if to < len(self.at) and self.at[to][0] == path:
            store.write(to, batch, hidden, more)
            return
        if self.layout.simple:
            store.write(to, batch, hidden)
            return
        store.write(self._slot(path), batch, hidden, more)
        if index == len(self.at) - 1:
            every: list[Any] = []
            for other in self.layout.lists:
                slot = self._slot(other)
                every += store.more(slot, batch) if self.layout.how == STEPPED else [store.read(slot, batch)]
            store.write(to, batch, hidden, every)

    def _slot(self, path: str) -> int:
        """The slot of what left a list."""
        return len(self.at) + 1 + self.layout.lists.index(path)

    def _ends(self, path: str, batch: int, store: Activations) -> dict[str, Any]:
        """What the lists before one returned for a batch."""
        found = {}
        for other in self.layout.lists[: self.layout.lists.index(path)]:
            form, slot = self.layout.forms[other], self._slot(other)
            if self.layout.how == STEPPED:
                found[other] = tree_unflatten(store.more(slot, batch), form.spec)
            else:
                found[other] = form.around(store.read(slot, batch))
        return found


def layers_at(model: nn.Module, name: str) -> list[Layer]:
    """The layers of a block of a model, of those that blocks_of() names."""
    layout = layout_of(model)
    layers = layers_of(model.get_submodule(name), name, layout.experts)
    return layers if name or not layout.lists else _within(model, inside(model, layout), layers)


def _within(model: nn.Module, names: Sequence[str], layers: Sequence[Layer]) -> list[Layer]:
    """The layers in blocks of these names; one whose weight something outside of them holds as well is refused."""
    inside = tuple(f"{name}." for name in names)
    named = model.named_parameters(remove_duplicate=False)
    outside = {id(parameter): name for name, parameter in named if not name.startswith(inside)}
    found = [layer for layer in layers if layer.name.startswith(inside)]
    return [
        replace(y, refused=f"{outside[id(y.parameter)]}, outside the blocks, is the same weight")
        if id(y.parameter) in outside
        else y
        for y in found
    ]
