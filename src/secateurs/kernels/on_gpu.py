"""Packed matrices on a GPU: the check of their tensors, what kernels need beside them, and the ways to multiply.

The tensors are those of docs/format.md, on the device. Beside them lies, made when a matrix is first used there, an int64 for every
word of 64 inputs of a panel: below where its survivors begin, above, a byte each, how much further those of its rows do. That is
0.25 bits a weight, not made where every quad (four inputs side by side) keeps as many, as in 2:4. Activations are not rounded to
integers, as CPU kernels do: integers are expanded to floats.
All of it is torch's operators and Triton, so tests run it on the CPU in Triton's interpreter. No card has run it yet.
Shapes: T tokens, O outputs, I inputs, P panels of 4 rows, J words of 64 inputs, S splits of the inputs.
"""

import functools
import importlib.util
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import DeviceError, PackError
from secateurs.kernels import semi_structured
from secateurs.kernels.formats import (
    DTYPES,
    INTEGER_PADDING,
    LAYOUT,
    PADDING,
    PANEL,
    PARTS,
    WORD,
    mask_shape,
    scales_shape,
)
from secateurs.matrix.grids import Grid

QUAD = 4
# a program of few_tokens takes so many quads at a time: 8 words, one quad a thread of 4 warps
FEW_QUADS = 128
FEW_TOKENS = 8
# programs for each multiprocessor from which inputs are not split: 8 of 4 warps are half of what one holds
_PROGRAMS = 8
# warps are 4 where not said otherwise; (tokens, rows, quads, warps) of many_tokens: the first that holds all tokens, or the last
TILES = ((16, 16, 32, 4), (32, 32, 32, 4), (64, 64, 16, 4), (128, 64, 16, 8))
# rows and quads of a tile that expand writes
EXPAND_TILE = (16, 64)
_ALIGNED = 16


def lacks() -> str | None:
    """Why packed layers cannot multiply on a GPU here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "packed layers multiply on a GPU with Triton, which is not installed: pip install 'secateurs[gpu]'"
    return None


@functools.cache
def _kernels() -> Any:
    if reason := lacks():
        raise DeviceError(f"{reason}, or model.cpu() first")
    from secateurs.kernels import triton_kernels

    return triton_kernels


def interpreted() -> bool:
    """True if Triton's interpreter runs the kernels, on tensors of the CPU."""
    from triton.runtime.jit import JITFunction

    return not isinstance(_kernels().expand, JITFunction)


@dataclass
class Matrix:
    """One packed matrix on a device. values: floats, or uint8; mask: int64 (P, J, 4); starts: int64 (P, J), see above.

    kept: survivors of every quad, 0 if that varies. scale: bf16 or fp16; dtype: of x and of the weights that it stands for.
    copies: the same weights by the way that multiplies them (dense), where tune() was allowed the memory.
    ways: (tokens, way), as measured: the way up to so many tokens; empty for the defaults.
    """

    shape: tuple[int, int]
    values: Tensor
    dtype: torch.dtype
    survivors: int
    mask: Tensor | None = None
    starts: Tensor | None = None
    kept: int = 0
    grid: Grid | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    copies: dict[str, Tensor] = field(default_factory=dict)
    ways: tuple[tuple[int, str], ...] = ()

    @property
    def plain(self) -> bool:
        """True if values is the matrix itself."""
        return self.mask is None and self.grid is None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides how fast its kernels are: matrices of one kind are measured once."""
        share = round(self.survivors / math.prod(self.shape), 2)
        return self.shape, str(self.grid), self.dtype, self.mask is not None, self.kept, share

    @property
    def nbytes(self) -> int:
        """Bytes that a product of few tokens reads."""
        own = (self.values, self.mask, self.starts, self.scale, self.zero)
        return sum(t.nbytes for t in own if t is not None)

    def way(self, tokens: int) -> str:
        """The way for so many tokens."""
        if self.plain:
            return "dense"
        found = next((way for most, way in self.ways if tokens <= most), self.ways[-1][1] if self.ways else None)
        return found or default_way(tokens, self.dtype)


def default_way(tokens: int, dtype: torch.dtype) -> str:
    """The way where nothing was measured. Not measured either: no card has run these kernels (docs/design.md)."""
    if dtype == torch.float32:
        # matrix units would round to TF32
        return "few_tokens" if tokens <= 16 else "expanded"
    return "few_tokens" if tokens <= 4 else "many_tokens" if tokens <= 64 else "expanded"


# ------------------------------------------------------------------------------------------------- reading and checking


def ones(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of int32: the number of set bits of each quad, in its four bits, and of all 32."""
    x = mask - ((mask >> 1) & 0x55555555)
    of_quads = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    # >> drags the sign along, but only a quad whose four bits are set has one
    of_bytes = (of_quads & 0x0F0F0F0F) + ((of_quads >> 4) & 0x0F0F0F0F)
    return of_quads, (of_bytes * 0x01010101) >> 24


