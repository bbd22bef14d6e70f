"""Which channels of a torch module must go together, found from a traced graph, and how they are cut.

torch.fx records every call. Each channel of each tensor (axis 1) carries a number; what makes two channels one (a sum, a product,
a depthwise convolution, their place in a group of a grouped convolution) joins their numbers. A channel that reaches something
that is not known here, the output or the input, is fixed. What is left are units: channels of all producers, batch norms
and consumers that carry one number.

    producer   rows of a convolution or linear layer (out)
    vector     batch norm and the like: as long as the channels
    consumer   columns of a convolution or linear layer (in); all that is ever lost by a removal is lost here

G units of C columns; a convolution's columns are its input channels times its kernel, in unfold()'s order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from secateurs.base.errors import PlanError

Labels = NDArray[np.int64]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VECTORS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
# one channel in, the same channel out
_PASSING = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d,
)  # fmt: skip
_PASSING_CALLS = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "sigmoid", "sigmoid_", "tanh", "hardswish",
    "hardsigmoid", "hardtanh", "dropout", "dropout2d", "clamp", "clamp_", "contiguous", "float", "neg", "abs", "sqrt", "square",
    "exp", "clone", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "interpolate", "pad",
}  # fmt: skip
_JOINING_CALLS = {"add", "add_", "iadd", "sub", "isub", "mul", "mul_", "imul", "truediv", "div", "maximum", "minimum"}
_RESHAPING_CALLS = {"flatten", "view", "reshape"}
_MEASURING_CALLS = {"size", "getattr", "dim"}


@dataclass(frozen=True)
class Slot:
    """A module's axis and the numbers of its channels. place: out, in or vector. groups: of a convolution; depthwise ones have no
    `in` of their own.
    """

    module: str
    place: str
    labels: Labels
    groups: int = 1


@dataclass(frozen=True)
class Group:
    """Units that stand in the same slots: `units` numbers; name: the first layer that makes them."""

    name: str
    units: Labels
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """factor * rows * columns, where both are {group: how many a unit} and '' is what stays."""

    rows: dict[str, int]
    columns: dict[str, int]
    factor: float

    def sides(self, counts: dict[str, int]) -> tuple[int, int]:
        """Rows and columns with so many units of every group left."""
        rows, columns = (sum(n * counts.get(g, 1) for g, n in side.items()) for side in (self.rows, self.columns))
        return rows, columns


class Cost:
    """What a module costs with so many units of every group left."""

    def __init__(self, terms: Sequence[Term], rest: int) -> None:
        self.rest = rest
        self.terms = list(terms)
        groups = {group for term in terms for group in (*term.rows, *term.columns)}
        self._of = {g: [term for term in terms if g in term.rows or g in term.columns] for g in groups}

    def at(self, counts: dict[str, int]) -> int:
        return self.rest + round(sum(term.factor * prod(term.sides(counts)) for term in self.terms))

    def saved(self, counts: dict[str, int], group: str, options: Sequence[int]) -> list[float]:
        """By leaving so many units of one group instead of counts[group], for each option."""
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
    """What trace() found. positions: {module: output places of one example}; fixed: {layer: why none of its channels may go};
    norms: {layer: the batch norm that is all that reads it}.
    """

    slots: list[Slot]
    groups: list[Group]
    positions: dict[str, int]
    fixed: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)

    def consumers(self, group: Group) -> list[Slot]:
        return [self.slots[i] for i in group.slots if self.slots[i].place == "in"]

    def macs(self, model: nn.Module) -> "Cost":
        """Multiply-adds of one example in convolutions and linear layers."""
        return Cost(self._weights(model, self.positions), 0)

    def parameters(self, model: nn.Module) -> "Cost":
        counted = {id(p) for slot in self.slots for p in model.get_submodule(slot.module).parameters(recurse=False)}
        other = sum(p.numel() for p in model.parameters() if id(p) not in counted)
        vectors: list[Term] = []
        seen: set[int] = set()
        for slot in self.slots:
            if slot.place != "in":
                # a bias, or a batch norm's two
                module = model.get_submodule(slot.module)
                own = [p for p in module.parameters(recurse=False) if p.dim() == 1 and id(p) not in seen]
                seen.update(id(p) for p in own)
                vectors.append(Term(self._width(slot), {"": 1}, sum(p.numel() for p in own) // len(slot.labels)))
        return Cost(self._weights(model, None) + vectors, other)

    def _weights(self, model: nn.Module, times: dict[str, int] | None) -> "list[Term]":
        """Weights of every convolution and linear layer, each times `times[module]`; without, every weight once."""
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
        """{group: channels of the slot a unit}; '' has the channels that stay."""
        found = {"": len(slot.labels)}
        for group in self.groups:
            here = int(np.isin(slot.labels, group.units).sum())
            if here:
                found[group.name] = here // len(group.units)
                found[""] -= here
        return found

    def columns(self, model: nn.Module, group: Group, slot: Slot) -> list[Tensor]:
        """For every convolution group of a consumer: the columns [G, C] of its unfolded input that belong to each unit."""
        kernel = prod(getattr(model.get_submodule(slot.module), "kernel_size", (1,)))
        width = len(slot.labels) // slot.groups
        found = []
        for part in range(slot.groups):
            labels = slot.labels[part * width : (part + 1) * width]
            places = np.stack([np.flatnonzero(labels == unit) for unit in group.units])
            columns_GCK = torch.from_numpy(places)[:, :, None] * kernel + torch.arange(kernel)
            found.append(columns_GCK.flatten(1))
        return found


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Find a module's units. Raises PlanError if it cannot be traced, or shares modules or parameters that would be cut."""
    from torch.fx.passes.shape_prop import ShapeProp

    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(*example)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot be traced by torch.fx: {str(error).splitlines()[0]}") from error
    return _Walk(model, traced).run()


