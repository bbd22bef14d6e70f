"""How a matrix is stored: pack() and unpack(), bit for bit. docs/format.md has the layout byte by byte.

A format has both directions, and the check of what is read from files. Weights are floats as they are, or integers of 2 to 8 bits
with the scales of a grid (secateurs.matrix.grids). bitmask stores a bit per position and the weights that are not zero, dense all
of them. A float is stored unless all its bits are zero, so negative zeros are stored; on a grid zeros have no sign.
Multiplication is in dispatch.py. Shapes: O outputs, I inputs; P panels of 4 rows, J words of 64 inputs, G groups of inputs.

Example:

    >>> import torch, secateurs as sc
    >>> weight_OI = torch.zeros(64, 64, dtype=torch.bfloat16).fill_diagonal_(1)
    >>> packed = sc.formats.pack(weight_OI)
    >>> packed.nbytes < weight_OI.nbytes, torch.equal(sc.formats.unpack(packed), weight_OI)
    (True, True)
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.base.errors import PackError
from secateurs.kernels.library import Weight, library
from secateurs.matrix.grids import Grid, Scales

VERSION = 3
# version 1 has no integers; of folders without fused experts, which those below 3 do not know, that of older releases is written
VERSIONS = (1, 2, 3)
VERSION_WITHOUT_EXPERTS = 2
PANEL = 4
WORD = 64
# zeros after the last survivor: a kernel's last load may reach 64 bytes past it, also after a cast to 16 bits
PADDING = 32
# the same for integers: bytes after the last
INTEGER_PADDING = 64
# the dtypes that kernels know, by the name that a kernel's row has
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Packed:
    """One matrix as stored. values: floats, or uint8 with the bits of integers; mask_PJ4: int64, or None if dense.

    bitmask: values holds the survivors, panel by panel, word by word, row by row, input by input, then padding.
    dense: values is the matrix itself, or integers in the order of a bitmask's survivors, then padding.
    grid, scale_PG4, zero_PG4: of integers. Scales are the bits of bf16 or fp16 as int16, which no cast of a model changes; zeros
    are uint8, or None on a symmetric grid. dtype: of the weights that unpack() gives.
    starts, most, pairs and survivors are not stored but found from the mask: where each panel begins in values, the highest number
    of survivors in any byte of the mask (4 for 2:4), and whether no four inputs side by side (0 to 3, 4 to 7, ...) keep more than
    two.
    """

    format: str
    shape: tuple[int, int]
    values: Tensor
    dtype: torch.dtype
    survivors: int
    mask_PJ4: Tensor | None = None
    starts: Tensor | None = None
    most: int = 8
    pairs: bool = False
    grid: Grid | None = None
    scale_PG4: Tensor | None = None
    zero_PG4: Tensor | None = None

    @property
    def stored(self) -> str:
        """What a kernel's row calls the stored numbers: bf16, fp16, fp32, int8, ..., int2."""
        return DTYPES[self.values.dtype] if self.grid is None else f"int{self.grid.bits}"

    @property
    def nbytes(self) -> int:
        """Bytes as stored: values, padding, mask, scales and zeros; row starts are counted when it is read."""
        return sum(t.nbytes for t in (self.values, self.mask_PJ4, self.scale_PG4, self.zero_PG4) if t is not None)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the plain matrix of this dtype."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def sparsity(self) -> float:
        """The fraction of weights that is not stored."""
        return 1 - self.survivors / math.prod(self.shape)

    @property
    def scales(self) -> Scales | None:
        """Scales and zeros by row, or None if the values are floats."""
        if self.grid is None or self.scale_PG4 is None:
            return None
        zero = None if self.zero_PG4 is None else _rows(self.zero_PG4, self.shape[0])
        return Scales(self.grid, _rows(self.scale_PG4.view(self.grid.scale_dtype), self.shape[0]), zero)