def read(
    values: Tensor, mask_PJ4: Tensor | None, scale_PG4: Tensor | None, zero_PG4: Tensor | None, shape: tuple[int, int],
    grid: Grid | None, dtype: torch.dtype,
) -> Matrix:  # fmt: skip
    """The stored tensors of a matrix -> what kernels take, checked, since they follow the mask without checks of their own.

    Reads results back from the device, which a CUDA graph that is being captured forbids: call it before. Raises PackError.
    """
    outputs, inputs = shape
    given = {t.device for t in (values, mask_PJ4, scale_PG4, zero_PG4) if t is not None}
    if len(given) > 1:
        raise PackError(
            f"the tensors of a packed matrix are on one device, found {' and '.join(sorted(map(str, given)))}"
        )
    values = values.detach()
    if mask_PJ4 is None and grid is None:
        return Matrix(shape, values.view(shape), values.dtype, outputs * inputs)
    if values.numel() >= 1 << 31:
        raise PackError(f"kernels for GPUs take less than 2^31 stored numbers of a matrix, found {values.numel()}")
    stored = values.numel() - (PADDING if grid is None else INTEGER_PADDING)
    if (values.dtype not in DTYPES if grid is None else values.dtype != torch.uint8) or values.ndim != 1 or stored < 0:
        wanted = "a vector of floats" if grid is None else "a vector of uint8"
        raise PackError(f"packed values are {wanted} with their padding, found {values.dtype} of {list(values.shape)}")
    scale = zero = None
    if grid is not None:
        scale, zero = _read_scales(scale_PG4, zero_PG4, shape, grid)
    found = Matrix(
        shape, _aligned(values), dtype if grid else values.dtype, outputs * inputs, None, None, 0, grid, scale, zero
    )
    if mask_PJ4 is None:
        assert grid is not None
        wanted_bytes = math.prod(mask_shape(shape)) * WORD // 8 * grid.bits
        if stored != wanted_bytes:
            raise PackError(
                f"all integers of {outputs}x{inputs} on {grid} take {wanted_bytes} bytes, but {stored} are stored"
            )
        return found
    if mask_PJ4.dtype != torch.int64 or tuple(mask_PJ4.shape) != mask_shape(shape):
        raise PackError(
            f"the mask of a {outputs}x{inputs} matrix is int64 of shape {list(mask_shape(shape))}, found {mask_PJ4.dtype} of "
            f"{list(mask_PJ4.shape)}"
        )
    return _follow(found, mask_PJ4, stored)


