"""The export stage: a folder of ours in a format that other engines load.

What cannot be held exactly is refused before anything is written. A result appears in its place when it is whole.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs.base.errors import OutputError, PlanError, nearest
from secateurs.base.files import appearing, replace
from secateurs.base.progress import Progress, silent
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import INDEX, resolve
from secateurs.pack import to_compressed_tensors, to_gguf, to_onnx
from secateurs.pack.folder import unpack
from secateurs.pack.on_grids import OnGrids


@dataclass(frozen=True)
class Target:
    """prepare: checks a folder and returns what writes it and says what it wrote. ending: of a target that is one file."""

    prepare: Callable[[str | Path], Callable[[Path, Progress], dict[str, Any]]]
    ending: str = ""


def export(source: str | Path, to: str, out: str | Path, progress: Progress = silent) -> dict[str, Any]:
    """Write the model of a folder or run directory to `out`, as one of TARGETS; return what was written.

    layers: name, grid and how it is stored. left: layers on a grid that are stored as plain weights, with the reason. Raises
    PlanError for an unknown target, OutputError for a place that is taken, PackError for what the format cannot hold.
    """
    if to not in TARGETS:
        raise PlanError(f"unknown target '{to}'; known: {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    target, place = TARGETS[to], Path(out).expanduser()
    if target.ending and place.suffix != target.ending:
        raise PlanError(f"{to} is one file: give --out NAME{target.ending}, not {place}")
    if place.exists() and (target.ending or not place.is_dir() or any(place.iterdir())):
        raise OutputError(f"{place} exists; give an empty place with --out")
    write = target.prepare(source)
    result: dict[str, Any] = {}
    if target.ending:
        replace(place, lambda part: result.update(write(part, progress)))
        nbytes = place.stat().st_size
    else:
        with appearing(place) as part:
            result.update(write(part, progress))
        nbytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return {"to": to, "place": str(place), "nbytes": nbytes, "layers": [], "left": [], "warnings": [], **result}


def _dense(source: str | Path) -> Callable[[Path, Progress], dict[str, Any]]:
    """The plain checkpoint, without the scales; a packed folder is unpacked."""
    checkpoint = Checkpoint(source, packed=True)
    if "quantization_config" in checkpoint.raw_config:

        def unpacked(out: Path, progress: Progress) -> dict[str, Any]:
            unpack(resolve(source), out, progress)
            return {}

        return unpacked

    def copied(out: Path, progress: Progress) -> dict[str, Any]:
        checkpoint.copy_small_files(out)
        files = sorted({*checkpoint.file_of.values(), *checkpoint.folder.glob(INDEX)})
        for i, file in enumerate(files):
            progress("files", i, len(files))
            shutil.copyfile(file, out / file.name)
        progress("files", len(files), len(files))
        return {}

    return copied


TARGETS = {
    "compressed-tensors": Target(lambda source: to_compressed_tensors.prepare(OnGrids.open(source))),
    "gguf": Target(lambda source: to_gguf.prepare(OnGrids.open(source)), ".gguf"),
    "onnx": Target(lambda source: to_onnx.prepare(OnGrids.open(source))),
    "dense": Target(_dense),
}