def mask_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """(P, J, 4) of an O x I matrix."""
    return -(-shape[0] // PANEL), -(-shape[1] // WORD), PANEL


def scales_shape(shape: tuple[int, int], grid: Grid) -> tuple[int, int, int]:
    """(P, G, 4) of an O x I matrix."""
    return -(-shape[0] // PANEL), grid.groups(shape[1]), PANEL


def packed_nbytes(shape: tuple[int, int], survivors: int | None, dtype: torch.dtype, grid: Grid | None = None) -> int:
    """Bytes that a matrix takes after pack(), computed without packing it; survivors: None if dense.

    Exact, but for a bitmask of 2 to 6 bits: there the integers of each row and word of 64 inputs begin at a byte, and this adds
    what that takes on average.
    """
    runs = math.prod(mask_shape(shape))
    if grid is None:
        return math.prod(shape) * dtype.itemsize if survivors is None else bitmask_nbytes(shape, survivors, dtype)
    fixed = math.prod(scales_shape(shape, grid)) * (2 if grid.symmetric else 3)
    if survivors is None:
        return fixed + packed_length(shape, grid)
    # n integers of b bits end at bit n * b mod 8, a multiple of gcd(b, 8); rows beyond the last have none
    unused = (8 - math.gcd(grid.bits, 8)) / 16 * shape[0] * runs / (PANEL * mask_shape(shape)[0])
    return fixed + INTEGER_PADDING + 8 * runs + math.ceil(survivors * grid.bits / 8 + min(unused, survivors))


def packed_length(shape: tuple[int, int], grid: Grid) -> int:
    """Bytes of all integers with their padding, without scales."""
    return math.prod(mask_shape(shape)) * WORD // 8 * grid.bits + INTEGER_PADDING


def masked_length(kept_OI: Tensor, grid: Grid) -> int:
    """The same of those integers alone that are kept."""
    counts = _ordered(kept_OI).sum(-1, dtype=torch.int32)
    return int(((counts * grid.bits + 7) // 8).sum()) + INTEGER_PADDING


def bitmask_nbytes(shape: tuple[int, int], survivors: int, dtype: torch.dtype) -> int:
    """packed_nbytes() of floats."""
    return (survivors + PADDING) * dtype.itemsize + math.prod(mask_shape(shape)) * 8


def count_stored(weight_OI: Tensor) -> int:
    """The number of floats that a bitmask stores: those with any bit set."""
    return int(torch.count_nonzero(_as_bits(weight_OI)))


def _as_bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)


def _check_matrix(weight_OI: Tensor) -> None:
    if weight_OI.ndim != 2 or not weight_OI.numel():
        raise PackError(f"cannot pack a tensor of shape {list(weight_OI.shape)}; give a matrix of outputs x inputs")
    if weight_OI.dtype not in DTYPES:
        known = ", ".join(DTYPES.values())
        raise PackError(f"cannot pack weights of dtype {weight_OI.dtype}; the formats hold {known}: cast them first")


def _panels(by_row: Tensor) -> Tensor:
    """[O, N] -> [P, N, 4], filled up with zeros."""
    rows, columns = by_row.shape
    panels = -(-rows // PANEL)
    by_row = torch.nn.functional.pad(by_row, (0, 0, 0, panels * PANEL - rows))
    return by_row.view(panels, PANEL, columns).transpose(1, 2).contiguous()


def _rows(by_panel: Tensor, rows: int) -> Tensor:
    """The inverse of _panels()."""
    return by_panel.transpose(1, 2).reshape(-1, by_panel.shape[1])[:rows]


def _ordered(matrix_OI: Tensor) -> Tensor:
    """[O, I] -> [P, J, 4, 64], filled up with zeros."""
    outputs, inputs = matrix_OI.shape
    panels, words, _ = mask_shape((outputs, inputs))
    if (panels * PANEL, words * WORD) != (outputs, inputs):
        matrix_OI = torch.nn.functional.pad(matrix_OI, (0, words * WORD - inputs, 0, panels * PANEL - outputs))
    return matrix_OI.view(panels, PANEL, words, WORD).permute(0, 2, 1, 3).contiguous()


def _mask(kept: Tensor) -> Tensor:
    """bool [P, J, 4, 64] -> int64 [P, J, 4]."""
    return torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little").view("<i8")[..., 0])


def pack_bitmask(weight_OI: Tensor) -> Packed:
    """A bit per weight and the survivors: itemsize * survivors + I/8 bytes a row, rounded up to words, + 32 zeros."""
    return read_bitmask(*bitmask_of(weight_OI), (weight_OI.shape[0], weight_OI.shape[1]))


def bitmask_of(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The survivors with their padding, and the mask, without the compiled library."""
    ordered = _ordered(_as_bits(weight_OI))
    kept = ordered != 0
    survivors = ordered[kept]
    return torch.cat([survivors, survivors.new_zeros(PADDING)]).view(weight_OI.dtype), _mask(kept)


def read_bitmask(values: Tensor, mask_PJ4: Tensor, shape: tuple[int, int]) -> Packed:
    """Stored floats -> Packed, after checking all of them, because kernels follow the mask without checks of their own.

    Raises PackError if a shape or dtype is not the format's, a bit lies outside of the matrix, the number of bits
    is not that of the values, or the padding is missing.
    """
    if values.dtype not in DTYPES or values.ndim != 1:
        raise PackError(f"packed values are a vector of {', '.join(DTYPES.values())}, found {_is(values)}")
    _check_here(shape, values, mask_PJ4)
    survivors = values.numel() - PADDING
    if survivors < 0:
        raise PackError(f"packed values end with {PADDING} zeros, found {values.numel()} elements in all")
    values, mask_PJ4 = values.detach().contiguous(), mask_PJ4.contiguous()
    starts, most, _, pairs = _follow(mask_PJ4, shape, 0, survivors)
    return Packed("bitmask", shape, values, values.dtype, survivors, mask_PJ4, starts, most, pairs)


def _check_here(shape: tuple[int, int], values: Tensor, mask_PJ4: Tensor | None) -> None:
    outputs, inputs = shape
    if outputs < 1 or inputs < 1:
        raise PackError(f"a packed matrix has at least one output and input, found shape {list(shape)}")
    if mask_PJ4 is not None and (mask_PJ4.dtype != torch.int64 or tuple(mask_PJ4.shape) != mask_shape(shape)):
        raise PackError(
            f"the mask of a {outputs}x{inputs} matrix is int64 of shape {list(mask_shape(shape))}, found {_is(mask_PJ4)}"
        )
    devices = [t.device for t in (values, mask_PJ4) if t is not None]
    if any(device.type != "cpu" for device in devices):
        raise PackError(f"packed matrices are read on the CPU, found {' and '.join(map(str, devices))}")


def _follow(mask_PJ4: Tensor, shape: tuple[int, int], bits: int, stored: int) -> tuple[Tensor, int, int, bool]:
    """Where each panel begins, the most survivors in a byte of the mask, all survivors, and whether no four keep more than two.

    stored: the number of survivors there should be, or of bytes of integers. Raises PackError.
    """
    outputs, inputs = shape
    starts = torch.empty(mask_PJ4.shape[0] + 1, dtype=torch.int64)
    where = (ctypes.c_int64 * 4)()
    wrong = library().secateurs_check_bitmask(
        mask_PJ4.data_ptr(), outputs, inputs, bits, stored, starts.data_ptr(), ctypes.addressof(where)
    )
    if wrong == 1:
        raise PackError(f"the mask keeps input {where[1]} of row {where[0]}, of {inputs} inputs")
    if wrong == 2:
        raise PackError(f"the mask keeps input {where[1]} of row {where[0]}, of {outputs} rows")
    if wrong and not bits:
        raise PackError(f"the mask keeps {where[0]} weights, but {stored} are stored")
    if wrong:
        raise PackError(f"the mask keeps weights that take {where[0]} bytes, but {stored} are stored")
    return starts, int(where[1]), int(where[2]), bool(where[3])


def unpack_bitmask(packed: Packed) -> Tensor:
    """The matrix of a bitmask, [O, I], bit for bit."""
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
    return Packed("dense", (weight_OI.shape[0], weight_OI.shape[1]), weight_OI, weight_OI.dtype, weight_OI.numel())


def unpack_dense(packed: Packed) -> Tensor:
    """The matrix as it was stored, [O, I]."""
    return packed.values


def pack_integers(weight_OI: Tensor, scales: Scales, masked: bool) -> Packed:
    """A weight's integer + zero in the grid's bits, of all weights or of those that are not zero. Raises PackError for one that is
    not on the grid."""
    if off := scales.off(weight_OI):
        raise PackError(f"cannot pack integers: {off}")
    shape, inputs = (weight_OI.shape[0], weight_OI.shape[1]), weight_OI.shape[1]
    grid = scales.grid
    integer_OI = scales.integers(weight_OI)
    codes = integer_OI + (
        grid.middle if scales.zero_OG is None else grid.spread(scales.zero_OG.to(torch.int16), inputs)
    )
    mask_PJ4 = _mask(_ordered(integer_OI != 0)) if masked else None
    scale_PG4 = _panels(scales.scale_OG.view(torch.int16))
    zero_PG4 = None if scales.zero_OG is None else _panels(scales.zero_OG)
    length = masked_length(integer_OI != 0, grid) if masked else packed_length(shape, grid)
    values = torch.zeros(length, dtype=torch.uint8)
    packed = read_integers(values, mask_PJ4, scale_PG4, zero_PG4, shape, grid, weight_OI.dtype)
    of_bytes = codes.to(torch.uint8).contiguous()
    library().secateurs_write_integers(ctypes.byref(weight_of(packed)), of_bytes.data_ptr())
    return packed


def read_integers(
    values: Tensor, mask_PJ4: Tensor | None, scale_PG4: Tensor, zero_PG4: Tensor | None,
    shape: tuple[int, int], grid: Grid, dtype: torch.dtype,
) -> Packed:  # fmt: skip
    """Stored integers -> Packed, after checking all that kernels rely on. mask_PJ4: None if dense. Raises PackError."""
    if values.dtype != torch.uint8 or values.ndim != 1:
        raise PackError(f"packed integers are a vector of uint8, found {_is(values)}")
    length = values.numel() - INTEGER_PADDING
    if length < 0:
        raise PackError(f"packed integers end with {INTEGER_PADDING} zeros, found {values.numel()} bytes in all")
    _check_here(shape, values, mask_PJ4)
    wanted = scales_shape(shape, grid)
    if scale_PG4.dtype != torch.int16 or tuple(scale_PG4.shape) != wanted or scale_PG4.device.type != "cpu":
        raise PackError(f"scales of {grid} are the bits of {wanted} numbers as int16, found {_is(scale_PG4)}")
    if not bool(scale_PG4.view(grid.scale_dtype).isfinite().all()):
        raise PackError(f"a scale of {grid} is not finite")
    if (zero_PG4 is None) != grid.symmetric:
        raise PackError(f"the grid {grid} has {'no' if grid.symmetric else 'its'} zeros, found them otherwise")
    if zero_PG4 is not None:
        if zero_PG4.dtype != torch.uint8 or tuple(zero_PG4.shape) != wanted or zero_PG4.device.type != "cpu":
            raise PackError(f"zeros of {grid} are {wanted} of uint8, found {_is(zero_PG4)}")
        if int(zero_PG4.max()) >= grid.levels:
            raise PackError(f"a zero of {grid} is {int(zero_PG4.max())}, of {grid.levels} levels")
        zero_PG4 = zero_PG4.contiguous()
    values, scale_PG4 = values.detach().contiguous(), scale_PG4.contiguous()
    if mask_PJ4 is None:
        dense = packed_length(shape, grid) - INTEGER_PADDING
        if length != dense:
            raise PackError(
                f"the integers of a {shape[0]}x{shape[1]} matrix on {grid} take {dense} bytes, but {length} are stored"
            )
        return Packed(
            "dense", shape, values, dtype, math.prod(shape), grid=grid, scale_PG4=scale_PG4, zero_PG4=zero_PG4
        )
    mask_PJ4 = mask_PJ4.contiguous()
    starts, most, survivors, pairs = _follow(mask_PJ4, shape, grid.bits, length)
    return Packed(
        "bitmask", shape, values, dtype, survivors, mask_PJ4, starts, most, pairs, grid, scale_PG4, zero_PG4
    )  # fmt: skip


def unpack_integers(packed: Packed) -> Tensor:
    """to_dtype(float32(scale) * integer); zeros are positive."""
    scales = packed.scales
    assert scales is not None
    codes = torch.empty(packed.shape, dtype=torch.uint8)
    library().secateurs_read_integers(ctypes.byref(weight_of(packed)), codes.data_ptr())
    grid, inputs = scales.grid, packed.shape[1]
    zero = grid.middle if scales.zero_OG is None else grid.spread(scales.zero_OG.to(torch.int16), inputs)
    # adding a positive zero makes every zero positive
    return scales.weights(codes.to(torch.int16) - zero).add_(0.0).to(packed.dtype)


# what is given of each matrix to the operators: five tensors, of which all but the first may be None, and five numbers
PARTS = ("values", "mask", "scale", "zero", "bias")
LAYOUT = ("outputs", "inputs", "bits", "group", "half")


def layout_of(shape: tuple[int, int], grid: Grid | None) -> tuple[int, ...]:
    """The numbers of LAYOUT; bits are 0 if the values are floats."""
    return (*shape, 0, 0, 0) if grid is None else (*shape, grid.bits, grid.group, int(grid.half))


def parts_of(packed: Packed, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The tensors of PARTS."""
    return packed.values, packed.mask_PJ4, packed.scale_PG4, packed.zero_PG4, bias


def weight_of(packed: Packed) -> Weight:
    """What the compiled kernels are given of a matrix; its tensors must outlive it."""

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    grid = packed.grid
    return Weight(
        *packed.shape, address(packed.mask_PJ4), packed.values.data_ptr(), address(packed.starts), packed.most, None, None,
        *((0, 0, 0) if grid is None else (grid.bits, grid.group, int(grid.half))),
        address(packed.scale_PG4), address(packed.zero_PG4), None,
    )  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A way to store a matrix, both directions. masked: positions are stored, and zeros are not."""

    name: str
    about: str
    masked: bool
    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Packed], Tensor]


FORMATS = {
    f.name: f
    for f in (
        Format("bitmask", "a bit per weight and the survivors; any pattern", True, pack_bitmask, unpack_bitmask),
        Format("dense", "all weights, zeros included", False, pack_dense, unpack_dense),
    )
}


def pack(weight_OI: Tensor, format: str = "bitmask", scales: Scales | None = None) -> Packed:
    """Store a matrix in a format of FORMATS, as integers if its scales are given; unpack(pack(w)) has the bits of w, but for the
    sign of zeros on a grid. Raises PackError, also for a weight that is not on the grid."""
    if format not in FORMATS:
        raise PackError(f"unknown format '{format}'; known: {', '.join(FORMATS)}")
    _check_matrix(weight_OI)
    weight_OI = weight_OI.detach().cpu().contiguous()
    if scales is not None:
        return pack_integers(weight_OI, scales, FORMATS[format].masked)
    return FORMATS[format].pack(weight_OI)


def unpack(packed: Packed) -> Tensor:
    """The matrix, bit for bit."""
    return FORMATS[packed.format].unpack(packed) if packed.grid is None else unpack_integers(packed)


def _is(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
