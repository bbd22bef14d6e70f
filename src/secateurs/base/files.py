"""Safe file writes, run directories and their locks, the cache folder.

A file is written beside its place, flushed to the disk and renamed, so a kill or a full disk never leaves half of one.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.errors import OutputError, SecateursError
from secateurs.base.run_folder import model_in


def replace(file: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `file`, flush it to the disk and give it its name.

    Raises OutputError naming the file and the system's reason; what was there before is still there.
    """
    temporary = _part(file)
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


def _part(file: Path) -> Path:
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


def resolved(model: str) -> str:
    """The absolute path of a model folder, of a run directory that of its model; a hub id unchanged."""
    folder = Path(model).expanduser()
    return str(model_in(folder).resolve()) if folder.is_dir() else model


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Take `out` as the run directory of this plan and write plan.json. Raises OutputError.

    It must be new, empty, or the directory of an earlier run of the same plan.
    """
    file = out / "plan.json"
    if file.is_file():
        try:
            old = json.loads(file.read_text())
        except ValueError:
            raise OutputError(f"{file} is not JSON; choose another folder, or delete it") from None
        if old != plan:
            missing = "not stated"
            name = next(k for k in {**plan, **old} if plan.get(k, missing) != old.get(k, missing))
            raise OutputError(
                f"{out} holds a run of another plan ({name} is {old.get(name, missing)} there, {plan.get(name, missing)} here); "
                "choose another folder, or delete it"
            )
        return
    try:
        # a run that was killed while it wrote its plan left a temporary file behind
        if out.exists() and (not out.is_dir() or any(found.name != _part(file).name for found in out.iterdir())):
            raise OutputError(f"{out} is not empty and holds no plan.json of ours; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {out}: {error.strerror}; choose another folder") from None
    write_json(file, plan)


def unchanged(run: Path, facts: dict[str, str]) -> None:
    """Check that what a run reads, {what: its fingerprint}, is what it read when it began. Raises OutputError."""
    file = run / "work" / "read.json"
    known: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    for what, fingerprint in facts.items():
        if known.get(what, fingerprint) != fingerprint:
            raise OutputError(f"{what} has changed since {run} was begun; delete {run} and start again")
    if not facts.keys() <= known.keys():
        write_json(file, {**known, **facts})


def fingerprint_of(windows: Tensor) -> str:
    """A hash of token windows: their tokens and their shape."""
    return hashlib.sha256(repr(tuple(windows.shape)).encode() + windows.contiguous().numpy().tobytes()).hexdigest()


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock a run directory against other processes and make its work/. Raises OutputError if another one has it.

    A command that fails before it has made anything leaves no directory, so that the corrected command can use the name.
    """
    try:
        (run / "work").mkdir(exist_ok=True)
        handle = os.open(run / "work" / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise OutputError(f"cannot write in {run}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputError(f"another secateurs is at work in {run}; wait for it or choose another folder") from None
    except SecateursError:
        if {file.name for file in run.rglob("*") if file.is_file()} <= {"plan.json", "lock", "read.json"}:
            shutil.rmtree(run, ignore_errors=True)
        raise
    finally:
        os.close(handle)


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
