"""The channels of a torch module that go together: where they are, what they cost, how they are cut.

A unit is the set of channels that trace.py found to be tied. It has places along axes of parameters and buffers, in sizes that
modules state, and in the columns of the layers that read it (readers.py); whatever a removal loses, it loses there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.shrink.attention import becomes_open
from secateurs.shrink.readers import Reader

Labels = NDArray[np.int64]
_REASONS = 5
NOBODY: Labels = np.empty(0, np.int64)


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter or buffer with the number of each of its channels.

    role: out, of a layer that makes them; in, of one that reads them (of a grouped convolution the first group's); else empty.
    """

    tensor: str
    axis: int
    labels: Labels
    role: str = ""


@dataclass(frozen=True)
class Size:
    """A number that a module states, as an attribute or in place `place` of one: how many of these channels there are.

    guessed: it is an attribute that holds the number which an operator was given.
    """

    module: str
    attribute: str
    place: int | None
    labels: Labels
    guessed: bool = False


@dataclass(frozen=True)
class Group:
    """Units that have the same places. units: their numbers. name: the first layer that makes them.

    run: how many channels of a unit lie next to each other in that layer: more than one for heads, or groups of a norm.
    """

    name: str
    units: Labels
    axes: tuple[int, ...]
    readers: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    run: int = 1


@dataclass(frozen=True)
class Term:
    """factor * the product of sides: parameters or multiplications.

    sides: {group: how many for each of its units}, and '' for those that stay in any case.
    """

    sides: tuple[dict[str, int], ...]
    factor: float

    def at(self, counts: dict[str, int]) -> float:
        """The term when counts[group] units of every group are left."""
        return self.factor * prod(sum(n * counts.get(g, 1) for g, n in side.items()) for side in self.sides)


class Cost:
    """Parameters or multiplications of a module as a function of how many units of every group are left.

    rest: what no group changes.
    """

    def __init__(self, terms: Sequence[Term], rest: int) -> None:
        self.rest = rest
        self.terms = list(terms)
        groups = {group for term in terms for side in term.sides for group in side}
        self._of = {g: [term for term in terms if any(g in side for side in term.sides)] for g in groups}

    def at(self, counts: dict[str, int]) -> int:
        """The cost when counts[group] units of every group are left."""
        return self.rest + round(sum(term.at(counts) for term in self.terms))

    def saved(self, counts: dict[str, int], group: str, options: Sequence[int]) -> list[float]:
        """What is saved by leaving `option` units of one group instead of counts[group], for each option."""
        terms = self._of.get(group, [])
        now = sum(term.at(counts) for term in terms)
        return [now - sum(term.at({**counts, group: option}) for term in terms) for option in options]


