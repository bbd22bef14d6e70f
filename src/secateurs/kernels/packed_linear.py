"""Linear layers that multiply packed weights; pack/ puts them into models.

A PackedLinear's tensors are those that are stored: `weight`, a vector, `weight_mask`, and of integers `weight_scale` and
`weight_zero`. `weight` is a vector on purpose: a loader that does not know the format fails on its shape instead of going on with
wrong weights.
A DenseLinear is an nn.Linear that uses our dense kernel where that is faster than torch's.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PackError
from secateurs.kernels import on_gpu
from secateurs.kernels.dispatch import kernels, multiply, ours_is_faster, wants_gradient
from secateurs.kernels.formats import (
    DTYPES,
    PADDING,
    Packed,
    bitmask_nbytes,
    count_stored,
    layout_of,
    mask_shape,
    masked_length,
    packed_length,
    packed_nbytes,
    parts_of,
    read_bitmask,
    read_integers,
    scales_shape,
    unpack,
)
from secateurs.matrix.grids import Grid, Scales

# siblings that transformers models call one after the other on the same input
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class PackedLinear(nn.Module):
    """y = x W' + b with W (O, I) stored as a bitmask or as integers; x (..., I) and y (..., O) on the CPU, of the weights' dtype;
    where those are integers, of any dtype that the kernels know.

    transposed: it replaces a module that stores W' (GPT-2's Conv1D), which dense() gives back. For inference: x has a gradient,
    the weights have none (PackError in a backward pass that asks for it).
    """

    def __init__(self, packed: Packed, bias: Tensor | None, transposed: bool = False) -> None:
        super().__init__()
        self.shape = self.out_features, self.in_features = packed.shape
        self.format, self.grid, self.survivors, self.dtype = packed.format, packed.grid, packed.survivors, packed.dtype
        self.transposed = transposed
        values, mask, scale, zero, _ = parts_of(packed)
        assert values is not None
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_mask", mask)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", zero)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.layout = layout_of(packed.shape, packed.grid)
        self.__dict__["group"] = None

    @classmethod
    def of(cls, packed: Packed, bias: Tensor | None = None, transposed: bool = False) -> "PackedLinear":
        assert packed.mask_PJ4 is not None or packed.grid is not None
        return cls(packed, bias, transposed)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], survivors: int, dtype: torch.dtype, bias: bool, transposed: bool = False,
        format: str = "bitmask", grid: Grid | None = None, length: int | None = None,
    ) -> "PackedLinear":  # fmt: skip
        """A layer on the meta device, for a loader to fill. length: of `weight`, needed for a bitmask of integers."""
        if length is None:
            length = survivors + PADDING if grid is None else packed_length(shape, grid)
        values = torch.empty(length, dtype=dtype if grid is None else torch.uint8, device="meta")
        mask = torch.empty(mask_shape(shape), dtype=torch.int64, device="meta") if format == "bitmask" else None
        scale = zero = None
        if grid is not None:
            scale = torch.empty(scales_shape(shape, grid), dtype=torch.int16, device="meta")
            zero = None if grid.symmetric else torch.empty(scales_shape(shape, grid), dtype=torch.uint8, device="meta")
        packed = Packed(format, shape, values, dtype, survivors, mask, grid=grid, scale_PG4=scale, zero_PG4=zero)
        return cls(packed, torch.empty(shape[0], dtype=dtype, device="meta") if bias else None, transposed)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.grid is not None:
            # a cast leaves integers and scales as they are; the weights that they stand for have the new dtype
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def packed(self) -> Packed:
        """The stored matrix, checked. Raises PackError."""
        mask: Any = self.weight_mask
        scale: Any = self.weight_scale
        zero: Any = self.weight_zero
        if self.grid is None:
            return read_bitmask(self.weight, mask, self.shape)
        return read_integers(self.weight, mask, scale, zero, self.shape, self.grid, self.dtype)

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
    def given(layers: "list[PackedLinear]") -> tuple[list[Tensor | None], list[int]]:
        """The parts and layouts of layers that share an input, as multiply() takes them."""
        parts: list[Tensor | None] = []
        layouts: list[int] = []
        for layer in layers:
            # attribute access of a module costs more than the rest of this loop
            own, buffers = layer._parameters, layer._buffers
            parts += (
                own["weight"], buffers["weight_mask"], buffers["weight_scale"], buffers["weight_zero"], own["bias"],
            )  # fmt: skip
            layouts += layer.layout
        return parts, layouts

    @staticmethod
    def _multiply(layers: "list[PackedLinear]", x: Tensor) -> list[Tensor]:
        parts, layouts = PackedLinear.given(layers)
        flat: Any = multiply(x, parts, layouts)
        outer = x.shape[:-1]
        if len(layers) == 1:
            return [flat.view(*outer, layouts[0])]
        tokens = outer.numel()
        pieces = flat.split([tokens * layer.shape[0] for layer in layers])
        return [piece.view(*outer, layer.shape[0]) for piece, layer in zip(pieces, layers, strict=True)]

    def extra_repr(self) -> str:
        sparsity = 1 - self.survivors / (self.out_features * self.in_features)
        kept = "" if self.format == "dense" else f"sparsity={sparsity:.3f}, "
        grid = "" if self.grid is None else f", grid={self.grid}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kept}format={self.format}{grid}"


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


def tune_on_gpu(
    model: nn.Module,
    tokens: Sequence[int] = (1, 4, 16, 64, 256, 2048),
    copies_nbytes: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, on_gpu.Tuned]:
    """Time the kernels of a packed model that is on a GPU, and let every packed layer take the fastest; what was found, by name.

    copies_nbytes: memory that dense copies may take. dtype: of activations, where layers hold integers. See on_gpu.tune().
    """
    named = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    matrices = [on_gpu.matrices_of(*PackedLinear.given([m]), dtype or m.dtype)[0] for m in named.values()]
    return dict(zip(named, on_gpu.tune(matrices, tokens, copies_nbytes), strict=True))


class DenseLinear(nn.Linear):
    """nn.Linear that is multiplied by our kernel where that is faster than torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if not ours_is_faster(self.weight, x, self.bias):
            return nn.functional.linear(x, self.weight, self.bias)
        return multiply(x, *self.given()).view(*x.shape[:-1], self.out_features)

    def given(self) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
        """Its parts and its layout, as multiply() takes them."""
        parts = (self.weight, None, None, None, self.bias)
        return parts, layout_of((self.out_features, self.in_features), None)


