"""A coupling of layers: which rows of some are the inputs of another, so that both can be reordered or cut alike.

O outputs, I inputs, w width of a head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.model.layers import EXPERTS, Layer


def _separate(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """Values alone: a KV head's rows below each other."""
    return _of_heads(inputs, outputs, width, outputs // width, width, 0) if width else None


def _fused(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """Queries, keys and values below each other."""
    if not width:
        return None
    groups = (outputs // width - inputs // width) // 2
    return _of_heads(inputs, outputs, width, groups, width, outputs - groups * width)


def _grouped(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """For each KV head its queries, keys and values."""
    if not width:
        return None
    groups = (outputs // width - inputs // width) // 2
    each = outputs // groups if groups > 0 else 0
    return _of_heads(inputs, outputs, width, groups, each, each - width)


def _by_head(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """For each head something else, then the values."""
    if not width:
        return None
    heads = inputs // width
    return _of_heads(inputs, outputs, width, heads, outputs // heads, outputs // heads - width)


def _keys_values(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """Keys and values below each other."""
    return _of_heads(inputs, outputs, width, outputs // width // 2, width, outputs // 2) if width else None


def _of_heads(inputs: int, outputs: int, width: int, groups: int, stride: int, first: int) -> Tensor | None:
    """[1, I]: row first + group * stride + d of channel d of a head of the group."""
    heads = inputs // width
    if groups < 1 or heads % groups or stride < width or first < 0 or first + (groups - 1) * stride + width > outputs:
        return None
    group = torch.arange(heads) // (heads // groups)
    return (first + group[:, None] * stride + torch.arange(width)).reshape(1, -1)


def _stacked(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """A row for each input; of several for one (gate and up), the first of all inputs, then the second."""
    return None if outputs % inputs else torch.arange(outputs).reshape(-1, inputs)


def _interleaved(inputs: int, outputs: int, width: int | None) -> Tensor | None:
    """Several rows for each input, next to each other."""
    return None if outputs % inputs else torch.arange(outputs).reshape(inputs, -1).T


FORMS: Mapping[str, Callable[[int, int, int | None], Tensor | None]] = {
    "stacked": _stacked,
    "interleaved": _interleaved,
    "separate": _separate,
    "fused": _fused,
    "grouped": _grouped,
    "by head": _by_head,
    "keys and values": _keys_values,
}
"""(I, O, width of a head) -> rows [copies, I] that feed each input, or None if the sizes do not fit. Without a width the first two
alone do."""


@dataclass(frozen=True)
class Coupling:
    """`consumer` reads what the producers' rows give. forms: how the rows of each lie. width: of a head; None if there is none.

    With heads, inputs change places within a head, all heads that share values alike.
    """

    producers: tuple[Layer, ...]
    consumer: Layer
    forms: tuple[str, ...] = ("stacked",)
    width: int | None = None

    def rows(self, producer: int) -> Tensor:
        """[copies, I]: the rows of a producer that feed each input. Raises ValueError if the sizes do not fit."""
        layer, form = self.producers[producer], self.forms[producer]
        found = FORMS[form](self.consumer.shape[1], layer.shape[0], self.width)
        if found is None:
            raise ValueError(f"{layer.name} has {layer.shape[0]} outputs, which do not fit {self.consumer.name}")
        return found

    @property
    def heads(self) -> tuple[int, int] | None:
        """(heads, heads of which none shares a row with another)."""
        if self.width is None:
            return None
        heads = self.consumer.shape[1] // self.width
        return heads, min(len(set(self.rows(i)[0, :: self.width].tolist())) for i in range(len(self.producers)))

    def row_order(self, producer: int, order_I: Tensor) -> Tensor:
        """The order of a producer's rows that belongs to an order of the consumer's inputs."""
        rows = self.rows(producer)
        order = torch.arange(self.producers[producer].shape[0])
        order[rows] = rows[:, order_I]
        return order

    def reorder(self, order_I: Tensor) -> list[str]:
        """Reorder the consumer's columns and the producers' rows and biases in place; names of the biases that moved."""
        self.consumer.write(self.consumer.read()[:, order_I].clone())
        moved = []
        for i, producer in enumerate(self.producers):
            order = self.row_order(i, order_I)
            producer.write(producer.read()[order].clone())
            bias, name = _bias(producer)
            if bias is not None:
                bias.copy_(bias[order].clone())
                moved.append(name)
        return moved


def _bias(layer: Layer) -> tuple[Tensor | None, str]:
    """The bias of a layer's rows, if any, and its name."""
    if layer.kind not in EXPERTS:
        bias = layer.module._parameters.get("bias")
        return (None if bias is None else bias.detach()), f"{layer.name}.bias"
    name = layer.tensor_name + "_bias"
    bias = layer.module._parameters.get(name.rpartition(".")[2])
    return (None if bias is None else bias.detach()[layer.index]), name
