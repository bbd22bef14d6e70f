"""Packed matrices in other pieces, bit for bit: rows or inputs of one, and several on top of each other.

A server multiplies q, k and v at once, and gives each process of a tensor-parallel group its rows, or its inputs, of a matrix.
O outputs, I inputs; P panels of 4 rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.base.errors import PackError
from secateurs.kernels.formats import (
    INTEGER_PADDING,
    PADDING,
    PANEL,
    WORD,
    Packed,
    mask_shape,
    pack,
    pack_dense,
    read_bitmask,
    read_integers,
    unpack,
)
from secateurs.matrix.grids import Scales


def rows(packed: Packed, start: int, stop: int) -> Packed:
    """Rows start to stop - 1 of a matrix. Of whole panels the stored numbers are copied; other rows are packed again.

    Raises PackError for rows that it does not have.
    """
    outputs = packed.shape[0]
    if _is_all("rows", start, stop, outputs):
        return packed
    if packed.grid is None and packed.mask_PJ4 is None:
        return pack_dense(packed.values[start:stop])
    if start % PANEL or (stop % PANEL and stop != outputs):
        return _cut(packed, slice(start, stop), slice(None))
    panels = slice(start // PANEL, -(-stop // PANEL))
    first, end = (_begins(packed, place) for place in (panels.start, panels.stop))
    return _read(
        packed, (stop - start, packed.shape[1]), packed.values[first:end],
        *(None if part is None else part[panels] for part in (packed.mask_PJ4, packed.scale_PG4, packed.zero_PG4)),
    )  # fmt: skip


def inputs(packed: Packed, start: int, stop: int) -> Packed:
    """Inputs start to stop - 1 of a matrix, packed again.

    Raises PackError for inputs that it does not have, and where a cut would part a group of integers that share a scale.
    """
    if _is_all("inputs", start, stop, packed.shape[1]):
        return packed
    if packed.grid is None and packed.mask_PJ4 is None:
        return pack_dense(packed.values[:, start:stop].contiguous())
    return _cut(packed, slice(None), slice(start, stop))


def _is_all(what: str, start: int, stop: int, there: int) -> bool:
    """True if start to stop - 1 are all that are there. Raises PackError for what is not there."""
    if not 0 <= start < stop <= there:
        raise PackError(f"{what} {start}..{stop - 1} were asked of a matrix of {there} {what}")
    return (start, stop) == (0, there)


def stacked(matrices: Sequence[Packed]) -> list[Packed]:
    """The matrices on top of each other, as few as hold all of them: neighbours of one format and kind of numbers become one.

    The one above must end with a whole panel, because the next row begins another.
    """
    found: list[Packed] = []
    for matrix in matrices:
        if found and found[-1].shape[0] % PANEL == 0 and _kind(found[-1]) == _kind(matrix):
            found[-1] = _joined(found[-1], matrix)
        else:
            found.append(matrix)
    return found


def _kind(packed: Packed) -> tuple[object, ...]:
    return packed.format, packed.grid, packed.values.dtype, packed.dtype, packed.shape[1]


def _joined(above: Packed, below: Packed) -> Packed:
    shape = (above.shape[0] + below.shape[0], above.shape[1])
    if above.grid is None and above.mask_PJ4 is None:
        return pack_dense(torch.cat([above.values, below.values]))
    parts = ((above.mask_PJ4, below.mask_PJ4), (above.scale_PG4, below.scale_PG4), (above.zero_PG4, below.zero_PG4))
    return _read(
        above, shape, torch.cat([_unpadded(above), _unpadded(below)]),
        *(None if one is None or other is None else torch.cat([one, other]) for one, other in parts),
    )  # fmt: skip


def _unpadded(packed: Packed) -> Tensor:
    return packed.values[: packed.values.numel() - (PADDING if packed.grid is None else INTEGER_PADDING)]


def _begins(packed: Packed, panel: int) -> int:
    """Where a panel begins in the values."""
    if packed.starts is not None:
        return int(packed.starts[panel])
    assert packed.grid is not None
    return panel * mask_shape(packed.shape)[1] * PANEL * WORD * packed.grid.bits // 8


def _read(
    like: Packed, shape: tuple[int, int], stored: Tensor, mask: Tensor | None, scale: Tensor | None, zero: Tensor | None
) -> Packed:
    """A matrix of these tensors, of which `stored` has no padding yet, checked."""
    if like.grid is None:
        assert mask is not None
        return read_bitmask(torch.cat([stored, stored.new_zeros(PADDING)]), mask.contiguous(), shape)
    assert scale is not None
    values = torch.cat([stored, stored.new_zeros(INTEGER_PADDING)])
    return read_integers(
        values, None if mask is None else mask.contiguous(), scale.contiguous(), None if zero is None else zero.contiguous(),
        shape, like.grid, like.dtype,
    )  # fmt: skip


def _cut(packed: Packed, some_O: slice, some_I: slice) -> Packed:
    """Part of a matrix, packed again."""
    weight_OI = unpack(packed)[some_O, some_I].contiguous()
    scales = packed.scales
    if scales is None:
        return pack(weight_OI, packed.format)
    grid, (_, width) = scales.grid, packed.shape
    begin, end, _ = some_I.indices(width)
    each = grid.width(width)
    if each < width and (begin % each or (end % each and end != width)):
        raise PackError(
            f"inputs {begin}..{end - 1} of {width} would part a group of {each} integers of the grid {grid}; take fewer processes, "
            f"or quantize in groups that divide {end - begin} inputs"
        )
    groups = slice(begin // each, -(-end // each))
    zero_OG = None if scales.zero_OG is None else scales.zero_OG[some_O, groups].contiguous()
    return pack(weight_OI, packed.format, Scales(grid, scales.scale_OG[some_O, groups].contiguous(), zero_OG))
