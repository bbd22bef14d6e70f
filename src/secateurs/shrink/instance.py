"""The small random instance of a model on which cuts are tried."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.model.batches import Batch
from secateurs.model.blocks import Call, whole
from secateurs.model.coupling import Coupling
from secateurs.model.couplings import Couplings
from secateurs.model.layers import Layer, layers_of
from secateurs.model.miniature import empty, inputs, seeded, small_instance
from secateurs.model.proof import unequal
from secateurs.shrink import config as stating
from secateurs.shrink import units
from secateurs.shrink.passes import asking
from secateurs.shrink.units import Heads, Neurons, No, Shape

Fields = Mapping[str, Sequence[str]]
"""{what is stated: the fields that state it}."""


@dataclass(frozen=True)
class Instance:
    """A small model. names: of its blocks. batches: what it is called with. fused: as in Layout.experts."""

    model: Any
    batches: Sequence[Batch]
    names: Sequence[str]
    fused: Mapping[str, str]
    couplings: Couplings

    @classmethod
    def of(cls, made: Any, config: Any, path: str, fused: Mapping[str, str], couplings: Couplings) -> "Instance":
        """The instance of a class and config. Raises No if there is none that runs."""
        try:
            small: Any = small_instance(made, config)
            names = [f"{path}.{i}" for i in range(len(small.get_submodule(path)))]
            batches = inputs(small)
            # what is changed for text alone must not be wrong beside images
            with suppress(ValueError):
                batches += inputs(small, "images and text")
            return cls(small, batches, names, fused, couplings)
        except ValueError as error:
            raise No(str(error)) from None

    @property
    def config(self) -> Any:
        return self.model.config

    def layers(self, at: int, model: nn.Module | None = None) -> dict[str, Layer]:
        """The layers of a block, of the instance or a copy of it, by their names in the block."""
        name = self.names[at]
        found = layers_of((model or self.model).get_submodule(name), name, self.fused)
        return {layer.name.removeprefix(f"{name}."): layer for layer in found}

    def coupling(self, consumer: str) -> Coupling:
        """What the first block's layer of that name is coupled with. Raises No if nothing is known."""
        block, layers = self.model.get_submodule(self.names[0]), self.layers(0)
        found = self.couplings.of(self.names[0], block, list(layers.values()), self.config)
        for coupling in found:
            if consumer in layers and coupling.consumer.name == layers[consumer].name:
                return coupling
        raise No(f"no small instance has a coupled {consumer}")

    def outputs(self, model: nn.Module) -> list[Any]:
        with torch.no_grad():
            return [whole(model, batch) for batch in self.batches]

    def windows(self) -> Tensor:
        """The token windows of a batch, [N, S]. Raises No for a model that is not called with tokens alone."""
        found = self.batches[0].get("input_ids")
        if found is None or len(self.batches[0]) > 1:
            raise No("it is not called with tokens alone")
        return found

    # ------------------------------------------------------------------------------------------------------------ cutting

    def without(self, kind: str, rule: Neurons | Heads, shape: Shape, gone: Tensor) -> tuple[list[Any], nn.Module]:
        """The outputs with some units of all blocks at zero, and a copy of the instance that they are cut from."""
        zeroed, smaller = copy.deepcopy(self.model), copy.deepcopy(self.model)
        for at, name in enumerate(self.names):
            for model in (zeroed, smaller):
                found = rule.units(kind, self.layers(at, model), shape)
                weight_OI = found.consumer.read().clone()
                lost = found.groups_GC[gone].flatten()
                if model is zeroed:
                    weight_OI[:, lost] = 0
                    found.consumer.write(weight_OI)
                else:
                    stays = torch.ones(weight_OI.shape[1], dtype=torch.bool)
                    stays[lost] = False
                    units.cut(model.get_submodule(name), found, gone, weight_OI[:, stays])
        return self.outputs(zeroed), smaller

    def shortened(self, model: Any, path: str, kept_layers: Sequence[int], depth: str) -> list[Any]:
        """The outputs of a copy whose other blocks are removed, in place. depth: the field that may state how many."""
        units.keep_blocks(model, path, kept_layers, (depth,))
        gone = [self.model.get_submodule(name) for i, name in enumerate(self.names) if i not in kept_layers]
        try:
            found = self.outputs(model)
            with handing_on(gone):
                skipped = self.outputs(self.model)
        # a field of something else was changed, or blocks count on those before them
        except Exception as error:
            raise No(f"with {depth} {len(kept_layers)}: {stating.sentence(error)}") from None
        if any(unequal(got, want) for got, want in zip(found, skipped, strict=True)):
            raise No("the model does more between its blocks than handing on, by their places")
        return found

    def first(
        self, tries: Iterable[Fields], numbers: Mapping[str, int], smaller: nn.Module, expected: Sequence[Any], what: str,
        rounding: float = 0.0,
    ) -> Fields:  # fmt: skip
        """The first fields that, with these numbers, make a model of the smaller one's shape and outputs. Raises No."""
        whys, known = [], []
        for fields in tries:
            changes = {name: numbers[key] for key, names in fields.items() for name in names}
            if changes in known:
                continue
            known.append(changes)
            try:
                self.check(changes, smaller, expected, rounding=rounding)
                return fields
            except No as why:
                whys.append(str(why))
        raise No(
            f"this {self.config.model_type}'s config cannot state {what}" + (f" ({whys[0]})" if len(whys) == 1 else "")
        )

    def check(
        self, changes: Mapping[str, int], smaller: nn.Module, expected: Sequence[Any],
        kept_layers: Sequence[int] | None = None, rounding: float = 0.0,
    ) -> None:  # fmt: skip
        """Raise No unless the model that is made from a changed config takes the smaller one's weights and gives what is expected.

        rounding: of the largest number, what may differ; 0 for rounding of sums alone.
        """
        said = ", ".join(f"{name} {value}" for name, value in changes.items())
        try:
            raw = stating.changed(self.config.to_dict(), self.config, changes, kept_layers)
            config = type(self.config).from_dict(raw)
            shapes: Any = empty(type(self.model), config)
            shapes.tie_weights()
        # a class may raise anything for a config that is not to its liking
        except Exception as error:
            raise No(f"with {said}: {stating.sentence(error)}") from None
        left, asked = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (smaller, shapes))
        odd = next((n for n in left if asked.get(n) != left[n]), None)
        if odd or left.keys() != asked.keys():
            raise No(f"with {said}, {odd or 'another parameter'} is not {list(left.get(odd or '', ()))}")
        try:
            with seeded():
                made: Any = type(self.model)._from_config(config).eval()
            made.load_state_dict(smaller.state_dict())
            found = self.outputs(made)
        except Exception as error:
            raise No(f"with {said}: {stating.sentence(error)}") from None
        if any(_differ(got, want, rounding) for got, want in zip(found, expected, strict=True)):
            raise No(f"with {said}, what is left gives other outputs")

    # -------------------------------------------------------------------------------------------------------------- heads

    def rows_of_heads(self, consumer: str, heads: int, groups: int, kind: str) -> Heads:
        """Where the first block's heads are. kind: 'heads' or 'queries', those of which all rows must be known. Raises No."""
        layers = self.layers(0)
        columns = torch.arange(layers[consumer].shape[1])
        alive = self._alive(layers[consumer], [])
        of_query = _owners(alive, [self._alive(layers[consumer], part) for part in columns.reshape(heads, -1)])
        of_group = _owners(alive, [self._alive(layers[consumer], part) for part in columns.reshape(groups, -1)])
        known = {}
        for name, layer in layers.items():
            group, query = of_group.pop(layer.tensor_name, None), of_query.get(layer.tensor_name)
            # biases go with their rows
            of_group.pop(f"{layer.name}.bias", None)
            if group is not None:
                known[name] = _runs(name, group, query, heads, groups, kind)
        if of_group:
            raise No(f"{next(iter(of_group))} has parts that belong to heads")
        return Heads(consumer, known)

    def _alive(self, consumer: Layer, zero: Tensor | list[int]) -> dict[str, Tensor]:
        """{parameter of the first block: its rows with a gradient}, with some of a consumer's columns at zero."""
        model, batch = self.model, self.batches[0]
        name = self.names[0]
        weight_OI = consumer.read().clone()
        cut_OI = weight_OI.clone()
        cut_OI[:, zero] = 0
        consumer.write(cut_OI)
        parameters = {f"{name}.{n}": p for n, p in model.get_submodule(name).named_parameters()}
        transposed = {y.tensor_name for y in self.layers(0).values() if y.kind == "conv1d"}
        try:
            with asking(model, parameters.values()), torch.enable_grad(), seeded():
                out = [x for x in tree_leaves(whole(model, batch)) if isinstance(x, Tensor) and x.requires_grad]
                total = torch.stack([(x * torch.rand_like(x)).sum() for x in out]).sum()
                grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        finally:
            consumer.write(weight_OI)
        found = {}
        for path, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                rows = grad.T if path in transposed else grad
                found[path] = rows.reshape(len(rows), -1).any(1)
        return found


