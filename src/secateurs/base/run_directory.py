"""A run directory: claimed once, locked while it is worked on, gone on with after a kill; and which models it holds."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateurs.base.errors import OutputError, SecateursError
from secateurs.base.files import PART, inside, write_json
from secateurs.base.processes import ALONE, Ranks

# of report.json
REPORT_FORMAT = 1

# files of a run that has made nothing
_BEGUN = {"plan.json", "lock", "ranks", "read.json", "parts.json"}

# that the ranks of a run may take to end when one of them was killed
_LAST_SECONDS = 30.0


def is_run(folder: str | Path) -> bool:
    """Whether it is a run directory."""
    return (Path(folder).expanduser() / "plan.json").is_file()


def model_in(folder: str | Path) -> Path:
    """The folder of the model that a folder means: of a run directory its model, as made and not packed; of a decision's that of
    the candidate to ship; any other folder itself. Raises OutputError for a run directory that has none.
    """
    folder = Path(folder).expanduser()
    if not is_run(folder):
        return folder
    file = folder / "decide.json"
    if file.is_file():
        decided = read_object(file)
        try:
            row = next((r for r in decided["rows"] if r["candidate"] == decided["recommended"]), None)
        except (KeyError, TypeError):
            raise OutputError(f"{file} is not a decision of this secateurs; use the version that wrote it") from None
        if row is None:
            raise OutputError(
                f"{folder} decided for the dense model, so it holds none of its own; name {decided['plan']['model']}, or a folder "
                f"in {folder / 'candidates'}"
            )
        return inside(folder, row["folder"], file) / "model"
    if not (folder / "model" / "config.json").is_file():
        raise OutputError(f"{folder} is a run directory without a finished model; rerun the command that began it")
    return folder / "model"


def model_note(folder: str | Path) -> str | None:
    """A sentence that says which model is taken where a run directory was named, else None."""
    if not is_run(folder):
        return None
    found = model_in(folder)
    packed = "; the packed one is in packed" if (found.parent / "packed").is_dir() else ""
    return f"{folder} is a run directory: its model {found} is taken, not the dense one that it was made of{packed}."


def models_of(run: Path) -> tuple[str, Path]:
    """The dense model and the folder of the resulting model, for a run directory of prune, shrink or recover.

    For recover the dense model is its teacher, or without a teacher the model that it was given.
    """
    try:
        plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
        dense, teacher = plan["model"], plan.get("teacher") or "none"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{run / 'plan.json'} is not a plan of ours: {error}") from None
    if teacher != "none":
        dense = teacher
    return dense, run / "model"


def calibrated_on(run: Path) -> str | None:
    """The calibration source of a run directory, or None if its plan has none."""
    try:
        source = json.loads((run / "plan.json").read_text(encoding="utf-8"))["calibration"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None


def shrunk_before(model: str) -> dict[str, Any] | None:
    """Budget, parameters, quality and latency of a model folder that `secateurs shrink` made; None for other folders."""
    try:
        found = json.loads((Path(model).expanduser().parent / "report.json").read_text(encoding="utf-8"))
        return {
            "budget": found["plan"]["budget"],
            "parameters": {kind: found[kind]["parameters"] for kind in ("dense", "left")},
            "quality": found["quality"],
            "latency_ratio": found["latency"]["ratio"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolved(model: str) -> str:
    """The absolute path of a model folder or file, of a run directory that of its model; a hub id unchanged."""
    folder = Path(model).expanduser()
    return str(model_in(folder).resolve()) if folder.exists() else model


def claim(out: Path, plan: dict[str, Any]) -> None:
    """Take `out` as the run directory of this plan and write plan.json. Raises OutputError.

    It must be new, empty, or the directory of an earlier run of the same plan.
    """
    file = out / "plan.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        # of two that begin at once, the second one sees the plan of the first
        alone = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot make {out}: {error.strerror}; choose another folder") from None
    try:
        # not every file system locks folders
        with suppress(OSError):
            fcntl.flock(alone, fcntl.LOCK_EX)
        if file.is_file():
            _same_plan(out, read_object(file), plan)
            return
        # a run that was killed while it wrote its plan left a temporary file behind
        if not all(found.name.startswith(file.name) and found.suffix == PART for found in out.iterdir()):
            raise OutputError(f"{out} is not empty and holds no plan.json of ours; choose another folder")
        write_json(file, plan)
    finally:
        os.close(alone)


def _same_plan(out: Path, old: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise OutputError if a run directory was begun with another plan, or by another version."""
    if old == plan:
        return
    other = sorted(set(old) ^ set(plan))
    if other:
        raise OutputError(
            f"{out} was begun by another command or version of secateurs ('{other[0]}' is stated only "
            f"{'there' if other[0] in old else 'here'}); go on with that one, choose another folder, or delete it"
        )
    name = next(k for k in plan if plan[k] != old[k])
    raise OutputError(
        f"{out} holds a run of another plan ({name} is {old[name]} there, {plan[name]} here); choose another folder, or delete it"
    )


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of a run directory. Raises OutputError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} cannot be read: {error}; choose another folder, or delete it") from None
    if not isinstance(found, dict):
        raise OutputError(f"{file} is not a JSON object of ours; choose another folder, or delete it")
    return found


def report_of(run: Path) -> dict[str, Any] | None:
    """The report.json of a run of shrink or recover, None if there is none. Raises OutputError for one of another version."""
    file = run / "report.json"
    if not file.is_file():
        return None
    found = read_object(file)
    if found.get("format") != REPORT_FORMAT:
        raise OutputError(
            f"{file} is of format {found.get('format')}, this secateurs writes {REPORT_FORMAT}; use the version that wrote it"
        )
    return found


def unchanged(run: Path, facts: dict[str, str]) -> None:
    """Check that what a run reads, {what: its fingerprint}, is what it read when it began. Raises OutputError."""
    file = run / "work" / "read.json"
    known: dict[str, str] = read_object(file) if file.is_file() else {}
    for what, fingerprint in facts.items():
        if known.get(what, fingerprint) != fingerprint:
            raise OutputError(f"{what} has changed since {run} was begun; delete {run} and start again")
    if not facts.keys() <= known.keys():
        write_json(file, {**known, **facts})


@contextmanager
def locked(run: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Lock a run directory against other processes and make its work/. Raises OutputError if another one has it.

    Of several ranks the first one locks it, once those of a run before are gone. A command that fails before it has made anything
    leaves no directory, so that the corrected command can use the name.
    """
    if not ranks.first:
        # the first one makes the folder
        ranks.wait()
        with open(run / "work" / "ranks", "a") as others:
            fcntl.flock(others, fcntl.LOCK_SH)
            yield
        return
    try:
        (run / "work").mkdir(exist_ok=True)
        handle = os.open(run / "work" / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise OutputError(f"cannot write in {run}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _others_gone(run / "work" / "ranks")
        # of a run that was killed while it wrote
        for stale in (file for below in ("*", "model/*", "work/**/*") for file in run.glob(below + PART)):
            stale.unlink()
        ranks.wait()
        yield
    except BlockingIOError:
        raise OutputError(f"another secateurs is at work in {run}; wait for it or choose another folder") from None
    except SecateursError:
        if {file.name for file in run.rglob("*") if file.is_file()} <= _BEGUN:
            shutil.rmtree(run, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _others_gone(file: Path) -> None:
    """Wait until the other ranks of a run before, whose first one was killed, have ended. Raises BlockingIOError if they do not."""
    with file.open("a") as others:
        until = time.monotonic() + _LAST_SECONDS
        while True:
            try:
                fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
