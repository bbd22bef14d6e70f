"""Chooses experts of a mixture to remove, and removes them. Tokens that were sent to a removed expert go to their next choice.

The loss of removing a set is measured on the block's inputs: half the squared change of the mixture's outputs, weighted by E[g^2]
of the block's output (the mixture is added to it, so both have the same gradient). Removal is greedy; Lu et al. 2024, arXiv
2402.14800, search by the same output error. E experts, T tokens, H hidden width.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.model.walk import Step
from secateurs.shrink.units import put

# inputs of a block on which sets of experts are compared
_TOKENS = 2048


def number(block: nn.Module, fused: Collection[str]) -> int:
    """How many experts a block has."""
    return next((len(p) for m in block.modules() for n, p in m._parameters.items() if n in fused and p is not None), 0)


def mixture(block: nn.Module, fused: Collection[str]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(the mixture, its router, its experts) of a block. Raises ValueError if the router is not one matrix [E, H].

    fused: the names of parameters that hold a matrix of each expert.
    """
    for path, module in block.named_modules():
        held = [p for n, p in module._parameters.items() if n in fused and p is not None]
        if held:
            parent = block.get_submodule(path.rpartition(".")[0])
            for child in parent.children():
                weight = child._parameters.get("weight")
                if child is not module and weight is not None and weight.dim() == 2 and len(weight) == len(held[0]):
                    return parent, child, module
    raise ValueError("no router with one row for every expert was found")


def inputs(step: Step, fused: Collection[str]) -> Tensor:
    """The inputs of a block's mixture, [T, H]."""
    found: list[Tensor] = []
    mixed, _, _ = mixture(step.block, fused)
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
    block: nn.Module, fused: Collection[str], x_TH: Tensor, weight_H: Tensor | None, count: int
) -> tuple[list[int], list[float]]:
    """The order in which to remove experts, and the loss after each; in nats a token where weight_H is E[g^2]."""
    mixed, router, experts = mixture(block, fused)
    total = number(experts, fused)

    def outputs(gone: Sequence[int]) -> Tensor:
        with torch.no_grad(), never([router], gone):
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


def cut(block: nn.Module, fused: Collection[str], removed: Sequence[int]) -> None:
    """Remove experts from a block, in place: their matrices, the router's rows, the sizes that both state."""
    _, router, experts = mixture(block, fused)
    stays = [e for e in range(len(router._parameters["weight"])) if e not in removed]  # type: ignore[arg-type]
    for module, names in ((experts, list(experts._parameters)), (router, list(router._parameters))):
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None and len(parameter) == len(stays) + len(removed):
                put(module, name, parameter.detach()[stays])
    for module in (router, experts):
        if isinstance(getattr(module, "num_experts", None), int):
            sized: Any = module
            sized.num_experts = len(stays)


def never(routers: Sequence[nn.Module], gone: Sequence[int]) -> AbstractContextManager[Any]:
    """A context in which routers do not choose some experts."""
    return _Mask([router._parameters["weight"] for router in routers], gone)


class _Mask(TorchFunctionMode):
    """Keeps routers from choosing some experts: their logits become -inf where F.linear multiplies with a router's matrix."""

    def __init__(self, weights: Sequence[Any], gone: Sequence[int]) -> None:
        super().__init__()
        self.weights, self.gone = {id(weight) for weight in weights}, list(gone)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.gone and func is nn.functional.linear and id(args[1]) in self.weights:
            out = out.clone()
            out[..., self.gone] = -torch.inf
        return out
