"""The import stage: a model that is stored in a way that nothing loads any more -> a plain folder.

Files become tensors, bitmasks are filled in, integers multiplied, masks applied. Then the names are held against the model's own
class, because a loader gives what is missing random numbers.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.base.files import appearing, write_json, write_tensors, write_text
from secateurs.base.progress import Progress, silent
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.scales import SCALES_FILE, write_scales
from secateurs.model.shards import copy_small_files, files_of, natural, shard_name, write_index
from secateurs.model.source import INDEX, SINGLE, weights_of
from secateurs.rescue import bitmasks, marlin, masks, onnx_files, pickled
from secateurs.rescue.quantized import Layers, dequantized
from secateurs.rescue.tensors import Lazy, in_files

# numbers that are written together
_SHARD_WEIGHTS = 1 << 28
_METHOD = "compressed-tensors"
# where config.json has it; the first is that of versions before 0.5
_SETTINGS = ("compression_config", "quantization_config")
KNOWN = (
    *bitmasks.FORMATS,
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    marlin.FORMAT,
    masks.FORMAT,
    pickled.FORMAT,
    onnx_files.FORMAT,
)


@dataclass
class _Source:
    """What was given: its tensors, config.json without settings, and the settings; folder: whose small files are copied."""

    tensors: Lazy
    folder: Path | None
    config: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    recipe: str | None = None


def rescue(source: str | Path, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Write `out`, a plain folder, from a folder or file that is stored in one of KNOWN; return what was read.

    formats: the ways it was stored in. layers: what was not stored plainly, with its sparsity and its grid, or why it has none.
    Weights have the dtype of config.json, else of the first other tensor. Integers with scales of 16 bits leave grids.safetensors,
    so that `pack` stores them as integers. Raises CheckpointError for what cannot be read, or would not load, and OutputError.
    """
    given, place = Path(source).expanduser(), Path(out).expanduser()
    with appearing(place) as part:
        found = _open(given)
        dtype = _dtype(found)
        tensors, whole = bitmasks.with_bitmasks(found.tensors)
        settings = found.settings
        packed = any(key.endswith(".scale_packed") for key in tensors)
        tensors, layers, kept, warnings = dequantized(tensors, settings, dtype)
        tensors, masked = masks.with_masks(tensors)
        if whole:
            found.formats.append(str((settings.get("sparsity_config") or {}).get("format", bitmasks.FORMATS[0])))
        if layers:
            found.formats.append(marlin.FORMAT if packed else str(settings.get("format", "quantized")))
        if masked:
            found.formats.append(masks.FORMAT)
        if not found.formats:
            raise CheckpointError(
                f"{given} is stored in none of these ways, so there is nothing to rescue: {', '.join(KNOWN)}; "
                "plain folders are read by every command as they are"
            )
        stored = {name.removesuffix(".weight") for name in (*whole, *masked)} | set(layers)
        records = _write(part, tensors, stored, dtype, kept, progress)
        if kept.scales:
            write_scales(part / SCALES_FILE, kept.scales)
        if found.folder is not None:
            copy_small_files(found.folder, part, ("config.json", SCALES_FILE, pickled.INDEX))
        if found.recipe is not None:
            write_text(part / "recipe.yaml", found.recipe)
        if found.config is None:
            warnings.append("no config.json lies beside it, so nobody held its names against a model")
        else:
            write_json(part / "config.json", found.config)
            warnings += _held_against_the_model(part, given)
    nbytes = sum(file.stat().st_size for file in place.iterdir())
    return {"place": str(place), "formats": found.formats, "nbytes": nbytes, "layers": records, "warnings": warnings}


# ------------------------------------------------------------------------------------------------------------- opening


def _open(given: Path) -> _Source:
    if not given.exists():
        raise CheckpointError(
            f"{given} is not there; give a folder, or a file that ends in {', '.join((*pickled.ENDINGS, '.onnx'))}"
        )
    folder = given if given.is_dir() else given.parent
    config, settings = _config(folder / "config.json")
    beside = folder if config is not None else None
    if given.is_dir():
        return _open_folder(given, config, settings)
    if given.suffix == ".onnx":
        return _Source(onnx_files.read(given), beside, config, {}, [onnx_files.FORMAT])
    if given.suffix in pickled.ENDINGS:
        tensors, recipe = pickled.read([given])
        return _Source(tensors, beside, config, settings, [pickled.FORMAT], recipe)
    if given.suffix == ".safetensors":
        return _Source(in_files(files_of(given)), beside, config, settings)
    raise CheckpointError(
        f"{given} is of no known kind; files end in {', '.join((*pickled.ENDINGS, '.onnx', '.safetensors'))}"
    )


