"""The channels of a torch module that go together: where they are, what they cost, how they are cut.

A unit is the set of channels that trace.py found to be tied. It has a place in slots, which are the axes of layers:

    producer   rows of a convolution or linear layer (out)
    vector     elements of a batch norm or PReLU, one for each channel
    consumer   columns of a convolution or linear layer (in); whatever a removal loses, it loses here

G units of C columns; a convolution's columns are its input channels times its kernel, in the order of unfold().
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from secateurs.base.errors import PlanError

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Slot:
    """An axis of a layer with the number of each of its channels.

    place: out, in or vector; a depthwise convolution has no `in` of its own. groups: of a convolution.
    """

    module: str
    place: str
    labels: Labels
    groups: int = 1


@dataclass(frozen=True)
class Group:
    """Units that have their places in the same slots. units: their numbers. name: the first layer that produces them."""

    name: str
    units: Labels
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """factor * rows * columns parameters or multiplications.

    rows, columns: {group: how many for each of its units}, and '' for those that stay in any case.
    """

    rows: dict[str, int]
    columns: dict[str, int]
    factor: float

    def sides(self, counts: dict[str, int]) -> tuple[int, int]:
        """Rows and columns when counts[group] units of every group are left."""
        rows, columns = (sum(n * counts.get(g, 1) for g, n in side.items()) for side in (self.rows, self.columns))
        return rows, columns


class Cost:
    """Parameters or multiplications of a module as a function of how many units of every group are left.

    rest: what no group changes.
    """

    def __init__(self, terms: Sequence[Term], rest: int) -> None:
        self.rest = rest
        self.terms = list(terms)
        groups = {group for term in terms for group in (*term.rows, *term.columns)}
        self._of = {g: [term for term in terms if g in term.rows or g in term.columns] for g in groups}

    def at(self, counts: dict[str, int]) -> int:
        """The cost when counts[group] units of every group are left."""
        return self.rest + round(sum(term.factor * prod(term.sides(counts)) for term in self.terms))

    def saved(self, counts: dict[str, int], group: str, options: Sequence[int]) -> list[float]:
        """What is saved by leaving `option` units of one group instead of counts[group], for each option."""
        total = [0.0] * len(options)
        for term in self._of.get(group, []):
            rows, columns = term.sides(counts)
            by_row, by_column = term.rows.get(group, 0), term.columns.get(group, 0)
            for i, count in enumerate(options):
                gone = counts[group] - count
                total[i] += term.factor * (rows * columns - (rows - by_row * gone) * (columns - by_column * gone))
        return total


@dataclass
class Graph:
    """What trace() found in a module.

    positions: {layer: output places of one example}. fixed: {layer: why some of its output channels stay}. norms: {layer: the
    batch norm that alone reads its output}.
    """

    slots: list[Slot]
    groups: list[Group]
    positions: dict[str, int]
    fixed: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)

    def consumers(self, group: Group) -> list[Slot]:
        """The slots whose layers read a group's channels."""
        return [self.slots[i] for i in group.slots if self.slots[i].place == "in"]

    def macs(self, model: nn.Module) -> Cost:
        """Multiply-adds of one example in convolutions and linear layers."""
        return Cost(self._weights(model, self.positions), 0)

    def parameters(self, model: nn.Module) -> Cost:
        """All parameters of the module."""
        counted = {id(p) for slot in self.slots for p in model.get_submodule(slot.module).parameters(recurse=False)}
        other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
        vectors: list[Term] = []
        seen: set[int] = set()
        for slot in self.slots:
            if slot.place != "in":
                # a layer's bias, or a batch norm's weight and bias
                module = model.get_submodule(slot.module)
                own = [p for p in module.parameters(recurse=False) if p.dim() == 1 and id(p) not in seen]
                seen.update(id(p) for p in own)
                vectors.append(Term(self._width(slot), {"": 1}, sum(p.numel() for p in own) // len(slot.labels)))
        return Cost(self._weights(model, None) + vectors, other)

    def _weights(self, model: nn.Module, times: dict[str, int] | None) -> list[Term]:
        """A term for every convolution and linear layer: its weights times times[layer]. None: each shared weight once."""
        found: list[Term] = []
        seen: set[Any] = set()
        ins = {slot.module: slot for slot in self.slots if slot.place == "in"}
        for slot in self.slots:
            module: Any = model.get_submodule(slot.module)
            # a module that is called twice has its slots twice
            key = id(module.weight) if times is None else slot.module
            if slot.place == "out" and key not in seen:
                seen.add(key)
                kernel = prod(getattr(module, "kernel_size", (1,)))
                # a depthwise convolution has one column
                columns, groups = (self._width(ins[slot.module]), slot.groups) if slot.module in ins else ({"": 1}, 1)
                factor = 1 if times is None else times.get(slot.module, 1)
                found.append(Term(self._width(slot), columns, kernel * factor / groups))
        return found

    def _width(self, slot: Slot) -> dict[str, int]:
        """{group: channels of the slot for each unit}, and '' for those that stay."""
        found = {"": len(slot.labels)}
        for group in self.groups:
            here = int(np.isin(slot.labels, group.units).sum())
            if here:
                found[group.name] = here // len(group.units)
                found[""] -= here
        return found

    def columns(self, model: nn.Module, group: Group, slot: Slot) -> list[Tensor]:
        """The columns [G, C] of a consumer's unfolded input that belong to each unit, for each of its convolution groups."""
        kernel = prod(getattr(model.get_submodule(slot.module), "kernel_size", (1,)))
        width = len(slot.labels) // slot.groups
        found = []
        for part in range(slot.groups):
            labels = slot.labels[part * width : (part + 1) * width]
            places = np.stack([np.flatnonzero(labels == unit) for unit in group.units])
            columns_GCK = torch.from_numpy(places)[:, :, None] * kernel + torch.arange(kernel)
            found.append(columns_GCK.flatten(1))
        return found


def cut(model: nn.Module, graph: Graph, removed: Sequence[int]) -> None:
    """Remove units from a module, in place: rows, columns, vector elements, and the sizes that layers state.

    Raises PlanError if a layer would lose all of its channels.
    """
    gone = np.array(sorted(removed), np.int64)
    kept = [torch.from_numpy(np.flatnonzero(~np.isin(slot.labels, gone))) for slot in graph.slots]
    by_module: dict[str, dict[str, tuple[Slot, Tensor]]] = {}
    for slot, index in zip(graph.slots, kept, strict=True):
        if not len(index):
            raise PlanError(f"all channels of {slot.module} would go; keep at least one")
        by_module.setdefault(slot.module, {})[slot.place] = (slot, index)
    for name, found in by_module.items():
        module: Any = model.get_submodule(name)
        if "vector" in found:
            slot, index = found["vector"]
            if len(index) < len(slot.labels):
                _cut_vector(module, index)
            continue
        slot, rows = found["out"]
        if len(rows) < len(slot.labels):
            _replace(module, "weight", module.weight.detach()[rows])
            if module.bias is not None:
                _replace(module, "bias", module.bias.detach()[rows])
        linear = isinstance(module, nn.Linear)
        setattr(module, "out_features" if linear else "out_channels", len(rows))
        if "in" not in found:
            # depthwise: a group for each input channel, and a multiple of that many outputs
            module.in_channels = module.groups = len(rows) * module.in_channels // len(slot.labels)
            continue
        slot, columns = found["in"]
        width = len(slot.labels) // slot.groups
        first = columns[columns < width]
        if len(columns) < len(slot.labels):
            _replace(module, "weight", module.weight.detach()[:, first])
        setattr(module, "in_features" if linear else "in_channels", len(columns))


def _cut_vector(module: Any, index: Tensor) -> None:
    for name in ("weight", "bias"):
        if module._parameters.get(name) is not None:
            _replace(module, name, module._parameters[name].detach()[index])
    for name in ("running_mean", "running_var"):
        if module._buffers.get(name) is not None:
            module._buffers[name] = module._buffers[name][index].clone()
    setattr(module, "num_parameters" if isinstance(module, nn.PReLU) else "num_features", len(index))


def _replace(module: Any, name: str, tensor: Tensor) -> None:
    module._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=module._parameters[name].requires_grad)


def unfolded(module: Any, x: Tensor) -> list[Tensor]:
    """The inputs that a layer's rows are multiplied with: [N, positions, I] for each of its convolution groups."""
    if isinstance(module, nn.Linear):
        return [x[:, None]]
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        raise PlanError(f"the inputs of a {type(module).__name__} cannot be cut; only Linear, Conv1d and Conv2d")
    flat = isinstance(module, nn.Conv1d)

    def square(numbers: Sequence[int], absent: int) -> tuple[int, ...]:
        return (absent, *numbers) if flat else tuple(numbers)

    columns = F.unfold(
        x[:, :, None] if flat else x, square(module.kernel_size, 1), square(module.dilation, 1), square(_padding(module), 0),
        square(module.stride, 1),
    )  # fmt: skip
    return [part.transpose(1, 2) for part in columns.chunk(module.groups, 1)]


def _padding(module: Any) -> tuple[int, ...]:
    """A convolution's padding on either side of each axis."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    whole = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(w % 2 for w in whole):
        raise PlanError(
            f"a convolution of kernel {module.kernel_size} with padding 'same' pads unevenly, which cannot be cut"
        )
    return tuple(w // 2 for w in whole)
