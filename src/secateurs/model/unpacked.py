"""Reads the tensors of a packed folder as the plain folder has them, and the scales of its integers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, PackError
from secateurs.kernels import formats
from secateurs.kernels.formats import Packed
from secateurs.kernels.packed_embedding import tables
from secateurs.kernels.packed_experts import packed_name
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


class PlainReader:
    """The tensors of a packed folder as the plain folder has them.

    units: what is read together, {stored name of a weight, or name of a fused parameter: all that lies in the folder for it}.
    Raises CheckpointError if the folder is not packed, of another version, or damaged.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.skeleton = checkpoint, checkpoint.skeleton()
        self._packed = _packed_reader(checkpoint, self.skeleton)
        self._transposed = {f"{name}.weight" for name, _, transposed in linears(self.skeleton) if transposed}
        settings = checkpoint.raw_config["quantization_config"]
        self._layers, self._experts = settings["layers"], settings.get("experts", {})
        fused = {
            packed_name(name, i): name for name in self._experts for i in range(len(self.skeleton.get_parameter(name)))
        }
        self.units: dict[str, list[str]] = {}
        for key in checkpoint.ordered_keys():
            weights = (key.removesuffix(part) for part in PARTS if key.endswith(part))
            weight = next((weight for weight in weights if weight in checkpoint.file_of), key)
            self.units.setdefault(fused.get(weight, weight), []).append(key)

    def read(self, unit: str) -> dict[str, Tensor]:
        """The plain tensors of a unit, by their stored names."""
        if unit not in self._experts:
            weight_OI = self._matrix(unit)
            transposed = self.checkpoint.target_of[unit] in self._transposed and len(self.units[unit]) > 1
            return {unit: weight_OI.T.contiguous() if transposed else weight_OI}
        matrices = []
        for i in range(len(self.skeleton.get_parameter(unit))):
            weight_OI = self._matrix(packed_name(unit, i))
            matrices.append(weight_OI.T if self._layers[f"{unit}.{i}"]["transposed"] else weight_OI)
        whole, stored = torch.stack(matrices), self._experts[unit]
        return {stored: whole} if stored else self.checkpoint.stored_as(self.skeleton, unit, whole)

    def _matrix(self, key: str) -> Tensor:
        """What is packed as a matrix [O, I]; what is not, as it is."""
        found = self._packed(key)
        return self.checkpoint.read([key])[key] if found is None else formats.unpack(found[1])


def packed_scales(checkpoint: Checkpoint) -> dict[str, Scales]:
    """The scales of a packed folder's layers on grids, of integers and of plain weights. Raises as plain_reader() does."""
    packed = _packed_reader(checkpoint, checkpoint.skeleton())
    found = read_scales(checkpoint.folder / SCALES_FILE)
    for key in checkpoint.file_of:
        if f"{key}_scale" in checkpoint.file_of:
            layer = packed(key)
            if layer is not None and layer[1].scales is not None:
                found[layer[0]] = layer[1].scales
    return found


def _packed_reader(checkpoint: Checkpoint, skeleton: Any) -> Callable[[str], tuple[str, Packed] | None]:
    """A function from the stored name of a tensor to the layer whose packed matrix it is, and that, checked; or None."""
    quantization = checkpoint.raw_config.get("quantization_config")
    if not quantization:
        raise CheckpointError(f"{checkpoint.folder} is not packed: its config.json has no quantization_config")
    version = quantization.get("format_version")
    if version not in formats.VERSIONS:
        raise CheckpointError(
            f"{checkpoint.folder} is packed in format version {version}, this secateurs reads versions "
            f"{', '.join(map(str, formats.VERSIONS))}"
        )
    # by the stored name of its weight: a layer's name and [O, I]
    layers = {
        f"{name}.weight": (name, _sides(module.weight, transposed)) for name, module, transposed in linears(skeleton)
    }
    layers |= {f"{name}.weight": (name, _sides(module.weight, False)) for name, module, _ in tables(skeleton)}
    for name in quantization.get("experts", {}):
        for i, matrix in enumerate(_fused(checkpoint, skeleton, name)):
            layer, key = quantization["layers"].get(f"{name}.{i}"), packed_name(name, i)
            if layer is None or key not in checkpoint.file_of:
                lacks = "config.json" if layer is None else "every file"
                raise CheckpointError(
                    f"{checkpoint.folder}: {lacks} lacks {name}.{i} of experts that are packed; copy or pack it again"
                )
            layers[key] = f"{name}.{i}", _sides(matrix, layer["transposed"])

    def packed(key: str) -> tuple[str, Packed] | None:
        beside = {part: f"{key}{part}" for part in PARTS if f"{key}{part}" in checkpoint.file_of}
        if not beside:
            return None
        target = checkpoint.target_of[key]
        if target not in layers:
            raise CheckpointError(f"{checkpoint.folder}: {key} is packed, and the model has no such layer")
        name, shape = layers[target]
        read = {part: checkpoint.read([stored])[stored] for part, stored in {"": key, **beside}.items()}
        try:
            if "_scale" not in read:
                return name, formats.read_bitmask(read[""], read["_mask"], shape)
            layer = quantization["layers"][name]
            grid, dtype = parse(layer["grid"]), getattr(torch, layer["dtype"])
            return name, formats.read_integers(
                read[""], read.get("_mask"), read["_scale"], read.get("_zero"), shape, grid, dtype
            )
        except (PackError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.folder}: {key}: {error}; copy or pack it again") from None

    return packed


def _fused(checkpoint: Checkpoint, skeleton: Any, name: str) -> Any:
    """The fused parameter of that name. Raises CheckpointError."""
    found = dict(skeleton.named_parameters()).get(name)
    if found is None or found.dim() != 3:
        raise CheckpointError(f"{checkpoint.folder}: {name} is packed, and the model has no such experts")
    return found


def _sides(weight: Any, transposed: bool) -> tuple[int, int]:
    rows, columns = weight.shape
    return (columns, rows) if transposed else (rows, columns)
