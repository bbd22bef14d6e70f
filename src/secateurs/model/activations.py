"""Stores for the hidden states that enter each block, in memory or on disk, and a note of the block that a walk is in."""

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from secateurs.base.files import write_json, writing


class Activations(Protocol):
    """The hidden states that enter each block, batch by batch."""

    def read(self, block: int, batch: int) -> Tensor: ...
    def write(self, block: int, batch: int, hidden: Tensor) -> None: ...
    def drop(self, block: int) -> None: ...


class InMemory:
    """Activations of a live model: a dict."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, Tensor]] = {}

    def read(self, block: int, batch: int) -> Tensor:
        return self._held[block][batch]

    def write(self, block: int, batch: int, hidden: Tensor) -> None:
        self._held.setdefault(block, {})[batch] = hidden

    def drop(self, block: int) -> None:
        self._held.pop(block, None)


class OnDisk:
    """Activations in a folder, so that memory holds one batch and a killed run goes on from the block it was in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: int, batch: int) -> Path:
        return self.folder / f"block-{block:04d}" / f"{batch:05d}.safetensors"

    def read(self, block: int, batch: int) -> Tensor:
        from safetensors.torch import load_file

        hidden: Tensor = load_file(self._file(block, batch))["hidden"]
        return hidden

    def write(self, block: int, batch: int, hidden: Tensor) -> None:
        from safetensors.torch import save_file

        file = self._file(block, batch)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": hidden.contiguous()}, file)

    def drop(self, block: int) -> None:
        import shutil

        shutil.rmtree(self.folder / f"block-{block:04d}", ignore_errors=True)


def read_place(file: Path | None) -> int:
    """The block that a killed walk was in, whose inputs are still in its store; 0 without a note."""
    return int(json.loads(file.read_text()).get("block", 0)) if file is not None and file.is_file() else 0


def note_place(file: Path | None, block: int, **found: Any) -> None:
    """Write a note of the block that comes next, and of what was found in the blocks before it."""
    if file is not None:
        write_json(file, {"block": block, **found})
