"""Finds the matrices of a model in a copy of it: an average of its weights, a deep copy, a checkpoint, the model in a wrapper."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from secateurs.base.errors import PlanError

Copy = nn.Module | Mapping[str, Any]

# the parts of names that wrappers add: DDP, FSDP and AveragedModel; torch.compile; FSDP; checkpointing; PEFT
_ADDED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
_PEFT = "base_model.model."


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _ADDED).removeprefix(_PEFT)


def found_in(copy: Copy, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """{name: the copy's tensor} for every name of `shapes`, which the copy may have inside wrappers' names.

    copy: a module, or a state dict. Raises PlanError for a name that it does not have, or has several times, and for another shape.
    """
    named: Mapping[str, Any] = (
        dict(copy.named_parameters(remove_duplicate=False)) if isinstance(copy, nn.Module) else copy
    )
    what = type(copy).__name__ if isinstance(copy, nn.Module) else "the state dict"
    by_plain: dict[str, list[str]] = {}
    for name in named:
        by_plain.setdefault(plain_name(name), []).append(name)
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        names = [name] if name in named else by_plain.get(plain_name(name), [])
        if len(names) != 1:
            why = (
                f"has several: {', '.join(names)}"
                if names
                else f"has none; it has {next(iter(named), 'nothing')}, for one"
            )
            raise PlanError(f"zeros of {name} go to the same name in another copy, and {what} {why}")
        tensor = named[names[0]]
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
            of = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PlanError(f"{names[0]} of {what} is {of} and its mask {tuple(shape)}; they must be alike")
        found[name] = tensor
    return found
