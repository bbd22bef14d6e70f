"""Finds a model's blocks and runs its parts alone: what comes before the blocks, one block, what comes after them.

The model's own forward is used throughout; the arguments of a block are recorded from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.base.errors import CheckpointError
from secateurs.base.precision import widened
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch, text_config
from secateurs.model.discover import THROUGH, WHOLE, Layout, layout_of

# logits made at a time: 256 tokens of a vocabulary of 262,144
LOGITS = 1 << 26


class Stop(Exception):
    """Raised to leave a forward pass early, once all that is wanted is known."""


class HandsOnMore(CheckpointError):
    """Raised where the inputs of blocks cannot be recorded in one pass, which only a layout STEPPED bears."""


class Loader(Protocol):
    """Loads parameters into a skeleton by the prefix of their names, and releases them."""

    def load(self, model: nn.Module, prefix: str) -> None: ...
    def load_outside(self, model: nn.Module) -> None: ...
    def release(self, model: nn.Module) -> None: ...


class AllLoaded:
    """The loader of a live model: does nothing, since all parameters are there."""

    def load(self, model: nn.Module, prefix: str) -> None: ...
    def load_outside(self, model: nn.Module) -> None: ...
    def release(self, model: nn.Module) -> None: ...


def blocks_of(model: nn.Module) -> tuple[list[str], Mapping[str, str]]:
    """Names of the model's blocks in the order of its lists, and {name of a fused expert parameter: kind of its layers}.

    A model that is walked as a whole (discover.py) is one block, named ''.
    """
    layout = layout_of(model)
    if layout.how == WHOLE:
        return [""], layout.experts
    return inside(model, layout), layout.experts


def inside(model: nn.Module, layout: Layout) -> list[str]:
    """Names of the blocks of all lists, whether the model is walked block by block or not."""
    lists: Any = [(path, model.get_submodule(path)) for path in layout.lists]
    return [f"{path}.{i}" for path, blocks in lists for i in range(len(blocks))]


def prefixes_of(model: nn.Module) -> tuple[str, ...]:
    """What the names of all that lies in the model's blocks begin with, however it is walked; '' if it has no lists of blocks."""
    return tuple(f"{name}." for name in inside(model, layout_of(model))) or ("",)


def device_of(model: nn.Module) -> torch.device:
    """Where a live model's parameters are; the CPU for a skeleton, which is loaded there."""
    found = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(found, torch.device("cpu"))


def entwined(model: nn.Module, names: Sequence[str]) -> bool:
    """True if two blocks hold one parameter: what is right for one of them is then not known before all have run."""
    owner: dict[int, int] = {}
    pairs = ((i, id(p)) for i, name in enumerate(names) for p in model.get_submodule(name).parameters())
    return any(owner.setdefault(parameter, i) != i for i, parameter in pairs)