@dataclass
class Graph:
    """What trace() found in a module.

    readers: {weight: the layer that reads channels}. positions: {weight: places of one example that it is multiplied at}. fixed:
    {layer: why some of the channels that it makes stay}. norms: {layer: the batch norm that alone reads its output}. proof: on what
    prove() has shown that cutting is zeroing; empty before it has.
    """

    axes: list[Axis]
    sizes: list[Size]
    readers: dict[str, Reader]
    groups: list[Group]
    positions: dict[str, int]
    fixed: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)

    def macs(self, model: nn.Module) -> Cost:
        """Multiply-adds of one example in convolutions, linear and recurrent layers."""
        return Cost([replace(term, factor=term.factor * self.positions[name])
                     for name, term in self._terms(model).items() if name in self.positions], 0)  # fmt: skip

    def parameters(self, model: nn.Module) -> Cost:
        """All parameters of the module."""
        terms = self._terms(model)
        named = dict(model.named_parameters())
        return Cost([terms[name] for name in named if name in terms],
                    sum(p.numel() for name, p in named.items() if name not in terms))  # fmt: skip

    def nbytes(self, model: nn.Module) -> Cost:
        """Bytes of the module's parameters and buffers, as its file has them; what is tied counts once."""
        terms = self._terms(model)
        named = dict([*model.named_parameters(), *model.named_buffers()])
        each = {name: t.element_size() for name, t in named.items()}
        return Cost([replace(terms[name], factor=terms[name].factor * each[name]) for name in named if name in terms],
                    sum(t.numel() * each[name] for name, t in named.items() if name not in terms))  # fmt: skip

    def _terms(self, model: nn.Module) -> dict[str, Term]:
        """{parameter: its size}, for those with an axis of channels."""
        sides: dict[str, list[dict[str, int]]] = {}
        covered: dict[str, int] = {}
        for axis in self.axes:
            if tensor_of(model, axis.tensor) is None:
                # a bias that a layer does not have
                continue
            sides.setdefault(axis.tensor, []).append(self._width(axis))
            covered[axis.tensor] = covered.get(axis.tensor, 1) * len(axis.labels)
        return {
            name: Term(tuple(found), tensor_of(model, name).numel() // covered[name]) for name, found in sides.items()
        }

    def _width(self, axis: Axis) -> dict[str, int]:
        """{group: channels along the axis for each unit}, and '' for those that stay."""
        found = {"": len(axis.labels)}
        for group in self.groups:
            here = int(np.isin(axis.labels, group.units).sum())
            if here:
                found[group.name] = here // len(group.units)
                found[""] -= here
        return found

    def columns(self, model: nn.Module, group: Group, reader: Reader) -> list[Tensor]:
        """The columns [G, C] of a reader's matrices that belong to each unit, for each of its convolution groups."""
        kernel = reader.kernel(tensor_of(model, reader.weight))
        found = []
        for labels in np.split(reader.labels, reader.groups):
            places = np.stack([np.flatnonzero(labels == unit) for unit in group.units])
            columns_GCK = torch.from_numpy(places)[:, :, None] * kernel + torch.arange(kernel)
            found.append(columns_GCK.flatten(1))
        return found

    def marked(self, units: Iterable[int]) -> NDArray[np.bool_]:
        """True at the numbers of units, of all numbers that there are."""
        labels = [axis.labels for axis in self.axes] + [size.labels for size in self.sizes]
        marks = np.zeros(1 + max((int(x.max()) for x in labels if len(x)), default=0), np.bool_)
        marks[list(units)] = True
        return marks

    def without(self, refused: dict[str, str]) -> "Graph":
        """The graph without some groups, {group: why}."""
        fixed = {self.axes[i].tensor: refused[g.name] for g in self.groups if g.name in refused for i in g.axes
                 if self.axes[i].role == "out"}  # fmt: skip
        groups = [group for group in self.groups if group.name not in refused]
        return replace(self, groups=groups, fixed={**self.fixed, **{layer_of(t): why for t, why in fixed.items()}})

    def standing(self, model: nn.Module) -> dict[str, float]:
        """{why: the share of the module's parameters that make channels that stay}, the largest first."""
        units = np.concatenate([NOBODY, *(group.units for group in self.groups)])
        named = dict(model.named_parameters())
        whole = sum(p.numel() for p in named.values())
        free = {axis.tensor: float(np.isin(axis.labels, units).mean()) for axis in self.axes if axis.role == "out"}
        found: dict[str, float] = {}
        for name, parameter in named.items():
            why = self.fixed.get(layer_of(name), "it makes no channels that can be followed")
            share = parameter.numel() / whole * (1 - free.get(name, 0.0))
            if parameter.dim() > 1 and share:
                found[why] = found.get(why, 0.0) + share
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def whole(fixed: dict[str, str]) -> str:
    """Which layers stay whole and why, as the end of a sentence: '; a and 3 others stay whole: why', each reason once and
    five of them.
    """
    of: dict[str, list[str]] = {}
    for layer, why in fixed.items():
        of.setdefault(why, []).append(layer)
    said = ""
    for why, layers in list(of.items())[:_REASONS]:
        others = len(layers) - 1
        stays = f" and {others} other{'s' * (others > 1)} stay" if others else " stays"
        said += f"; {layers[0] or 'the module itself'}{stays} whole: {why}"
    more = list(of.values())[_REASONS:]
    return said + (f"; {sum(map(len, more))} more for {len(more)} more reasons" if more else "")


def layer_of(tensor: str) -> str:
    """The module that holds a parameter, or the parameter of a module that holds no others."""
    return tensor.rpartition(".")[0] or tensor


def tensor_of(model: nn.Module, name: str) -> Any:
    """The parameter or buffer of a name."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])


def kill(model: nn.Module, graph: Graph, units: Iterable[int]) -> None:
    """Zero what readers take from units, in place."""
    gone = graph.marked(units)
    for axis in graph.axes:
        if axis.role == "in":
            places = torch.from_numpy(np.flatnonzero(gone[axis.labels]))
            held = tensor_of(model, axis.tensor).data
            held.index_fill_(axis.axis, places.to(held.device), 0)


def cut(model: nn.Module, graph: Graph, removed: Iterable[int]) -> dict[str, Any]:
    """Remove units from a module, in place: from axes of its parameters and buffers, and from the sizes that modules state.

    Returns what was done, as JSON has it: {axes: {tensor: [[axis, the places that are kept]]}, sizes: [[module, attribute, place,
    count]]}. Raises PlanError if a layer would lose all of its channels.
    """
    gone = graph.marked(removed)
    kept: dict[str, list[tuple[int, Tensor]]] = {}
    for axis in graph.axes:
        stays = np.flatnonzero(~gone[axis.labels])
        if not len(stays):
            raise PlanError(f"all channels of {layer_of(axis.tensor)} would go; keep at least one")
        if len(stays) < len(axis.labels) and tensor_of(model, axis.tensor) is not None:
            kept.setdefault(axis.tensor, []).append((axis.axis, torch.from_numpy(stays)))
    take(model, kept)
    sizes = []
    for size in graph.sizes:
        if gone[size.labels].any():
            count = int((~gone[size.labels]).sum())
            state(model, size, count)
            sizes.append([size.module, size.attribute, size.place, count])
    return {
        "axes": {name: [[axis, places.tolist()] for axis, places in held] for name, held in kept.items()},
        "sizes": sizes,
    }


def take(model: nn.Module, kept: dict[str, list[tuple[int, Tensor]]]) -> None:
    """Leave parts of parameters and buffers, {name: [(axis, places along it)]}, in place. Tied ones stay tied."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            holders.setdefault(id(tensor), []).append((module, name))
    for name, places in kept.items():
        old = tensor_of(model, name)
        new = old.detach()
        for number, index in places:
            new = new.index_select(number, index.to(new.device))
        # index_select copies; nothing of the old tensor is held
        new = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        for module, leaf in holders[id(old)]:
            setattr(module, leaf, new)


def state(model: nn.Module, size: Size, count: int) -> None:
    """Write a size into a module."""
    module = model.get_submodule(size.module)
    becomes_open(model, size.module)
    if size.place is None:
        setattr(module, size.attribute, count)
        return
    held = getattr(module, size.attribute)
    setattr(module, size.attribute, type(held)((*held[: size.place], count, *held[size.place + 1 :])))
