"""Which kernel multiplies a packed matrix, and the call: y = x W' + b for T tokens.

A Kernel is a row: of csrc/kernels.inc for CPUs, and PyTorch's 2:4 for GPUs. It says why it cannot take a problem, and select()
chooses by the measured CHOICES; on_gpu.py multiplies on a GPU and chooses by itself. SECATEURS_KERNEL=name forces a row;
SECATEURS_MAX_ISA=avx2 leaves out rows of richer instruction sets. The torch.library operator secateurs::linear is the only way
in, so torch.compile traces through it.
"""

import ctypes
import functools
import math
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import DeviceError, PackError
from secateurs.base.precision import compute_dtype
from secateurs.kernels import on_gpu, semi_structured
from secateurs.kernels.formats import (
    DTYPES,
    LAYOUT,
    PANEL,
    PARTS,
    Packed,
    layout_of,
    mask_shape,
    pack_dense,
    parts_of,
    read_bitmask,
    read_integers,
    unpack,
    weight_of,
)
from secateurs.kernels.library import Info, Product, library
from secateurs.matrix.grids import Grid


@dataclass(frozen=True)
class Kernel:
    """One kernel. index: its place in the compiled table, -1 for the GPU's. lacks: why it cannot run on this machine, or None."""

    name: str
    format: str
    dtype: str
    isa: str
    strategy: str
    index: int
    lacks: str | None

    def accepts(self, packed: Packed, tokens: int) -> str | None:
        """None, or why this kernel cannot multiply `tokens` tokens with this matrix."""
        if self.lacks:
            return self.lacks
        if self.format != packed.format:
            return f"{self.name} takes {self.format} weights, these are {packed.format}"
        if self.dtype != packed.stored:
            return f"{self.name} takes {self.dtype}, these are {packed.stored}"
        if self.strategy == "gather" and packed.shape[1] > GATHER_INPUTS:
            return f"{self.name} takes at most {GATHER_INPUTS} inputs, these are {packed.shape[1]}"
        if self.strategy == "pairs" and not packed.pairs:
            return f"{self.name} takes at most two weights of every four inputs, here some keep more"
        if self.strategy == "pairs" and packed.zero_PG4 is not None:
            return f"{self.name} takes symmetric grids, these are on {packed.grid}"
        return None


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """All kernels, fastest first, including those that cannot run on this machine (see `lacks`)."""
    rows = []
    limit = max_isa()
    for index in range(library().secateurs_kernels()):
        info = Info()
        library().secateurs_kernel_info(index, ctypes.byref(info))
        name, format, dtype, isa, strategy = (
            getattr(info, f).decode() for f in ("name", "format", "dtype", "isa", "strategy")
        )
        lacks = None if info.runnable else f"{name} needs {ISA_NEEDS[isa]}, which this CPU lacks"
        if lacks is None and limit and ISA_LEVELS[isa] > ISA_LEVELS[limit]:
            lacks = f"{name} needs {ISA_NEEDS[isa]}, and {MAX_ISA}={limit} leaves that out"
        rows.append(Kernel(name, format, dtype, isa, strategy, index, lacks))
    gpu = semi_structured.lacks() or "it takes tensors on the GPU: `secateurs probe` measures it"
    rows.append(Kernel(semi_structured.NAME, "2:4", "bf16", "cuda", "semi_structured", -1, gpu))
    return tuple(rows)


ISA_NEEDS = {
    "avx512": "AVX-512 with VBMI, VBMI2, VNNI and BF16",
    "avx2": "AVX2 with FMA, F16C and BMI2",
    "neon": "NEON",
    "scalar": "nothing",
}
# a limit leaves out the instruction sets above it; ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY do the same for torch's own
ISA_LEVELS = {"scalar": 0, "neon": 1, "avx2": 1, "avx512": 2}
MAX_ISA = "SECATEURS_MAX_ISA"
# the strategy gather keeps positions in 16 bits
GATHER_INPUTS = 1 << 16


def max_isa() -> str | None:
    """The richest instruction set that SECATEURS_MAX_ISA allows, None for all. Raises DeviceError for an unknown one."""
    name = os.environ.get(MAX_ISA)
    if not name:
        return None
    if name not in ISA_LEVELS:
        raise DeviceError(f"{MAX_ISA}={name} is no instruction set; known: {', '.join(ISA_LEVELS)}")
    return name


