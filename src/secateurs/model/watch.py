"""Collects Stats of layers' inputs while their block runs: modules by hooks, products inside larger functions by a mode."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.base.errors import LayerError
from secateurs.matrix.stats import Stats
from secateurs.model.blocks import Stop
from secateurs.model.layers import EXPERTS, Layer
from secateurs.model.products import products


class Unlike(Exception):
    """Raised where a layer that shared the Stats of another one is called with an input of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Uncalled(Exception):
    """Raised where no module of some layers was called: their weights may be multiplied by a function."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names[0])
        self.names = names


class _Call(NamedTuple):
    """What a layer was called with; None where that is not needed again.

    version: of the tensor then, so that a change in place shows; None if it has none.
    """

    x: Tensor | None = None
    version: int | None = None

    @classmethod
    def of(cls, x: Tensor) -> "_Call":
        return cls(x, None if x.is_inference() else x._version)

    def same(self, other: "_Call") -> bool:
        return self.x is other.x and self.version is not None and self.version == other.version


_FORGOTTEN = _Call()


class Watch:
    """The Stats of some layers of one block. Use hooks() around the passes, next_batch() after each batch, finish() at the end.

    A layer may be called any number of times in a batch; all calls count. Layers whose every call has the same tensor share one
    Stats, but for those named in `apart`: where calls turn out to differ, Unlike names the layer to set apart in a new Watch. Where
    the modules of some layers are not called, Uncalled names these: a new Watch looks for functions that multiply by their weights.
    """

    def __init__(
        self, layers: Sequence[Layer], gram: bool, may_stop: bool, apart: frozenset[str] = frozenset(),
        uncalled: frozenset[str] = frozenset(), some: bool = False,
    ) -> None:  # fmt: skip
        """some: the layers are some of the experts, of which no token may reach any."""
        self.some = some
        self.layers = [layer for layer in layers if layer.kind not in EXPERTS]
        self.experts = [layer for layer in layers if layer.kind in EXPERTS]
        self.uncalled = uncalled
        self.gram = gram
        self.apart = apart
        # a pass may end at the last call; which call of an expert is the last one is not known
        self.may_stop = may_stop and not self.experts and not uncalled
        self.leader: dict[str, str] = {}
        # leaders of others
        self.followed: set[str] = set()
        self.sums: dict[str, Stats] = {}
        # of the batch under way
        self.calls: dict[str, list[_Call]] = {}
        # how often each layer was called in the batch before
        self.usual: dict[str, int] = {}
        self.dense: dict[str, list[_Call]] | None = None
        self.at_dense = False

    @contextmanager
    def looking_at_dense(self) -> Iterator[None]:
        """A context for a pass with the dense model's inputs, which are kept until the same batch of the pruned model follows."""
        self.dense, self.at_dense = {}, True
        try:
            yield
        finally:
            self.at_dense = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        places = [(layer, module) for layer in self.layers for module in layer.places]
        handles = [module.register_forward_pre_hook(self._hook(layer), with_kwargs=True) for layer, module in places]
        try:
            inside = self.experts or self.uncalled or any(_attends(y.module) for y in self.layers)
            with _Products(self) if inside else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer) -> Callable[..., None]:
        return lambda module, args, named: self.see(layer, next(iter((*args, *named.values()))), module)

    def see(self, layer: Layer, x: Tensor, module: nn.Module | None = None) -> None:
        """Note that a layer is called with x. module: the one of its places where it is."""
        calls = self.dense if self.at_dense and self.dense is not None else self.calls
        mine, call = calls.setdefault(layer.name, []), _Call.of(x)
        number = len(mine)
        # a loop of a hundred calls holds the inputs of those that another layer may share
        mine.append(call if self.at_dense or number == 0 or layer.name in self.followed else _FORGOTTEN)
        if self.at_dense:
            return
        leader = self.leader.get(layer.name)
        if leader is None:
            leader = self.leader[layer.name] = self._shared(layer, call)
            self.followed |= {leader} - {layer.name}
        if leader != layer.name:
            if not any(call.same(other) for other in self.calls.get(leader, [])[number : number + 1]):
                raise Unlike(layer.name)
        else:
            self.add(layer, layer.inputs(x, module), self._dense_inputs(layer, number, module))
        if self.may_stop and self.usual and all(len(self.calls.get(n, ())) >= k for n, k in self.usual.items()):
            raise Stop

    def _shared(self, layer: Layer, call: _Call) -> str:
        """The layer whose Stats a layer takes, by its first call: another one that was called with the same, or its own."""
        if layer.kind == "conv" or layer.name in self.apart:
            return layer.name
        convolutions = {other.name for other in self.layers if other.kind == "conv"}
        alike = (
            n
            for n, calls in self.calls.items()
            if n not in convolutions and self.leader.get(n) == n and call.same(calls[0])
        )
        return next(alike, layer.name)

    def _dense_inputs(self, layer: Layer, number: int, module: nn.Module | None) -> Tensor | None:
        calls = [] if self.dense is None else self.dense.get(layer.name, [])
        if number >= len(calls):
            return None
        x, version = calls[number]
        assert x is not None
        if _Call.of(x).version != version:
            raise LayerError(f"{layer.name}: its block changes the layer's input in place; leave out --blend")
        return layer.inputs(x, module)

    def add(self, layer: Layer, x_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        if layer.name not in self.sums:
            self.sums[layer.name] = Stats.zeros(layer.shape[1], self.gram, x_TI.device)
        self.sums[layer.name].add_(x_TI, dense_TI)

    def next_batch(self) -> None:
        missing = [layer.name for layer in self.layers if layer.name not in self.leader]
        if not self.uncalled and missing:
            raise Uncalled(missing)
        for name, leader in self.leader.items():
            if len(self.calls.get(name, ())) != len(self.calls.get(leader, ())):
                raise Unlike(name)
        self.usual = {name: len(calls) for name, calls in self.calls.items()}
        self.calls.clear()

    def finish(self) -> dict[str, Stats]:
        """Stats by layer, which are not finished: other ranks may have sums of their own."""
        if self.experts and not self.some and not any(layer.name in self.sums for layer in self.experts):
            raise LayerError(idle(self.experts[0]))
        found = {y.name: self.sums[self.leader[y.name]] for y in self.layers if y.name in self.leader}
        for layer in self.experts:
            found[layer.name] = self.sums.get(layer.name) or Stats.zeros(
                layer.shape[1], self.gram, layer.parameter.device
            )
        return found


def idle(expert: Layer) -> str:
    """What is wrong where no expert gets a token."""
    return f"no expert of {expert.tensor_name} was seen at work; its forward is not the eager one"


def _attends(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


class _Products(TorchFunctionMode):
    """Watches functions that multiply by a layer's weight without calling a module that could be hooked.

    Matrix products with a slice of a fused expert parameter, or with the weight of a module that is not called, and
    F.multi_head_attention_forward.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        functional = [layer for layer in watch.layers if layer.name in watch.uncalled]
        self.at = {layer.read().data_ptr(): layer for layer in [*watch.experts, *functional]}
        self.by_parameter = {(id(layer.parameter), layer.index): layer for layer in watch.layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.multi_head_attention_forward:
            return self._attention(func, inspect.signature(func).bind(*args, **kwargs).arguments)
        for product in products(func, args, kwargs) if self.at else ():
            layer = self.at.get(product.place)
            if layer is None or product.shape != layer.shape:
                continue
            if layer.kind not in EXPERTS:
                self.watch.see(layer, product.x_TI)
            elif not self.watch.at_dense and product.outputs_first == (layer.kind == "expert"):
                # experts that run on every token get zeros for those that are not theirs
                mine_T = product.x_TI.any(1) if product.whole else slice(None)
                self.watch.add(layer, product.x_TI[mine_T])
        return func(*args, **kwargs)

    def _attention(self, func: Any, given: dict[str, Any]) -> Any:
        apart = given.get("use_separate_proj_weight")
        for i, name in enumerate(("query", "key", "value")):
            key = (id(given[f"{name[0]}_proj_weight"]), 0) if apart else (id(given["in_proj_weight"]), i)
            if key in self.by_parameter:
                self.watch.see(self.by_parameter[key], given[name])
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        out = self.by_parameter.get((id(weight), 0))
        if out is None:
            return func(**given)
        # with 1 as the last matrix the function gives what that is multiplied with
        one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        x, *rest = func(**{**given, "out_proj_weight": one, "out_proj_bias": None})
        self.watch.see(out, x)
        return nn.functional.linear(x, weight, bias), *rest
