"""Safe file writes, and the cache folder.

A file is written beside its place, flushed to the disk and renamed, so a kill or a full disk never leaves half of one.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from secateurs.base.errors import CheckpointError, OutputError

# ending of a file that is not whole yet
PART = ".part"


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Raises OutputError, naming the place and the system's reason, for what cannot be written inside."""
    try:
        yield
    # a full disk is an exception of its own in safetensors
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        full = "No space" in reason or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        todo = "free space" if full else "make it writable"
        raise OutputError(f"cannot write {place}: {reason}; nothing else was changed, {todo} and rerun") from None


def replace(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to the disk and give it its name.

    Raises OutputError as writing() does; what was there before is still there.
    """
    # of two processes that write one file of the cache at once each has its own
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PART}")
    try:
        with writing(file):
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
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole. Raises OutputError for a place that is taken or cannot be written."""
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise OutputError(f"{place} exists; give an empty place with --out")
    part = place.with_name(place.name + PART)
    with writing(place):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            part.replace(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def inside(folder: Path, name: object, named_in: Path) -> Path:
    """`folder / name`, for a name that a file states. Raises CheckpointError for one that leads out of the folder.

    Names are judged, not what they link to: in a hub cache every file is a link to one elsewhere.
    """
    if not isinstance(name, str) or os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise CheckpointError(
            f"{named_in} names {name!r}, which leads out of {folder}; nothing outside a model's folder is read or written"
        )
    return folder / name


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
    """Write JSON, indented by two spaces, keys in the order given. Raises OutputError as to_json() and replace() do."""
    text = to_json(data, str(file))
    replace(file, lambda part: _write_text(part, text + "\n"))


def to_json(data: Any, what: str) -> str:
    """The text of JSON. Raises OutputError naming the first number that is NaN or infinite: as a result it would hide a mistake."""
    try:
        return json.dumps(data, indent=2, allow_nan=False)
    except ValueError:
        found = next(_not_finite(data, ""), None)
        if found is None:
            raise
    raise OutputError(
        f"{what} was not written: {found[0]} is {found[1]}, which no result may be; nothing else was changed"
    )


def _not_finite(data: Any, place: str) -> Iterator[tuple[str, float]]:
    """Where numbers are that JSON has no word for, as layers[3].error, and what they are."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _not_finite(value, f"{place}.{key}" if place else str(key))
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from _not_finite(value, f"{place}[{i}]")
    elif isinstance(data, float) and not math.isfinite(data):
        yield place or "it", data


def write_text(file: Path, text: str) -> None:
    replace(file, lambda part: _write_text(part, text))


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. metadata: instead of {"format": "pt"}; with one key, because the library writes several in any order."""
    from safetensors.torch import save_file

    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace(file, lambda part: save_file(held, part, metadata=metadata or {"format": "pt"}))


def _write_text(part: Path, text: str) -> None:
    part.write_text(text, encoding="utf-8")
