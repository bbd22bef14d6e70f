"""Linear layers that multiply packed weights; pack/ puts them into models.

A PackedLinear's parameters are the stored tensors: `weight`, the survivors as a vector, and `weight_mask`. `weight` is a vector
on purpose: a loader that does not know the format fails on its shape instead of going on with wrong weights.
A DenseLinear is an nn.Linear that uses our dense kernel where that is faster than torch's.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.kernels.dispatch import multiply, ours_is_faster, wants_gradient
from secateurs.kernels.formats import (
    DTYPES,
    PADDING,
    Packed,
    bitmask_nbytes,
    count_stored,
    mask_shape,
    read_bitmask,
    unpack,
)

# siblings that transformers models call one after the other on the same input
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class PackedLinear(nn.Module):
    """y = x W' + b with W (O, I) stored as a bitmask; x (..., I) and y (..., O) of the weights' dtype, on the CPU.

    transposed: it replaces a module that stores W' (GPT-2's Conv1D), which dense() gives back. For inference: x has a gradient,
    the weights have none (PackError in a backward pass that asks for it).
    """

    def __init__(
        self, shape: tuple[int, int], values: Tensor, mask_PJ4: Tensor, bias: Tensor | None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.shape = self.out_features, self.in_features = shape
        self.transposed = transposed
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_mask", mask_PJ4)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.__dict__["group"] = None

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None = None, transposed: bool = False) -> "PackedLinear":
        assert packed.mask_PJ4 is not None
        return cls(packed.shape, packed.values, packed.mask_PJ4, bias, transposed)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], survivors: int, dtype: torch.dtype, bias: bool, transposed: bool = False
    ) -> "PackedLinear":
        """A layer on the meta device, for a loader to fill."""
        values = torch.empty(survivors + PADDING, dtype=dtype, device="meta")
        mask = torch.empty(mask_shape(shape), dtype=torch.int64, device="meta")
        return cls(shape, values, mask, torch.empty(shape[0], dtype=dtype, device="meta") if bias else None, transposed)

    def packed(self) -> Packed:
        """The stored matrix, checked. Raises PackError."""
        mask: Any = self.weight_mask
        return read_bitmask(self.weight, mask, (self.out_features, self.in_features))

    def dense(self) -> nn.Module:
        """The dense layer that it replaces, with the same weights bit for bit."""
        weight = unpack(self.packed())
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            conv: nn.Module = Conv1D(1, 1)
            conv.__dict__.update(nf=self.out_features, nx=self.in_features)
            conv.weight, conv.bias = nn.Parameter(weight.T.contiguous(), requires_grad=False), self.bias
            return conv
        # made without storage: nn.Linear would fill a matrix with random numbers first
        linear: Any = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        dense: nn.Module = linear
        return dense

    def forward(self, x: Tensor) -> Tensor:
        group: SharedInput | None = self.__dict__["group"]
        # a compiler sees plain calls; an inference tensor has no version that would tell whether it was changed between two calls;
        # with gradients each call has its own place in the graph
        if group is None or torch.compiler.is_compiling() or x.is_inference() or wants_gradient(x):
            return self._multiply([self], x)[0]
        return group.multiply(self, x)

    @staticmethod
    def _multiply(layers: "list[PackedLinear]", x: Tensor) -> list[Tensor]:
        values, masks, biases = [], [], []
        shapes: list[int] = []
        for layer in layers:
            # attribute access of a module costs more than the rest of this loop
            values.append(layer._parameters["weight"])
            masks.append(layer._buffers["weight_mask"])
            biases.append(layer._parameters["bias"])
            shapes += layer.shape
        flat: Any = multiply(x, values, masks, biases, shapes)  # type: ignore[arg-type]
        outer = x.shape[:-1]
        if len(layers) == 1:
            return [flat.view(*outer, shapes[0])]
        tokens = outer.numel()
        parts = flat.split([tokens * outputs for outputs in shapes[::2]])
        return [part.view(*outer, outputs) for part, outputs in zip(parts, shapes[::2], strict=True)]

    def extra_repr(self) -> str:
        kept = (self.weight.numel() - PADDING) / (self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, sparsity={1 - kept:.3f}, format=bitmask"
        )


class SharedInput:
    """Layers that are called with the same input: the first call multiplies for all, the others fetch their result.

    A result is handed out once, to the thread that made it, and only for the same, unchanged tensor.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self.layers = layers
        self.waiting: dict[int, tuple[Tensor, int, dict[int, Tensor]]] = {}
        for layer in layers:
            layer.__dict__["group"] = self

    def multiply(self, layer: PackedLinear, x: Tensor) -> Tensor:
        thread = threading.get_ident()
        made = self.waiting.get(thread)
        if made is not None:
            source, version, ready = made
            if source is x and version == x._version and id(layer) in ready:
                y = ready.pop(id(layer))
                if not ready:
                    del self.waiting[thread]
                return y
        outputs = PackedLinear._multiply(self.layers, x)
        ready = {id(m): y for m, y in zip(self.layers, outputs, strict=True)}
        y = ready.pop(id(layer))
        self.waiting[thread] = (x, x._version, ready)
        return y

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts without results that wait
        return {"layers": self.layers, "waiting": {}}