def named(name: str) -> Kernel:
    """The kernel of that name. Raises DeviceError, naming those that can run here, if there is none or it cannot run."""
    row = next((k for k in kernels() if k.name == name), None)
    if row is None or row.lacks:
        found = row.lacks if row else f"no kernel is named '{name}'"
        raise DeviceError(f"{found}; these run here: {', '.join(k.name for k in kernels() if not k.lacks)}")
    return row


@dataclass(frozen=True)
class Choice:
    """Which strategy is fastest for so many tokens and zeros, as measured (docs/log.md).

    Up to stream_tokens: stream. Beyond: skip from skip_sparsity on, else tile. gather = (tokens, sparsity): up to so many
    tokens and from this sparsity on, gather instead. many = (tokens, sparsity): from so many tokens on, this sparsity takes
    skip_sparsity's place, since one listing of positions serves more tokens.
    """

    stream_tokens: int
    skip_sparsity: float
    gather: tuple[int, float] = (0, 1.0)
    many: tuple[int, float] | None = None

    def strategy(self, tokens: int, sparsity: float) -> str:
        if tokens <= self.gather[0] and sparsity >= self.gather[1]:
            return "gather"
        if tokens <= self.stream_tokens:
            return "stream"
        enough = self.many[1] if self.many and tokens >= self.many[0] else self.skip_sparsity
        return "skip" if sparsity >= enough else "tile"


# by (dtype, isa), measured on one machine of each; SECATEURS_KERNEL overrules them
CHOICES = {
    ("bf16", "avx512"): Choice(8, 0.85, many=(256, 0.73)),
    ("fp16", "avx512"): Choice(8, 0.50),
    ("fp32", "avx512"): Choice(8, 0.50),
    ("bf16", "avx2"): Choice(5, 0.58, gather=(8, 0.85), many=(48, 0.45)),
    ("fp16", "avx2"): Choice(5, 0.58, gather=(8, 0.85), many=(48, 0.45)),
    ("fp32", "avx2"): Choice(5, 0.58, gather=(8, 0.85), many=(48, 0.45)),
}
# dense matrices: up to so many tokens our kernels use stream, beyond that tile; by isa
DENSE_STREAM_TOKENS = {"avx512": 16, "avx2": 6, "neon": 4, "scalar": 4}
# the same of integers, in either format
INTEGER_STREAM_TOKENS = {"avx512": 8, "avx2": 6, "neon": 4, "scalar": 4}
# up to so many tokens the strategy pairs is the fastest for integers that it accepts; measured up to 256 (docs/log.md)
PAIRS_TOKENS = {"avx512": 8, "avx2": 256, "neon": 4, "scalar": 4}
# what csrc/secateurs.h calls the dtypes of x
CODES = {dtype: code for code, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32))}


# the most tokens for which our dense kernels are faster than torch's, by (dtype, isa); measured up to 256
DENSE_TOKENS = {("bf16", "avx512"): 16, ("fp32", "avx512"): 256, ("bf16", "avx2"): 8, ("fp32", "avx2"): 256}


@functools.cache
def _dense_tokens(dtype: torch.dtype) -> int | None:
    """Up to how many tokens our dense kernel is faster than torch's product of this dtype; None for any number."""
    isa = _best("dense", DTYPES[dtype])["stream"].isa
    if isa in ("avx2", "avx512") and compute_dtype(dtype) != dtype:
        # torch emulates such products
        return None
    return DENSE_TOKENS.get((DTYPES[dtype], isa), 0)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True if a product of these tensors belongs into a graph."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def ours_is_faster(weight_OI: Tensor, x: Tensor, bias: Tensor | None = None) -> bool:
    """True if our dense kernel is faster than torch's for this product, and no gradient is wanted, which it has not."""
    row = forced()
    if row is not None and row.format != "dense":
        return False
    if weight_OI.dtype not in DTYPES or x.dtype != weight_OI.dtype or x.device.type != "cpu":
        return False
    # kernels read rows one after another
    if not weight_OI.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return False
    if wants_gradient(x, weight_OI, bias):
        return False
    most = _dense_tokens(weight_OI.dtype)
    return most is None or x.numel() <= most * weight_OI.shape[1]


