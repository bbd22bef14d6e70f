"""Finds out which layers of a block give the inputs of another, so that both can be reordered or cut alike, and checks it.

This is done on a small random instance of the same class and config (miniature.py). The outputs of a block's layers are cut out of
the graph of gradients; what a layer's input channel then has a gradient to are the rows that feed it. Where one row of a layer
feeds one channel, the way the rows lie is looked for among FORMS. A coupling is used only if the small model, reordered by it at
random, gives what it gave before.

T rows, O outputs, I inputs, w width of a head.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.model.batches import Batch
from secateurs.model.blocks import Call, evaluation_mode, inside, whole
from secateurs.model.coupling import FORMS, Coupling
from secateurs.model.discover import Layout, layout_of
from secateurs.model.layers import EXPERTS, Layer, layers_of
from secateurs.model.miniature import inputs, miniature, seeded
from secateurs.model.products import products
from secateurs.model.proof import unequal

# gradients below this share of the largest are rounding
_NOTHING = 1e-5
# channels of a consumer that must be seen to have rows; an activation may be 0 for all inputs
_SEEN = 0.75
# where modules and configs state the width of a head, and configs the number of heads, the first that holds
_WIDTHS = ("v_head_dim", "head_dim", "attention_head_size", "head_size", "attention_head_dim", "d_head", "kv_channels")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True)
class Rule:
    """A coupling of every block of a kind; names are relative to the block, with * for a number.

    producers: (name, form). width: where the width of a head is stated, as in _stated(); None without heads.
    """

    consumer: str
    producers: tuple[tuple[str, str], ...]
    width: str | None = None


@dataclass
class Couplings:
    """The rules of a model. rules: by the names of a block's layers. refused: {consumer: why it has none}."""

    rules: dict[frozenset[str], list[Rule]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def of(self, prefix: str, block: nn.Module, layers: Sequence[Layer], config: Any) -> list[Coupling]:
        """The couplings of a block whose layers are given."""
        named = {layer.name.removeprefix(f"{prefix}."): layer for layer in layers}
        found = []
        for rule in self.rules.get(frozenset(map(pattern_of, named)), ()):
            for name, consumer in named.items():
                if pattern_of(name) != rule.consumer:
                    continue
                width = None
                if rule.width is not None:
                    width = _stated(block, name, config, consumer.shape[1]).get(rule.width)
                    if width is None:
                        continue
                numbers = _numbers(name)
                names = [_numbered(p, numbers) for p, _ in rule.producers]
                if not all(n in named for n in names):
                    continue
                producers = tuple(named[n] for n in names)
                coupling = Coupling(producers, consumer, tuple(form for _, form in rule.producers), width)
                if _fits(coupling):
                    found.append(coupling)
        return found


def _fits(coupling: Coupling) -> bool:
    try:
        copies = [len(coupling.rows(i)) for i in range(len(coupling.producers))]
    except ValueError:
        return False
    return coupling.width is None or set(copies) == {1}


def pattern_of(name: str) -> str:
    """A name with * for its numbers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    found = iter(numbers)
    return re.sub(r"\*", lambda _: next(found), pattern)


def _stated(block: nn.Module, name: str, config: Any, inputs: int) -> dict[str, int]:
    """{where: width of a head}, as the modules that hold a layer and the config's text part state it, if it divides the inputs."""
    found: dict[str, int] = {}
    inside = [(path, module) for path, module in block.named_modules() if not path or name.startswith(f"{path}.")]
    for path, module in reversed(inside):
        found |= {f"{pattern_of(path)}:{n}": getattr(module, n) for n in _WIDTHS if _is_size(module, n)}
    for label, part in ("config", config), ("text config", config.get_text_config()):
        found |= {f"{label}:{n}": getattr(part, n) for n in _WIDTHS if _is_size(part, n)}
        heads = {n: getattr(part, n) for n in _HEADS if _is_size(part, n)}
        found |= {f"{label}:{n}": inputs // h for n, h in heads.items() if inputs % h == 0}
    return {where: width for where, width in found.items() if inputs % width == 0}


def _is_size(thing: Any, name: str) -> bool:
    try:
        value = getattr(thing, name, None)
    # transformers raises an error of its own for a number that is not the same in all blocks
    except Exception:
        return False
    return type(value) is int and value > 0


_KNOWN: "WeakKeyDictionary[nn.Module, Couplings]" = WeakKeyDictionary()


def couplings_of(model: nn.Module) -> Couplings:
    """The couplings of a Hugging Face model, found out once; none where its class makes no small instance."""
    found = _KNOWN.get(model)
    if found is None:
        found = _KNOWN[model] = _find(model)
    return found


@torch.no_grad()
def _find(model: Any) -> Couplings:
    layout = layout_of(model)
    if not layout.lists or not hasattr(getattr(model, "config", None), "model_type"):
        return Couplings()
    try:
        small = miniature(model)
        with evaluation_mode(small):
            batch = inputs(small)[0]
        return find(small, layout, batch)
    # it makes no small instance, or changes in place what gradients need
    except (ValueError, RuntimeError) as error:
        return Couplings(refused={"": str(error)})


def find(small: nn.Module, layout: Layout, batch: Batch) -> Couplings:
    """The couplings of a small model that is in memory."""
    found = Couplings()
    blocks = {name: small.get_submodule(name) for name in inside(small, layout)}
    kinds: dict[frozenset[str], dict[str, list[Layer]]] = {}
    for name, block in blocks.items():
        layers = layers_of(block, name, layout.experts)
        kinds.setdefault(frozenset(pattern_of(y.name.removeprefix(f"{name}.")) for y in layers), {})[name] = layers
    # one block of each kind and of each shape
    chosen: dict[str, list[Layer]] = {}
    for alike in kinds.values():
        shapes: dict[tuple[Any, ...], str] = {}
        for name, layers in alike.items():
            shapes.setdefault(tuple((y.name.removeprefix(name), y.shape) for y in layers), name)
        chosen |= {name: alike[name] for name in shapes.values()}
    with seeded():
        seen, one = _watch(small, chosen, batch), _watch(small, chosen, _first_position(batch))
        for key, alike in kinds.items():
            guesses = [_guesses(n, blocks[n], chosen[n], small, seen[n], one.get(n)) for n in alike if n in seen]
            for consumer in dict.fromkeys(c for guess in guesses for c in guess):
                ways = [guess.get(consumer, []) for guess in guesses if guess]
                rules = [rule for rule in ways[0] if all(rule in way for way in ways)]
                why: str | None = "blocks have it in different ways" if ways[0] else "no form fits"
                for rule in rules:
                    why = _wrong(small, rule, {n: (blocks[n], alike[n]) for n in alike}, batch)
                    if why is None:
                        found.rules.setdefault(key, []).append(rule)
                        break
                if why is not None:
                    found.refused[consumer] = why
    return found


# ----------------------------------------------------------------------------------------------------------- what feeds what


@dataclass
class _Seen:
    """A block's run: the inputs and outputs of its layers by name, and its own inputs; outputs are leaves of the graph."""

    ins: dict[str, list[Tensor]] = field(default_factory=dict)
    outs: dict[str, list[Tensor]] = field(default_factory=dict)
    # views of the leaves that are one expert's rows
    parts: dict[str, list[tuple[Tensor, Callable[[Tensor], Tensor]]]] = field(default_factory=dict)
    own: list[Tensor] = field(default_factory=list)


def _first_position(batch: Batch) -> Batch:
    """The first position of each sequence alone: weights of attention are then 1, and only values count."""
    return {n: x[:, :1] if x.dim() == 2 else x for n, x in batch.items()}


def _watch(small: nn.Module, chosen: Mapping[str, Sequence[Layer]], batch: Batch) -> dict[str, _Seen]:
    """What the blocks' layers are called with; empty if the model does not run on the batch."""
    found = {name: _Seen() for name in chosen}

    def block_hook(seen: _Seen) -> Callable[..., Any]:
        def cut(_: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, call = Call.split(args, kwargs)
            return call.around(_leaf(hidden, seen.own))

        return cut

    def layer_hook(seen: _Seen, layer: Layer) -> Callable[..., Any]:
        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            if args:
                seen.ins.setdefault(layer.name, []).append(args[0])
            return _leaf(output, seen.outs.setdefault(layer.name, []))

        return cut

    with ExitStack() as stack:
        for name, layers in chosen.items():
            handle = small.get_submodule(name).register_forward_pre_hook(block_hook(found[name]), with_kwargs=True)
            stack.callback(handle.remove)
            for layer in layers:
                for place in layer.places:
                    stack.callback(place.register_forward_hook(layer_hook(found[name], layer)).remove)
        try:
            with torch.enable_grad(), _Products(chosen, found):
                whole(small, batch)
        # a model that is given odd inputs may raise anything
        except Exception:
            return {}
    return found


def _leaf(x: Any, leaves: list[Tensor]) -> Any:
    """The tensor as a new leaf of the graph of gradients, which may be changed in place."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        return x
    leaves.append(x.detach().clone().requires_grad_())
    return leaves[-1].clone()


class _Products(TorchFunctionMode):
    """Cuts the outputs of fused experts, and takes their inputs."""

    def __init__(self, chosen: Mapping[str, Sequence[Layer]], found: Mapping[str, _Seen]) -> None:
        super().__init__()
        self.at = {
            layer.read().data_ptr(): (found[name], layer)
            for name, layers in chosen.items()
            for layer in layers
            if layer.kind in EXPERTS
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.at:
            return output
        known = [(p, *self.at[p.place]) for p in products(func, args, kwargs) if p.place in self.at]
        leaves: list[Tensor] = []
        output = _leaf(output, leaves) if known else output
        for product, seen, layer in known:
            seen.ins.setdefault(layer.name, []).append(product.x_TI)
            seen.parts.setdefault(layer.name, []).append((leaves[0], product.of))
        return output


def _guesses(
    prefix: str, block: nn.Module, layers: Sequence[Layer], small: Any, seen: _Seen, one: _Seen | None
) -> dict[str, list[Rule]]:
    """{consumer: rules that fit what was seen}; without layers that read what enters the block."""
    shapes = {y.name: y.shape for y in layers}
    found: dict[str, list[Rule]] = {}
    for layer in layers:
        # layers that are called on one tensor with others are not told apart by it
        feeds = _feeds(layer, seen, shapes)
        if feeds is None:
            continue
        name = layer.name.removeprefix(f"{prefix}.")
        rules = _rules(name, feeds, prefix, [None])
        if not rules:
            widths = _stated(block, name, small.config, layer.shape[1])
            rules = _rules(name, feeds, prefix, widths.items())
            if not rules and one is not None:
                rules = _rules(name, _feeds(layer, one, shapes) or {}, prefix, widths.items())
        consumer = pattern_of(name)
        found[consumer] = [r for r in rules if consumer not in found or r in found[consumer]]
    return found


def _rules(name: str, feeds: Mapping[str, Tensor], prefix: str, widths: Iterable[tuple[str, int] | None]) -> list[Rule]:
    """The rules under which channels have the rows that they were seen to have; without heads, of all layers that feed them."""
    found = []
    for stated in widths:
        producers, width = [], stated[1] if stated else None
        for layer, feed_IO in feeds.items():
            producer = layer.removeprefix(f"{prefix}.")
            form = next((form for form in FORMS if _matches(form, feed_IO, width)), None)
            if form and _numbers(producer) == _numbers(name)[: len(_numbers(producer))]:
                producers.append((pattern_of(producer), form))
            elif width is None:
                return []
        if producers:
            found.append(Rule(pattern_of(name), tuple(producers), stated[0] if stated else None))
    return found


def _matches(form: str, feed_IO: Tensor, width: int | None) -> bool:
    inputs, outputs = feed_IO.shape
    rows = FORMS[form](inputs, outputs, width)
    if rows is None or (width is not None and len(rows) > 1):
        return False
    expected = torch.zeros_like(feed_IO)
    expected[torch.arange(inputs).expand_as(rows), rows] = True
    alike = (feed_IO == expected).all(1)
    return bool((feed_IO <= expected).all()) and float(alike.float().mean()) >= _SEEN


@torch.enable_grad()
def _feeds(layer: Layer, seen: _Seen, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor] | None:
    """{layer: which of its rows feed each input of a layer [I, O]}; None if nothing else than what enters the block does."""
    xs = [x.reshape(-1, x.shape[-1]) for x in seen.ins.get(layer.name, []) if x.requires_grad]
    if not xs or layer.kind == "conv" or any(x.shape[1] != layer.shape[1] for x in xs):
        return None
    named: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]
    named = [(name, leaf, _itself) for name, leaves in seen.outs.items() for leaf in leaves]
    named += [(name, leaf, of) for name, parts in seen.parts.items() for leaf, of in parts]
    leaves = [leaf for _, leaf, _ in named]
    weights = [torch.rand(len(x)) + 0.5 for x in xs]
    found: dict[str, Tensor] = {}
    for channel in range(layer.shape[1]):
        total = torch.stack([(x[:, channel] * w).sum() for x, w in zip(xs, weights, strict=True)]).sum()
        grads = torch.autograd.grad(total, [*seen.own, *leaves], retain_graph=True, allow_unused=True)
        if any(g is not None and bool(g.any()) for g in grads[: len(seen.own)]):
            return None
        for (name, _, of), grad in zip(named, grads[len(seen.own) :], strict=True):
            if grad is None or not bool(grad.any()):
                continue
            outputs = shapes[name][0]
            rows = of(grad).reshape(-1, outputs).abs().amax(0)
            feed_IO = found.setdefault(name, torch.zeros(layer.shape[1], outputs, dtype=torch.bool))
            feed_IO[channel] |= rows > _NOTHING * float(rows.max())
    return {name: feed for name, feed in found.items() if bool(feed.any())} or None


def _itself(x: Tensor) -> Tensor:
    return x


# ------------------------------------------------------------------------------------------------------------------- check


@torch.no_grad()
def _wrong(small: Any, rule: Rule, blocks: Mapping[str, tuple[nn.Module, Sequence[Layer]]], batch: Batch) -> str | None:
    """Why a rule does not hold: the small model, reordered by it, does not give what it gave before. None if it does.

    A coupling that is not seen to matter is not held to be one.
    """
    key = frozenset(pattern_of(y.name.removeprefix(f"{n}.")) for n, (_, layers) in blocks.items() for y in layers)
    rules = Couplings({key: [rule]})
    found = [c for name, (block, layers) in blocks.items() for c in rules.of(name, block, layers, small.config)]
    if not found:
        return "sizes do not fit"
    orders = [_random_order(coupling) for coupling in found]
    before = whole(small, batch)
    for coupling, order_I in zip(found, orders, strict=True):
        coupling.consumer.write(coupling.consumer.read()[:, order_I].clone())
    alone = unequal(whole(small, batch), before)
    for coupling, order_I in zip(found, orders, strict=True):
        coupling.consumer.write(coupling.consumer.read()[:, order_I.argsort()].clone())
        coupling.reorder(order_I)
    together = unequal(whole(small, batch), before)
    for coupling, order_I in zip(found, orders, strict=True):
        coupling.reorder(order_I.argsort())
    if alone is None:
        return "no output changes with the order of its inputs"
    return f"reordered, the model gives another {together}" if together else None


def _random_order(coupling: Coupling) -> Tensor:
    inputs, heads = coupling.consumer.shape[1], coupling.heads
    if heads is None or coupling.width is None:
        return torch.randperm(inputs)
    each = heads[0] // heads[1]
    orders = torch.stack([torch.randperm(coupling.width) for _ in range(heads[1])]).repeat_interleave(each, 0)
    return (orders + torch.arange(heads[0])[:, None] * coupling.width).reshape(-1)
