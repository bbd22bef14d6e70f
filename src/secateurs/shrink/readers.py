"""Layers that read channels: the matrices that they multiply with, and the inputs that these are multiplied with.

A convolution's columns are its input channels times its kernel. A transposed convolution is one of its kernel turned around, over
inputs with zeros between them. A recurrent layer has two matrices: one reads its inputs, one its own last outputs. They are seen
where they are called, as functions, so that it does not matter which module calls them.

N examples, O outputs, I inputs, K places of the kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_RECURRENT = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
# what is called, and the names of its arguments
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.linear: ("linear", ("input", "weight", "bias")),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), ("conv", _CONVOLUTION)),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), ("transposed", _TRANSPOSED)
    ),
    **dict.fromkeys((torch.gru, torch.lstm), ("recurrent", _RECURRENT)),
}


@dataclass(frozen=True)
class Reader:
    """A weight whose columns are channels.

    kind: linear, conv, transposed, inputs or state (of a recurrent layer). labels: of all its input channels. bias: the parameter
    that takes an intercept, or None where there is none. groups: of a convolution. calls: how often one pass of the model uses it.
    """

    weight: str
    kind: str
    labels: NDArray[np.int64]
    bias: str | None = None
    groups: int = 1
    calls: int = 1

    @property
    def axis(self) -> int:
        """The axis of the weight along which its input channels lie."""
        return 0 if self.kind == "transposed" else 1

    def kernel(self, weight: Tensor) -> int:
        """Columns for each input channel."""
        return prod(weight.shape[2:])

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """[O, I K] for each convolution group."""
        if self.kind != "transposed":
            return list(weight.flatten(1).chunk(self.groups))
        return [part.transpose(0, 1).flatten(1) for part in self._turned(weight).chunk(self.groups)]

    def weight_of(self, matrices: Sequence[Tensor], weight: Tensor) -> Tensor:
        """The weight that has these matrices, in the shape of `weight`."""
        if self.kind != "transposed":
            return torch.cat(list(matrices)).reshape(weight.shape)
        inputs, outputs, *kernel = weight.shape
        parts = [m.reshape(outputs, inputs // self.groups, *kernel).transpose(0, 1) for m in matrices]
        return self._turned(torch.cat(parts))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.flip([*range(2, weight.dim())])

    def rows(self, out: Tensor) -> Tensor:
        """Outputs of a call, or their gradients, with channels first: [O, places]."""
        return out.movedim(1 if self.kind in ("conv", "transposed") else -1, 0).flatten(1)


@dataclass(frozen=True)
class Call:
    """One call of a function in _FUNCTIONS. given: its arguments by name."""

    kind: str
    given: dict[str, Any]
    out: Any

    def unfolded(self, reader: Reader, most: int, generator: torch.Generator) -> list[Tensor]:
        """What a reader's matrices are multiplied with, [N, places, I K] for each group: `most` places of every example, drawn from
        all of them.
        """
        x: Tensor = self.given["input"].float()
        if reader.kind in ("inputs", "state"):
            x = self._states().float() if reader.kind == "state" else x
            x = x if self.given["batch_first"] else x.transpose(0, 1)
        if reader.kind in ("linear", "inputs", "state"):
            x = x.reshape(len(x), -1, x.shape[-1])
            return [x[:, _drawn(x.shape[1], most, generator)]]
        kernel = self.given["weight"].shape[2:]
        stride, dilation = (_each(self.given.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
        before, after = self._padding(kernel, stride, dilation)
        if self.kind == "transposed":
            x, stride = _spread(x, stride), (1,) * len(kernel)
        x = F.pad(x, [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair])
        for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        places = x.shape[2 : 2 + len(kernel)]
        chosen: Any = torch.unravel_index(_drawn(prod(places), most, generator), places)
        # [N, I, places, K]
        x = x[(slice(None), slice(None), *chosen)].flatten(3)
        return [part.transpose(1, 2).flatten(2) for part in x.chunk(reader.groups, 1)]

    def _padding(
        self, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """What is put before and after each axis."""
        whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        given = self.given.get("padding", 0)
        if isinstance(given, str):
            given = [w // 2 for w in whole] if given == "same" else [0] * len(whole)
            # an uneven rest goes to the end
            return given, [
                w - 2 * g + g if self.given["padding"] == "same" else 0 for w, g in zip(whole, given, strict=True)
            ]
        padding = _each(given, len(kernel))
        if self.kind == "conv":
            return list(padding), list(padding)
        more = _each(self.given.get("output_padding", 0), len(kernel))
        sides = [w - p for w, p in zip(whole, padding, strict=True)]
        return sides, [side + m for side, m in zip(sides, more, strict=True)]

    def _states(self) -> Tensor:
        """The state before each step: the first is given, the others are the outputs of the step before."""
        hx = self.given["hx"]
        first = (hx[0] if isinstance(hx, tuple | list) else hx)[0]
        axis = 1 if self.given["batch_first"] else 0
        out = self.out[0]
        return torch.cat([first.unsqueeze(axis), out.narrow(axis, 0, out.shape[axis] - 1)], axis)


class Watched(TorchFunctionMode):
    """Calls watch(call, weight) after each call of a layer, for each of its weights."""

    def __init__(self, watch: Callable[[Call, Tensor], None]) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _FUNCTIONS:
            kind, names = _FUNCTIONS[func]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            for weight in given["params"] if kind == "recurrent" else [given["weight"]]:
                self.watch(Call(kind, given, out), weight)
        return out


def _each(given: Any, count: int) -> tuple[int, ...]:
    found = (given,) * count if isinstance(given, int) else tuple(given)
    return found * count if len(found) < count else found


def _drawn(places: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.arange(places) if places <= most else torch.randperm(places, generator=generator)[:most]


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Put stride - 1 zeros between neighbours."""
    shape = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *shape)
    out[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return out