@contextmanager
def _replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    # only the instance's forward is replaced, so that loops over blocks still find the attributes they read
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            # the library accelerate replaces the instance's forward as well, to move inputs to a block's device
            if own is not None:
                module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context with model.eval(); after it each module trains as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context without gradients and dropout, with products in compute_dtype(), and experts and attention run step by step."""
    eager = getattr(model, "set_experts_implementation", None)
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if eager and before not in (None, "eager"):
        # fused kernels do not show which expert saw which token
        eager("eager")
    # nor does the fused kernel of nn.TransformerEncoderLayer call the layers in it
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad(), widened():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if eager and before not in (None, "eager"):
            eager(before)


@dataclass
class Call:
    """The arguments of a block besides its hidden states, which go to `place`: a position, or a name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str = 0

    @staticmethod
    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "Call"]:
        """The hidden states that a block is called with, its first tensor of numbers, and the other arguments."""
        for i, x in enumerate(args):
            if isinstance(x, Tensor) and x.is_floating_point():
                return x, Call((*args[:i], *args[i + 1 :]), kwargs, i)
        named = "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else None
        for name in [named] if named else kwargs:
            x = kwargs[name]
            if isinstance(x, Tensor) and x.is_floating_point():
                return x, Call(args, {n: y for n, y in kwargs.items() if n != name}, name)
        raise CheckpointError("a block is called with no tensor of numbers")

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """What a block returns for hidden states and these arguments."""
        args, kwargs = self.around(hidden)
        return block(*args, **kwargs)

    def around(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments, with these hidden states among them."""
        if isinstance(self.place, str):
            return self.args, {self.place: hidden, **self.kwargs}
        return (*self.args[: self.place], hidden, *self.args[self.place :]), self.kwargs

    def of(self, part: slice | None, whole: int) -> "Call":
        """The arguments for some windows of a batch of `whole`: tensors with one entry for each window are cut."""
        if part is None:
            return self
        leaves, spec = tree_flatten((self.args, self.kwargs))
        cut = [x[part] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == whole else x for x in leaves]
        args, kwargs = tree_unflatten(cut, spec)
        return Call(args, kwargs, self.place)

    def same(self, other: "Call") -> bool:
        """True if both have the same arguments. Objects that are neither tensors nor numbers count by their type."""
        (mine, spec), (its, other_spec) = (
            tree_flatten((self.args, self.kwargs)),
            tree_flatten((other.args, other.kwargs)),
        )
        return spec == other_spec and all(_same(x, y) for x, y in zip(mine, its, strict=True))


def _same(x: object, y: object) -> bool:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    return type(x) is type(y) and (x == y or not isinstance(x, int | float | str))


def run(model: nn.Module, batch: Batch) -> Any:
    hugging_face = hasattr(getattr(model, "config", None), "model_type")
    return model(**batch, use_cache=False) if hugging_face else model(**batch)


Outputs = Mapping[str, Any]
"""What the last block of each list returned for a batch, by the list's path."""


def enter_list(
    model: nn.Module, layout: Layout, path: str, batch: Batch, ends: Outputs
) -> dict[int, tuple[Tensor, Call]]:
    """What each block of a list is called with, by its place, if blocks gave on the hidden states that they get.

    ends: of the lists before it. Blocks that are not called are not in it. Raises HandsOnMore where more happens between two blocks
    than handing on, as it does in some models of many blocks only.
    """
    found: dict[int, tuple[Tensor, Call]] = {}
    blocks: Any = model.get_submodule(path)

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            if found and hidden is not next(reversed(found.values()))[0]:
                raise HandsOnMore(f"{path}.{index} is not called with what the block before it returns")
            found[index] = hidden, call
            if index == len(blocks) - 1:
                raise Stop
            return layout.forms[path].around(hidden)

        return forward

    _until_stopped(model, layout, path, batch, ends, {block: recorder(i) for i, block in enumerate(blocks)})
    return found


def enter_block(
    model: nn.Module, layout: Layout, path: str, index: int, batch: Batch, before: Any, ends: Outputs
) -> tuple[Tensor, Call] | None:
    """What block `index` of a list is called with, or None if it is not. before: what the last block called returned."""
    found: list[tuple[Tensor, Call]] = []
    blocks: Any = model.get_submodule(path)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append(Call.split(args, kwargs))
        raise Stop

    forwards = {
        block: forward if i == index else _given(before) if i < index else _stop for i, block in enumerate(blocks)
    }
    _until_stopped(model, layout, path, batch, ends, forwards)
    return found[0] if found else None


def _until_stopped(
    model: nn.Module,
    layout: Layout,
    path: str,
    batch: Batch,
    ends: Outputs,
    forwards: Mapping[nn.Module, Callable[..., Any]],
) -> None:
    """Run a model whose blocks are replaced: in the list at `path` by `forwards`, in those before it by their ends."""
    every = dict(forwards)
    for other in layout.lists:
        if other != path:
            every |= {b: _given(ends[other]) if other in ends else _stop for b in model.get_submodule(other).children()}
    with _replaced_forward(every), suppress(Stop):
        run(model, batch)


def _given(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _stop(*_: Any, **__: Any) -> Any:
    raise Stop


def leave(
    model: nn.Module,
    loader: Loader,
    hidden: Tensor,
    batch: Batch,
    at: slice | None = None,
    more: Sequence[Any] = (),
) -> Any:
    """Run what comes after the blocks (norms, head) on hidden states that left the last one: the model's output.

    at: the positions of the batch to which `hidden` belongs, where layout.in_pieces; None for all. more: of a model that is not
    layout.simple, all that its lists returned, as walk.stream() stores it. Gradients flow to `hidden` if it requires them.
    """
    if at is not None:
        length = shape_of(batch)[1]
        batch = {n: x[:, at] if x.dim() > 1 and x.shape[1] == length else x for n, x in batch.items()}
    layout = layout_of(model)
    ends = {layout.lists[0]: layout.forms[layout.lists[0]].around(hidden)} if not more else ends_from(layout, more)
    forwards = {b: _given(ends[path]) for path in layout.lists for b in model.get_submodule(path).children()}

    loader.load_outside(model)
    with evaluation_mode(model), _replaced_forward(forwards), torch.set_grad_enabled(hidden.requires_grad):
        return run(model, batch)


def ends_from(layout: Layout, more: Sequence[Any]) -> dict[str, Any]:
    """What the lists returned: from all their leaves in order, or from the hidden states alone."""
    if layout.how == THROUGH:
        return {path: layout.forms[path].around(hidden) for path, hidden in zip(layout.lists, more, strict=True)}
    found, rest = {}, list(more)
    for path in layout.lists:
        spec = layout.forms[path].spec
        found[path], rest = tree_unflatten(rest[: spec.num_leaves], spec), rest[spec.num_leaves :]
    return found


def pieces(model: nn.Module, batch: Batch) -> list[slice]:
    """Slices of the positions of a batch, so short that the logits of one are at most LOGITS numbers.

    All logits of a large vocabulary at once would take more memory than all else. All positions where not layout.in_pieces.
    """
    if not layout_of(model).in_pieces:
        return [slice(0, None)]
    windows, length = shape_of(batch)[:2]
    words = getattr(text_config(getattr(model, "config", None)), "vocab_size", None) or 1
    each = max(1, LOGITS // (words * windows))
    return [slice(start, start + each) for start in range(0, length, each)]


def whole(model: nn.Module, batch: Batch) -> Any:
    """The output of a whole model, run in evaluation mode. Gradients flow where they are enabled."""
    grad = torch.is_grad_enabled()
    with evaluation_mode(model), torch.set_grad_enabled(grad):
        return run(model, batch)


def caller(model: nn.Module, batches: Sequence[Batch], loader: Loader | None = None) -> Callable[..., Tensor]:
    """A function (index, hidden, batch, block=None, part=None) that runs block `index`, or `block` in its place; it must be loaded.

    hidden: hidden states of the batch's windows, or of `part` of them. The other arguments are those that the model gives to
    that place now, so it also works after blocks were removed. Raises CheckpointError for a model that is not layout.simple.
    """
    loader = loader or AllLoaded()
    layout = layout_of(model)
    if not layout.simple:
        raise CheckpointError(
            f"blocks of {type(model).__name__} cannot be called apart: {layout.why or 'it has several lists'}"
        )
    blocks = list(model.get_submodule(layout.lists[0]).children())
    loader.load_outside(model)
    calls = enter_all(model, layout.lists[0], batches, [{}] * len(batches), [])
    loader.release(model)

    def call(index: int, hidden: Tensor, batch: int, block: nn.Module | None = None, part: slice | None = None) -> Any:
        return first(
            called(blocks[index] if block is None else block, calls[batch][index], hidden, batches[batch], part)
        )

    return call


def called(block: nn.Module, call: Call, hidden: Tensor, batch: Batch, part: slice | None = None) -> Any:
    """What a block returns for hidden states of a batch and recorded arguments. part: the windows they are of; None for all."""
    return call.of(part, shape_of(batch)[0]).run(block, hidden)


def first(output: Any) -> Any:
    """The first tensor of what a block or a model returns."""
    return output if isinstance(output, Tensor) else next(x for x in tree_flatten(output)[0] if isinstance(x, Tensor))


def shape_of(batch: Batch) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)


def enter_all(
    model: nn.Module,
    path: str,
    batches: Sequence[Batch],
    ends: Sequence[Outputs],
    stores: Sequence[tuple[Activations, int]],
) -> list[dict[int, Call]]:
    """The arguments of all blocks of a list besides hidden states, by batch and place; the list's inputs go to the stores.

    ends: of the lists before it, by batch. stores: and the block under which a store keeps them. Batches whose arguments are the
    same share them, so masks and rotary tables are held once unless they go by the tokens. What lies outside the blocks must be
    loaded.
    """
    found: list[dict[int, Call]] = []
    layout = layout_of(model)
    first_of: dict[tuple[int, ...], dict[int, Call]] = {}
    with evaluation_mode(model):
        for i, batch in enumerate(batches):
            entered = enter_list(model, layout, path, batch, ends[i])
            if not entered:
                raise CheckpointError(f"no block of {path} in {type(model).__name__} was called")
            calls = {index: call for index, (_, call) in entered.items()}
            found.append(shared(calls, first_of.setdefault(shape_of(batch), calls)))
            hidden, _ = entered[min(entered)]
            for store, block in stores:
                store.write(block, i, hidden)
    return found


def shared(calls: dict[int, Call], known: dict[int, Call]) -> dict[int, Call]:
    """`known` where it holds the same arguments, so that they are in memory once, else `calls`."""
    alike = calls.keys() == known.keys() and all(call.same(known[i]) for i, call in calls.items())
    return known if alike else calls