@dataclass(frozen=True)
class LayerChoice:
    """The format chosen for one layer. reason: why this one. nbytes: as stored; dense_nbytes: of the plain matrix; without bias.

    least_nbytes: of the smallest form that a kernel runs. slower: True if the chosen one takes longer for one token than another.
    grid: of a layer that is stored as integers; `format` is then theirs. A layer that stays as it is is dense without a grid.
    """

    name: str
    shape: tuple[int, int]
    format: str
    survivors: int
    nbytes: int
    dense_nbytes: int
    least_nbytes: int
    reason: str
    slower: bool = False
    grid: Grid | None = None

    @property
    def plain(self) -> bool:
        """True if the layer stays as it is."""
        return self.format == "dense" and self.grid is None

    @property
    def sparsity(self) -> float:
        return 1 - self.survivors / max(1, self.shape[0] * self.shape[1])

    def but(self, why: str | None) -> "LayerChoice":
        """The layer as it is for that reason; itself if there is none, or where it stays as it is already."""
        if not why or self.plain:
            return self
        nbytes = self.dense_nbytes
        return replace(self, format="dense", nbytes=nbytes, least_nbytes=nbytes, reason=why, slower=False, grid=None)


# The sparsity from which a bitmask of integers is at least as fast for one token as all integers, by (numbers, isa), as measured
# (docs/log.md); where a pair is missing it never is.
BITMASK_FROM: dict[tuple[str, str], float] = {
    ("int8", "avx512"): 0.3,
    ("int6", "avx512"): 0.3,
    ("int5", "avx512"): 0.3,
    ("int4", "avx512"): 0.5,
    ("int8", "avx2"): 0.45,
}
# where at most two weights of four inputs are kept, kernels of the strategy pairs are faster at any sparsity
PAIRS = {(numbers, isa) for numbers in ("int8", "int4") for isa in ("avx512", "avx2")}


def _pairs(kept_OI: Tensor) -> bool:
    """True if no four inputs side by side keep more than two weights."""
    filled_OI = nn.functional.pad(kept_OI, (0, -kept_OI.shape[1] % 4))
    return bool((filled_OI.view(-1, 4).sum(-1, dtype=torch.uint8) <= 2).all())


# what a layer's format is chosen for: the time of one token, or bytes
OPTIMIZE = ("speed", "size")


