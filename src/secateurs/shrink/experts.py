"""Chooses experts of a mixture to remove, and removes them. Tokens that were sent to a removed expert go to their next choice.

The loss of removing a set is measured on the block's inputs: half the squared change of the mixture's outputs, weighted by E[g^2]
of the block's output (the mixture is added to it, so both have the same gradient). Removal is greedy; Lu et al. 2024, arXiv
2402.14800, search by the same output error. E experts, T tokens, H hidden width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.model.families import Family
from secateurs.model.walk import Step
from secateurs.shrink.units import put

# inputs of a block on which sets of experts are compared
_TOKENS = 2048


def mixture(block: nn.Module, family: Family) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(the mixture, its router, its experts) of a block. Raises ValueError if the router is not one matrix [E, H]."""
    for path, module in block.named_modules():
        fused = module._parameters.get(family.experts[0])
        if fused is not None and fused.dim() == 3:
            parent = block.get_submodule(path.rpartition(".")[0])
            for child in parent.children():
                weight = child._parameters.get("weight")
                if child is not module and weight is not None and weight.dim() == 2 and len(weight) == len(fused):
                    return parent, child, module
    raise ValueError("no router with one row for every expert was found")


def inputs(step: Step, family: Family) -> Tensor:
    """The inputs of a block's mixture, [T, H]."""
    found: list[Tensor] = []
    mixed, _, _ = mixture(step.block, family)
    hook = mixed.register_forward_pre_hook(
        lambda _, args: found.append(args[0].detach().reshape(-1, args[0].shape[-1]))
    )
    try:
        with step.evaluating():
            for batch in range(step.batches):
                if sum(map(len, found)) < _TOKENS:
                    step.call(step.inputs(batch), batch)
    finally:
        hook.remove()
    return torch.cat(found)[:_TOKENS]


def removal(
    block: nn.Module, family: Family, x_TH: Tensor, weight_H: Tensor | None, count: int
) -> tuple[list[int], list[float]]:
    """The order in which to remove experts, and the loss after each; in nats a token where weight_H is E[g^2]."""
    mixed, router, experts = mixture(block, family)
    total = len(experts._parameters[family.experts[0]])  # type: ignore[arg-type]

    def outputs(gone: Sequence[int]) -> Tensor:
        with torch.no_grad(), _Mask(router._parameters["weight"], gone):  # type: ignore[arg-type]
            out = mixed(x_TH[None])
        found: Tensor = (out[0] if isinstance(out, tuple) else out)[0].float()
        return found

    dense_TH = outputs([])
    removed: list[int] = []
    losses: list[float] = []
    while len(removed) < count:
        costs = {}
        for e in range(total):
            if e not in removed:
                square_H = (outputs([*removed, e]) - dense_TH).square().mean(0)
                costs[e] = float((square_H if weight_H is None else square_H * weight_H).sum() / 2)
        best = min(costs, key=lambda e: costs[e])
        removed.append(best)
        losses.append(costs[best])
    return removed, losses


def cut(block: nn.Module, family: Family, removed: Sequence[int]) -> None:
    """Remove experts from a block, in place: their matrices, the router's rows, the sizes that both state."""
    _, router, experts = mixture(block, family)
    stays = [e for e in range(len(router._parameters["weight"])) if e not in removed]  # type: ignore[arg-type]
    for module, names in ((experts, list(experts._parameters)), (router, list(router._parameters))):
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None and len(parameter) == len(stays) + len(removed):
                put(module, name, parameter.detach()[stays])
    resize(block, family)


def resize(block: nn.Module, family: Family) -> None:
    """Set the number of experts that a mixture's modules state to what their parameters hold."""
    _, router, experts = mixture(block, family)
    for module in (router, experts):
        if isinstance(getattr(module, "num_experts", None), int):
            sized: Any = module
            sized.num_experts = len(experts._parameters[family.experts[0]])  # type: ignore[arg-type]


class _Mask(TorchFunctionMode):
    """Keeps the router from choosing some experts: their logits become -inf wherever F.linear multiplies with its matrix."""

    def __init__(self, weight: Tensor, gone: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.gone = weight, list(gone)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.gone and func is nn.functional.linear and args[1] is self.weight:
            out = out.clone()
            out[..., self.gone] = -torch.inf
        return out
