"""Which dense model a run directory was made from, and where the resulting model lies."""

import json
from pathlib import Path
from typing import Any

from secateurs.base.errors import OutputError


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
        decided = json.loads(file.read_text(encoding="utf-8"))
        row = next((r for r in decided["rows"] if r["candidate"] == decided["recommended"]), None)
        if row is None:
            raise OutputError(
                f"{folder} decided for the dense model, so it holds none of its own; name {decided['plan']['model']}, or a folder "
                f"in {folder / 'candidates'}"
            )
        return folder / str(row["folder"]) / "model"
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
    elif (Path(dense) / "plan.json").is_file():
        # recover was given a run directory, and trained its model
        dense = str(Path(dense) / "model")
    return dense, run / "model"


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