def choose(
    name: str,
    weight_OI: Tensor,
    profile: Any = None,
    scales: Scales | None = None,
    looked_up: bool = False,
    optimize: str = "speed",
) -> LayerChoice:
    """bitmask where it is smaller and, on the profile's machine, not slower for one token; else dense, with the reason.

    scales: of a layer on a grid, which is stored as integers, whichever is smaller of both formats and not slower. looked_up: of an
    embedding, which needs all of them. optimize: 'size' takes the smaller format where it is slower, too, and says so. Raises
    PackError for a weight that is not on the grid.
    """
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    dense_nbytes = weight_OI.numel() * weight_OI.element_size()
    if weight_OI.dtype not in DTYPES:
        survivors = int(torch.count_nonzero(weight_OI))
        reason = f"no kernel for {str(weight_OI.dtype).removeprefix('torch.')}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, dense_nbytes, reason)
    if scales is not None:
        return _choose_integers(name, weight_OI, profile, scales, looked_up, optimize)
    survivors = count_stored(weight_OI)
    nbytes = bitmask_nbytes(shape, survivors, weight_OI.dtype)
    sparsity = 1 - survivors / max(1, weight_OI.numel())
    if nbytes >= dense_nbytes:
        reason = f"{sparsity:.1%} zeros: packed it would take {nbytes} bytes of {dense_nbytes}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, dense_nbytes, reason)
    speedup = None if profile is None else profile.speedup(DTYPES[weight_OI.dtype], sparsity, tokens=1)
    slower = speedup is not None and speedup < 1
    if slower and optimize == "speed":
        reason = f"{sparsity:.1%} zeros: {speedup:.2f}x as fast as dense on {profile.name}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, nbytes, reason)
    reason = f"{nbytes / dense_nbytes:.2f}x the bytes"
    if speedup is not None:
        reason += f", {speedup:.2f}x as fast for one token on {profile.name}"
    return LayerChoice(name, shape, "bitmask", survivors, nbytes, dense_nbytes, nbytes, reason, slower)


def _choose_integers(
    name: str, weight_OI: Tensor, profile: Any, scales: Scales, looked_up: bool, optimize: str
) -> LayerChoice:
    if off := scales.off(weight_OI):
        raise PackError(f"{name}: {off}; quantize the layer again, or leave its scales out")
    grid, shape = scales.grid, (weight_OI.shape[0], weight_OI.shape[1])
    dense_nbytes = weight_OI.numel() * weight_OI.element_size()
    numbers, isa = f"int{grid.bits}", next(k.isa for k in kernels() if k.dtype == f"int{grid.bits}" and not k.lacks)
    kept = weight_OI != 0
    survivors = int(torch.count_nonzero(kept))
    sparsity = 1 - survivors / max(1, weight_OI.numel())
    of_all = packed_nbytes(shape, None, weight_OI.dtype, grid)
    of_some = of_all - packed_length(shape, grid) + masked_length(kept, grid) + 8 * math.prod(mask_shape(shape))
    least = of_all if looked_up else min(of_all, of_some)
    if least >= dense_nbytes:
        reason = f"on {grid} it would take {least} bytes of {dense_nbytes}"
        return LayerChoice(name, shape, "dense", survivors, dense_nbytes, dense_nbytes, dense_nbytes, reason)

    def chosen(format: str, nbytes: int, why: str, slower: bool = False) -> LayerChoice:
        reason = f"{grid}, {nbytes / dense_nbytes:.2f}x the bytes; {sparsity:.1%} zeros{why}"
        return LayerChoice(name, shape, format, survivors, nbytes, dense_nbytes, least, reason, slower, grid)

    if looked_up:
        return chosen("dense", of_all, ", rows are looked up")
    if of_some >= of_all:
        return chosen("dense", of_all, f" would take {of_some / of_all:.2f}x the bytes of all integers")
    pairs = _pairs(kept) and grid.symmetric and (numbers, isa) in PAIRS
    speedup = None if profile is None else profile.speedup(numbers, sparsity, tokens=1, pairs=pairs)
    if speedup is not None:
        slower, found = speedup < 1, f"{speedup:.2f}x as fast as all integers on {profile.name}"
    elif pairs:
        slower, found = False, "at most two of four inputs kept"
    else:
        from_here = BITMASK_FROM.get((numbers, isa), math.inf)
        slower, below = sparsity < from_here, f" below {from_here:.0%}" if from_here < 1 else ""
        found = f"slower than all integers{below} with {isa} kernels" if slower else ""
    if slower and optimize == "speed":
        return chosen("dense", of_all, f" left out would be {found}")
    return chosen("bitmask", of_some, f" left out, {found}" if found else " left out", slower)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, module, transposed) of the layers that can be packed: Linear, and GPT-2's Conv1D, which stores W'."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module, False
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            yield name, module, True


def group_shared_inputs(model: nn.Module) -> None:
    """Let those of q, k and v, or of gate and up, that one kernel can multiply share a call."""
    for parent in model.modules():
        for names in SHARED_INPUT:
            alike: dict[Any, list[PackedLinear]] = {}
            for name in names:
                found = parent._modules.get(name)
                if isinstance(found, PackedLinear):
                    kind = (found.in_features, found.weight.dtype, found.format, found.grid and found.grid.bits)
                    alike.setdefault(kind, []).append(found)
            for layers in alike.values():
                if len(layers) > 1:
                    SharedInput(layers)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module, in evaluation mode, in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    module.train(False)
    setattr(model.get_submodule(parent), child, module)