def _read_scales(
    scale_PG4: Tensor | None, zero_PG4: Tensor | None, shape: tuple[int, int], grid: Grid
) -> tuple[Tensor, Tensor | None]:
    wanted = scales_shape(shape, grid)
    if scale_PG4 is None or scale_PG4.dtype != torch.int16 or tuple(scale_PG4.shape) != wanted:
        found = "none" if scale_PG4 is None else f"{scale_PG4.dtype} of shape {list(scale_PG4.shape)}"
        raise PackError(f"scales of {grid} are the bits of {wanted} numbers as int16, found {found}")
    scale = scale_PG4.contiguous().view(grid.scale_dtype)
    if not bool(scale.isfinite().all()):
        raise PackError(f"a scale of {grid} is not finite")
    if (zero_PG4 is None) != grid.symmetric:
        raise PackError(f"the grid {grid} has {'no' if grid.symmetric else 'its'} zeros, found them otherwise")
    if zero_PG4 is None:
        return scale, None
    if zero_PG4.dtype != torch.uint8 or tuple(zero_PG4.shape) != wanted or int(zero_PG4.max()) >= grid.levels:
        raise PackError(f"zeros of {grid} are {wanted} of uint8 below {grid.levels}")
    return scale, zero_PG4.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that begins where loads of several numbers may: a view of a file may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def _follow(found: Matrix, mask_PJ4: Tensor, stored: int) -> Matrix:
    """The matrix with its mask and the starts that are counted from it."""
    outputs, inputs = found.shape
    mask_PJ4 = found.mask = _aligned(mask_PJ4.detach())
    if inputs % WORD:
        outside = mask_PJ4[:, -1] & (-1 << inputs % WORD)
        if bool(outside.any()):
            row = int(outside.flatten().nonzero()[0])
            raise PackError(f"the mask keeps an input beyond {inputs} of row {row}")
    if outputs % PANEL and bool(mask_PJ4[-1, :, outputs % PANEL :].any()):
        raise PackError(f"the mask keeps weights of rows beyond {outputs}")
    of_quads, of_halves = ones(mask_PJ4.view(torch.int32))
    counts_PJ4 = of_halves.view(*mask_PJ4.shape, 2).sum(-1, dtype=torch.int32)
    lengths_PJ4 = counts_PJ4 if found.grid is None else (counts_PJ4 * found.grid.bits + 7) // 8
    upto_PJ4 = lengths_PJ4.cumsum(-1, dtype=torch.int32)
    lengths_PJ = upto_PJ4[..., -1].to(torch.int64)
    ends_PJ = lengths_PJ.flatten().cumsum(0).view_as(lengths_PJ)
    total, found.survivors = int(ends_PJ[-1, -1]), int(counts_PJ4.sum(dtype=torch.int64))
    if total != stored:
        what = "weights" if found.grid is None else "weights that take bytes"
        raise PackError(f"the mask keeps {total} {what}, but {stored} are stored")
    first = int(of_quads.flatten()[0]) & 0xF
    found.kept = first if first and bool((of_quads == _alike(first)).all()) else 0
    if not found.kept:
        of_rows = (upto_PJ4[..., 0] << 8) | (upto_PJ4[..., 1] << 16) | (upto_PJ4[..., 2] << 24)
        found.starts = (ends_PJ - lengths_PJ) | (of_rows.to(torch.int64) << 32)
    return found


def _alike(count: int) -> int:
    """An int32 whose eight quads are all `count`."""
    return count * 0x11111111


# --------------------------------------------------------------------------------------------------------- the launches


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _of(m: Matrix) -> tuple[list[Tensor], dict[str, Any]]:
    """Pointers and constants that every kernel takes of a matrix; pointers that are not read are that of values."""
    grid = m.grid
    pointers = [m.values, *(m.values if t is None else t for t in (m.mask, m.starts, m.scale, m.zero))]
    if grid is None:
        constants = {"BITS": 0, "GROUP": 1, "MIDDLE": 0, "ZEROS": False}
    else:
        # a group that is the row holds every input
        group = grid.group or mask_shape(m.shape)[1] * WORD
        constants = {"BITS": grid.bits, "GROUP": group, "MIDDLE": grid.middle, "ZEROS": m.zero is not None}
    return pointers, {**constants, "MASKED": m.mask is not None, "KEPT": m.kept}


def _groups(m: Matrix) -> int:
    return 1 if m.grid is None else m.grid.groups(m.shape[1])


