"""Finds a model's blocks by its structure, and holds what was found out about how they run.

A list of blocks is an outermost nn.ModuleList whose members all hold layers that can be pruned. How blocks run (in which order,
what they return, what they hand on) is found out and checked by proof.py, on a small random instance where the model is a skeleton.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from secateurs.model.layers import kind_of

# how a model is walked: all arguments of its blocks are recorded in one pass; before each block anew; not in blocks at all
THROUGH, STEPPED, WHOLE = "through", "stepped", "whole"


@dataclass(frozen=True)
class Form:
    """What a block returns: a pytree, of which `hidden` is the place of its first tensor among the leaves; others: those leaves
    that are no tensors, by place.
    """

    spec: TreeSpec
    hidden: int = 0
    others: Mapping[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, output: Any) -> "Form":
        """The form of an output. Raises ValueError if there is no tensor in it."""
        leaves, spec = tree_flatten(output)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not tensors:
            raise ValueError("a block returns no tensor")
        return cls(spec, tensors[0], {i: leaf for i, leaf in enumerate(leaves) if i not in tensors})

    def around(self, hidden: Tensor) -> Any:
        """An output of this form with these hidden states; None in the place of other tensors."""
        leaves = [self.others.get(i) for i in range(self.spec.num_leaves)]
        leaves[self.hidden] = hidden
        return tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Layout:
    """How a model's blocks are walked.

    lists: the paths of its lists of blocks in the order in which they are called. forms: what their blocks return. experts: {name
    of fused 3-D parameters: kind of their layers}. how: THROUGH, STEPPED or WHOLE; why: the reason if it is not THROUGH. in_pieces:
    whether what comes after the blocks treats every position alone.
    """

    lists: tuple[str, ...] = ()
    experts: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    how: str = THROUGH
    why: str | None = None
    in_pieces: bool = False

    @property
    def simple(self) -> bool:
        """True if hidden states alone go from block to block, from the first to the last."""
        return self.how == THROUGH and len(self.lists) == 1


_KNOWN: "WeakKeyDictionary[nn.Module, Layout]" = WeakKeyDictionary()
# of skeletons, whose layout follows from class and config
_OF_CONFIGS: dict[Any, Layout] = {}


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model, found out once. A module without a config.model_type is WHOLE."""
    found = _KNOWN.get(model)
    if found is None:
        from secateurs.model.proof import prove

        config: Any = getattr(model, "config", None)
        if hasattr(config, "model_type"):
            key = (type(model), config.to_json_string(use_diff=False)) if _is_skeleton(model) else None
            found = _OF_CONFIGS.get(key) or prove(model)
            if key:
                _OF_CONFIGS[key] = found
        else:
            found = Layout(how=WHOLE, why="only a Hugging Face model's blocks and loss are known")
        _KNOWN[model] = found
    return found


def assume(model: nn.Module, layout: Layout) -> None:
    """Let a model have this layout."""
    _KNOWN[model] = layout


def _is_skeleton(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def lists_of(model: nn.Module) -> list[str]:
    """The paths of the outermost lists whose members all hold layers and are none, in module order."""
    found: list[str] = []
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{path}.") for path in found)
        if not (isinstance(module, nn.ModuleList) and len(module) and outermost):
            continue
        if all(kind_of(block) is None and holds_layers(block) for block in module):
            found.append(name)
    return found


def fused_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: 3-D parameter that no known module holds}: fused experts, and others."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and _fused(module, parameter)
    }


def holds_layers(block: nn.Module) -> bool:
    return any(
        kind_of(module) is not None or any(_fused(module, p) for p in module._parameters.values())
        for module in block.modules()
    )


def _fused(module: nn.Module, parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.dim() == 3 and kind_of(module) is None