class _Walk:
    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        self.model, self.traced = model, traced
        self.parent: list[int] = []
        self.reason: dict[int, str] = {}
        self.labels: dict[fx.Node, Any] = {}
        self.slots: list[Slot] = []
        self.positions: dict[str, int] = {}
        self.norms: dict[str, str] = {}
        self.shared = _shared(model, traced)

    # ---------------------------------------------------------------------------------------------------- numbers

    def new(self, count: int) -> Labels:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return np.arange(start, start + count)

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, a: Labels, b: Labels) -> None:
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.root(x), self.root(y)
            if x != y:
                first, second = min(x, y), max(x, y)
                self.parent[second] = first
                if second in self.reason:
                    self.reason.setdefault(first, self.reason[second])

    def fix(self, labels: Any, why: str) -> None:
        if isinstance(labels, tuple):
            for part in labels:
                self.fix(part, why)
        elif labels is not None:
            for label in labels.tolist():
                self.reason.setdefault(self.root(label), why)

    # ------------------------------------------------------------------------------------------------------ calls

    def run(self) -> Graph:
        for node in self.traced.graph.nodes:
            self.labels[node] = self.visit(node)
        labels = [np.array([self.root(x) for x in slot.labels.tolist()], np.int64) for slot in self.slots]
        slots = [Slot(s.module, s.place, found, s.groups) for s, found in zip(self.slots, labels, strict=True)]
        where: dict[int, list[int]] = {}
        for i, slot in enumerate(slots):
            for label in dict.fromkeys(slot.labels.tolist()):
                where.setdefault(label, []).append(i)
        fixed: dict[str, str] = {}
        by_slots: dict[tuple[int, ...], list[int]] = {}
        for label, found in where.items():
            makers = [slots[i].module for i in found if slots[i].place == "out"]
            why = self.reason.get(self.root(label))
            if why is None and not any(slots[i].place == "in" for i in found):
                why = "nothing reads it that could make up for it"
            if why is not None:
                fixed.update(dict.fromkeys(makers, why))
            elif makers:
                by_slots.setdefault(tuple(found), []).append(label)
        groups: list[Group] = []
        for together, units in by_slots.items():
            name = next(slots[i].module for i in together if slots[i].place == "out")
            # two sets of units may start in one layer
            while any(group.name == name for group in groups):
                name += "'"
            groups.append(Group(name, np.array(units, np.int64), together))
        return Graph(slots, groups, self.positions, fixed, self.norms)

    def visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.fresh(node, "it is the model's input")
        if node.op == "get_attr":
            return self.fresh(node, f"it meets {node.target}, a tensor by itself")
        if node.op == "output":
            for source in node.all_input_nodes:
                self.fix(self.labels[source], "it is the model's output")
            return None
        if node.op == "call_module":
            return self.module(node, str(node.target), self.model.get_submodule(str(node.target)))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
        return self.call(node, name)

    def fresh(self, node: fx.Node, why: str) -> Any:
        """Fixed numbers for what a node gives."""
        shape = _shape(node)
        if shape is None or len(shape) < 2:
            return None
        labels = self.new(shape[1])
        self.fix(labels, why)
        return labels

    def unknown(self, node: fx.Node, what: str) -> Any:
        for source in node.all_input_nodes:
            self.fix(self.labels[source], f"it goes through {what}, which is not known to keep channels apart")
        return self.fresh(node, f"it comes out of {what}")

    def module(self, node: fx.Node, name: str, module: nn.Module) -> Any:
        given = self.labels[node.all_input_nodes[0]] if node.all_input_nodes else None
        shape = _shape(node)
        if len(node.all_input_nodes) != 1 or not isinstance(given, np.ndarray) or shape is None:
            return self.unknown(node, name)
        if isinstance(module, nn.Flatten):
            return self.flat(node, given, "flatten", module.start_dim)
        if isinstance(module, _CONVOLUTIONS) and len(shape) == module.weight.dim() and module.padding_mode == "zeros":
            return self.convolution(node, name, module, given)
        if isinstance(module, nn.Linear) and len(shape) == 2:
            self.count(name, 1)
            out = self.new(module.out_features)
            self.slots += [Slot(name, "in", given), Slot(name, "out", out)]
            self.fix_shared(name, given, out)
            return out
        if isinstance(module, _VECTORS):
            if len(module.weight if module.weight is not None else given) == len(given):
                self.slots.append(Slot(name, "vector", given))
                self.fix_shared(name, given)
                source = node.all_input_nodes[0]
                if (
                    source.op == "call_module"
                    and len(source.users) == 1
                    and getattr(module, "running_mean", None) is not None
                ):
                    self.norms[str(source.target)] = name
            return given
        if isinstance(module, _PASSING):
            return given
        return self.unknown(node, f"{name} ({type(module).__name__})")

    def convolution(self, node: fx.Node, name: str, module: Any, given: Labels) -> Labels:
        shape = _shape(node)
        assert shape is not None
        self.count(name, prod(shape[2:]))
        groups = module.groups
        if groups == module.in_channels and groups > 1:
            # depthwise: channel i makes channels i k to i k + k - 1
            out = np.repeat(given, module.out_channels // groups)
            self.slots.append(Slot(name, "out", out, groups))
        else:
            out = self.new(module.out_channels)
            for labels in (given, out) if groups > 1 else ():
                # as many must stay in every group: the same places go from each
                parts = labels.reshape(groups, -1)
                for part in parts[1:]:
                    self.join(parts[0], part)
            self.slots += [Slot(name, "in", given, groups), Slot(name, "out", out, groups)]
        self.fix_shared(name, given, out)
        return out

    def count(self, name: str, places: int) -> None:
        self.positions[name] = self.positions.get(name, 0) + places

    def fix_shared(self, name: str, *labels: Labels) -> None:
        if name in self.shared:
            for part in labels:
                self.fix(part, self.shared[name])

    def call(self, node: fx.Node, name: str) -> Any:
        sources = [self.labels[source] for source in node.all_input_nodes]
        tensors = [labels for labels in sources if labels is not None]
        shape = _shape(node)
        if name in _MEASURING_CALLS or (name == "getitem" and not tensors):
            return None
        if name == "getitem":
            place: Any = node.args[1]
            return tensors[0][place] if isinstance(tensors[0], tuple) else self.unknown(node, "indexing")
        if name in ("chunk", "split") and isinstance(tensors[0], np.ndarray):
            return self.parts(node, tensors[0], name)
        if shape is None or not all(isinstance(labels, np.ndarray) for labels in tensors):
            return self.unknown(node, name) if tensors else None
        if name in ("cat", "concat"):
            return self.concatenation(node, tensors)
        if name in _PASSING_CALLS and len(tensors) == 1:
            # a padding may be of channels
            return tensors[0] if len(tensors[0]) == prod(shape[1:2]) else self.unknown(node, name)
        if name in ("mean", "sum", "amax") and len(shape) >= 2 and 1 not in _axes(node):
            return tensors[0]
        if name in _RESHAPING_CALLS and len(tensors) == 1:
            return self.flat(node, tensors[0], name)
        if name in _JOINING_CALLS:
            return self.joined(node, name)
        return self.unknown(node, name)

    def joined(self, node: fx.Node, name: str) -> Any:
        shape = _shape(node)
        assert shape is not None
        out = None
        for source in node.all_input_nodes:
            labels, its = self.labels[source], _shape(source)
            if labels is None and its is None:
                continue
            if labels is None or its is None or len(its) != len(shape) or len(shape) < 2:
                return self.unknown(node, f"{name} of tensors of {its} and {shape}")
            if its[1] == 1 and shape[1] != 1:
                # one channel for all of the others
                continue
            if out is None:
                out = labels
            else:
                self.join(out, labels)
        return out if out is not None else self.fresh(node, f"it comes out of {name}")

    def concatenation(self, node: fx.Node, tensors: list[Labels]) -> Any:
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        shape = _shape(node)
        assert shape is not None
        listed: Any = node.args[0]
        parts = [self.labels[source] for source in listed]
        if axis in (1, 1 - len(shape)):
            return np.concatenate(parts)
        for labels in parts[1:]:
            self.join(parts[0], labels)
        return parts[0]

    def parts(self, node: fx.Node, labels: Labels, name: str) -> Any:
        axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        how: Any = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
        if axis != 1:
            return self.unknown(node, f"{name} along axis {axis}")
        # sizes are written in the forward function, so channels may go only if all parts lose alike: nobody knows that here
        self.fix(labels, f"it goes through {name}, whose sizes are written in the code")
        if isinstance(how, int):
            each = -(-len(labels) // how) if name == "chunk" else how
            return tuple(labels[i : i + each] for i in range(0, len(labels), each))
        ends = np.cumsum(how)
        return tuple(np.split(labels, ends[:-1]))

    def flat(self, node: fx.Node, labels: Labels, name: str, start: int = 1) -> Any:
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        if before is None or after is None or start != 1:
            return self.unknown(node, "a reshape")
        rest = prod(before[2:])
        sizes: Any = node.args[1:] or tuple(node.kwargs.values())
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = sizes[0]
        # a width that is written in the code would be wrong afterwards
        written = name != "flatten" and (not sizes or sizes[-1] != -1)
        if written or after[0] != before[0] or after[1:] != (before[1] * rest,):
            return self.unknown(node, "a reshape")
        return np.repeat(labels, rest)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found: Any = node.meta.get("tensor_meta")
    return tuple(found.shape) if hasattr(found, "shape") else None


def _axes(node: fx.Node) -> list[int]:
    """Those that a reduction takes away."""
    rank = len(_shape(node.all_input_nodes[0]) or ())
    given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if given is None:
        return list(range(rank))
    return [axis % rank for axis in ([given] if isinstance(given, int) else given)]


def _shared(model: nn.Module, traced: fx.GraphModule) -> dict[str, str]:
    """{module: why it is not cut}: modules called twice, and parameters that two of them have."""
    called: dict[str, int] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            called[str(node.target)] = called.get(str(node.target), 0) + 1
    found = {name: f"{name} is called {count} times" for name, count in called.items() if count > 1}
    owner: dict[int, str] = {}
    for name in called:
        for p in model.get_submodule(name).parameters(recurse=False):
            other = owner.setdefault(id(p), name)
            if other != name:
                why = f"{name} and {other} share a parameter"
                found.update({name: why, other: why})
    return found


def cut(model: nn.Module, graph: Graph, removed: Sequence[int]) -> None:
    """Take units out of a module, in place: rows, columns, vectors and the numbers that modules keep of them."""
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
            # depthwise: as many groups as channels come in, and out is a multiple of it
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
    """What a consumer's rows are multiplied with, one [N, positions, I] for each of its convolution groups."""
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
