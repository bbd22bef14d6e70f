"""Finds a model's blocks by its structure: lists of modules that hold matrices, and matrices of experts that are fused.

A list of blocks is an outermost nn.ModuleList whose members all hold a layer that can be pruned.
"""

from dataclasses import dataclass

from torch import nn

from secateurs.model.layers import kind_of


@dataclass(frozen=True)
class Layout:
    """Where a model's blocks are. lists: the paths of the lists of blocks. experts: the names of fused 3-D parameters in them."""

    lists: tuple[str, ...]
    experts: tuple[str, ...] = ()


def layout_of(model: nn.Module) -> Layout:
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(_holds_layers, module)):
            lists.append(name)
    # text is read by the list that holds the most
    lists.sort(key=lambda name: sum(p.numel() for p in model.get_submodule(name).parameters()))
    lists = lists[-1:]
    fused = (
        name
        for path in lists
        for module in model.get_submodule(path).modules()
        for name, parameter in module._parameters.items()
        if _fused(module, parameter)
    )
    return Layout(tuple(lists), tuple(dict.fromkeys(fused)))


def _holds_layers(block: nn.Module) -> bool:
    return any(
        kind_of(module) is not None or any(_fused(module, p) for p in module._parameters.values())
        for module in block.modules()
    )


def _fused(module: nn.Module, parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and kind_of(module) is None
