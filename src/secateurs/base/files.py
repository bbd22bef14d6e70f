"""Safe file writes, and the cache folder.

A file is written beside its place, flushed to the disk and renamed, so a kill or a full disk never leaves half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.errors import OutputError


def replace(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to the disk and give it its name.

    Raises OutputError naming the file and the system's reason; what was there before is still there.
    """
    temporary = part_of(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    # safetensors reports a full disk as its own exception type
    except Exception as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"cannot write {file}: {reason}; nothing else was changed, free space and rerun") from None


def part_of(file: Path) -> Path:
    """Where a file is written before it gets its name."""
    return file.with_name(file.name + ".part")


def cache_folder() -> Path:
    """The folder for results that later runs may use again: $SECATEURS_CACHE, else ~/.cache/secateurs."""
    given = os.environ.get("SECATEURS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "secateurs"


def trim(folder: Path, nbytes: int) -> None:
    """Delete the least recently used subfolders of `folder` until the others take at most `nbytes`."""
    found = sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime, reverse=True)
    for one in found:
        nbytes -= sum(file.stat().st_size for file in one.iterdir())
        if nbytes < 0:
            shutil.rmtree(one, ignore_errors=True)


def fingerprint_of(windows: Tensor) -> str:
    """A hash of token windows: their tokens and their shape."""
    return hashlib.sha256(repr(tuple(windows.shape)).encode() + windows.contiguous().numpy().tobytes()).hexdigest()


def write_json(file: Path, data: Any) -> None:
    """Write JSON, indented by two spaces, keys in the order given. Refuses NaN and infinity, which would hide a bad number."""
    replace(file, lambda part: _write_text(part, json.dumps(data, indent=2, allow_nan=False) + "\n"))


def write_text(file: Path, text: str) -> None:
    replace(file, lambda part: _write_text(part, text))


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace(file, lambda part: save_file(held, part, metadata={"format": "pt"}))


def _write_text(part: Path, text: str) -> None:
    part.write_text(text, encoding="utf-8")
