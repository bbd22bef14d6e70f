"""Which dense model a run directory was made from, and where the resulting model lies."""

import json
from pathlib import Path
from typing import Any

from secateurs.base.errors import OutputError


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