def _open_folder(given: Path, config: dict[str, Any] | None, settings: dict[str, Any]) -> _Source:
    if any((given / name).is_file() for name in (SINGLE, INDEX)) or (config or {}).get("transformers_weights"):
        return _Source(in_files(files_of(weights_of(given, config or {}))), given, config, settings)
    files = pickled.found_in(given)
    if files:
        tensors, recipe = pickled.read(files)
        return _Source(tensors, given, config, settings, [pickled.FORMAT], recipe)
    graphs = sorted(given.glob("*.onnx"))
    if len(graphs) > 1:
        raise CheckpointError(
            f"{given} holds {len(graphs)} ONNX files, {', '.join(f.name for f in graphs[:3])}; name one of them"
        )
    if graphs:
        return _Source(onnx_files.read(graphs[0]), given, config, {}, [onnx_files.FORMAT])
    raise CheckpointError(
        f"{given} holds no weights: no {SINGLE}, no {INDEX}, no file that ends in {', '.join((*pickled.ENDINGS, '.onnx'))}"
    )


def _config(file: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """config.json without what says how weights are stored, and that. Raises CheckpointError for a method that is not read."""
    if not file.is_file():
        return None, {}
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    settings: dict[str, Any] = next((config[key] for key in _SETTINGS if config.get(key)), {})
    method = settings.get("quant_method", _METHOD)
    if method != _METHOD:
        raise CheckpointError(f"{file} says that weights are stored as '{method}'; import reads {', '.join(KNOWN)}")
    return {key: value for key, value in config.items() if key not in (*_SETTINGS, "transformers_weights")}, settings


def _dtype(found: _Source) -> torch.dtype:
    """The dtype that weights get: as config.json states it, else that of the first tensor of 16 or 32 bits."""
    config = found.config or {}
    stated = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, stated.removeprefix("torch."), None) if isinstance(stated, str) else None
    if dtype is not None and dtype.is_floating_point:
        return dtype  # type: ignore[no-any-return]
    for name in sorted(found.tensors, key=natural):
        tensor = found.tensors[name]()
        if tensor.is_floating_point() and tensor.itemsize > 1:
            return tensor.dtype
    return torch.float32


# ------------------------------------------------------------------------------------------------------------- writing


def _write(
    part: Path, tensors: Lazy, stored: set[str], dtype: torch.dtype, layers: Layers, progress: Progress
) -> list[dict[str, Any]]:
    """Write all tensors in shards; return the records of those that were not stored plainly."""
    records: list[dict[str, Any]] = []
    held: dict[str, Tensor] = {}
    files: list[Path] = []
    names = sorted(tensors, key=natural)

    def flush() -> None:
        # how many there are is known at the end
        files.append(part / f"{len(files)}.safetensors")
        write_tensors(files[-1], held)
        held.clear()

    for i, name in enumerate(names):
        progress("tensors", i, len(names))
        if sum(tensor.numel() for tensor in held.values()) > _SHARD_WEIGHTS:
            flush()
        held[name] = tensor = tensors[name]()
        layer = name.removesuffix(".weight")
        if layer in stored:
            zeros = int((tensor == 0).sum())
            scales = layers.scales.get(layer)
            records.append(
                {
                    "name": layer,
                    "shape": list(tensor.shape),
                    "sparsity": zeros / max(tensor.numel(), 1),
                    "grid": None if scales is None else str(scales.grid),
                    "off_grid": layers.off.get(layer),
                }
            )
    flush()
    progress("tensors", len(names), len(names))
    if len(files) == 1:
        files[0].rename(part / SINGLE)
        return records
    for i, file in enumerate(files):
        file.rename(part / shard_name(i, len(files)))
    write_index(part, len(files))
    return records


def _held_against_the_model(part: Path, given: Path) -> list[str]:
    """Raises CheckpointError unless every parameter of the model's class has its tensor; a sentence on tensors that it has not."""
    checkpoint = Checkpoint(part)
    model = checkpoint.skeleton()
    state = model.state_dict()
    targets = {target for key in checkpoint.file_of for target in checkpoint.targets_of(key)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in targets & parameters.keys()}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in held]
    unknown = [key for key in checkpoint.ordered_keys() if not checkpoint.targets_of(key) & state.keys()]
    if missing:
        has = f"; it has {unknown[0]}, which that class does not know" if unknown else ""
        raise CheckpointError(
            f"{given} has no tensor for {missing[0]} of {type(model).__name__} ({len(missing)} are missing){has}"
        )
    for name in targets & parameters.keys():
        _same_shape(checkpoint, name, parameters[name], given)
    if not unknown:
        return []
    return [
        f"{len(unknown)} tensors are none of {type(model).__name__}, first {unknown[0]}; they are kept, and no loader reads them"
    ]


def _same_shape(checkpoint: Checkpoint, name: str, parameter: Tensor, given: Path) -> None:
    keys = [key for key, target in checkpoint.target_of.items() if target == name and key not in checkpoint.converted]
    for key in keys:
        found = checkpoint.shape_of(key)
        if found != list(parameter.shape):
            raise CheckpointError(f"{given}: {key} is {found}, and {name} of its model is {list(parameter.shape)}")
