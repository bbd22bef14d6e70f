"""Layers that compressed-tensors stores as integers or fp8 with scales, made plain: weight = (integer - zero point) * scale.

int-quantized and float-quantized: NAME.weight int8 or fp8; pack-quantized: NAME.weight_packed, 32 // bits integers in an int32, the
first in its lowest bits, plus 2^(bits - 1), and NAME.weight_shape; marlin-24: marlin.py. NAME.weight_scale by tensor, row, group of
inputs; NAME.weight_zero_point; NAME.weight_g_idx, the group of each input. What is quantized while the model runs is left out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.matrix.grids import BITS, GROUPS, ROW, Grid, Scales
from secateurs.rescue import marlin
from secateurs.rescue.tensors import Lazy, damaged

# of the inputs, outputs and caches of layers
_RUNTIME = re.compile(r"\.(input|output)_(scale|zero_point|global_scale|g_idx)$|\.(k|v|q|kv)_(scale|zero_point)$")
_PARTS = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", *marlin.PARTS)
_ACTIVATIONS = (
    "the inputs of layers were quantized too ({} tensors say how); the plain model computes with them as they are"
)
_GLOBAL = "weight_global_scale"


@dataclass
class Layers:
    """What became of layers: scales of those that lie on a grid of ours, and why others do not. Filled as weights are read."""

    scales: dict[str, Scales] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)


def dequantized(
    stored: Lazy, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[Lazy, list[str], Layers, list[str]]:
    """The tensors with layers made plain, these layers' names, what becomes of them, and what is left out, in sentences.

    settings: quantization_config. Products are formed in fp32 and rounded once, to dtype. Raises CheckpointError.
    """
    layers = Layers()
    names = {key.rpartition(".")[0] for key in stored if key.endswith((".weight_scale", ".scale_packed"))}
    for key in stored:
        if key.endswith(f".{_GLOBAL}"):
            raise CheckpointError(
                f"{key}: 4-bit floats with two scales (nvfp4) are not read here; transformers and vLLM read them"
            )
    runtime = [key for key in stored if _RUNTIME.search(key)]
    taken = {f"{name}.{part}" for name in names for part in _PARTS} | set(runtime)
    out = {key: read for key, read in stored.items() if key not in taken}
    for name in sorted(names):
        parts = {part: stored[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in stored}
        out[f"{name}.weight"] = _reader(name, parts, bits_of(name, settings), dtype, layers)
    return out, sorted(names), layers, [_ACTIVATIONS.format(len(runtime))] if runtime else []


def bits_of(name: str, settings: dict[str, Any]) -> int | None:
    """Bits of a layer by the group that targets it: by its name, an expression for it, or the class of most; None if none says."""
    by_rank: dict[int, int] = {}
    for group in (settings.get("config_groups") or {}).values():
        bits: int = (group.get("weights") or {}).get("num_bits") or 0
        for target in group.get("targets") or () if bits else ():
            named = target == name or (target.startswith("re:") and re.match(target[3:], name))
            rank = 0 if target == name else 1 if named else 2
            if named or not ("." in target or target.startswith("re:")):
                by_rank.setdefault(rank, bits)
    return by_rank[min(by_rank)] if by_rank else None


def _reader(
    name: str, parts: dict[str, Callable[[], Tensor]], bits: int | None, dtype: torch.dtype, layers: Layers
) -> Callable[[], Tensor]:
    stated = [part for part in ("weight", "weight_packed") if part in parts]
    if len(stated) != 1:
        raise damaged(name, f"it has scales, and {'two weights' if stated else 'no weight'}")
    if stated == ["weight_packed"] and bits not in range(1, 9):
        raise CheckpointError(f"{name}: no group of quantization_config says how many bits its integers have")

    def read() -> Tensor:
        found = {part: load() for part, load in parts.items()}
        if "scale_packed" in found:
            missing = [part for part in marlin.PARTS if part not in found]
            if missing:
                raise damaged(name, f"{missing[0]} is missing")
            if bits not in (4, 8):
                raise CheckpointError(f"{name}: marlin-24 has 4 or 8 bits, and quantization_config says {bits}")
            integer_OI, scale_OG = marlin.from_marlin(name, bits, **{part: found[part] for part in marlin.PARTS})
        else:
            integer_OI, scale_OG = _integers(name, found, bits), found["weight_scale"]
        return _product(name, integer_OI, scale_OG, found, bits, dtype, layers)

    return read


def _integers(name: str, found: dict[str, Tensor], bits: int | None) -> Tensor:
    """What is multiplied with scales: int64, or fp32 of fp8 and of weights that were left as they are."""
    if "weight" in found:
        weight = found["weight"]
        return weight.float() if weight.is_floating_point() else weight.long()
    if "weight_shape" not in found:
        raise damaged(name, "weight_shape is missing")
    assert bits is not None
    shape = [int(n) for n in found["weight_shape"].flatten()]
    return unpacked(name, found["weight_packed"], bits, shape) - (1 << bits - 1)


def unpacked(name: str, packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Numbers of 0 .. 2^bits - 1 from the words of rows, int64. Raises CheckpointError for another number of words."""
    words = 32 // bits
    if len(shape) != 2 or packed.dtype != torch.int32 or list(packed.shape) != [shape[0], -(-shape[1] // words)]:
        raise damaged(
            name, f"its shape is {shape} of {bits} bits, its words are {list(packed.shape)} of {packed.dtype}"
        )
    spread = packed.long()[..., None] >> torch.arange(words) * bits & (1 << bits) - 1
    return spread.flatten(1)[:, : shape[1]]


def _product(
    name: str,
    integer_OI: Tensor,
    scale: Tensor,
    found: dict[str, Tensor],
    bits: int | None,
    dtype: torch.dtype,
    layers: Layers,
) -> Tensor:
    rows, inputs = integer_OI.shape
    scale_OG = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if len(scale_OG) == 1:
        scale_OG = scale_OG.expand(rows, -1)
    groups = scale_OG.shape[1]
    if len(scale_OG) != rows or inputs % groups:
        raise damaged(name, f"its weight is {rows} x {inputs}, its scales are {list(scale.shape)}")
    zero_OG = _zeros(name, found, scale_OG, bits)
    group_I = torch.arange(inputs) // (inputs // groups)
    if "weight_g_idx" in found and (found["weight_g_idx"] >= 0).all():
        group_I = found["weight_g_idx"].long()
    stored = found.get("weight")
    if stored is not None and stored.is_floating_point() and stored.itemsize > 1:
        # not compressed: rounded already, and stored as it is multiplied
        return stored.to(dtype)
    centred = integer_OI if zero_OG is None else integer_OI - zero_OG[:, group_I]
    weight_OI = (centred.float() * scale_OG[:, group_I].float()).to(dtype)
    # a zero is a zero, whatever the sign of its scale
    weight_OI = torch.where(weight_OI == 0, 0, weight_OI)
    if integer_OI.is_floating_point():
        layers.off[name] = "fp8"
    else:
        # int-quantized integers of few bits lie in bytes
        _grid(name, weight_OI, scale_OG, zero_OG, bits or 8, group_I, layers)
    return weight_OI


def _zeros(name: str, found: dict[str, Tensor], scale_OG: Tensor, bits: int | None) -> Tensor | None:
    """Zero points, int64 [O, G]; None where all are 0."""
    zero = found.get("weight_zero_point")
    if zero is None:
        return None
    if zero.dtype == torch.int32 and "weight_packed" in found:
        assert bits is not None
        rows, groups = scale_OG.shape
        zero = unpacked(f"{name}.weight_zero_point", zero.T.contiguous(), bits, [groups, rows]).T - (1 << bits - 1)
    zero = zero.reshape(-1, 1) if zero.ndim < 2 else zero
    if zero.shape != scale_OG.shape and zero.shape != (1, 1):
        raise damaged(name, f"its scales are {list(scale_OG.shape)}, its zero points {list(zero.shape)}")
    zero_OG = zero.long().expand_as(scale_OG)
    return zero_OG if zero_OG.any() else None


def _grid(
    name: str, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int, group_I: Tensor, layers: Layers
) -> None:
    """Note the scales of a layer whose weights lie on a grid of ours, else why they do not."""
    inputs = weight_OI.shape[1]
    groups = scale_OG.shape[1]
    width = ROW if groups == 1 else inputs // groups
    if bits not in BITS or width not in (ROW, *GROUPS):
        layers.off[name] = f"int{bits} in groups of {width or inputs}"
        return
    if not torch.equal(group_I, torch.arange(inputs) // (inputs // groups)):
        layers.off[name] = "its groups are not of neighbouring inputs"
        return
    for half in (False, True):
        grid = Grid(bits, width, zero_OG is None, half)
        cast = scale_OG.to(grid.scale_dtype)
        if torch.equal(cast.float(), scale_OG.float()):
            zero = None if zero_OG is None else (zero_OG + grid.middle).to(torch.uint8)
            scales = Scales(grid, cast.contiguous(), zero)
            why = scales.off(weight_OI)
            if why is None:
                layers.scales[name] = scales
            else:
                layers.off[name] = why
            return
    layers.off[name] = "its scales are of more than 16 bits"