def _split(programs: int, blocks: int, device: torch.device, splits: int | None) -> tuple[int, int]:
    """(splits, blocks of each): enough programs for the device, none of them empty."""
    wanted = splits or _PROGRAMS * _multiprocessors(device) // programs
    each = -(-blocks // min(max(1, wanted), blocks))
    return -(-blocks // each), each


def _even(m: Matrix, rows: int, quads: int, blocks: int) -> bool:
    """True if tiles of so many rows and quads, so many of these beside each other, are the matrix: nothing lies outside."""
    return m.shape[0] % rows == 0 and m.shape[1] == blocks * quads * QUAD


def _multiplied(
    kernel: Any, grid: tuple[int, ...], splits: int, m: Matrix, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor,
    sizes: Sequence[int], warps: int, **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel, and what adds its splits."""
    tokens, outputs = y_TO.shape
    pointers, own = _of(m)
    to = y_TO if splits == 1 else y_TO.new_empty((splits, tokens, outputs), dtype=torch.float32)
    kernel[grid](
        x_TI, *pointers, m.values if bias is None else bias, to, tokens, outputs, m.shape[1], *sizes,
        **own, BIASED=bias is not None, WHOLE=splits == 1, num_warps=warps, **constants,
    )  # fmt: skip
    if splits > 1:
        block = 256
        _kernels().add_splits[(-(-tokens * outputs // block),)](
            to, y_TO if bias is None else bias, y_TO, tokens * outputs, outputs,
            SPLITS=splits, BIASED=bias is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip


def few_tokens(m: Matrix, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor, splits: int | None = None) -> None:
    """y = x W' + b in fp32 units, for up to 8 tokens at once: 16 of fp32 would spill registers."""
    panels, words, _ = mask_shape(m.shape)
    splits, each = _split(panels, -(-words * 16 // FEW_QUADS), x_TI.device, splits)
    for begin in range(0, len(x_TI), FEW_TOKENS):
        part, to = x_TI[begin : begin + FEW_TOKENS], y_TO[begin : begin + FEW_TOKENS]
        _multiplied(
            _kernels().few_tokens, (panels, splits), splits, m, part, bias, to, (words, _groups(m)), 4,
            BLOCKS=each, EVEN=_even(m, 1, FEW_QUADS, splits * each), TOKENS=1 << (len(part) - 1).bit_length(), QUADS=FEW_QUADS,
        )  # fmt: skip


def many_tokens(m: Matrix, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor, splits: int | None = None) -> None:
    """y = x W' + b in matrix units."""
    tokens, rows, quads, warps = next((t for t in TILES if len(x_TI) <= t[0]), TILES[-1])
    panels, words, _ = mask_shape(m.shape)
    programs = -(-m.shape[0] // rows) * -(-len(x_TI) // tokens)
    splits, each = _split(programs, -(-words * 16 // quads), x_TI.device, splits)
    grid = (-(-m.shape[0] // rows), -(-len(x_TI) // tokens), splits)
    _multiplied(
        _kernels().many_tokens, grid, splits, m, x_TI, bias, y_TO, (panels, words, _groups(m)), warps,
        BLOCKS=each, EVEN=_even(m, rows, quads, splits * each), TOKENS=tokens, ROWS=rows, QUADS=quads, WIDE=interpreted(),
    )  # fmt: skip


def expand(m: Matrix) -> Tensor:
    """The matrix (O, I), as unpack() gives it."""
    if m.plain:
        return m.values
    panels, words, _ = mask_shape(m.shape)
    rows, quads = EXPAND_TILE
    pointers, constants = _of(m)
    weight_OI = torch.empty(m.shape, dtype=m.dtype, device=m.values.device)
    with _on(m.values.device):
        _kernels().expand[(-(-m.shape[0] // rows), -(-words * 16 // quads))](
            *pointers, weight_OI, *m.shape, panels, words, _groups(m), **constants, ROWS=rows, QUADS=quads,
            EVEN=_even(m, rows, quads, -(-words * 16 // quads)), num_warps=4,
        )  # fmt: skip
    return weight_OI


def _library(weight_OI: Tensor, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor) -> None:
    if bias is None:
        torch.mm(x_TI, weight_OI.T, out=y_TO)
    else:
        torch.addmm(bias, x_TI, weight_OI.T, out=y_TO)


def _expanded(m: Matrix, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor) -> None:
    """The library's product with the matrix, expanded for this call."""
    _library(expand(m), x_TI, bias, y_TO)


def _dense(m: Matrix, x_TI: Tensor, bias: Tensor | None, y_TO: Tensor) -> None:
    """The library's product with a dense copy."""
    _library(m.values if m.plain else m.copies["dense"], x_TI, bias, y_TO)


# how a product may be computed: (matrix, x (T, I), bias or None, y (T, O) to write); dense wants a copy of the weights
WAYS = {"few_tokens": few_tokens, "many_tokens": many_tokens, "expanded": _expanded, "dense": _dense}


@dataclass(frozen=True)
class Tuned:
    """seconds: by tokens and way, of one kind of matrix. ways: of the matrix. slower: tokens for which a dense copy would be
    faster, but its memory was not allowed."""

    kind: tuple[Any, ...]
    seconds: dict[int, dict[str, float]]
    ways: tuple[tuple[int, str], ...]
    slower: tuple[int, ...]


def tune(
    matrices: Sequence[Matrix], tokens: Sequence[int] = (1, 4, 16, 64, 256, 2048), copies_nbytes: int = 0
) -> list[Tuned]:
    """Time every way for every kind of matrix, and let each matrix take the fastest. In place; a result for each matrix.

    A dense copy is kept where it is fastest for some number of tokens and copies_nbytes of memory are not used up; where they are,
    the result says for which it is slower than dense.
    """
    kinds: dict[Any, list[Matrix]] = {}
    for m in matrices:
        kinds.setdefault(m.kind, []).append(m)
    times = {kind: {t: _timed(same, t) for t in sorted(tokens)} for kind, same in kinds.items() if not same[0].plain}
    found, left = [], copies_nbytes
    for m in matrices:
        seconds = times.get(m.kind, {})
        fastest = {t: min(by_way, key=by_way.__getitem__) for t, by_way in seconds.items()}
        nbytes = math.prod(m.shape) * m.dtype.itemsize
        m.copies.clear()
        if "dense" in fastest.values() and nbytes <= left:
            left -= nbytes
            m.copies["dense"] = expand(m)
        here = {w for w in WAYS if w != "dense" or w in m.copies}
        m.ways = tuple((t, min(here & by_way.keys(), key=by_way.__getitem__)) for t, by_way in seconds.items())
        slower = tuple(t for t, way in m.ways if fastest[t] == "dense" != way)
        found.append(Tuned(m.kind, seconds, m.ways, slower))
    return found


# weights are rotated through at least so much memory, where a model has as much of a kind
_COLD_BYTES = 160 << 20


def _timed(same: Sequence[Matrix], tokens: int) -> dict[str, float]:
    """Median seconds of every way, interleaved, each pass over several matrices of a kind; replayed as a CUDA graph."""
    first = same[0]
    some = same[: max(1, -(-_COLD_BYTES // first.nbytes))]
    device = first.values.device
    x_TI = torch.randn(tokens, first.shape[1], device=device).to(first.dtype)
    y_TO = x_TI.new_empty(tokens, first.shape[0])
    runs: dict[str, list[Callable[[], Any]]] = {}
    for name, way in WAYS.items():
        # a copy for the time of the measurement
        given = [replace(m, copies={"dense": expand(m)}) for m in some] if name == "dense" else some
        if name != "few_tokens" or tokens <= 16:
            runs[name] = [functools.partial(way, m, x_TI, None, y_TO) for m in given]
    with _on(device):
        samples = semi_structured.interleaved(runs, device.type, 10, device.type == "cuda")
    return {name: median(taken) for name, taken in samples.items()}


# -------------------------------------------------------------------------------------------------------- kept matrices


# by the id of the values, as long as they exist
_matrices: dict[int, tuple["weakref.ref[Tensor]", list[Any], Matrix]] = {}


def matrix_of(parts: Sequence[Tensor | None], shape: tuple[int, int], grid: Grid | None, dtype: torch.dtype) -> Matrix:
    """The Matrix of (values, mask, scale, zero): read once, and again where one of them was changed. Raises PackError."""
    values = parts[0]
    assert values is not None
    state: list[Any] = [shape, grid, dtype]
    for part in parts:
        state += (None,) if part is None else (part.data_ptr(), -1 if part.is_inference() else part._version)
    kept = _matrices.get(id(values))
    if kept is not None and kept[0]() is values and kept[1] == state:
        return kept[2]
    found, key = read(values, parts[1], parts[2], parts[3], shape, grid, dtype), id(values)
    _matrices[key] = (weakref.ref(values, lambda _: _matrices.pop(key, None)), state, found)
    return found


def matrices_of(parts: Sequence[Tensor | None], layouts: Sequence[int], dtype: torch.dtype) -> list[Matrix]:
    """The matrices of an operator's PARTS and LAYOUT. dtype: of x, in which integers are multiplied."""
    found = []
    for i in range(len(layouts) // len(LAYOUT)):
        stored = parts[len(PARTS) * i : len(PARTS) * (i + 1) - 1]
        outputs, inputs, bits, group, half = layouts[len(LAYOUT) * i : len(LAYOUT) * (i + 1)]
        grid = Grid(bits, group, stored[3] is None, bool(half)) if bits else None
        found.append(matrix_of(stored, (outputs, inputs), grid, dtype))
    return found


def linear(x: Tensor, parts: Sequence[Tensor | None], layouts: Sequence[int]) -> Tensor:
    """What secateurs::linear does on a GPU: a flat y that holds, for each matrix in turn, tokens x outputs."""
    matrices, biases, inputs = matrices_of(parts, layouts, x.dtype), parts[len(PARTS) - 1 :: len(PARTS)], layouts[1]
    first = matrices[0]
    if x.dtype not in DTYPES or x.dtype != first.dtype or x.shape[-1] != inputs or x.device != first.values.device:
        raise DeviceError(
            f"a packed layer of {inputs} {first.dtype} inputs on {first.values.device} was given {x.dtype} of shape "
            f"{list(x.shape)} on {x.device}"
        )
    if len({(m.shape[1], m.dtype) for m in matrices}) > 1:
        raise DeviceError("matrices that share an input have one number of inputs and one dtype")
    for m, bias in zip(matrices, biases, strict=True):
        if bias is not None and (tuple(bias.shape) != (m.shape[0],) or bias.device != x.device):
            raise DeviceError(f"the bias of {m.shape[0]} outputs is of shape {list(bias.shape)} on {bias.device}")
    x_TI = x.reshape(-1, inputs).contiguous()
    tokens = len(x_TI)
    y = x.new_empty(tokens * sum(m.shape[0] for m in matrices))
    if tokens:
        with _on(x.device):
            pieces = torch.split(y, [tokens * m.shape[0] for m in matrices])
            for m, bias, piece in zip(matrices, biases, pieces, strict=True):
                WAYS[m.way(tokens)](m, x_TI, None if bias is None else bias.detach(), piece.view(tokens, m.shape[0]))
    return y


def linear_back(by_y: Tensor, parts: Sequence[Tensor | None], layouts: Sequence[int]) -> Tensor:
    """What secateurs::linear_back does on a GPU: the gradient by x, flat: by_y W, summed over the matrices."""
    matrices = matrices_of(parts, layouts, by_y.dtype)
    outputs = [m.shape[0] for m in matrices]
    tokens = by_y.numel() // sum(outputs)
    by_x_TI = by_y.new_zeros(tokens, layouts[1])
    for m, piece in zip(matrices, torch.split(by_y, [tokens * n for n in outputs]), strict=True):
        by_x_TI.addmm_(piece.view(tokens, m.shape[0]), expand(m))
    return by_x_TI.flatten()
