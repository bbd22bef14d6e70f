"""Finds the channels of a torch module that must go together, by following a torch.fx trace of its calls.

Each channel of each tensor (axis 1) gets a number. Operations that tie two channels to each other (a sum, a product, a depthwise
convolution, equal places in the groups of a grouped convolution) join their numbers. A channel that reaches the input, the output
or an operation that is not in the tables below is fixed: it stays. Channels under one number are a unit (graph.py).

The tables name the operations that are known to keep channels apart; a new operation is a name in one of them.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateurs.base.errors import PlanError
from secateurs.shrink.graph import Graph, Group, Labels, Slot

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


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Find a module's units. Raises PlanError if torch.fx cannot trace it."""
    from torch.fx.passes.shape_prop import ShapeProp

    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(*example)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} cannot be traced by torch.fx: {str(error).splitlines()[0]}") from error
    return _Walk(model, traced).run()


class _Numbers:
    """The numbers of channels: which are joined (a union-find forest), and why some are fixed."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.reason: dict[int, str] = {}

    def new(self, count: int) -> Labels:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return np.arange(start, start + count)

    def root(self, label: int) -> int:
        """The lowest of the numbers that are joined with this one."""
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, a: Labels, b: Labels) -> None:
        """Tie each channel of a to the channel of b in the same place."""
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            x, y = self.root(x), self.root(y)
            if x != y:
                first, second = min(x, y), max(x, y)
                self.parent[second] = first
                if second in self.reason:
                    self.reason.setdefault(first, self.reason[second])

    def fix(self, labels: Any, why: str) -> None:
        """Mark the channels of an array, or of a tuple of arrays, as ones that stay."""
        if isinstance(labels, tuple):
            for part in labels:
                self.fix(part, why)
        elif labels is not None:
            for label in labels.tolist():
                self.reason.setdefault(self.root(label), why)

    def why(self, label: int) -> str | None:
        """Why a channel is fixed, or None."""
        return self.reason.get(self.root(label))


class _Walk:
    """Visits every call of a traced module, in order.

    labels: the numbers of the channels that each call gives: an array, a tuple of arrays for several tensors, or None for what
    has no channels.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        self.model, self.traced = model, traced
        self.numbers = _Numbers()
        self.labels: dict[fx.Node, Any] = {}
        self.slots: list[Slot] = []
        self.positions: dict[str, int] = {}
        self.norms: dict[str, str] = {}
        self.shared = _shared(model, traced)

    def run(self) -> Graph:
        for node in self.traced.graph.nodes:
            self.labels[node] = self.visit(node)
        root = self.numbers.root
        slots = [
            Slot(s.module, s.place, np.array([root(x) for x in s.labels.tolist()], np.int64), s.groups)
            for s in self.slots
        ]
        groups, fixed = _grouped(slots, self.numbers)
        return Graph(slots, groups, self.positions, fixed, self.norms)

    def visit(self, node: fx.Node) -> Any:
        """Return the labels of what a node gives, and note the slots of a layer."""
        if node.op == "placeholder":
            return self.fresh(node, "it is the model's input")
        if node.op == "get_attr":
            return self.fresh(node, f"it meets {node.target}, a tensor by itself")
        if node.op == "output":
            for source in node.all_input_nodes:
                self.numbers.fix(self.labels[source], "it is the model's output")
            return None
        if node.op == "call_module":
            return self.module(node, str(node.target), self.model.get_submodule(str(node.target)))
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
        return self.call(node, name)

    def fresh(self, node: fx.Node, why: str) -> Any:
        """New numbers for what a node gives, all fixed."""
        shape = _shape(node)
        if shape is None or len(shape) < 2:
            return None
        labels = self.numbers.new(shape[1])
        self.numbers.fix(labels, why)
        return labels

    def unknown(self, node: fx.Node, what: str) -> Any:
        """Fix all channels that enter and leave a node."""
        for source in node.all_input_nodes:
            self.numbers.fix(self.labels[source], f"it goes through {what}, which is not known to keep channels apart")
        return self.fresh(node, f"it comes out of {what}")

    def module(self, node: fx.Node, name: str, module: nn.Module) -> Any:
        """visit() for a layer."""
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
            out = self.numbers.new(module.out_features)
            self.slots += [Slot(name, "in", given), Slot(name, "out", out)]
            self.fix_shared(name, given, out)
            return out
        if isinstance(module, _VECTORS):
            if len(module.weight if module.weight is not None else given) == len(given):
                self.slots.append(Slot(name, "vector", given))
                self.fix_shared(name, given)
                source = node.all_input_nodes[0]
                # a norm that several layers feed has one mean for all of them
                if (
                    source.op == "call_module"
                    and len(source.users) == 1
                    and name not in self.shared
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
            out = self.numbers.new(module.out_channels)
            for labels in (given, out) if groups > 1 else ():
                # every group must keep equally many: the same places go from each
                parts = labels.reshape(groups, -1)
                for part in parts[1:]:
                    self.numbers.join(parts[0], part)
            self.slots += [Slot(name, "in", given, groups), Slot(name, "out", out, groups)]
        self.fix_shared(name, given, out)
        return out

    def count(self, name: str, places: int) -> None:
        """Add to the number of output places of a layer, which may be called several times."""
        self.positions[name] = self.positions.get(name, 0) + places

    def fix_shared(self, name: str, *labels: Labels) -> None:
        """Fix the channels of a layer that is called twice or shares a parameter."""
        if name in self.shared:
            for part in labels:
                self.numbers.fix(part, self.shared[name])

    def call(self, node: fx.Node, name: str) -> Any:
        """visit() for a function or a method of a tensor."""
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
            # pad() may add channels
            return tensors[0] if len(tensors[0]) == prod(shape[1:2]) else self.unknown(node, name)
        if name in ("mean", "sum", "amax") and len(shape) >= 2 and not {0, 1} & {*_axes(node)}:
            return tensors[0]
        if name in _RESHAPING_CALLS and len(tensors) == 1:
            return self.flat(node, tensors[0], name)
        if name in _JOINING_CALLS:
            return self.joined(node, name)
        return self.unknown(node, name)

    def joined(self, node: fx.Node, name: str) -> Any:
        """An operation on elements of tensors of the same channels."""
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
                self.numbers.join(out, labels)
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
            self.numbers.join(parts[0], labels)
        return parts[0]

    def parts(self, node: fx.Node, labels: Labels, name: str) -> Any:
        """A tensor split along its channels, which stay."""
        axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        how: Any = node.args[1] if len(node.args) > 1 else next(iter(node.kwargs.values()))
        if axis != 1:
            return self.unknown(node, f"{name} along axis {axis}")
        # sizes are written in the forward function: channels could go only if all parts lose equally many
        self.numbers.fix(labels, f"it goes through {name}, whose sizes are written in the code")
        if isinstance(how, int):
            each = -(-len(labels) // how) if name == "chunk" else how
            return tuple(labels[i : i + each] for i in range(0, len(labels), each))
        ends = np.cumsum(how)
        return tuple(np.split(labels, ends[:-1]))

    def flat(self, node: fx.Node, labels: Labels, name: str, start: int = 1) -> Any:
        """All axes after the first made one: each number is repeated for the places of its channel."""
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


def _grouped(slots: Sequence[Slot], numbers: _Numbers) -> tuple[list[Group], dict[str, str]]:
    """Groups of units that stand in the same slots, and {layer: why some of its output channels are fixed}."""
    where: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        for label in dict.fromkeys(slot.labels.tolist()):
            where.setdefault(label, []).append(i)
    fixed: dict[str, str] = {}
    by_slots: dict[tuple[int, ...], list[int]] = {}
    for label, found in where.items():
        makers = [slots[i].module for i in found if slots[i].place == "out"]
        why = numbers.why(label)
        if why is None and not any(slots[i].place == "in" for i in found):
            why = "nothing reads it that could make up for it"
        if why is not None:
            fixed.update(dict.fromkeys(makers, why))
        elif makers:
            by_slots.setdefault(tuple(found), []).append(label)
    groups: list[Group] = []
    for together, units in by_slots.items():
        name = next(slots[i].module for i in together if slots[i].place == "out")
        # two groups may begin in one layer
        while any(group.name == name for group in groups):
            name += "'"
        groups.append(Group(name, np.array(units, np.int64), together))
    return groups, fixed


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    found: Any = node.meta.get("tensor_meta")
    return tuple(found.shape) if hasattr(found, "shape") else None


def _axes(node: fx.Node) -> list[int]:
    """The axes that a reduction removes."""
    rank = len(_shape(node.all_input_nodes[0]) or ())
    given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if given is None:
        return list(range(rank))
    return [axis % rank for axis in ([given] if isinstance(given, int) else given)]


def _shared(model: nn.Module, traced: fx.GraphModule) -> dict[str, str]:
    """{module: why it is not cut}, for modules that are called twice or share a parameter."""
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
