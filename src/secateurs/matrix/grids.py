"""Grids that weights are rounded to: a weight is scale * integer, with one scale for a group of neighbouring inputs of a row.

O outputs, I inputs, G groups of a row. Integers lie in -zero .. 2^bits - 1 - zero, so 0 is always one of them and zeros stay
zero. Symmetric: zero is 2^(bits - 1) everywhere, and a scale may be negative, which puts the extra level on the side that needs
it. Asymmetric: every group has a zero of its own.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import nearest

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (32, 64, 128)
# the whole row
ROW = 0


@dataclass(frozen=True)
class Grid:
    """bits of an integer. group: neighbouring inputs that share a scale, ROW for all of a row. symmetric: see above. half: scales
    are fp16, as llama.cpp stores them; else bf16, whose range is that of fp32.
    """

    bits: int
    group: int = 64
    symmetric: bool = True
    half: bool = False

    def __str__(self) -> str:
        named = next((name for name, grid in NAMED.items() if grid == self), None)
        if named:
            return named
        kind = f"{'' if self.symmetric else '/asymmetric'}{'/fp16' if self.half else ''}"
        return f"int{self.bits}/{self.group or 'row'}{kind}"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.bfloat16

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid: integers run from -middle to middle - 1."""
        return self.levels // 2

    def width(self, inputs: int) -> int:
        """Inputs of a group; the last group of a row may have fewer."""
        return min(self.group, inputs) if self.group else inputs

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.width(inputs))

    def overhead(self, inputs: int) -> float:
        """Bits of a row's scales and zeros."""
        return self.groups(inputs) * (16 + (0 if self.symmetric else self.bits))

    def spread(self, by_group_OG: Tensor, inputs: int) -> Tensor:
        """A value of every group for each of its inputs, [O, I]."""
        return by_group_OG.repeat_interleave(self.width(inputs), 1)[:, :inputs]

    def grouped(self, matrix_OI: Tensor) -> Tensor:
        """[O, G, inputs of a group], filled up with zeros."""
        rows, inputs = matrix_OI.shape
        width, groups = self.width(inputs), self.groups(inputs)
        if groups * width != inputs:
            matrix_OI = torch.nn.functional.pad(matrix_OI, (0, groups * width - inputs))
        return matrix_OI.reshape(rows, groups, width)


# llama.cpp's own: an fp16 scale for 32 weights
NAMED = {"q4_0": Grid(4, 32, True, True), "q8_0": Grid(8, 32, True, True)}


def parse(text: str) -> Grid:
    """'int4', 'int4/128', 'int3/row', 'int4/64/asymmetric', 'q4_0' -> Grid. Raises ValueError naming what may be written."""
    if text in NAMED:
        return NAMED[text]
    found = re.fullmatch(r"int(\d+)(?:/(\d+|row))?(/asymmetric)?(/fp16)?", text)
    if found and int(found[1]) in BITS and (found[2] in (None, "row") or int(found[2]) in GROUPS):
        group = 64 if found[2] is None else ROW if found[2] == "row" else int(found[2])
        return Grid(int(found[1]), group, not found[3], bool(found[4]))
    raise ValueError(
        f"unknown grid '{text}'; write intB or intB/GROUP with B in {', '.join(map(str, BITS))} and GROUP in "
        f"{', '.join(map(str, GROUPS))} or row, e.g. int4/64, with /asymmetric after it for a zero point a group, then /fp16 "
        "for scales of that type, or "
        f"{', '.join(NAMED)}{nearest(text, ('int4', 'int8', 'int4/128', *NAMED))}"
    )