@functools.cache
def _best(format: str, dtype: str) -> dict[str, Kernel]:
    """strategy -> the kernel of the fastest instruction set that has one and runs here."""
    found: dict[str, Kernel] = {}
    for k in kernels():
        if k.format == format and k.dtype == dtype and not k.lacks:
            found.setdefault(k.strategy, k)
    return found


@functools.cache
def forced() -> Kernel | None:
    """The kernel that SECATEURS_KERNEL names, or None if it is not set. Raises DeviceError if it cannot run."""
    name = os.environ.get("SECATEURS_KERNEL")
    return named(name) if name else None


def select(packed: Packed, tokens: int) -> Kernel:
    """The kernel for this matrix and so many tokens. Raises DeviceError if SECATEURS_KERNEL names one that cannot take it."""
    row = forced()
    if row:
        if reason := row.accepts(packed, tokens):
            raise DeviceError(f"SECATEURS_KERNEL={row.name}: {reason}")
        return row
    best = _best(packed.format, packed.stored)
    isa = best["stream"].isa
    if packed.grid is not None:
        pairs = best.get("pairs")
        if pairs and tokens <= PAIRS_TOKENS[pairs.isa] and pairs.accepts(packed, tokens) is None:
            return pairs
        choice = Choice(INTEGER_STREAM_TOKENS[isa], 1.1)
    elif packed.format == "dense":
        choice = Choice(DENSE_STREAM_TOKENS[isa], 1.1)
    else:
        choice = CHOICES.get((packed.stored, isa), Choice(4, 1.1))
    found = best[choice.strategy(tokens, packed.sparsity)]
    return best["stream"] if found.accepts(packed, tokens) else found


# held while positions are listed: a second thread must not list them again while a kernel reads them
_LISTING = threading.Lock()


