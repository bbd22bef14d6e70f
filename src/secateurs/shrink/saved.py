"""A module that shrink_module made, in one file: its tensors as safetensors, and JSON of what was cut in the file's metadata.

Nothing in it is executed. Loading builds the class as the user does, cuts that to shape and fills it in.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateurs.base.errors import CheckpointError, PlanError
from secateurs.base.files import replace
from secateurs.shrink import graph
from secateurs.shrink.graph import Size

_KEY = "secateurs.shrunk"


def save_shrunk(model: nn.Module, report: dict[str, Any], path: str | Path) -> Path:
    """Write a module that shrink_module made, trained since or not. report: the one that came with it. Returns the file.

    Raises PlanError if the report is of something else, OutputError if the file cannot be written.
    model: what shrink_module returned. path: the file, .safetensors.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
        >>> small, report = sc.shrink_module(net, [(torch.randn(32, 8),)], budget="params=0.5x")
        >>> print(sc.save_shrunk(small, report, "small.safetensors"))
        small.safetensors
    """
    cut = report.get("cut")
    if not cut or any(_tensor(model, name) is None for name in cut["axes"]):
        raise PlanError(
            f"the report does not say what was cut of {type(model).__name__}; give the one that came with it"
        )
    for name, axes in cut["axes"].items():
        found = [len(kept) for _, kept in axes]
        here = [_tensor(model, name).shape[axis] for axis, _ in axes]  # type: ignore[union-attr]
        if found != here:
            raise PlanError(
                f"the report leaves {found} channels of {name}, and the module has {here}; give the one that came with it"
            )
    held: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # a tied parameter is written once
        other = first.setdefault(id(tensor), name)
        if other == name:
            held[name] = tensor.detach().contiguous().cpu()
        else:
            same[name] = other
    said = json.dumps({"class": type(model).__name__, "same": same, **cut})
    file = Path(path)
    replace(file, lambda part: save_file(held, part, metadata={"format": "pt", _KEY: said}))
    return file


def load_shrunk(path: str | Path, model_factory: Callable[[], nn.Module]) -> nn.Module:
    """The module of a file that save_shrunk wrote, in evaluation mode. model_factory: builds the module as it was before the cut.

    A module that was cut twice is loaded with a factory that loads the file of the first cut. Raises CheckpointError if the file is
    no such file, or the factory builds something else.
    path: the file.

    Example, of the file that save_shrunk() wrote above:

        >>> import torch, secateurs as sc
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> sc.load_shrunk("small.safetensors", build)[0].out_features
        24
    """
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if said is None:
        raise CheckpointError(f"{path} was not written by save_shrunk")
    cut = json.loads(said)
    # what the factory draws is filled in; the caller's random numbers are left alone
    with torch.random.fork_rng(devices=[]):
        model = model_factory()
    if type(model).__name__ != cut["class"]:
        raise CheckpointError(f"{path} holds a {cut['class']}, and the factory builds a {type(model).__name__}")
    # an intercept that came where there was no bias is filled in as it is
    there = {name: axes for name, axes in cut["axes"].items() if not _may_come(model, name)}
    for name, axes in there.items():
        tensor = _tensor(model, name)
        if tensor is None or any(len(tensor.shape) <= axis or tensor.shape[axis] <= max(kept) for axis, kept in axes):
            raise CheckpointError(f"the factory's {cut['class']} has no {name} of the size that {path} was cut from")
    kept = {name: [(axis, torch.tensor(places)) for axis, places in axes] for name, axes in there.items()}
    graph.take(model, kept)
    for module, attribute, place, count in cut["sizes"]:
        graph.state(model, Size(module, attribute, place, graph.NOBODY), count)
    _fill(model, {**tensors, **{name: tensors[other] for name, other in cut["same"].items()}}, path)
    return model.eval()


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    for name, tensor in tensors.items():
        holder, _, leaf = name.rpartition(".")
        if _may_come(model, name):
            model.get_submodule(holder).register_parameter(leaf, nn.Parameter(torch.empty_like(tensor)))
        here = _tensor(model, name)
        if here is None or here.shape != tensor.shape:
            found = "none" if here is None else list(here.shape)
            raise CheckpointError(f"{path} holds {name} of {list(tensor.shape)}, and the factory's module has {found}")
    missing = set(model.state_dict()) - set(tensors)
    if missing:
        raise CheckpointError(f"{path} holds no {min(missing)}; the factory builds another module")
    # it states the versions that modules ask for
    held = model.state_dict()
    held.update(tensors)
    model.load_state_dict(held)


def _may_come(model: nn.Module, name: str) -> bool:
    """True if this is the bias of a layer that has none."""
    holder, _, leaf = name.rpartition(".")
    held = dict(model.named_modules()).get(holder)
    return leaf == "bias" and held is not None and held._parameters.get(leaf, held) is None


def _tensor(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer, or None where there is none of that name."""
    try:
        found = graph.tensor_of(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None
