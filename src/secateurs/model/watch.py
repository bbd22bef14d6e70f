"""Collects Stats of layers' inputs, by hooks, while their block runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.base.errors import LayerError
from secateurs.matrix.stats import Stats
from secateurs.model.blocks import Stop
from secateurs.model.layers import Layer


class Watch:
    """The Stats of some layers of one block. Use hooks() around the passes, next_batch() after each batch, finish() at the end."""

    def __init__(self, layers: Sequence[Layer], gram: bool, may_stop: bool) -> None:
        self.layers = [layer for layer in layers if layer.kind != "expert"]
        self.experts = [layer for layer in layers if layer.kind == "expert"]
        self.gram = gram
        # a pass may end at the last layer's input; which call of an expert is the last one is not known
        self.may_stop = may_stop and not self.experts
        self.leader: dict[str, str] = {}
        self.sums: dict[str, Stats] = {}
        self.current: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self.first_batch = True
        self.dense: dict[str, Tensor] | None = None
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
        handles = [layer.module.register_forward_pre_hook(self._hook(layer)) for layer in self.layers]
        try:
            with _ExpertMode(self) if self.experts else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if self.at_dense:
                assert self.dense is not None
                self.dense[layer.name] = x
                return
            self.called.add(layer.name)
            if self.first_batch and layer.name not in self.leader:
                shared = (name for name, other in self.current.items() if other is x and layer.kind != "conv2d")
                self.leader[layer.name] = next(shared, layer.name)
            leader = self.leader[layer.name]
            if leader != layer.name and self.current.get(leader) is not x:
                raise LayerError(f"{layer.name} shared its input with {leader} in one batch and not in the next")
            if leader == layer.name:
                self.current[layer.name] = x
                self.add(layer, layer.inputs(x))
            if self.may_stop and not self.first_batch and len(self.called) == len(self.layers):
                raise Stop

        return hook

    def add(self, layer: Layer, x_TI: Tensor) -> None:
        if self.at_dense:
            return
        if layer.name not in self.sums:
            self.sums[layer.name] = Stats.zeros(layer.shape[1], self.gram, x_TI.device)
        dense = None if self.dense is None else self.dense.get(layer.name)
        self.sums[layer.name].add_(x_TI, None if dense is None else layer.inputs(dense))

    def next_batch(self) -> None:
        missing = [layer.name for layer in self.layers if layer.name not in self.leader]
        if missing:
            raise LayerError(
                f"{missing[0]} was never called on calibration inputs; leave it out with --skip '{missing[0]}'"
            )
        self.first_batch = False
        self.current.clear()
        self.called.clear()

    def finish(self) -> dict[str, Stats]:
        if self.experts and not any(layer.name in self.sums for layer in self.experts):
            raise LayerError(
                f"no expert of {self.experts[0].tensor_name} was seen at work; its forward is not the eager one"
            )
        for name, stats in self.sums.items():
            stats.finish()
            if not torch.isfinite(stats.sqnorm_I).all():
                bad = int((~torch.isfinite(stats.sqnorm_I)).sum())
                raise LayerError(
                    f"{name}: {bad} of {len(stats.sqnorm_I)} inputs were NaN or infinite on calibration text"
                )
        found = {layer.name: self.sums[self.leader[layer.name]] for layer in self.layers}
        for layer in self.experts:
            found[layer.name] = self.sums.get(layer.name) or Stats.zeros(
                layer.shape[1], self.gram, layer.parameter.device
            )
        return found


class _ExpertMode(TorchFunctionMode):
    """Watches F.linear for calls on a slice of a fused expert parameter: an eager expert loop has no module to hook."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.at = {layer.read().data_ptr(): layer for layer in watch.experts}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and isinstance(args[1], Tensor):
            layer = self.at.get(args[1].data_ptr())
            if layer is not None and tuple(args[1].shape) == layer.shape:
                self.watch.add(layer, args[0].reshape(-1, layer.shape[1]))
        return func(*args, **(kwargs or {}))