class Call:
    """Matrices that share their input, ready for the kernels: holds the addresses that do not change between calls."""

    def __init__(self, packed: Sequence[Packed], biases: Sequence[Tensor | None]) -> None:
        self.packed = tuple(packed)
        self.biases = tuple(biases)
        self.outputs = [p.shape[0] for p in packed]
        self.inputs = packed[0].shape[1]
        self.width = sum(self.outputs)
        self.products = (Product * len(packed))()
        for product, p, bias in zip(self.products, packed, biases, strict=True):
            product.weight = weight_of(p)
            product.bias = bias.data_ptr() if bias is not None else None
        self._address = ctypes.addressof(self.products)
        self._linear = library().secateurs_linear
        self._kernels: dict[int, int] = {}
        self._listed: list[Tensor] = []
        self._listing = {k.index: k.strategy for k in kernels() if k.strategy in ("gather", "pairs")}

    def _list(self, strategy: str) -> None:
        """List the positions that gather kernels read, or the pairs of theirs; at 90% zeros, and in 2:4, they take about as many
        bytes as the packed matrix."""
        threads, made_of = torch.get_num_threads(), []
        for product, p in zip(self.products, self.packed, strict=True):
            weight = ctypes.addressof(product) + Product.weight.offset
            if strategy == "pairs":
                assert p.grid is not None
                made = torch.empty(math.prod(mask_shape(p.shape)) * (8 + 4 * p.grid.bits), dtype=torch.uint8)
                product.weight.pairs = made.data_ptr()
                library().secateurs_fill_pairs(weight, threads)
                made_of.append(made)
                continue
            starts = torch.empty(-(-p.shape[0] // PANEL) + 1, dtype=torch.int64)
            steps = library().secateurs_count_steps(weight, starts.data_ptr())
            made = torch.empty(steps * 8 * (1 + p.values.element_size()), dtype=torch.uint8)
            product.weight.step_starts, product.weight.steps = starts.data_ptr(), made.data_ptr()
            library().secateurs_fill_steps(weight, p.values.element_size(), threads)
            made_of += [starts, made]
        # assigned last: another thread takes any list that is there for a complete one
        self._listed = made_of

    def kernel(self, tokens: int) -> int:
        """The index of the kernel for so many tokens: the largest matrix's, if it takes all of them, else that of the next."""
        index = self._kernels.get(tokens)
        if index is None:
            rows = [select(p, tokens) for p in sorted(self.packed, key=lambda p: -p.shape[0])]
            row = next(r for r in rows if all(r.accepts(p, tokens) is None for p in self.packed))
            index = self._kernels[tokens] = row.index
        return index

    def ready(self, tokens: int, kernel: int | None = None) -> int:
        """The index of the kernel, or of that for so many tokens, when what it reads is listed."""
        index = self.kernel(tokens) if kernel is None else kernel
        if index in self._listing and not self._listed:
            with _LISTING:
                if not self._listed:
                    self._list(self._listing[index])
        return index

    def __call__(self, x_TI: Tensor, kernel: int | None = None) -> Tensor:
        """Multiply: a flat y that holds, for each matrix in turn, tokens x outputs."""
        if not x_TI.is_contiguous():
            x_TI = x_TI.contiguous()
        tokens = x_TI.numel() // self.inputs
        index = self.ready(tokens, kernel)
        y = x_TI.new_empty(tokens * self.width)
        wrong = self._linear(
            index, self._address, len(self.packed),
            x_TI.data_ptr(), y.data_ptr(), CODES[x_TI.dtype], tokens, torch.get_num_threads(),
        )  # fmt: skip
        if wrong:
            raise DeviceError(
                f"kernel refused {tokens} tokens of {self.inputs} inputs: code {wrong} of csrc/secateurs.h"
            )
        return y


def _read(parts: Sequence[Tensor | None], layouts: Sequence[int], dtype: torch.dtype) -> list[Packed]:
    """The matrices of these tensors, checked. dtype: of the weights, where they are integers. Raises PackError."""
    found = []
    for i in range(len(layouts) // len(LAYOUT)):
        values, mask, scale, zero, _ = parts[len(PARTS) * i : len(PARTS) * (i + 1)]
        outputs, inputs, bits, group, half = layouts[len(LAYOUT) * i : len(LAYOUT) * (i + 1)]
        shape = (outputs, inputs)
        assert values is not None
        if bits:
            if scale is None:
                raise PackError("integers were given without their scales")
            found.append(
                read_integers(values, mask, scale, zero, shape, Grid(bits, group, zero is None, bool(half)), dtype)
            )
        else:
            found.append(pack_dense(values.view(shape)) if mask is None else read_bitmask(values, mask, shape))
    return found


def call_of(parts: Sequence[Tensor | None], layouts: Sequence[int], dtype: torch.dtype) -> Call:
    """The Call of these tensors: checked and made once, then kept until one of them changes or the first is freed."""
    state: list[Any] = [dtype, *layouts]
    for i in range(0, len(parts), len(PARTS)):
        values, mask, scale, zero, bias = parts[i : i + len(PARTS)]
        state += (None if values is None else values.data_ptr(), None if bias is None else bias.data_ptr())
        # a mask with another version was written to and is checked again, as are scales and zeros; survivors too, since a Call may
        # hold copies of them; not dense floats and biases, of which any bits will do
        for part in (mask, scale, zero):
            state += (None,) if part is None else (part.data_ptr(), _version(part), _version(values))
    first = parts[0]
    key = id(first), len(parts)
    kept = _calls.get(key)
    if kept is not None and kept[0]() is first and kept[1] == state:
        return kept[2]
    packed, biases = _read(parts, layouts, dtype), parts[4 :: len(PARTS)]
    for p, bias in zip(packed, biases, strict=True):
        if bias is not None and (tuple(bias.shape) != (p.shape[0],) or bias.dtype != p.dtype):
            raise DeviceError(f"the bias of {p.shape[0]} {p.dtype} outputs is {bias.dtype} of shape {list(bias.shape)}")
    if len({(p.shape[1], p.format, p.stored) for p in packed}) > 1:
        raise DeviceError("matrices that share an input have one number of inputs, one format and one kind of numbers")
    call = Call(packed, biases)
    assert first is not None
    _calls[key] = (weakref.ref(first, lambda _: _calls.pop(key, None)), state, call)
    return call


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to; -1 for an inference tensor, of which nobody keeps count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


# by the id of the first tensor, as long as that exists, and the number of tensors
_calls: dict[tuple[int, int], tuple["weakref.ref[Tensor]", list[Any], Call]] = {}


_library: Any = torch.library.Library("secateurs", "DEF")  # type: ignore[no-untyped-call]
# parts and layouts: PARTS and LAYOUT of each matrix, one after the other
_library.define(
    "linear(Tensor x, Tensor?[] parts, int[] layouts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "linear_back(Tensor by_y, Tensor?[] parts, int[] layouts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "linear", "CPU")
def _linear_cpu(x: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    if layouts[2] and x.dtype not in DTYPES:
        raise DeviceError(f"a packed layer of integers takes {', '.join(DTYPES.values())}, and was given {x.dtype}")
    call = call_of(parts, layouts, x.dtype)
    if x.dtype != call.packed[0].dtype or x.shape[-1] != call.inputs:
        raise DeviceError(
            f"a packed layer of {call.inputs} {call.packed[0].dtype} inputs was given {x.dtype} of shape {list(x.shape)}"
        )
    return call(x)


@torch.library.impl(_library, "linear", "CUDA")
def _linear_cuda(x: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    return on_gpu.linear(x, parts, layouts)


@torch.library.register_fake("secateurs::linear", lib=_library)  # type: ignore[untyped-decorator]
def _linear_fake(x: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    return x.new_empty(x.numel() // layouts[1] * sum(layouts[:: len(LAYOUT)]))


@torch.library.impl(_library, "linear_back", "CPU")
def _linear_back(by_y: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    """The gradient by x, flat: by_y W, summed over the matrices, which are unpacked one at a time."""
    outputs, inputs = layouts[:: len(LAYOUT)], layouts[1]
    tokens = by_y.numel() // sum(outputs)
    by_x_TI = by_y.new_zeros(tokens, inputs)
    pieces = torch.split(by_y, [tokens * n for n in outputs])
    for piece, packed in zip(pieces, _read(parts, layouts, by_y.dtype), strict=True):
        by_x_TI += piece.view(tokens, packed.shape[0]) @ unpack(packed)
    return by_x_TI.flatten()


@torch.library.impl(_library, "linear_back", "CUDA")
def _linear_back_cuda(by_y: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    return on_gpu.linear_back(by_y, parts, layouts)


@torch.library.register_fake("secateurs::linear_back", lib=_library)  # type: ignore[untyped-decorator]
def _linear_back_fake(by_y: Tensor, parts: list[Tensor | None], layouts: list[int]) -> Tensor:
    return by_y.new_empty(by_y.numel() // sum(layouts[:: len(LAYOUT)]) * layouts[1])


def multiply(x: Tensor, parts: Sequence[Tensor | None], layouts: Sequence[int]) -> Tensor:
    """A flat y, tokens x outputs of each matrix in turn, by the operator secateurs::linear; x gets a gradient if it wants one.

    parts, layouts: parts_of() and layout_of() of each matrix, one after the other.
    """
    if wants_gradient(x, *parts):
        apply: Any = _Multiply.apply
        y: Tensor = apply(x, parts, layouts, *parts)
        return y
    found: Tensor = _operator(x, parts, layouts)
    return found


_operator: Any = torch.ops.secateurs.linear.default
_back: Any = torch.ops.secateurs.linear_back.default


class _Multiply(torch.autograd.Function):
    """multiply() in a graph. Only x has a gradient; the parts are listed again, so that their want of one is seen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Any, layouts: Any, *_: Any) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.shape, ctx.layouts = x.shape, layouts
        found: Tensor = _operator(x, parts, layouts)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if any(ctx.needs_input_grad[3:]):
            raise PackError(
                "weights and biases of a packed layer cannot be trained: requires_grad_(False) on them leaves the gradient of "
                "the input, make_dense(model) gives layers that train"
            )
        by_x = _back(gradients[0], list(ctx.saved_tensors), ctx.layouts)
        return by_x.view(ctx.shape), *[None] * (len(ctx.needs_input_grad) - 1)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y = x W' + b: x (..., I), y (..., O), of the matrix's dtype, or of any of DTYPES if it holds integers; sums in fp32. Raises
    DeviceError."""
    y = multiply(x, parts_of(packed, bias), layout_of(packed.shape, packed.grid))
    return y.view(*x.shape[:-1], packed.shape[0])
