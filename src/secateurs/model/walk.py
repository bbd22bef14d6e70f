"""Walks through a model block by block, with the weights of one block in memory.

    for step in stream(model, batches):      # one block is loaded; the Hugging Face module itself is not changed
        stats = step.observe(...)            # statistics of its layers' inputs
        ...edit step.layers in place...      # the next block's inputs come from the edited block

It knows nothing of pruning. Hooks are in watch.py, the storage of weights in layers.py, the model's other parts in parts.py.

T tokens, O outputs, I inputs, B sequences, S positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from secateurs.base.errors import CheckpointError
from secateurs.matrix.stats import Stats
from secateurs.model.activations import Activations, InMemory
from secateurs.model.batches import Batch
from secateurs.model.blocks import (
    AllLoaded,
    Loader,
    Stop,
    blocks_of,
    called,
    enter_all,
    entwined,
    evaluation_mode,
    first,
    run,
    shape_of,
)
from secateurs.model.layers import Layer, layers_of
from secateurs.model.watch import Unlike, Watch


@dataclass
class Step:
    """One block of a walk: its layers, to be edited in place, and passes over its inputs. windows: how many each batch has."""

    index: int
    count: int
    name: str
    block: nn.Module
    layers: list[Layer]
    windows: list[int]
    _model: nn.Module = field(repr=False)
    _forward: Callable[[int], Tensor] = field(repr=False)
    _keep_output: Callable[[int, Tensor], None] | None = field(default=None, repr=False)
    _tick: Callable[[], None] = field(default=lambda: None, repr=False)
    _call: Callable[..., Tensor] | None = field(default=None, repr=False)
    _teacher: Activations | None = field(default=None, repr=False)
    _store: Activations | None = field(default=None, repr=False)
    _targets: Activations | None = field(default=None, repr=False)
    _seen: set[int] = field(default_factory=set, repr=False)

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

    def evaluating(self) -> AbstractContextManager[None]:
        """The model in evaluation mode and without gradients, as calls of the block expect it."""
        return evaluation_mode(self._model)

    def call(self, hidden: Tensor, batch: int, part: slice | None = None) -> Tensor:
        """Run the block, as it now is, on the hidden states of a batch's windows, or of `part` of them: what leaves it."""
        assert self._call
        return self._call(hidden, batch, part)

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
                    self._targets.write(self.index, batch, self._forward(batch))
                    self._seen.add(batch)

    def targets(self, batch: int) -> Tensor:
        """The dense block's outputs for the inputs that it gets in this walk; needs stream(targets=...)."""
        assert self._targets
        return self._targets.read(self.index, batch)

    def observe(self, layers: Sequence[Layer], gram: bool, drift: bool = False) -> dict[str, Stats]:
        """Stats of each layer's inputs, by layer name, from one pass over all batches.

        All calls of a layer count. Layers called on the same tensors share one Stats. An expert's Stats hold the tokens routed
        to it, possibly none. drift: also how far the inputs have moved from the dense model's (Stats.drift_II); needs
        stream(teacher=...), leaves experts out.
        The block's outputs are stored for targets() if stream() was given a store for them.

        Raises LayerError if an input is not finite or a layer was never called.
        """
        apart: frozenset[str] = frozenset()
        # a whole model may call a layer as often as its tokens say
        may_stop = self._keep_output is None and self._targets is None and self._call is not None
        while True:
            watch = Watch(layers, gram, may_stop, apart)
            try:
                self._look(watch, drift)
                return watch.finish()
            except Unlike as found:
                apart |= {found.name}

    def _look(self, watch: Watch, drift: bool) -> None:
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
                    if self._keep_output:
                        self._keep_output(batch, output)
                    if self._targets:
                        self._targets.write(self.index, batch, output)
                        self._seen.add(batch)
                except Stop:
                    pass
                watch.next_batch()
                self._tick()


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
) -> Iterator[Step]:
    """Yield the model's blocks in order, each with the inputs that the blocks before it give.

    batches: what the model is called with; if empty, blocks are yielded without inputs. store: where the blocks' inputs are
    kept, in memory by default. propagate: 'pruned' makes the next block's inputs by each block as the caller left it, 'dense' by
    the block as it was when observed. start > 0 goes on from the inputs of that block, which `store` holds from an earlier walk:
    a block's inputs are dropped only after the next block was yielded and done, so a caller that notes its place before editing a
    block can always return to it. keep_last also stores what leaves the last block, for leave(). tick is called after every batch
    of every pass. teacher: a second store, for the inputs that the dense blocks would have; observe(drift=True) of every block
    fills it. targets: a store for a block's dense outputs, kept until the next block. keep_all drops no block's inputs; backwards
    then goes through the same blocks from the last to the first. Blocks that share a weight are walked as one, the whole model,
    but with keep_last or backwards, which edit nothing.
    Raises CheckpointError for a model without a family row.
    """
    loader = loader or AllLoaded()
    store = store or InMemory()
    try:
        names, experts = blocks_of(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    inside = names
    if entwined(model, names) and not keep_last and not backwards:
        names = [""]
    blocks = [model.get_submodule(name) for name in names]
    whole = names == [""]
    stores = [] if start or backwards else [store] if teacher is None else [store, teacher]
    calls = [] if whole else enter_all(model, blocks, batches, loader, stores)

    indices = range(start, len(names))
    for index in reversed(indices) if backwards else indices:
        block = blocks[index]
        loader.load(model, names[index])

        def call(
            hidden: Tensor, batch: int, part: slice | None = None, index: int = index, block: nn.Module = block
        ) -> Any:
            return called(block, calls[batch][index], hidden, batches[batch], part)

        def forward(batch: int, index: int = index, call: Callable[..., Any] = call) -> Any:
            return first(run(model, batches[batch])) if whole else call(store.read(index, batch), batch)

        def keep_output(batch: int, hidden: Tensor, index: int = index) -> None:
            store.write(index + 1, batch, hidden)

        wanted = not whole and not backwards and (keep_last or index < len(names) - 1)
        early = keep_output if wanted and propagate == "dense" else None
        layers = layers_of(block, names[index], experts)
        if inside != [""]:
            layers = _within(model, inside, layers)
        yield Step(
            index, len(names), names[index], block, layers, [shape_of(b)[0] for b in batches], model, forward, early, tick,
            None if whole else call, teacher, store, targets,
        )  # fmt: skip
        if not keep_all and not backwards:
            store.drop(index - 1)
        if teacher is not None:
            teacher.drop(index - 1)
        if targets is not None:
            targets.drop(index)
        if wanted and not early:
            with evaluation_mode(model):
                for batch in range(len(batches)):
                    keep_output(batch, forward(batch))
                    tick()
        loader.release(model)


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
