"""int4 and int8 grids as compressed-tensors' `pack-quantized`, which transformers and vLLM load.

Of a layer NAME of O outputs and I inputs: NAME.weight_packed int32 [O, I / (32 / bits)], integers plus 2^(bits-1), the first in the
lowest bits; NAME.weight_scale [O, G]; NAME.weight_shape; of an asymmetric grid NAME.weight_zero_point, packed along O. A weight is
(integer - zero point) * scale, rounded to the dtype of the scale, which is that of the folder's weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PackError
from secateurs.base.files import write_json
from secateurs.base.progress import Progress
from secateurs.matrix.grids import Scales
from secateurs.model.shards import write_index, write_shard
from secateurs.pack.folder import shards_of
from secateurs.pack.on_grids import OnGrids, exactly, needs_grids

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = (4, 8)


def prepare(found: OnGrids) -> Callable[[Path, Progress], dict[str, Any]]:
    """Raises PackError for a grid that the format or its engines cannot hold."""
    needs_grids(found, METHOD)
    left = []
    stored = {}
    for name, scales in found.scales.items():
        linear = isinstance(found.model.get_submodule(name), nn.Linear)
        if not linear or found.shared(name):
            why = "its weight is that of the embedding too" if linear else "it is no Linear layer"
            left.append(f"{name}: {why}, and only Linear layers are loaded quantized")
            continue
        _check(name, scales, found.shape(name)[1])
        # scales take the dtype of the weights: a loader multiplies in it
        dtype = found.model.get_submodule(name).weight.dtype
        cast = exactly(scales.scale_OG, dtype)
        if cast is None:
            raise PackError(
                f"{name}: its scales are {_word(scales.scale_OG.dtype)}, the model is {_word(dtype)}, which {METHOD} multiplies "
                "in and which does not hold them exactly; prune with --grid symmetric"
            )
        stored[name] = cast
    if not stored:
        raise PackError(f"no layer on a grid is a Linear layer, first {left[0]}; use --to onnx or dense")

    def write(out: Path, progress: Progress) -> dict[str, Any]:
        groups = shards_of(found.checkpoint)
        for i, keys in enumerate(groups):
            progress("tensors", sum(map(len, groups[:i])), len(found.checkpoint.file_of))
            tensors: dict[str, Tensor] = {}
            for key in keys:
                tensor, name = found.read(key), found.layer_of.get(key)
                if name in stored:
                    tensors |= _tensors(key.removesuffix(".weight"), tensor, found.scales[name], stored[name])
                else:
                    tensors[key] = tensor
            write_shard(out, i, len(groups), tensors)
        write_index(out, len(groups))
        found.checkpoint.copy_small_files(out, but=("config.json",))
        ignore = [name for name in found.linears() if name not in stored]
        config = config_of({name: (found.scales[name], found.shape(name)[1]) for name in stored}, ignore)
        write_json(out / "config.json", {**found.checkpoint.raw_config, "quantization_config": config})
        progress("tensors", len(found.checkpoint.file_of), len(found.checkpoint.file_of))
        layers = [{"name": name, "grid": str(found.scales[name].grid), "stored": FORMAT} for name in stored]
        return {"layers": layers, "left": left, "warnings": _warnings(config)}

    return write


def _warnings(config: dict[str, Any]) -> list[str]:
    """What transformers 5.23 with compressed-tensors 0.20 cannot do with a folder that is as the format says."""
    groups = config["config_groups"].values()
    warnings = []
    if not all(group["weights"]["symmetric"] for group in groups):
        warnings.append(
            "transformers 5.23 with compressed-tensors 0.20 loads an asymmetric grid only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    if len(groups) > 1:
        warnings.append(
            "transformers 5.23 with dequantize=True reads layers of different grids wrongly; load it without"
        )
    return warnings


def _check(name: str, scales: Scales, inputs: int) -> None:
    grid = scales.grid
    if grid.bits not in BITS:
        raise PackError(f"{name} is on the grid {grid}; {METHOD} is loaded with 4 or 8 bits: prune with --bits 4 or 8")
    if grid.groups(inputs) > 1 and inputs % grid.group:
        raise PackError(
            f"{name} has {inputs} inputs, which groups of {grid.group} do not divide, as {METHOD} needs; prune with --group row"
        )


def config_of(layers: dict[str, tuple[Scales, int]], ignore: list[str]) -> dict[str, Any]:
    """quantization_config of layers, each with its scales and inputs; layers of one kind share a group."""
    kinds: dict[tuple[int, bool, int | None], list[str]] = {}
    for name, (scales, inputs) in layers.items():
        grid = scales.grid
        kind = grid.bits, grid.symmetric, grid.group if grid.group and inputs % grid.group == 0 else None
        kinds.setdefault(kind, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group else "channel",
                "group_size": group,
                "dynamic": False,
            },
            "format": FORMAT,
        }
        for i, ((bits, symmetric, group), names) in enumerate(kinds.items())
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }


def _tensors(prefix: str, weight_OI: Tensor, scales: Scales, scale_OG: Tensor) -> dict[str, Tensor]:
    bits, middle = scales.grid.bits, scales.grid.middle
    levels_OI = scales.integers(weight_OI).int() + (middle if scales.zero_OG is None else 0)
    tensors = {f"{prefix}.weight_scale": scale_OG, f"{prefix}.weight_shape": torch.tensor(weight_OI.shape)}
    if scales.zero_OG is not None:
        zero_OG = scales.zero_OG.int()
        levels_OI += scales.grid.spread(zero_OG, weight_OI.shape[1])
        tensors[f"{prefix}.weight_zero_point"] = packed(zero_OG.T, bits).T.contiguous()
    tensors[f"{prefix}.weight_packed"] = packed(levels_OI, bits)
    return tensors


def packed(levels: Tensor, bits: int) -> Tensor:
    """Numbers of 0 .. 2^bits - 1, bits 4 or 8, along the rows of int32 words, the first in the lowest bits; zeros fill the last."""
    rows, columns = levels.shape
    levels = nn.functional.pad(levels, (0, -columns % (32 // bits))).to(
        torch.uint8, memory_format=torch.contiguous_format
    )
    if bits == 4:
        levels = levels[:, ::2] | (levels[:, 1::2] << 4)
    return levels.view(torch.int32).reshape(rows, -1)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
