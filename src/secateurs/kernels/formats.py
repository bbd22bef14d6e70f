"""How a sparse matrix is stored: pack() and unpack(), bit for bit. docs/format.md has the layout byte by byte.

A format has both directions, and the check of what is read from files. A weight is stored unless all its bits are zero, so
negative zeros are stored. Multiplication is in dispatch.py. Shapes: O outputs, I inputs; P panels of 4 rows, J words of 64
inputs.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.base.errors import PackError
from secateurs.kernels.library import library

VERSION = 1
PANEL = 4
WORD = 64
# zeros after the last survivor: a kernel's last load may reach 64 bytes past it, also after a cast to 16 bits
PADDING = 32
# the dtypes that kernels know, by the name that a kernel's row has
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Packed:
    """One matrix as stored. values: bf16, fp16 or fp32; mask_PJ4: int64, or None if dense.

    bitmask: values holds the survivors, panel by panel, word by word, row by row, input by input, then 32 zeros.
    dense: values is the matrix itself. starts and most are not stored but counted from the mask: where each panel's survivors
    begin, and the highest number of survivors in any byte of the mask (4 for 2:4).
    """

    format: str
    shape: tuple[int, int]
    values: Tensor
    mask_PJ4: Tensor | None = None
    starts: Tensor | None = None
    most: int = 8

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes as stored: survivors, padding and mask; row starts are counted when it is read."""
        return self.values.nbytes + (0 if self.mask_PJ4 is None else self.mask_PJ4.nbytes)

    @property
    def dense_nbytes(self) -> int:
        return math.prod(self.shape) * self.values.element_size()

    @property
    def survivors(self) -> int:
        return self.values.numel() - (PADDING if self.format == "bitmask" else 0)

    @property
    def sparsity(self) -> float:
        return 1 - self.survivors / math.prod(self.shape) if self.format == "bitmask" else 0.0


def mask_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """(P, J, 4) of an O x I matrix."""
    return -(-shape[0] // PANEL), -(-shape[1] // WORD), PANEL


def bitmask_nbytes(shape: tuple[int, int], survivors: int, dtype: torch.dtype) -> int:
    """Bytes that a matrix would take after pack(), computed without packing it."""
    return (survivors + PADDING) * dtype.itemsize + math.prod(mask_shape(shape)) * 8


def count_stored(weight_OI: Tensor) -> int:
    """The number of weights that a packed format stores: those with any bit set."""
    return int(torch.count_nonzero(_as_bits(weight_OI)))


def _as_bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)


def _check_matrix(weight_OI: Tensor) -> None:
    if weight_OI.ndim != 2 or not weight_OI.numel():
        raise PackError(f"cannot pack a tensor of shape {list(weight_OI.shape)}; give a matrix of outputs x inputs")
    if weight_OI.dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise PackError(f"cannot pack weights of dtype {weight_OI.dtype}; the formats hold {known}: cast them first")


def pack_bitmask(weight_OI: Tensor) -> Packed:
    """A bit per weight and the survivors: itemsize * survivors + I/8 bytes a row, rounded up to words, + 32 zeros."""
    _check_matrix(weight_OI)
    weight_OI = weight_OI.detach().cpu().contiguous()
    outputs, inputs = weight_OI.shape
    panels, words, _ = mask_shape((outputs, inputs))
    bits_OI = _as_bits(weight_OI)
    if (panels * PANEL, words * WORD) != (outputs, inputs):
        bits_OI = torch.nn.functional.pad(bits_OI, (0, words * WORD - inputs, 0, panels * PANEL - outputs))
    ordered = bits_OI.view(panels, PANEL, words, WORD).permute(0, 2, 1, 3).contiguous()
    kept = ordered != 0
    survivors = ordered[kept]
    mask = np.packbits(kept.numpy(), axis=-1, bitorder="little").view("<i8").reshape(panels, words, PANEL)
    values = torch.cat([survivors, survivors.new_zeros(PADDING)]).view(weight_OI.dtype)
    return read_bitmask(values, torch.from_numpy(mask), (outputs, inputs))