@dataclass(frozen=True, eq=False)
class Scales:
    """What a layer's integers are multiplied with. scale_OG: of the grid's scale_dtype. zero_OG: uint8, or None if symmetric."""

    grid: Grid
    scale_OG: Tensor
    zero_OG: Tensor | None = None

    def low_high(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest integer of every group, [O, G], or [1, 1] where all have the same."""
        zero = torch.tensor([[self.grid.middle]]) if self.zero_OG is None else self.zero_OG.int()
        zero = zero.to(self.scale_OG.device)
        return -zero, self.grid.levels - 1 - zero

    def integers(self, weight_OI: Tensor) -> Tensor:
        """The nearest integers, int16 [O, I]; of a weight on the grid those that give it back. All are 0 where a scale is 0."""
        parts = self.grid.grouped(weight_OI.float())
        scale_OG1 = self.scale_OG.float()[..., None]
        low, high = (bound[..., None].float() for bound in self.low_high())
        found = (parts / scale_OG1).nan_to_num_(0, 0, 0).round_().clamp_(low, high)
        if weight_OI.dtype is torch.bfloat16 and self.grid.bits == 8 and self.zero_OG is not None:
            # bf16 moves a number by up to a 256th: from 128 steps on that is half a step, and the next integer may be nearer
            for step in (-1, 1):
                beside = (found + step).clamp_(low, high)
                better = ((found * scale_OG1).bfloat16() != parts) & ((beside * scale_OG1).bfloat16() == parts)
                found = torch.where(better, beside, found)
        return found.to(torch.int16).reshape(len(weight_OI), -1)[:, : weight_OI.shape[1]]

    def weights(self, integer_OI: Tensor) -> Tensor:
        """scale * integer in fp32, [O, I]. Zeros are positive, also those of a negative scale."""
        parts = self.grid.grouped(integer_OI.float()) * self.scale_OG.float()[..., None] + 0.0
        return parts.reshape(len(integer_OI), -1)[:, : integer_OI.shape[1]]

    def rounded(self, weight_OI: Tensor) -> Tensor:
        """The nearest weights on the grid, fp32 [O, I]."""
        return self.weights(self.integers(weight_OI))

    def off(self, weight_OI: Tensor) -> str | None:
        """None if every weight, in the dtype that it has, is scale * integer rounded to that dtype; else the first that is not."""
        if tuple(self.scale_OG.shape) != (len(weight_OI), self.grid.groups(weight_OI.shape[1])):
            return f"its scales have shape {list(self.scale_OG.shape)}, the weight {list(weight_OI.shape)}"
        on_OI = self.rounded(weight_OI).to(weight_OI.dtype)
        bad = (on_OI != weight_OI).nonzero()
        if not len(bad):
            return None
        row, i = (int(place) for place in bad[0])
        return (
            f"{len(bad)} of {weight_OI.numel()} weights are not on the grid {self.grid}; first at row {row}, input {i}: "
            f"{float(weight_OI[row, i]):.6g}, nearest {float(on_OI[row, i]):.6g}"
        )

    def reordered(self, order_O: Tensor) -> "Scales":
        """Those of the same rows in another order."""
        return Scales(self.grid, self.scale_OG[order_O], None if self.zero_OG is None else self.zero_OG[order_O])


def tensors_of(scales: dict[str, Scales]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file that keeps the scales of layers: NAME.scale, NAME.zero; {NAME: grid}."""
    tensors: dict[str, Tensor] = {}
    for name, found in scales.items():
        tensors[f"{name}.scale"] = found.scale_OG.contiguous()
        if found.zero_OG is not None:
            tensors[f"{name}.zero"] = found.zero_OG.contiguous()
    return tensors, {name: str(found.grid) for name, found in scales.items()}


def scales_from(tensors: Any, grids: dict[str, str]) -> Iterator[tuple[str, Scales]]:
    """The inverse of tensors_of(). Raises ValueError for what does not fit together."""
    for name, text in grids.items():
        grid = parse(text)
        if f"{name}.scale" not in tensors or grid.symmetric == (f"{name}.zero" in tensors):
            raise ValueError(f"{name} is on the grid {text}, and its scales or zeros are missing")
        scale_OG, zero_OG = tensors[f"{name}.scale"], None if grid.symmetric else tensors[f"{name}.zero"]
        if scale_OG.dtype != grid.scale_dtype or scale_OG.ndim != 2 or not scale_OG.isfinite().all():
            raise ValueError(
                f"{name}: scales of {text} are finite {grid.scale_dtype} by row and group, found {scale_OG.dtype}"
            )
        if zero_OG is not None and (zero_OG.dtype != torch.uint8 or zero_OG.shape != scale_OG.shape):
            raise ValueError(f"{name}: zeros of {text} are uint8, as many as scales, found {zero_OG.dtype}")
        yield name, Scales(grid, scale_OG, zero_OG)


def least_bits(grid: Grid, shape: tuple[int, int], survivors: int) -> float:
    """Bits of a matrix in the smaller format: a bit a position and the survivors' integers, or all integers."""
    return math.prod(shape) * min(bits_a_weight(grid, shape), bits_a_weight(grid, shape, survivors))


def bits_a_weight(grid: Grid, shape: tuple[int, int], survivors: int | None = None) -> float:
    """Bits a weight as stored: integers, scales and zeros; with `survivors`, a bit a position and the survivors' integers."""
    numel = math.prod(shape)
    held = grid.bits if survivors is None else 1 + grid.bits * survivors / numel
    return held + grid.overhead(shape[1]) / shape[1]
