"""Finds the channels of a torch module that must go together, by following the operators of its graph.

torch.export gives the graph, of operators that methods, functions and modules all come down to. Each element of each tensor has the
number of its channel (labels.py). operators.py says what each operator does to numbers: it moves them, ties some of them to each
other, or reads them and makes new ones. What is tied must be rectangular in every shape that it takes on the way. An operator that
is in no table fixes its channels. Channels under one number are a unit (graph.py); proof.py shows that it can go.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateurs.base.errors import PlanError
from secateurs.shrink.attention import opened
from secateurs.shrink.graph import Axis, Graph, Group, Labels, Size, layer_of
from secateurs.shrink.labels import FREE, STAYS, Numbers, changing, same
from secateurs.shrink.layer_rules import LAYERS
from secateurs.shrink.operators import MOVES, POINTWISE, Computed, Given, Unknown
from secateurs.shrink.outputs import only_tensors
from secateurs.shrink.passes import forgetting
from secateurs.shrink.readers import Reader

_RULES = {**MOVES, **LAYERS}
# parameters of more elements than this are not followed element by element
_ELEMENTS = 1 << 22
# constants of at most this many elements are computed: they may be indices
_CONSTANT = 1 << 22


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """Find a module's units. Raises PlanError if torch.export refuses the module.

    Parameters that no pass in the module's own mode uses (heads that only training has) are followed in train mode.
    """
    with _exporting(), opened(model), forgetting(model):
        walk = Walk(model, len(example[0]))
        try:
            with only_tensors(model):
                program = torch.export.export(model, example, strict=False)
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise PlanError(f"{type(model).__name__} cannot be traced by torch.export: {said[0]}") from error
        walk.visit(program)
        if not model.training and walk.unused(program):
            # proof.py shows what this adds, and what it misses where train mode is not exported
            with suppress(Exception):
                twin = copy.deepcopy(model).train()
                with only_tensors(twin):
                    walk.visit(torch.export.export(twin, example, strict=False))
        return walk.finish()


@contextmanager
def _exporting() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # torch.export warns of attributes that forward() writes; it works on a copy of them
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Walk:
    """Visits every operator of a graph, in order.

    Rules of operators.py use its methods. shaped: labels that must become rectangular, and the axes that must not be cut, with the
    reason if they would be. sized: operators that state a number of channels: (where, the number, labels, their axis).
    """

    def __init__(self, model: nn.Module, examples: int) -> None:
        self.model, self.examples = model, examples
        self.program: Any = None
        # what is seen in a second graph is tied to the first, and neither read nor counted
        self.again = False
        self.numbers = Numbers()
        self.values: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, str] = {}
        self.elements: dict[str, Tensor] = {}
        self.axes: dict[tuple[str, int], tuple[Tensor, str]] = {}
        self.stated: list[tuple[str, str, int | None, Tensor]] = []
        self.sized: list[tuple[fx.Node, int, Tensor, int]] = []
        self.shaped: list[tuple[Tensor, tuple[int, ...], str]] = []
        self.together: list[tuple[Tensor, str]] = []
        self.readers: dict[str, tuple[Reader, Tensor]] = {}
        self.positions: dict[str, int] = {}
        self.normed: list[tuple[str, str]] = []
        self.tied = _tied(model)
        self.whole: dict[str, str] = {}

    def visit(self, program: Any) -> None:
        """Follow every operator of a graph that something else depends on."""
        self.again, self.program = self.program is not None, program
        program.graph.eliminate_dead_code()
        signature = program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.placeholder(node, held, lifted)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.fix(self.values[source], "it is the model's output")
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            else:
                self.values[node] = None

    def unused(self, program: Any) -> bool:
        """True if there are parameters of layers that no operator takes."""
        held = program.graph_signature.inputs_to_parameters
        return any(not node.users for node in program.graph.nodes if node.name in held)

    # ------------------------------------------------------------------------------------------------ values of nodes

    def placeholder(self, node: fx.Node, held: dict[str, str], lifted: dict[str, str]) -> Any:
        name, found = held.get(node.name), node.meta.get("val")
        if not isinstance(found, Tensor):
            return None
        if name is not None:
            value = _held(self.model, name)
            if value.is_floating_point():
                self.names[node] = name
                return None
            self.constants[node] = value
        elif node.name in lifted:
            self.constants[node] = self.program.constants[lifted[node.name]]
        else:
            return same(STAYS, tuple(found.shape))
        return same(FREE, tuple(found.shape))

    def call(self, node: fx.Node) -> Any:
        """What a call gives: labels of each tensor."""
        if getattr(node.target, "__name__", "") == "getitem":
            source, place = node.args
            return self.values[source][place]  # type: ignore[index]
        name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target))
        found = node.meta.get("val")
        if found is None or isinstance(found, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
            # assertions and numbers
            return None
        if self.constant(node):
            return self.outputs(node, FREE)
        rule = _RULES.get(name.rstrip("_"), _RULES.get(name))
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = POINTWISE
        try:
            if rule is None:
                raise Unknown
            return rule(self, Given.of(self, node, name))
        except Unknown as error:
            what = f"{name}{f' {error}' if str(error) else ''}{self.place(node)}"
            if isinstance(error, Computed):
                self.whole[self.module_of(node)] = f"it has a {name} {error}"
            for source in node.all_input_nodes:
                self.fix(self.labels(source), f"it goes through {what}, which is not known to keep channels apart")
            return self.outputs(node, STAYS)

    def constant(self, node: fx.Node) -> bool:
        """True if a node depends on no input and no parameter. Its value is computed if it is small."""
        if any(source not in self.constants for source in node.all_input_nodes):
            return False
        self.constants[node] = None
        found = node.meta["val"]
        if isinstance(found, Tensor) and not found.is_floating_point() and found.numel() <= _CONSTANT:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self.constants[source])
            try:
                self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except Exception:
                # one of its inputs was not computed
                self.constants[node] = None
        return True

    def outputs(self, node: fx.Node, number: int) -> Any:
        found = node.meta["val"]
        if isinstance(found, Tensor):
            return same(number, tuple(found.shape))
        return [same(number, tuple(x.shape)) if isinstance(x, Tensor) else None for x in found]

    def labels(self, node: fx.Node) -> Any:
        """The labels of what a node gives. A parameter that is used as a tensor has a number for each element."""
        name = self.names.get(node)
        return self.values[node] if name is None else self.elements_of(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return tuple(_held(self.model, name).shape)

    def elements_of(self, name: str) -> Tensor:
        if name not in self.elements:
            shape = tuple(_held(self.model, name).shape)
            followed = int(np.prod(shape)) <= _ELEMENTS
            self.elements[name] = self.numbers.new(*shape) if followed else same(STAYS, shape)
            for (tensor, axis), (labels, _) in self.axes.items():
                if tensor == name:
                    self.join(self.elements[name], _along(labels, axis, shape), f"{name} is used in two ways")
        return self.elements[name]

    # ------------------------------------------------------------------------------------------------ used by rules

    def join(self, a: Tensor, b: Tensor, why: str) -> None:
        self.numbers.join(a, b, why)

    def fix(self, labels: Any, why: str) -> None:
        """Mark the channels of a tensor, or of a list of tensors, as ones that stay."""
        for part in labels if isinstance(labels, list) else [labels]:
            if part is not None:
                self.numbers.fix(part, why)

    def mixed(self, labels: Tensor, axes: Sequence[int], what: str) -> Tensor:
        """Tie what lies along axes, and leave one place of each."""
        for axis in axes:
            axis %= max(labels.dim(), 1)
            if labels.dim() and labels.shape[axis] > 1:
                first = labels.narrow(axis, 0, 1)
                if axis in changing(labels):
                    self.join(first.expand(labels.shape), labels, f"{what} takes it together with others that stay")
                    if not changing(first):
                        self.together.append((first, f"{what} takes all of its channels together"))
                labels = first
        return labels

    def axis(self, name: str, axis: int, labels: Tensor | None = None, role: str = "") -> Tensor:
        """The labels of an axis of a parameter, which are new, or tied to those that are given."""
        shape = tuple(_held(self.model, name).shape)
        if (name, axis) not in self.axes:
            new = self.numbers.new(shape[axis]) if labels is None else labels
            self.axes[name, axis] = (new, role)
            if name in self.elements:
                self.join(self.elements[name], _along(new, axis, shape), f"{name} is used in two ways")
        elif labels is not None:
            self.join(self.axes[name, axis][0], labels, f"{name} is used more than once")
        return self.axes[name, axis][0]

    def state(self, module: str, attribute: str, labels: Tensor) -> None:
        """A module states how many of these there are."""
        if isinstance(getattr(self.model.get_submodule(module), attribute, None), int):
            self.stated.append((module, attribute, None, labels))

    def read(self, reader: Reader, labels: Tensor, places: int) -> None:
        """A layer reads channels, at so many places of all examples."""
        old = self.readers.get(reader.weight)
        if old is not None:
            self.join(old[1], labels, f"{reader.weight} is used more than once")
        if self.again:
            return
        if old is not None:
            # each call must add the intercept
            bias = reader.bias if reader.bias == old[0].bias else None
            reader = Reader(reader.weight, reader.kind, reader.labels, bias, reader.groups, old[0].calls + 1)
        self.readers[reader.weight] = (reader, labels)
        self.count(reader.weight, places)

    def count(self, weight: str, places: int) -> None:
        """Add to the number of places that a weight is multiplied at."""
        if self.again:
            return
        self.positions[weight] = self.positions.get(weight, 0) + max(1, places // self.examples)

    def norms(self, maker: str, path: str) -> None:
        """A batch norm takes what a layer makes, and nothing else does; or '' for another batch norm."""
        if not self.again:
            self.normed.append((maker, path))

    def module_of(self, node: fx.Node) -> str:
        """The module whose forward function a node was called in."""
        return next(iter(self.modules_of(node)), "")

    def modules_of(self, node: fx.Node) -> list[str]:
        """The modules that a node was called in, the innermost first."""
        found = [re.sub(r"@\d+", "", path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        return list(dict.fromkeys(reversed(found)))

    def place(self, node: fx.Node) -> str:
        """Where a node was called, as part of a sentence."""
        path = self.module_of(node)
        return f" in {path}" if path else ""

    # ------------------------------------------------------------------------------------------------ the end

    def finish(self) -> Graph:
        self.square()
        find = self.numbers.find
        axes = []
        for (name, number), (labels, role) in self.axes.items():
            axes.append(Axis(name, number, find(labels).numpy(), role))
        by_axis = {axis.tensor for axis in axes}
        for name, labels in self.elements.items():
            found = find(labels)
            along = changing(found)
            if len(along) > 1:
                self.fix(found, f"{name} has no axis of its own for it")
            elif along and name not in by_axis:
                axes.append(Axis(name, along[0], _vector(found, along[0])))
        # a bias that others use as well takes no intercept
        takers = [r.bias for r, _ in self.readers.values()]
        own = {bias for bias in takers if takers.count(bias) == 1 and bias not in self.elements}
        readers = {
            name: Reader(name, r.kind, find(labels).numpy(), r.bias if r.bias in own else None, r.groups, r.calls)
            for name, (r, labels) in self.readers.items()
        }
        sizes = [Size(m, a, p, find(labels).numpy()) for m, a, p, labels in self.stated]
        sizes = _once([*sizes, *self.found_sizes()])
        groups, fixed = _grouped(axes, sizes, readers, self.numbers, self.together)
        fixed = {**self.whole, **fixed}
        makers, norms = ([pair[i] for pair in self.normed] for i in (0, 1))
        alone = {
            maker: norm
            for maker, norm in self.normed
            if maker in readers and makers.count(maker) == norms.count(norm) == readers[maker].calls == 1
        }
        return Graph(axes, sizes, readers, groups, self.positions, fixed, alone)

    def square(self) -> None:
        """Tie numbers until what goes with each of them is rectangular in every tensor, and fix what is picked by its place."""
        again = True
        while again:
            again = False
            for labels, avoided, why in self.shaped:
                found = self.numbers.find(labels)
                along = changing(found)
                if len(along) > 1:
                    # channels lie on the longest axis, and of two on the later one
                    longest = max(along, key=lambda axis: (axis not in avoided, found.shape[axis], axis))
                    self.mixed(found, [axis for axis in along if axis != longest], why)
                    again = True
        for labels, avoided, why in self.shaped:
            found = self.numbers.find(labels)
            if set(changing(found)) & set(avoided):
                self.fix(found, why)

    def found_sizes(self) -> list[Size]:
        """Attributes of modules that hold a number of channels which an operator in their forward function was given."""
        found = []
        for node, number, labels, axis in self.sized:
            here = self.numbers.find(labels)
            if changing(here) != [axis % here.dim()]:
                continue
            vector = _vector(here, axis % here.dim())
            for path in self.modules_of(node):
                module = self.model.get_submodule(path)
                held = set(_integers(module, number))
                if held:
                    # a method of a member may have been called, which leaves no trace in the graph
                    for name, member in module.named_modules(prefix=path):
                        same_names = [pair for pair in _integers(member, number) if pair in held]
                        found += [Size(name, attribute, place, vector, True) for attribute, place in same_names]
                    break
        return found


def _held(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def _along(labels: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Labels of an axis as those of a tensor."""
    return labels.reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _vector(labels: Tensor, axis: int) -> Labels:
    """Labels that change along one axis only, along it."""
    found: Labels = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])[0].numpy()
    return found


