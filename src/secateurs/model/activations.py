"""Stores for the hidden states that enter each block, in memory or on disk, and a note of the block that a walk is in."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from secateurs.base.files import write_json, writing
from secateurs.base.processes import ALONE, Ranks


class Activations(Protocol):
    """The hidden states that enter each block, batch by batch, and `more`: what else has to be kept beside them."""

    def read(self, block: int, batch: int) -> Tensor: ...
    def more(self, block: int, batch: int) -> list[Any]: ...
    def write(self, block: int, batch: int, hidden: Tensor, more: Sequence[Any] = ()) -> None: ...
    def drop(self, block: int) -> None: ...


class InMemory:
    """Activations of a live model: a dict."""

    def __init__(self) -> None:
        self._held: dict[int, dict[int, tuple[Tensor, list[Any]]]] = {}

    def read(self, block: int, batch: int) -> Tensor:
        return self._held[block][batch][0]

    def more(self, block: int, batch: int) -> list[Any]:
        return self._held[block][batch][1]

    def write(self, block: int, batch: int, hidden: Tensor, more: Sequence[Any] = ()) -> None:
        self._held.setdefault(block, {})[batch] = hidden, list(more)

    def drop(self, block: int) -> None:
        self._held.pop(block, None)


class OnDisk:
    """Activations in a folder, so that memory holds one batch and a killed run goes on from the block it was in.

    Ranks have their own batches in one folder, under numbers that do not depend on how many ranks there are.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks

    def _folder(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}"

    def _file(self, block: int, batch: int) -> Path:
        return self._folder(block) / f"{self.ranks.number(batch):05d}.safetensors"

    def read(self, block: int, batch: int) -> Tensor:
        from safetensors.torch import load_file

        hidden: Tensor = load_file(self._file(block, batch))["hidden"]
        return hidden

    def more(self, block: int, batch: int) -> list[Any]:
        return read_more(self._file(block, batch))

    def write(self, block: int, batch: int, hidden: Tensor, more: Sequence[Any] = ()) -> None:
        file = self._file(block, batch)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_state(file, hidden, more)

    def drop(self, block: int) -> None:
        folder = self._folder(block)
        # another rank that drops its own last takes the folder with them; before that it is not empty
        with suppress(FileNotFoundError):
            for name in os.listdir(folder):
                file = folder / name
                if file.suffix == ".safetensors" and self.ranks.owner(int(file.stem)) == self.ranks.rank:
                    file.unlink()
        with suppress(OSError):
            folder.rmdir()


def write_state(file: Path, hidden: Tensor, more: Sequence[Any] = ()) -> None:
    """Hidden states and what is kept beside them, tensors and values that JSON knows, as one safetensors file."""
    from safetensors.torch import save_file

    tensors = {"hidden": hidden.contiguous()}
    tensors |= {f"more.{i}": x.clone().contiguous() for i, x in enumerate(more) if isinstance(x, Tensor)}
    rest = [None if isinstance(x, Tensor) else x for x in more]
    save_file(tensors, file, {"more": json.dumps(rest)} if more else None)


def read_more(file: Path) -> list[Any]:
    """What write_state() kept beside the hidden states."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        found: list[Any] = json.loads((handle.metadata() or {}).get("more", "[]"))
        for i in [int(name.removeprefix("more.")) for name in list(handle.keys()) if name.startswith("more.")]:
            found[i] = handle.get_tensor(f"more.{i}")
    return found


def read_place(file: Path | None) -> int:
    """The block that a killed walk was in, whose inputs are still in its store; 0 without a note."""
    return int(json.loads(file.read_text()).get("block", 0)) if file is not None and file.is_file() else 0


def note_place(file: Path | None, block: int, ranks: Ranks = ALONE, **found: Any) -> None:
    """Write a note of the block that comes next, once all ranks have stored its inputs, and of what was found before it."""
    if file is not None:
        ranks.alone(lambda: write_json(file, {"block": block, **found}))
