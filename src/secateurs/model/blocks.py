"""Finds a model's blocks and runs its parts alone: what comes before the blocks, one block, what comes after them.

The model's own forward is used throughout; the arguments of a block are recorded from it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateurs.base.errors import CheckpointError
from secateurs.base.precision import widened
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.discover import layout_of

# logits made at a time: 256 tokens of a vocabulary of 262,144
_LOGITS = 1 << 26


class Stop(Exception):
    """Raised to leave a forward pass early, once all that is wanted is known."""


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


def blocks_of(model: nn.Module) -> tuple[list[str], tuple[str, ...]]:
    """Names of the model's blocks in order, and of its fused expert parameters.

    A module without a config.model_type is one block, named ''. Raises ValueError for a Hugging Face model without
    a list of blocks.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return [""], ()
    layout = layout_of(model)
    if not layout.lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (an nn.ModuleList of modules that hold matrices)"
        )
    names = [f"{path}.{i}" for path in layout.lists for i in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]
    return names, layout.experts


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
def _replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    # only the instance's forward is replaced, so that loops over blocks still find the attributes they read
    before = {module: module.__dict__.get("forward") for module in modules}
    for module in before:
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
    """The arguments of a block besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, part: slice | None, whole: int) -> "Call":
        """The arguments for some windows of a batch of `whole`: tensors with one entry for each window are cut."""
        if part is None:
            return self
        leaves, spec = tree_flatten((self.args, self.kwargs))
        cut = [x[part] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == whole else x for x in leaves]
        return Call(*tree_unflatten(cut, spec))

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


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def run(model: nn.Module, batch: Batch) -> Any:
    hugging_face = hasattr(getattr(model, "config", None), "model_type")
    return model(**batch, use_cache=False) if hugging_face else model(**batch)


def _enter(model: nn.Module, blocks: list[nn.Module], batch: Batch) -> tuple[Tensor, list[Call]]:
    """Run what comes before the blocks: the hidden states that enter block 0, and the other arguments of each block."""
    entered: list[Tensor] = []
    calls: list[Call] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, rest, named = _hidden(args, kwargs)
        entered.append(hidden)
        calls.append(Call(rest, named))
        if len(calls) == len(blocks):
            raise Stop
        return hidden

    with _replaced_forward(blocks, forward):
        try:
            run(model, batch)
        except Stop:
            return entered[0], calls
    raise CheckpointError(f"the last block of {type(model).__name__} was never called; is its family row right?")


def leave(model: nn.Module, loader: Loader, hidden: Tensor, batch: Batch, at: slice | None = None) -> Any:
    """Run what comes after the blocks (norms, head) on hidden states that left the last one: the model's output.

    at: the positions of the batch to which `hidden` belongs, since norms and heads treat each position alone; None for all.
    Gradients flow to `hidden` if it requires them.
    """
    if at is not None:
        length = shape_of(batch)[1]
        batch = {n: x[:, at] if x.dim() > 1 and x.shape[1] == length else x for n, x in batch.items()}
    names, _ = blocks_of(model)
    blocks = [model.get_submodule(name) for name in names]

    loader.load_outside(model)
    with (
        evaluation_mode(model),
        _replaced_forward(blocks, lambda *_, **__: hidden),
        torch.set_grad_enabled(hidden.requires_grad),
    ):
        return run(model, batch)


def pieces(model: nn.Module, hidden: Tensor) -> list[slice]:
    """Slices of the positions of hidden states [N, S, D], so short that the logits of one are at most _LOGITS numbers.

    All logits of a large vocabulary at once would take more memory than all else.
    """
    words = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    each = max(1, _LOGITS // (words * hidden.shape[0]))
    return [slice(start, start + each) for start in range(0, hidden.shape[1], each)]


def whole(model: nn.Module, batch: Batch) -> Any:
    """The output of a whole model, run in evaluation mode. Gradients flow where they are enabled."""
    grad = torch.is_grad_enabled()
    with evaluation_mode(model), torch.set_grad_enabled(grad):
        return run(model, batch)


def caller(model: nn.Module, batches: Sequence[Batch]) -> Callable[..., Tensor]:
    """A function (index, hidden, batch, block=None, part=None) that runs block `index` of a live model, or `block` in its place.

    hidden: hidden states of the batch's windows, or of `part` of them. The other arguments are those that the model gives to
    that place now, so it also works after blocks were removed.
    """
    names, _ = blocks_of(model)
    blocks = [model.get_submodule(name) for name in names]
    calls = enter_all(model, blocks, batches, AllLoaded(), [])

    def call(index: int, hidden: Tensor, batch: int, block: nn.Module | None = None, part: slice | None = None) -> Any:
        return called(blocks[index] if block is None else block, calls[batch][index], hidden, batches[batch], part)

    return call


def called(block: nn.Module, call: Call, hidden: Tensor, batch: Batch, part: slice | None = None) -> Any:
    """Run a block on hidden states of a batch, with recorded arguments. part: the windows they are of; None for all."""
    arguments = call.of(part, shape_of(batch)[0])
    return first(block(hidden, *arguments.args, **arguments.kwargs))


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def shape_of(batch: Batch) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)


def enter_all(
    model: nn.Module, blocks: list[nn.Module], batches: Sequence[Batch], loader: Loader, stores: Sequence[Activations]
) -> list[list[Call]]:
    """The arguments of all blocks besides hidden states, by batch; the inputs of block 0 go to the stores.

    Batches whose arguments are the same share them, so masks and rotary tables are held once unless they go by the tokens.
    """
    found: list[list[Call]] = []
    if not batches:
        return found
    first_of: dict[tuple[int, ...], list[Call]] = {}
    loader.load_outside(model)
    with evaluation_mode(model):
        for i, batch in enumerate(batches):
            hidden, calls = _enter(model, blocks, batch)
            known = first_of.setdefault(shape_of(batch), calls)
            alike = all(mine.same(other) for mine, other in zip(calls, known, strict=True))
            found.append(known if alike else calls)
            for store in stores:
                store.write(0, i, hidden)
    loader.release(model)
    return found