@contextmanager
def handing_on(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks return the hidden states that they are called with."""

    def hook(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        hidden, _call = Call.split(args, kwargs)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hooks = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _owners(alive: Mapping[str, Tensor], without: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{parameter: the unit that each of its rows belongs to, or -1}. without: the rows that are alive without each unit."""
    found = {}
    for name, rows in alive.items():
        own = torch.full((len(rows),), -1)
        for unit, left in enumerate(without):
            own[rows & ~left[name]] = unit
        if (own >= 0).any():
            found[name] = own
    return found


def _runs(name: str, of_group: Tensor, of_query: Tensor | None, heads: int, groups: int, kind: str) -> tuple[bool, ...]:
    """The runs of a layer's rows, as in Heads.rows."""
    odd = No(f"the rows of {name} that belong to heads lie in no known way")
    each = heads // groups
    runs, start = [], 0
    while start < len(of_group):
        rest = of_group[start:]
        size = int((rest != 0).int().argmax()) if (rest != 0).any() else len(rest)
        end = start + size * groups
        if not size or not torch.equal(of_group[start:end], torch.arange(groups).repeat_interleave(size)):
            raise odd
        queries = torch.full((end - start,), -1) if of_query is None else of_query[start:end]
        wide = size % each == 0 and torch.equal(queries, torch.arange(heads).repeat_interleave(size // each))
        if not wide and (queries >= 0).any() and (kind == "queries" or size * groups < len(of_group)):
            raise odd
        runs.append((wide, size))
        start = end
    unit = min(size // (each if wide else 1) for wide, size in runs)
    if len(runs) > 1 and any(size != unit * (each if wide else 1) for wide, size in runs):
        raise odd
    return tuple(wide for wide, _ in runs)


def _differ(got: Any, want: Any, rounding: float) -> bool:
    if not rounding:
        return unequal(got, want) is not None
    pairs = zip(*([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in (got, want)), strict=True)
    return not all(float((a - b).abs().max()) <= rounding * float(b.abs().max()) for a, b in pairs)