def _integers(module: nn.Module, number: int) -> Iterator[tuple[str, int | None]]:
    """The attributes of a module that are a number, and places of attributes that are tuples or lists of numbers."""
    for name, value in vars(module).items():
        if type(value) is int and value == number:
            yield name, None
        elif type(value) in (tuple, list) and all(type(x) is int for x in value):
            yield from ((name, place) for place, x in enumerate(value) if x == number)


def _once(sizes: Sequence[Size]) -> list[Size]:
    """One size for each place: the one that the table of layers gave, else what was guessed, unless it counts two things."""
    found: dict[tuple[str, str, int | None], list[Size]] = {}
    for size in sizes:
        found.setdefault((size.module, size.attribute, size.place), []).append(size)
    return [
        held[0]
        for held in found.values()
        if not held[0].guessed or len({np.sort(s.labels).tobytes() for s in held}) == 1
    ]


def _grouped(
    axes: Sequence[Axis], sizes: Sequence[Size], readers: dict[str, Reader], numbers: Numbers,
    together: Sequence[tuple[Tensor, str]],
) -> tuple[list[Group], dict[str, str]]:  # fmt: skip
    """Groups of units that have the same places, and {layer: why some of its output channels are fixed}."""
    reasons = numbers.reasons()
    where: dict[int, list[tuple[str, Any, int]]] = {}
    for kind, found in (("axis", enumerate(axes)), ("size", enumerate(sizes)), ("reader", readers.items())):
        for key, held in found:
            for label, count in zip(*np.unique(held.labels, return_counts=True), strict=True):
                if label > STAYS:
                    where.setdefault(int(label), []).append((kind, key, int(count)))
    alone = {int(numbers.find(labels).flatten()[0]): why for labels, why in together[::-1]}
    fixed: dict[str, str] = {}
    by_places: dict[tuple[tuple[str, Any, int], ...], list[int]] = {}
    alike: dict[tuple[tuple[str, Any, int], ...], list[int]] = {}
    for label, places in where.items():
        alike.setdefault(tuple(places), []).append(label)
    for spots, labels in alike.items():
        makers = [layer_of(axes[key].tensor) for kind, key, _ in spots if kind == "axis" and axes[key].role == "out"]
        unread = not any(kind == "reader" for kind, _, _ in spots)
        one = any(kind == "axis" and count == len(axes[key].labels) > 1 for kind, key, count in spots)
        for label in labels:
            why = reasons.get(label)
            if why is None and unread:
                why = "nothing reads it that could make up for it"
            if why is None and one:
                why = alone.get(label, "its channels go together")
            if why is not None:
                fixed.update(dict.fromkeys(makers, why))
            elif makers:
                by_places.setdefault(spots, []).append(label)
    groups: list[Group] = []
    for found_places, units in by_places.items():
        of = {kind: tuple(key for k, key, _ in found_places if k == kind) for kind in ("axis", "size", "reader")}
        first = next(axes[i] for i in of["axis"] if axes[i].role == "out")
        name = layer_of(first.tensor)
        # two groups may begin in one layer
        while any(group.name == name for group in groups):
            name += "'"
        groups.append(
            Group(name, np.array(units, np.int64), of["axis"], of["reader"], of["size"], _run(first.labels, units))
        )
    return groups, fixed


def _run(labels: Labels, units: Sequence[int]) -> int:
    """The least number of channels of a unit that lie next to each other."""
    ends = np.flatnonzero(np.diff(labels, append=-1))
    lengths = np.diff(ends, prepend=-1)
    return int(lengths[np.isin(labels[ends], units)].min())


def _tied(model: nn.Module) -> dict[str, str]:
    """{parameter: why its layer is not cut}, for those that two modules share."""
    owner: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = owner.setdefault(id(parameter), name)
        if other != name and layer_of(other) != layer_of(name):
            why = f"{layer_of(name)} and {layer_of(other)} share a parameter"
            found.update({name: why, other: why})
    return found
