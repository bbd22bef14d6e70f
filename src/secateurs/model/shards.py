"""A folder's weight files: what they are called, how they are opened, written and indexed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateurs.base.errors import CheckpointError
from secateurs.base.files import write_json, write_tensors
from secateurs.model.source import INDEX


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
