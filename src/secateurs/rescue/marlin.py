"""compressed-tensors' marlin-24: 2:4 weights of 4 or 8 bits, stored as a GPU kernel read them, which the package never read back.

O outputs, I inputs. Of a layer: weight_packed int32, the two integers that stay of four, [I / 2, O], plus 2^(bits - 1), in tiles of
16 x 16, shuffled for the tensor cores; meta int16, where in its four each lies, in the layout of CUTLASS; scale_packed fp16 [G, O],
shuffled where a kernel's column block has several groups.
"""

from functools import cache

import torch
from torch import Tensor

from secateurs.rescue.tensors import damaged

FORMAT = "marlin-24"
PARTS = ("weight_packed", "scale_packed", "meta")
_TILE = 16
# integers that are shuffled together: four tiles
_SHUFFLED = 1024
# the order of the integers of a word
_IN_WORD = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}


@cache
def _shuffle(bits: int) -> Tensor:
    """Which of four tiles' integers lies at each place: [1024].

    Thread t of 32 has, for each of 4 columns j, two blocks of 4 rows: rows 2 (t % 4) and the next, and those 8 below.
    """
    thread, j, block, r = torch.meshgrid(*(torch.arange(n) for n in (32, 4, 2, 4)), indexing="ij")
    row = 2 * (thread % 4) + r % 2 + 8 * (r // 2)
    place = _TILE * row + 256 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * block + j
    order = torch.tensor(_IN_WORD[bits])
    return place.reshape(-1, len(order))[:, order].flatten()


def _meta_places(rows: int, columns: int) -> Tensor:
    """Where the words of rows x columns lie in CUTLASS' layout of pairs of columns, rows shuffled and 2 x 2 blocks turned."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    to = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    turn = (to % 2 == 0).long() * (column % 2) - (to % 2) * (column % 2 == 0).long()
    to, column = to + turn, column - turn
    return (column // 2 * rows + to) * 2 + column % 2


def from_marlin(
    name: str, bits: int, weight_packed: Tensor, scale_packed: Tensor, meta: Tensor
) -> tuple[Tensor, Tensor]:
    """(integers int64 [O, I], scale fp16 [O, G]). Raises CheckpointError for parts of other shapes than the format's."""
    words = 32 // bits
    half, outputs = len(weight_packed) * _TILE, weight_packed.shape[1] * words // _TILE
    inputs, groups = 2 * half, len(scale_packed)
    if (
        weight_packed.dtype != torch.int32
        or meta.dtype != torch.int16
        or half * outputs % _SHUFFLED
        or outputs % 64
        or meta.numel() * 16 != outputs * inputs
        or list(scale_packed.shape) != [groups, outputs]
        or inputs % groups
    ):
        shapes = ", ".join(f"{list(t.shape)} of {t.dtype}" for t in (weight_packed, scale_packed, meta))
        raise damaged(name, f"{', '.join(PARTS)} of {bits} bits do not fit together: they are {shapes}")
    shifts = torch.arange(words) * bits
    shuffled = (weight_packed.long()[..., None] >> shifts & (1 << bits) - 1).reshape(-1, _SHUFFLED)
    tiles = torch.empty_like(shuffled)
    tiles[:, _shuffle(bits)] = shuffled
    kept_HO = tiles.reshape(half // _TILE, outputs // _TILE, _TILE, _TILE).permute(0, 2, 1, 3).reshape(half, outputs)
    kept_OQ2 = (kept_HO.T - (1 << bits - 1)).reshape(outputs, -1, 2)
    # a word of meta says of four quadruples in which places their two integers lie, two bits each
    columns = inputs // 16
    plain = meta.flatten()[_meta_places(outputs, columns)].long()
    places_OQ2 = (plain[..., None] >> torch.arange(0, 16, 2) & 3).reshape(outputs, -1, 2)
    if (places_OQ2[..., 0] >= places_OQ2[..., 1]).any():
        raise damaged(name, "its meta does not name two places of each four")
    integer = torch.zeros(outputs, inputs // 4, 4, dtype=torch.int64).scatter_(2, places_OQ2, kept_OQ2)
    return integer.reshape(outputs, inputs), _scales(scale_packed, groups, inputs).T.contiguous()


def _scales(scale_GO: Tensor, groups: int, inputs: int) -> Tensor:
    """Scales in the order of the outputs: shuffled in runs of 64 where groups are smaller than the rows that the kernel reads."""
    if groups == 1 or inputs // groups >= inputs // 2:
        return scale_GO
    order = torch.arange(64).reshape(8, 2, 4).transpose(1, 2).flatten()
    out = torch.empty_like(scale_GO).reshape(-1, 64)
    out[:, order] = scale_GO.reshape(-1, 64)
    return out.reshape(scale_GO.shape)