class DenseLinear(nn.Linear):
    """nn.Linear that is multiplied by our kernel where that is faster than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if not ours_is_faster(self.weight, x, self.bias):
            return nn.functional.linear(x, self.weight, self.bias)
        flat = multiply(x, [self.weight], [None], [self.bias], [self.out_features, self.in_features])
        return flat.view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class LayerChoice:
    """The format chosen for one layer. reason: why this one. nbytes, dense_nbytes: as stored, without bias."""

    name: str
    shape: tuple[int, int]
    format: str
    survivors: int
    nbytes: int
    dense_nbytes: int
    reason: str

    @property
    def sparsity(self) -> float:
        return 1 - self.survivors / max(1, self.shape[0] * self.shape[1])

    def but(self, why: str | None) -> "LayerChoice":
        """The layer as dense for that reason; itself if there is none, or where it is dense already."""
        if not why or self.format == "dense":
            return self
        return replace(self, format="dense", nbytes=self.dense_nbytes, reason=why)


def choose(name: str, weight_OI: Tensor, profile: Any = None) -> LayerChoice:
    """bitmask where it is smaller and, on the profile's machine, not slower for one token; else dense, with the reason."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    dense_nbytes = weight_OI.numel() * weight_OI.element_size()
    if weight_OI.dtype not in DTYPES:
        survivors = int(torch.count_nonzero(weight_OI))
        reason = f"no kernel for {str(weight_OI.dtype).removeprefix('torch.')}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, reason)
    survivors = count_stored(weight_OI)
    nbytes = bitmask_nbytes(shape, survivors, weight_OI.dtype)
    sparsity = 1 - survivors / max(1, weight_OI.numel())
    if nbytes >= dense_nbytes:
        reason = f"{sparsity:.1%} zeros: packed it would take {nbytes} bytes of {dense_nbytes}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, reason)
    if profile is not None:
        speedup = profile.speedup(DTYPES[weight_OI.dtype], sparsity, tokens=1)
        if speedup is not None and speedup < 1:
            reason = f"{sparsity:.1%} zeros: {speedup:.2f}x as fast as dense on {profile.name}"
            return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, reason)
        if speedup is not None:
            reason = f"{nbytes / dense_nbytes:.2f}x the bytes, {speedup:.2f}x as fast for one token on {profile.name}"
            return LayerChoice(name, shape, "bitmask", survivors, nbytes, dense_nbytes, reason)
    return LayerChoice(
        name, shape, "bitmask", survivors, nbytes, dense_nbytes, f"{nbytes / dense_nbytes:.2f}x the bytes"
    )


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, transposed) of the layers that can be packed: Linear, and GPT-2's Conv1D, which stores W'."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module, False
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            yield name, module, True


def group_shared_inputs(model: nn.Module) -> None:
    """Let q, k and v, or gate and up, share a call, if they are packed with one dtype and number of inputs."""
    for parent in model.modules():
        for names in SHARED_INPUT:
            found = [m for n in names if isinstance(m := parent._modules.get(n), PackedLinear)]
            alike = {(m.in_features, m.weight.dtype) for m in found}
            if len(found) > 1 and len(alike) == 1:
                SharedInput(found)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module, in evaluation mode, in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    module.train(False)
    setattr(model.get_submodule(parent), child, module)


def make_dense(model: nn.Module) -> nn.Module:
    """Undo accelerate(): every packed layer becomes the dense one that it replaced, bit for bit."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            put(model, name, module.dense())
        elif type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
