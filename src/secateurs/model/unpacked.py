"""Reads the tensors of a packed folder as the plain folder has them, and the scales of its integers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, PackError
from secateurs.kernels import formats
from secateurs.kernels.formats import Packed
from secateurs.kernels.packed_embedding import tables
from secateurs.kernels.packed_linear import linears
from secateurs.matrix.grids import Scales, parse
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.scales import SCALES_FILE, read_scales

# what may lie beside a packed weight, by the end of its name
PARTS = ("_mask", "_scale", "_zero")


def packed_tensors(key: str, packed: Packed) -> dict[str, Tensor]:
    """The tensors of a packed matrix by their stored names."""
    found = zip(("", *PARTS), (packed.values, packed.mask_PJ4, packed.scale_PG4, packed.zero_PG4), strict=True)
    return {key + part: tensor for part, tensor in found if tensor is not None}


def plain_reader(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """A function from the stored name of a packed folder's tensor to that tensor as the plain folder has it.

    Raises CheckpointError if the folder is not packed, of another version, or damaged.
    """
    packed, skeleton = _packed_reader(checkpoint), checkpoint.skeleton()
    transposed = {f"{name}.weight" for name, _, transposed in linears(skeleton) if transposed}

    def plain(key: str) -> Tensor:
        found = packed(key)
        if found is None:
            return checkpoint.read([key])[key]
        weight_OI = formats.unpack(found)
        return weight_OI.T.contiguous() if checkpoint.target_of[key] in transposed else weight_OI

    return plain


def packed_scales(checkpoint: Checkpoint) -> dict[str, Scales]:
    """The scales of a packed folder's layers on grids, of integers and of plain weights. Raises as plain_reader() does."""
    packed = _packed_reader(checkpoint)
    found = read_scales(checkpoint.folder / SCALES_FILE)
    for key, target in checkpoint.target_of.items():
        if f"{key}_scale" in checkpoint.file_of:
            matrix = packed(key)
            if matrix is not None and matrix.scales is not None:
                found[target.removesuffix(".weight")] = matrix.scales
    return found


def _packed_reader(checkpoint: Checkpoint) -> Callable[[str], Packed | None]:
    """A function from the stored name of a tensor to the packed matrix that it belongs to, checked, or None."""
    quantization = checkpoint.raw_config.get("quantization_config")
    if not quantization:
        raise CheckpointError(f"{checkpoint.folder} is not packed: its config.json has no quantization_config")
    version = quantization.get("format_version")
    if version not in formats.VERSIONS:
        raise CheckpointError(
            f"{checkpoint.folder} is packed in format version {version}, this secateurs reads versions "
            f"{', '.join(map(str, formats.VERSIONS))}"
        )
    skeleton = checkpoint.skeleton()
    modules = {f"{name}.weight": (name, module, transposed) for name, module, transposed in linears(skeleton)}
    modules |= {f"{name}.weight": (name, module, False) for name, module, _ in tables(skeleton)}

    def packed(key: str) -> Packed | None:
        beside = {part: f"{key}{part}" for part in PARTS if f"{key}{part}" in checkpoint.file_of}
        if not beside:
            return None
        target = checkpoint.target_of[key]
        if target not in modules:
            raise CheckpointError(f"{checkpoint.folder}: {key} is packed, and the model has no such layer")
        name, module, transposed = modules[target]
        weight: Any = module.weight
        shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        read = {part: checkpoint.read([stored])[stored] for part, stored in {"": key, **beside}.items()}
        try:
            if "_scale" not in read:
                return formats.read_bitmask(read[""], read["_mask"], shape)
            layer = quantization["layers"][name]
            grid, dtype = parse(layer["grid"]), getattr(torch, layer["dtype"])
            return formats.read_integers(
                read[""], read.get("_mask"), read["_scale"], read.get("_zero"), shape, grid, dtype
            )
        except (PackError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.folder}: {key}: {error}; copy or pack it again") from None

    return packed