def read_bitmask(values: Tensor, mask_PJ4: Tensor, shape: tuple[int, int]) -> Packed:
    """Stored tensors -> Packed, after checking all of them, because kernels follow the mask without checks of their own.

    Raises PackError if a shape or dtype is not the format's, a bit lies outside of the matrix, the number of bits
    is not that of the values, or the padding is missing.
    """
    outputs, inputs = shape
    if outputs < 1 or inputs < 1:
        raise PackError(f"a packed matrix has at least one output and input, found shape {list(shape)}")
    if values.dtype not in DTYPES or values.ndim != 1:
        raise PackError(f"packed values are a vector of {', '.join(DTYPES.values())}, found {_is(values)}")
    if mask_PJ4.dtype != torch.int64 or tuple(mask_PJ4.shape) != mask_shape(shape):
        raise PackError(
            f"the mask of a {outputs}x{inputs} matrix is int64 of shape {list(mask_shape(shape))}, found {_is(mask_PJ4)}"
        )
    survivors = values.numel() - PADDING
    if survivors < 0:
        raise PackError(f"packed values end with {PADDING} zeros, found {values.numel()} elements in all")
    if values.device.type != "cpu" or mask_PJ4.device.type != "cpu":
        raise PackError(f"packed matrices are read on the CPU, found {values.device} and {mask_PJ4.device}")
    values, mask_PJ4 = values.detach().contiguous(), mask_PJ4.contiguous()
    starts = torch.empty(mask_PJ4.shape[0] + 1, dtype=torch.int64)
    where = (ctypes.c_int64 * 2)()
    wrong = library().secateurs_check_bitmask(
        mask_PJ4.data_ptr(), outputs, inputs, survivors, starts.data_ptr(), ctypes.addressof(where)
    )
    if wrong == 1:
        raise PackError(f"the mask keeps input {where[1]} of row {where[0]}, of {inputs} inputs")
    if wrong == 2:
        raise PackError(f"the mask keeps input {where[1]} of row {where[0]}, of {outputs} rows")
    if wrong:
        raise PackError(f"the mask keeps {where[0]} weights, but {survivors} are stored")
    return Packed("bitmask", (outputs, inputs), values, mask_PJ4, starts, int(where[1]))


def unpack_bitmask(packed: Packed) -> Tensor:
    outputs, inputs = packed.shape
    assert packed.mask_PJ4 is not None
    panels, words, _ = packed.mask_PJ4.shape
    kept = np.unpackbits(packed.mask_PJ4.numpy().view(np.uint8), bitorder="little").view(np.bool_)
    bits = _as_bits(packed.values)
    ordered = torch.zeros(panels * words * PANEL * WORD, dtype=bits.dtype)
    ordered[torch.from_numpy(kept)] = bits[: packed.survivors]
    rows = ordered.view(panels, words, PANEL, WORD).permute(0, 2, 1, 3).reshape(panels * PANEL, words * WORD)
    return rows[:outputs, :inputs].contiguous().view(packed.dtype)


def pack_dense(weight_OI: Tensor) -> Packed:
    """The matrix as it is: itemsize * O * I bytes."""
    _check_matrix(weight_OI)
    return Packed("dense", (weight_OI.shape[0], weight_OI.shape[1]), weight_OI.detach().cpu().contiguous())


def unpack_dense(packed: Packed) -> Tensor:
    return packed.values


@dataclass(frozen=True)
class Format:
    name: str
    about: str
    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Packed], Tensor]


FORMATS = {
    f.name: f
    for f in (
        Format("bitmask", "a bit per weight and the survivors; any pattern", pack_bitmask, unpack_bitmask),
        Format("dense", "all weights, zeros included", pack_dense, unpack_dense),
    )
}


def pack(weight_OI: Tensor, format: str = "bitmask") -> Packed:
    """Store a matrix in a format of FORMATS; unpack(pack(w)) has the bits of w. Raises PackError."""
    if format not in FORMATS:
        raise PackError(f"unknown format '{format}'; known: {', '.join(FORMATS)}")
    return FORMATS[format].pack(weight_OI)


def unpack(packed: Packed) -> Tensor:
    """The matrix, bit for bit."""
    return FORMATS[packed.format].unpack(packed)


def _is(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
