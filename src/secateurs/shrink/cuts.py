"""Finds out what can be cut of a model, and which fields of its config say so, by trying on a small random instance.

Half of the instance's units are cut, and what is left is loaded into the class as it is made from a config with other numbers. If
that model gives what the instance gives with those units at zero, the units can go and the fields state it; else units of that kind
are refused with the reason. Which rows of a block belong to a head is seen from gradients: with the columns that read a head at
zero, its rows have none.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from secateurs.base.errors import PlanError, said
from secateurs.base.progress import quiet
from secateurs.matrix.solvers import DAMPING
from secateurs.model.batches import batched, embeddings_of, text_config
from secateurs.model.blocks import inside
from secateurs.model.coupling import Coupling
from secateurs.model.couplings import couplings_of
from secateurs.model.discover import assume, layout_of
from secateurs.model.layers import EXPERTS, Layer, layers_of
from secateurs.model.miniature import empty
from secateurs.shrink import config as stating
from secateurs.shrink import mixture, width
from secateurs.shrink.instance import Instance
from secateurs.shrink.mixture import Mixture, Otherwise
from secateurs.shrink.units import KINDS, USUAL, Neurons, No, Shape, Units
from secateurs.shrink.width import Stream

# fields that state how many experts a token is sent to
ACTIVE = re.compile(r"experts_per_tok|selected_experts|moe_top_?k|moe_k$|top_?k_experts|experts_top_?k|^top_k$")
# fields that state heads, but for those with sizes in their names; the width of an MLP, often; the number of blocks, often
_HEADS, _WIDTH = re.compile("head"), re.compile("dim|size|rank|channels")
_INNER, _DEPTH = re.compile("inner|intermediate|ffn|ff_|mlp"), re.compile("layer|depth|block")


@dataclass(frozen=True)
class _Way:
    """How units of a kind go. fields: {what they state, a key of Cuts.numbers(): their names}. rule: where units are in a block."""

    fields: Mapping[str, Sequence[str]]
    rule: Any = None


@dataclass(frozen=True)
class _Heads:
    """An attention that all blocks have: the layer that reads its heads, and their numbers."""

    consumer: str
    all: int
    groups: int
    width: int


class Cuts:
    """What can be cut of a model. A kind of units is tried when it is first asked for.

    path: of the list of blocks. shape: the model's. head: the width of a head. fused: {name of fused expert parameters: kind}.
    mixtures: the blocks that have experts. groups: as of Mixture. sums_experts: whether a mixture is the weighted sum of what each
    expert gives, known once refuses('experts') was asked.
    """

    def __init__(self, model: Any) -> None:
        """Raises PlanError for a model whose blocks are not one list that is walked from the first to the last."""
        layout = layout_of(model)
        if not layout.simple:
            why = layout.why or f"its blocks are in {len(layout.lists)} lists ({', '.join(layout.lists)})"
            raise PlanError(f"{type(model).__name__} cannot be shrunk: {why}")
        self.config: Any = model.config
        self.cls: Any = type(model)
        self._layout = layout
        self.path, self.fused = layout.lists[0], layout.experts
        self.names = inside(model, layout)
        self.couplings = couplings_of(model)
        blocks = [model.get_submodule(name) for name in self.names]
        self.mixtures = [n for n, b in zip(self.names, blocks, strict=True) if mixture.number(b, self.fused)]
        self._alike = len({sum(p.numel() for p in block.parameters()) for block in blocks}) == 1
        self.neurons, self.attention = self._coupled(model)
        self.shape = self._shape_of(model)
        heads = self.attention
        self.head = heads.width if heads else _stated_head(text_config(self.config))
        self._known: dict[str, _Way | str] = {}
        self.groups, self.sums_experts = 1, False
        with suppress(ValueError):
            self.groups = Mixture(model.get_submodule([*self.mixtures, *self.names][0]), self.fused).groups

    # ------------------------------------------------------------------------------------------------------- what there is

    def layers(self, block: nn.Module, name: str) -> dict[str, Layer]:
        """The layers of a block, by their names in it."""
        found = layers_of(block, name, self.fused)
        return {layer.name.removeprefix(f"{name}."): layer for layer in found}

    def units(self, kind: str, block: nn.Module, name: str, shape: Shape) -> Units:
        """The units of a kind (of COLUMNS) of a block of this shape. Ask refuses() first."""
        rule = self._way(kind).rule
        found: Units = rule.units(kind, self.layers(block, name), shape)
        return found

    @property
    def last(self) -> str | None:
        """The layer of a block that reads its MLP's neurons, the last to add to the residual stream; None if there is none."""
        return self.neurons.consumer if self.neurons else None

    @property
    def stream(self) -> Stream:
        """Who reads and writes the residual stream. Ask refuses('hidden') first."""
        found: Stream = self._way("hidden").rule
        return found

    def _coupled(self, model: nn.Module) -> tuple[Neurons | None, _Heads | None]:
        """The MLP and the attention that all blocks have alike; the widest if there are several."""
        mlps: dict[Neurons, int] = {}
        attentions: dict[_Heads, int] = {}
        for at, name in enumerate(self.names):
            block = model.get_submodule(name)
            found = self.couplings.of(name, block, list(self.layers(block, name).values()), self.config)
            mine = [y for y in found if y.consumer.kind not in EXPERTS]
            here = {_neurons(y, name): y.consumer.shape[1] for y in mine if y.width is None}
            heads = {_heads(y, name): y.consumer.shape[1] for y in mine if y.width is not None}
            mlps = here if at == 0 else {k: v for k, v in mlps.items() if here.get(k) == v}
            attentions = heads if at == 0 else {k: v for k, v in attentions.items() if heads.get(k) == v}
        return max(mlps, key=lambda k: mlps[k], default=None), max(
            attentions, key=lambda k: attentions[k], default=None
        )

    def _shape_of(self, model: Any) -> Shape:
        text = text_config(self.config)
        layers = self.layers(model.get_submodule(self.names[0]), self.names[0])
        mlp = layers[self.neurons.consumer].shape[1] if self.neurons else _stated(text, "intermediate_size")
        found = self.attention
        heads = found.groups if found else _stated(text, "num_attention_heads")
        queries = found.all // found.groups if found else 1
        number = max(mixture.number(model.get_submodule(name), self.fused) for name in self.names)
        stated = (x for n, x in stating.flat(text) if ACTIVE.search(n) and type(x) is int)
        active = next(stated, number) if number else 0
        hidden = _stated(text, "hidden_size", embeddings_of(model).shape[1])
        return Shape(len(self.names), mlp, heads, queries, number, hidden, active)

    # ------------------------------------------------------------------------------------------------------- what can go

    def refuses(self, kind: str) -> str | None:
        """The reason why units of a kind cannot be removed, or None."""
        if kind not in self._known:
            try:
                self._known[kind] = getattr(self, f"_{kind}")()
            except No as why:
                self._known[kind] = str(why)
            # code that does not run at another size than it was made for
            except RuntimeError as error:
                self._known[kind] = f"its small instance cannot be cut: {stating.sentence(error)}"
        found = self._known[kind]
        return found if isinstance(found, str) else None

    def usual(self) -> tuple[tuple[str, ...], list[str]]:
        """The kinds of USUAL that can go, and a sentence for each that cannot. Raises PlanError where none can."""
        stay = {kind: why for kind in USUAL if (why := self.refuses(kind))}
        if len(stay) == len(USUAL):
            others = [kind for kind in KINDS if kind not in USUAL and not self.refuses(kind)]
            said = "; ".join(f"{kind}: {why}" for kind, why in stay.items())
            raise PlanError(
                f"nothing of {', '.join(USUAL)} can go: {said}; --units can name {', '.join(others) or 'no other'}"
            )
        return tuple(k for k in USUAL if k not in stay), [f"units {kind} stay: {why}" for kind, why in stay.items()]

    def _way(self, kind: str) -> _Way:
        if why := self.refuses(kind):
            raise PlanError(f"units {kind}: {why}")
        found = self._known[kind]
        assert isinstance(found, _Way)
        return found

    @cached_property
    def small(self) -> Instance:
        """The instance on which cuts are tried. Raises No if there is none."""
        return Instance.of(self.cls, self.config, self.path, self.fused, self.couplings)

    def _mlp(self) -> _Way:
        if self.neurons is None:
            why = (
                "are experts, whose neurons are not cut"
                if self.shape.experts
                else "are not alike, or not known to be coupled"
            )
            raise No(f"the MLPs of this {self.config.model_type}'s blocks {why}")
        small = self.small
        number = small.layers(0)[self.neurons.consumer].shape[1]
        gone = torch.arange(number // 2)
        expected, smaller = small.without("mlp", self.neurons, Shape(0, number, 1), gone)
        # what is not stated has a default in the class
        empty = [n for n in stating.fields_with(small.config, None) if _INNER.search(n)]
        names = [*sorted(stating.fields_with(small.config, number), key=lambda n: not _INNER.search(n)), *empty]
        tries = [{"mlp": (name,)} for name in names]
        return _Way(
            small.first(tries, {"mlp": number - len(gone)}, smaller, expected, "the width of its MLPs"), self.neurons
        )

    def _heads(self) -> _Way:
        return self._of_heads("heads")

    def _queries(self) -> _Way:
        if self.attention and self.shape.queries == 1:
            raise No(f"every KV head of this {self.config.model_type} has one query head")
        return self._of_heads("queries")

    def _of_heads(self, kind: str) -> _Way:
        model_type = self.config.model_type
        if self.attention is None:
            raise No(f"the attention of this {model_type}'s blocks is not alike, or not known to be coupled")
        if kind == "heads" and self.shape.heads == 1:
            raise No(f"this {model_type} has one KV head")
        small = self.small
        coupling = small.coupling(self.attention.consumer)
        assert coupling.heads
        assert coupling.width
        total, groups = coupling.heads
        queries = total // groups
        if (queries == 1) != (self.shape.queries == 1):
            raise No(f"no small instance of this {model_type} has such heads")
        rule = small.rows_of_heads(self.attention.consumer, total, groups, kind)
        shape = Shape(0, 1, groups, queries)
        if kind == "heads":
            gone, left = torch.arange(groups // 2), (groups - groups // 2, queries)
        else:
            gone = torch.cat([torch.arange(queries // 2) + g * queries for g in range(groups)])
            left = (groups, queries - queries // 2)
        expected, smaller = small.without(kind, rule, shape, gone)
        of_all, of_groups = ([n for n in stating.fields_with(small.config, x) if _is_heads(n)] for x in (total, groups))
        tries = []
        # the parts of a config, its vision tower say, may have as many heads
        for part in dict.fromkeys(map(_part, of_all)):
            here, there = ([n for n in names if _part(n) == part] for names in (of_all, of_groups))
            tries += [
                {"all heads": a, "heads": g, "head": w}
                for w, a, g in product([(f"{part}head_dim",), ()], _some(here), [*_some(there), ()])
            ]
        numbers = {"all heads": left[0] * left[1], "heads": left[0], "head": coupling.width}
        return _Way(small.first(tries, numbers, smaller, expected, "fewer heads of the same width"), rule)

    def _layers(self) -> _Way:
        if not self._alike:
            raise No(f"the blocks of this {self.config.model_type} are not alike")
        small = self.small
        total = len(small.names)
        names = sorted(stating.fields_with(small.config, total), key=lambda n: not _DEPTH.search(n))
        why = "nothing in its config states the number of blocks"
        for name in names:
            try:
                tries = [[i for i in range(total) if i != gone] for gone in range(total)]
                for kept in [kept for kept in tries if _states(small.config, (name,), kept)] or tries:
                    smaller = copy.deepcopy(small.model)
                    expected = small.shortened(smaller, self.path, kept, name)
                    small.check({name: total - 1}, smaller, expected, kept)
                return _Way({"layers": (name,)})
            except No as reason:
                why = str(reason)
        raise No(f"blocks cannot go: {why}")

    def _experts(self) -> _Way:
        if not self.fused:
            raise No(f"this {self.config.model_type} has no experts in fused parameters")
        small = self.small
        masked, smaller = copy.deepcopy(small.model), copy.deepcopy(small.model)
        try:
            hidden, cut = self._mixtures(masked), self._mixtures(smaller)
            with suppress(Otherwise):
                hidden[0].is_sum_of_experts()
                self.sums_experts = True
            number, each = cut[0].number, cut[0].number // cut[0].groups
            # as many of every group of experts, the first ones
            gone = [e for e in range(number) if e % each < each // 2]
            if any(m.number != number for m in cut):
                raise No("its blocks have unequal numbers of experts")
            for found in cut:
                found.cut(gone)
            with mixture.never(hidden, gone):
                expected = small.outputs(masked)
        except ValueError as error:
            raise No(str(error)) from None
        tries = [{"experts": (name,)} for name in stating.fields_with(small.config, number)]
        return _Way(small.first(tries, {"experts": number - len(gone)}, smaller, expected, "the number of experts"))

    def _active(self) -> _Way:
        if self.shape.active < 2:
            raise No(f"this {self.config.model_type} sends a token to {self.shape.active or 'no'} expert")
        small = self.small
        fewer, other = copy.deepcopy(small.model), copy.deepcopy(small.model)
        try:
            found = self._mixtures(fewer)
            active = found[0].active
            for each in found:
                each.send_to(active - 1)
            expected = small.outputs(fewer)
        except ValueError as error:
            raise No(str(error)) from None
        names = [n for n in stating.fields_with(small.config, active) if ACTIVE.search(n.rpartition(".")[2])]
        tries = [{"active": (name,)} for name in names]
        return _Way(small.first(tries, {"active": active - 1}, other, expected, "to how many experts a token is sent"))

    def _mixtures(self, model: nn.Module) -> list[Mixture]:
        """The mixtures of the small instance, or of a copy of it. Raises No without any, ValueError for one of unknown form."""
        blocks = [model.get_submodule(name) for name in self.small.names]
        found = [Mixture(block, self.fused) for block in blocks if mixture.number(block, self.fused)]
        if not found:
            raise No("its small instance has no mixture")
        return found

    def _hidden(self) -> _Way:
        small = self.small
        hidden = int(text_config(small.config).hidden_size)
        zeroed, smaller = copy.deepcopy(small.model), copy.deepcopy(small.model)
        gone = torch.arange(0, hidden, 4)
        windows = small.windows()
        found = width.stream_of(small.model, small.names, self.fused, windows)
        width.silence(zeroed, small.names, found, gone)
        width.silence(smaller, small.names, found, gone)
        try:
            # it is a copy of a model whose layout is known
            assume(smaller, self._layout)
            reading = width.readers(smaller, found, batched(windows), {}, lambda: None)
            width.cut(smaller, reading, gone, DAMPING, refit=False)
        # a class may raise anything for modules that are not what was taken for granted
        except Exception as error:
            raise No(f"its residual width cannot be cut: {stating.sentence(error)}") from None
        names = [n for n in stating.fields_with(small.config, hidden) if not _is_heads(n)]
        tries = [{"hidden": (name,), "head": w} for w in (("head_dim",), ()) for name in names]
        coupling = self.attention and small.coupling(self.attention.consumer)
        numbers = {"hidden": hidden - len(gone), "head": (coupling and coupling.width) or 0}
        expected = small.outputs(zeroed)
        return _Way(small.first(tries, numbers, smaller, expected, "the residual width", rounding=1e-3), found)

    # ------------------------------------------------------------------------------------------------------- what is stated

    def stated(self, raw: stating.Raw, shape: Shape, kept_layers: Sequence[int]) -> stating.Raw:
        """config.json for a shape. raw: the dense model's, whose other entries are kept."""
        dense = self.shape
        kinds = [
            kind
            for kind in ("mlp", "heads", "queries", "experts", "hidden", "active")
            if shape.steps(kind) != dense.steps(kind)
        ]
        changes: dict[str, int] = {}
        numbers = {
            "mlp": shape.mlp, "heads": shape.heads, "all heads": shape.heads * shape.queries, "head": self.head,
            "experts": shape.experts, "hidden": shape.hidden, "active": shape.active,
        }  # fmt: skip
        for kind in kinds:
            changes |= {name: numbers[what] for what, names in self._way(kind).fields.items() for name in names}
        out = stating.changed(raw, self.config, changes)
        if shape.layers == dense.layers:
            return out
        return stating.changed(out, self.config, dict.fromkeys(self.depth, shape.layers), kept_layers)

    @property
    def depth(self) -> Sequence[str]:
        """The fields that state the number of blocks."""
        return self._way("layers").fields["layers"]

    def may_keep(self, kept_layers: Sequence[int]) -> bool:
        """False if the config of a model of these blocks cannot be made, or says other things of them, such as of the last one."""
        return _states(self.config, self.depth, kept_layers)

    def not_loadable(self, shape: Shape) -> str | None:
        """Why transformers would not make a config of that shape, or None."""
        try:
            self.config_of(shape, range(shape.layers))
            # what the class itself asks for shows in one block as in all
            one = replace(shape, layers=1) if self._of_one_block else shape
            with quiet():
                empty(self.cls, self.config_of(one, range(one.layers)))
        # transformers raises its own exception, which wraps a ValueError; config_of() wraps that once more
        except Exception as error:
            inner = error.__cause__ if isinstance(error, PlanError) else None
            return stating.sentence(inner if isinstance(inner, Exception) else error)
        return None

    @cached_property
    def _of_one_block(self) -> bool:
        """True if the class makes a model of the first block alone."""
        if self.refuses("layers"):
            return False
        try:
            with quiet():
                empty(self.cls, self.config_of(replace(self.shape, layers=1), [0]))
        # a class may raise anything for a config that is not to its liking
        except Exception:
            return False
        return True

    def config_of(self, shape: Shape, kept_layers: Sequence[int]) -> Any:
        """The config of a model of that shape. Raises PlanError for one that the class does not take."""
        kind = type(self.config)
        try:
            return kind.from_dict(self.stated(self.config.to_dict(), shape, kept_layers))
        # a class may raise anything for a config that is not to its liking
        except Exception as error:
            raise PlanError(
                f"{kind.__name__} cannot be of {shape.heads} x {shape.queries} heads, {shape.mlp} neurons, {shape.layers} blocks "
                f"and width {shape.hidden}: {said(error, 2)}; name other units, e.g. --units mlp,layers"
            ) from error

    def skeleton(self, shape: Shape, kept_layers: Sequence[int]) -> Any:
        """A model of that shape on the meta device."""
        found: Any = empty(self.cls, self.config_of(shape, kept_layers))
        found.tie_weights()
        return found


def _states(config: Any, depth: Sequence[str], kept_layers: Sequence[int]) -> bool:
    """True if a config says of some blocks alone what it said of them. depth: the fields of their number."""
    changes = dict.fromkeys(depth, len(kept_layers))
    try:
        with quiet():
            made = type(config).from_dict(stating.changed(config.to_dict(), config, changes, kept_layers))
    # a class may raise anything for a config that is not to its liking
    except Exception:
        return False
    return stating.states(made, config, changes, kept_layers)


def _neurons(coupling: Coupling, name: str) -> Neurons:
    made = zip(coupling.producers, coupling.forms, strict=True)
    return Neurons(_in(coupling.consumer, name), tuple((_in(layer, name), form) for layer, form in made))


def _heads(coupling: Coupling, name: str) -> _Heads:
    heads = coupling.heads
    assert heads
    assert coupling.width
    return _Heads(_in(coupling.consumer, name), *heads, coupling.width)


def _in(layer: Layer, name: str) -> str:
    return layer.name.removeprefix(f"{name}.")


def _part(name: str) -> str:
    """What comes before a field's own name: 'text_config.', or nothing."""
    return name[: name.rfind(".") + 1]


def _is_heads(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return bool(_HEADS.search(leaf)) and not _WIDTH.search(leaf)


def _some(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All of them, and each alone."""
    return list(dict.fromkeys([tuple(names), *((name,) for name in names)]))


def _stated_head(text: Any) -> int:
    return _stated(text, "head_dim", max(1, _stated(text, "hidden_size") // _stated(text, "num_attention_heads")))


def _stated(text: Any, name: str, otherwise: int = 1) -> int:
    """A number that a config states; `otherwise` if it states none for all blocks."""
    try:
        return int(getattr(text, name))
    # transformers raises an error of its own for a number that is not the same in all blocks
    except Exception:
        return otherwise


_CUTS: "WeakKeyDictionary[nn.Module, Cuts]" = WeakKeyDictionary()


def cuts_of(model: nn.Module) -> Cuts:
    """What can be cut of a model. Raises PlanError for a model whose blocks are not one list."""
    if model not in _CUTS:
        _CUTS[model] = Cuts(model)
    return _CUTS[model]
