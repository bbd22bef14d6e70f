"""Exports a live module: torch.export's model.pt2 and model.onnx, both read back and compared with the module."""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import OutputError
from secateurs.model.blocks import evaluating
from secateurs.shrink.outputs import tensors_of

# the largest difference between outputs that is accepted, relative to the largest output
_CLOSE = 1e-3


def export(model: nn.Module, example: tuple[Tensor, ...], folder: str | Path, batch: bool = True) -> list[Path]:
    """Write a module for inference and check what was written. Returns the files.

    batch: the first axis of every input may have any length. model.onnx is written where the packages onnx and onnxscript are
    installed (`pip install secateurs[onnx]`), and run where onnxruntime is. Raises OutputError if the folder holds something, the
    module cannot be exported, or what was written gives something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty; choose another folder")
    # torch.export would take a batch of one for a constant
    shown = tuple(torch.cat([x, x]) if batch and len(x) == 1 else x for x in example)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in shown) if batch else None
    with evaluating(model), quiet_export():
        return _export(model, shown, shapes, folder)


def _export(model: nn.Module, shown: tuple[Tensor, ...], shapes: Any, folder: Path) -> list[Path]:
    with torch.no_grad():
        expected = model(*shown)
    try:
        program = torch.export.export(model, shown, dynamic_shapes=shapes)
    except Exception as error:
        raise OutputError(f"{type(model).__name__} cannot be exported: {str(error).splitlines()[0]}") from error
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "model.pt2"]
    torch.export.save(program, files[0])
    _compare(files[0], torch.export.load(files[0]).module()(*shown), expected)
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        files.append(folder / "model.onnx")
        torch.onnx.export(program, (), files[1], external_data=False, verbose=False)
        if importlib.util.find_spec("onnxruntime"):
            import onnxruntime

            session = onnxruntime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
            names = [given.name for given in session.get_inputs()]
            found = session.run(None, {name: x.numpy() for name, x in zip(names, shown, strict=True)})
            _compare(files[1], [torch.from_numpy(x) for x in found], expected)
    return files


@contextmanager
def quiet_export() -> Iterator[None]:
    """Let the exporter to ONNX say nothing but errors."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _compare(file: Path, found: Any, expected: Any) -> None:
    """Raise OutputError if what the file computes is not what the module does."""
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        a, b = a.detach().double(), b.detach().double()
        gap = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) if b.numel() else 0.0
        if not gap <= _CLOSE:
            raise OutputError(f"{file} gives something else than the module: {gap:.2g} of the largest output apart")
