"""The matrices of a model that training prunes, and which of their weights stay.

O outputs, I inputs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateurs.base.errors import PlanError, nearest
from secateurs.matrix import patterns
from secateurs.model.discover import fused_in, layout_of
from secateurs.model.layers import kind_of, layers_of


def prunable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of every matrix that may be pruned (model/layers.py), a shared one once."""
    kinds = _kinds(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in kinds:
            yield name, parameter


def computed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every layer's weight that is no parameter but made of others: weight norm, a parametrization."""
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None) if kind_of(module) else None
        if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
            yield f"{path}.weight".strip("."), weight.detach()


def holders(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module that holds a parameter, and its name there; weights that are tied have several."""
    return [(module, leaf) for module in model.modules() for leaf, p in module._parameters.items() if p is parameter]


def make_plain(module: nn.Module, leaf: str) -> None:
    """Make a parametrized weight an ordinary parameter with the value that it has now.

    torch's own removal takes the weight away from deep copies of the module too, whose class is the same.
    """
    chains: Any = module.parametrizations
    if len(chains) > 1:
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=True)
        return
    chain = chains[leaf]
    weight = chain.original
    with torch.no_grad():
        weight.copy_(chain())
    del module.parametrizations
    module.__class__ = module.__class__.__bases__[0]
    module.register_parameter(leaf, weight)


def as_matrix(
    model: nn.Module, parameter: nn.Parameter
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: from a parameter's layout to the matrix [O, I] that patterns see, and back. Experts are stacked as rows."""
    kind = _kinds(model)[id(parameter)]
    shape = parameter.shape
    if kind == "conv1d":
        return lambda t: t.T, lambda t: t.T
    if kind == "conv":
        out, channels, *kernel = shape
        return lambda t: t.movedim(1, -1).flatten(1), lambda t: t.reshape(out, *kernel, channels).movedim(-1, 1)
    return lambda t: t.reshape(-1, t.shape[-1]), lambda t: t.reshape(shape)


def chosen(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Parameter]:
    """{name: parameter} of every prunable matrix but those in `skip`, which may use any name of a shared one.

    Raises PlanError if none is left, for a name in `skip` that is no parameter, and for a matrix that is computed in every pass.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    made = dict(computed(model))
    for name in skip:
        if name not in named and name not in made:
            raise PlanError(f"the model has no parameter {name} to skip{nearest(name, [*named, *made])}")
    for name in made:
        if name not in skip:
            raise PlanError(
                f"{name} is computed in every pass, so training cannot prune it: make it a plain parameter, or put it in skip"
            )
    skipped = {id(named[name]) for name in skip if name in named}
    found = {name: p for name, p in prunable(model) if id(p) not in skipped}
    if not found:
        raise PlanError(f"{type(model).__name__} has no matrix to prune")
    return found


def check_pattern(name: str, matrix_OI: Tensor, pattern: str) -> None:
    """Raise PlanError if a matrix of this shape cannot take a pattern."""
    refused = patterns.parse(pattern).refuses(*matrix_OI.shape)
    if refused:
        raise PlanError(f"{name} cannot take {pattern}: {refused}; put it in skip")


def apart(
    names: Mapping[str, nn.Parameter], frozen: str | None, why: str
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that are trained, and the frozen ones that are to be pruned once.

    frozen: 'prune' or 'skip', or None. Raises PlanError, naming the frozen ones, where there are some and nothing was said of them.
    """
    if frozen not in (None, "prune", "skip"):
        raise PlanError(f"frozen '{frozen}'; write prune or skip")
    still = {name: p for name, p in names.items() if not p.requires_grad}
    trained = {name: p for name, p in names.items() if p.requires_grad}
    if still and frozen is None:
        some = ", ".join([*list(still)[:3], *([f"{len(still) - 3} more"] if len(still) > 3 else [])])
        raise PlanError(
            f"{some} {'is' if len(still) == 1 else 'are'} frozen (requires_grad is False), and {why}; give frozen='prune' to prune "
            "them once, by magnitude, and keep their zeros, or frozen='skip' to leave them dense"
        )
    if not trained:
        raise PlanError(f"all matrices are frozen, and {why}; train some")
    return trained, still if frozen == "prune" else {}


def largest(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """{name: mask} of the highest scores over all matrices together; `sparsity` of all is removed."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = patterns.top(flat, len(flat) - patterns.count_zeros(len(flat), sparsity))
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _kinds(model: nn.Module) -> dict[int, str]:
    """{id of parameter: kind of layer}."""
    # which fused parameters are experts is known from a look at how they are used
    experts = layout_of(model).experts if fused_in(model) else {}
    return {id(layer.parameter): layer.kind for layer in layers_of(model, "", experts)}
