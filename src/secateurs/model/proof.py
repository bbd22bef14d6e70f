"""Finds out how a model's blocks run, and proves it: streamed block by block, the model gives what it gives as a whole.

This is done on a small random instance of the same class and config (miniature.py), or on a model that is in memory itself, with
made-up inputs of two lengths, padded and not. Ways of walking are tried from the cheapest on; the first that gives equal outputs is
taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from secateurs.base.errors import CheckpointError, said
from secateurs.model.activations import InMemory
from secateurs.model.batches import Batch
from secateurs.model.blocks import (
    AllLoaded,
    Call,
    Loader,
    entwined,
    evaluation_mode,
    inside,
    leave,
    run,
    whole,
)
from secateurs.model.discover import STEPPED, THROUGH, WHOLE, Form, Layout, assume, fused_in, lists_of
from secateurs.model.miniature import inputs, miniature, unchanged
from secateurs.model.products import products
from secateurs.model.walk import stream

# outputs may differ by so many units of rounding of the largest
_ROUNDING = 64


@torch.no_grad()
def prove(model: Any, blocks: int = 0, kind: str | None = None) -> Layout:
    """The cheapest layout by which a Hugging Face model is walked and gives the outputs of the whole model.

    Of a model that can be walked in no way but as a whole, `why` says what differs. blocks: of the small instance, at least.
    kind: of made-up inputs; None for the first that the model runs on.
    Raises CheckpointError for a model that changes its weights when it runs.
    """
    name = type(model).__name__
    lists = lists_of(model)
    experts: dict[str, str] = {}

    def as_whole(why: str) -> Layout:
        return Layout(tuple(lists), experts, how=WHOLE, why=why)

    if not lists:
        return as_whole(f"{name} has no list of blocks")
    is_skeleton = any(p.is_meta for p in model.parameters())
    try:
        small = miniature(model, blocks) if is_skeleton else model
        with evaluation_mode(small):
            batches = inputs(small, kind)
        with _Fused(small) as fused, unchanged(small):
            seen = _watched(small, lists, batches[0])
    except CheckpointError:
        raise
    # a model that is given odd inputs may raise anything
    except Exception as error:
        return as_whole(f"{name} was not run on made-up inputs: {type(error).__name__}: {said(error)}")
    experts = fused.kinds
    # what is right for a weight is not known before all its uses have run
    if any(entwined(either, inside(either, Layout(tuple(lists)))) for either in (model, small)):
        return as_whole(f"{name}'s blocks share weights")
    try:
        found = _order(seen)
        forms = _forms(seen, found)
    except ValueError as error:
        return as_whole(f"{name}: {error}")
    differs: list[str] = []
    for how in (THROUGH, STEPPED):
        layout = Layout(found, experts, forms, how)
        why = _hands_on_more(seen) if how == THROUGH else None
        why = why or _first_difference(small, layout, batches, is_skeleton)
        if why is None:
            layout = replace(layout, why=differs[0] if differs else None)
            return replace(layout, in_pieces=layout.simple and _same_in_pieces(small, layout, batches[0]))
        differs.append(why)
    return as_whole(f"{name} streamed block by block differs: {differs[-1]}")


class _Lent:
    """A loader that lends a model its own parameters, so that a small instance is walked as a skeleton is."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.blocks = blocks
        self.held = [
            (path, module, name, parameter)
            for path, module in model.named_modules(remove_duplicate=False)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def _lend(self, wanted: Callable[[str], bool]) -> None:
        for path, module, name, parameter in self.held:
            if wanted(path):
                module._parameters[name] = parameter

    def load(self, model: nn.Module, prefix: str) -> None:
        self._lend(lambda path: f"{path}.".startswith(f"{prefix}.") or not prefix)

    def load_outside(self, model: nn.Module) -> None:
        self._lend(lambda path: not any(f"{path}.".startswith(f"{block}.") for block in self.blocks))

    def release(self, model: nn.Module) -> None:
        for _, module, name, parameter in self.held:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


@dataclass(frozen=True)
class _Run:
    """One call of a block: its name, its hidden states, the tensors of its other arguments, and what it returned."""

    name: str
    hidden: Tensor
    others: list[Tensor]
    output: Any


def _watched(model: nn.Module, lists: Sequence[str], batch: Batch) -> list[_Run]:
    """All calls of blocks in one pass of the whole model, in order."""
    found: list[_Run] = []

    def hook(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden, call = Call.split(args, kwargs)
            others = [x for x in tree_flatten((call.args, call.kwargs))[0] if isinstance(x, Tensor)]
            found.append(_Run(name, hidden, others, output))

        return see

    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in inside(model, Layout(tuple(lists)))
    ]
    try:
        with evaluation_mode(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Fused(TorchFunctionMode):
    """Sees which fused parameters are multiplied matrix by matrix, and how these lie in memory: {name: kind of layer}."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kinds: dict[str, str] = {}
        self.at = {
            part.data_ptr(): (path.rpartition(".")[2], tuple(part.shape))
            for path, parameter in fused_in(model).items()
            for part in parameter.detach()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for product in products(func, args, kwargs or {}) if self.at else ():
            name, shape = self.at.get(product.place, ("", None))
            stored = product.shape if product.outputs_first else product.shape[::-1]
            if stored == shape:
                self.kinds[name] = "expert" if product.outputs_first else "expert1d"
        return func(*args, **(kwargs or {}))


def _list_of(name: str) -> str:
    return name.rpartition(".")[0]


def _order(seen: Sequence[_Run]) -> tuple[str, ...]:
    """The lists that were called, in order. Raises ValueError if blocks are called more than once, or out of order."""
    names = [call.name for call in seen]
    if not names:
        raise ValueError("no block is called")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"{twice} is called {names.count(twice)} times in a pass")
    order = tuple(dict.fromkeys(map(_list_of, names)))
    places = [(order.index(_list_of(n)), int(n.rpartition(".")[2])) for n in names]
    late = next((name for name, at, before in zip(names[1:], places[1:], places, strict=False) if at < before), None)
    if late:
        raise ValueError(f"{late} is called after blocks that come later")
    return order


def _forms(seen: Sequence[_Run], lists: Sequence[str]) -> dict[str, Form]:
    return {path: next(Form.of(c.output) for c in seen if _list_of(c.name) == path) for path in lists}


def _hands_on_more(seen: Sequence[_Run]) -> str | None:
    """Why hidden states alone do not make the next block's arguments, or None."""
    for before, after in pairwise(seen):
        if _list_of(before.name) != _list_of(after.name):
            continue
        first, *others = [x for x in tree_flatten(before.output)[0] if isinstance(x, Tensor)]
        if tree_flatten(before.output)[1] != tree_flatten(after.output)[1]:
            return f"{after.name} returns something else than {before.name}"
        if after.hidden is not first:
            return f"{after.name} is not called with the first tensor that {before.name} returns"
        if any(x is y for x in others for y in after.others):
            return f"{after.name} is called with more of what {before.name} returns than hidden states"
    return None


def _first_difference(model: Any, layout: Layout, batches: Sequence[Batch], lent: bool) -> str | None:
    """The first block and the first tensor that are not equal to the whole model's, or None. The model is walked by `layout`.

    lent: walk it as a skeleton whose blocks are loaded one by one.
    """
    assume(model, layout)
    names = inside(model, layout)
    for batch in batches:
        want, store = whole(model, batch), InMemory()
        loader: Loader = _Lent(model, names) if lent else AllLoaded()
        try:
            loader.release(model)
            for _ in stream(model, [batch], loader, store, keep_last=True, keep_all=True):
                pass
            got = leave(model, loader, store.read(len(names), 0), batch, None, store.more(len(names), 0))
        # what a model raises where a block gets other things than it returns
        except Exception as error:
            return f"{type(error).__name__}: {said(error)}"
        finally:
            loader.load(model, "")
        path = unequal(got, want, getattr(model.config, "keys_to_ignore_at_inference", ()))
        if path is None:
            continue
        kind = ", ".join(f"{n} {list(x.shape)}" for n, x in batch.items())
        for call in _watched(model, layout.lists, batch):
            index = names.index(call.name)
            if unequal(store.read(index, 0), call.hidden) is not None:
                return f"hidden states that enter {call.name} ({kind})"
        return f"output {path} ({kind})"
    return None


def _same_in_pieces(model: nn.Module, layout: Layout, batch: Batch) -> bool:
    """Whether what comes after the blocks gives the same for the positions in two pieces."""
    store, count = InMemory(), len(inside(model, layout))
    for _ in stream(model, [batch], AllLoaded(), store, keep_last=True):
        pass
    hidden = store.read(count, 0)
    if hidden.dim() != 3 or "input_ids" not in batch or hidden.shape[:2] != batch["input_ids"].shape:
        return False
    half = hidden.shape[1] // 2
    parts = [slice(0, half), slice(half, hidden.shape[1])]
    try:
        pieces = [_floats(leave(model, AllLoaded(), hidden[:, at], batch, at)) for at in parts]
        wanted = _floats(whole(model, batch))
    except Exception:
        return False
    return all(
        unequal(torch.cat([piece[path] for piece in pieces], 1), x) is None
        for path, x in wanted.items()
        if all(path in piece for piece in pieces)
    )


def _floats(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of numbers of nested mappings and sequences, by its path."""
    # by hand: older versions of transformers register their outputs with torch's pytrees without their keys
    if isinstance(output, Tensor):
        return {path: output} if output.is_floating_point() and output.numel() else {}
    if isinstance(output, Mapping):
        parts = [(f"{path}['{name}']", x) for name, x in output.items()]
    elif isinstance(output, (tuple, list)):
        parts = [(f"{path}[{i}]", x) for i, x in enumerate(output)]
    else:
        return {}
    return {name: tensor for at, x in parts for name, tensor in _floats(x, at).items()}


def unequal(got: Any, want: Any, ignored: Sequence[str] = ()) -> str | None:
    """The path of the first tensor of numbers that differs by more than rounding, or None. ignored: names of what is left out."""
    mine, its = _floats(got), _floats(want)
    for path, x in its.items():
        if any(path.startswith(f"['{name}']") for name in ignored):
            continue
        y = mine.get(path)
        if y is None or y.shape != x.shape:
            return path or "it"
        # what is not finite must be alike, and counts as 0
        alike = torch.equal(torch.isfinite(x), torch.isfinite(y))
        x, y = (z.nan_to_num(0, 0, 0) for z in (x, y))
        bound = _ROUNDING * torch.finfo(x.dtype).eps * float(x.abs().max())
        if not (alike and float((x - y).abs().max()) <= bound):
            return path or "it"
    return None
