"""A folder's weight files: what they are called, how they are opened, written and indexed."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.base.files import inside, write_json, write_tensors
from secateurs.model.source import INDEX

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shard(folder: Path, index: int, count: int, tensors: dict[str, Tensor]) -> None:
    write_tensors(folder / shard_name(index, count), tensors)


def write_index(folder: Path, count: int) -> None:
    """The index over all shards of a folder, from what the shards hold."""
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(count):
        file = folder / shard_name(i, count)
        with opened(file) as handle:
            weight_map.update(dict.fromkeys(handle.keys(), file.name))
        total += file.stat().st_size
    ordered = dict(sorted(weight_map.items(), key=lambda item: natural(item[0])))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": ordered})


def files_of(index: Path) -> dict[str, Path]:
    """{stored name: the file that holds it} of one safetensors file, or of all that an index lists.

    Raises CheckpointError for a file that is missing or damaged, or holds less than the index says.
    """
    files = [index]
    listed: dict[str, str] | None = None
    if index.suffix == ".json":
        files, listed = listed_in(index)
    found: dict[str, Path] = {}
    for shard in files:
        with opened(shard) as handle:
            found.update(dict.fromkeys(handle.keys(), shard))
    missing = sorted(set(listed or ()) - set(found))
    if missing:
        raise CheckpointError(f"{index.name} lists {missing[0]} and no shard holds it; download the model again")
    return found


def listed_in(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of an index, all of which are there, and {stored name: name of its file}. Raises CheckpointError."""
    try:
        listed = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from None
    if not isinstance(listed, dict):
        raise CheckpointError(f"{index} cannot be read: weight_map says no file for each tensor")
    files = sorted({inside(index.parent, name, index) for name in listed.values()})
    for shard in files:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, though {index.name} lists it; download the model again")
    return files, listed


def copy_small_files(folder: Path, to: Path, but: tuple[str, ...] = ()) -> None:
    """Everything that lies in a folder but weights, the model card and what `but` names."""
    to.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in ("README.md", *but):
            shutil.copyfile(file, to / file.name)


def checksum(file: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """safe_open() that raises CheckpointError for a file that is truncated, corrupt or gone."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or corrupt ({str(error).strip()}); download or copy it again"
        ) from None


def natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
