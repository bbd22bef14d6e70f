"""Tensors of a pickled checkpoint (.bin, .pt, .pth, .ckpt), read without running what it may contain.

SparseML wrote such files: a state_dict beside the recipe and the epoch. torch reads them with weights_only, so whatever is not a
tensor, a number, a text or a list of these is refused.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, said
from secateurs.model.shards import listed_in
from secateurs.rescue.tensors import Lazy

FORMAT = "pickled"
ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
INDEX = "pytorch_model.bin.index.json"
# where trainers keep the weights among other things; of SparseML's the averaged ones come last
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "ema")


def found_in(folder: Path) -> list[Path]:
    """The pickled weight files of a folder: those of an index, else pytorch_model.bin, else all."""
    if (folder / INDEX).is_file():
        return listed_in(folder / INDEX)[0]
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS)
    one = [file for file in files if file.name == "pytorch_model.bin"]
    return one or [
        file for file in files if not file.name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))
    ]


def read(files: list[Path]) -> tuple[Lazy, str | None]:
    """The tensors, and the recipe if the file has one. Raises CheckpointError."""
    found: dict[str, Tensor] = {}
    recipe = None
    for file in files:
        loaded = _load(file)
        tensors = _tensors(loaded)
        if tensors is None:
            raise CheckpointError(
                f"{file} holds no state_dict: {_kind(loaded)}; save model.state_dict() with torch.save and import that"
            )
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise CheckpointError(f"{file} and another file both hold {twice[0]}; give one of them")
        found |= tensors
        if isinstance(loaded, Mapping) and isinstance(loaded.get("recipe"), str):
            recipe = loaded["recipe"]
    # DistributedDataParallel's own
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    # what is tied is one place in memory, and safetensors refuses that
    return {name: tensor.clone for name, tensor in found.items()}, recipe


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise CheckpointError(
                f"{file} is truncated or corrupt ({said(error)}); download or copy it again"
            ) from None
    except (EOFError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({said(error)}); download or copy it again") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(file, error)) from None
    try:
        # the format before torch 1.6 is no zip file, and cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(file, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt ({said(error)}); download or copy it again") from None


def _refused(file: Path, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    what = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0] if lines else "")
    return (
        f"{file} is no plain state_dict: it would run code when it is read, or is damaged ({what}); load it where you trust it, "
        "and save model.state_dict() alone"
    )


def _tensors(loaded: Any) -> dict[str, Tensor] | None:
    """The state_dict of what was loaded: itself, or one in it."""
    if not isinstance(loaded, Mapping):
        return None
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    return next((found for key in _INSIDE if (found := _tensors(loaded.get(key))) is not None), None)


def _kind(loaded: Any) -> str:
    return (
        f"its entries are {', '.join(map(str, list(loaded)[:4]))}"
        if isinstance(loaded, Mapping)
        else f"it is a {type(loaded).__name__}"
    )
