"""What a forward or backward pass is run with: hooks that are removed after it, parameters that ask for gradients, modules that
forget it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from secateurs.base.errors import PlanError

# what every module has
_TORCHS = frozenset(vars(nn.Module()))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. Raises PlanError if what a pass left in the module cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(
            f"{type(model).__name__} cannot be copied ({said}); a pass with gradients may have left it something; give a new one"
        ) from error


@contextmanager
def hooked(found: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call every module's hook after its forward pass."""
    hooks = [module.register_forward_hook(hook) for module, hook in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def backward(model: nn.Module, outs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor] | None = None) -> None:
    """Run a model's outputs backward. Raises PlanError if it overwrote what gradients need, or kept it from an earlier pass."""
    try:
        torch.autograd.backward(list(outs), gradients)
    except RuntimeError as error:
        said = str(error).strip().splitlines() or ["RuntimeError"]
        raise PlanError(
            f"{type(model).__name__} gives no gradients, which say what a channel is worth: {said[0]}"
        ) from error


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Take back what a pass writes into modules, but for parameters and buffers: tables that are kept for the next one,
    say, which hold their graph or are of the widths before a cut.
    """
    before = []
    for module in model.modules():
        own = {name: held for name, held in vars(module).items() if name not in _TORCHS}
        inside = [(held, copy.copy(held)) for held in own.values() if type(held) in (dict, list, set)]
        before.append((module, own, inside))
    try:
        yield
    finally:
        for module, own, inside in before:
            for name in [name for name in vars(module) if name not in own and name not in _TORCHS]:
                del vars(module)[name]
            vars(module).update(own)
            for held, was in inside:
                held.clear()
                held.extend(was) if isinstance(held, list) else held.update(was)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """forgetting(), and buffers become what they were."""
    before = [
        (module, name, held, held.clone())
        for module in model.modules() for name, held in module._buffers.items() if held is not None
    ]  # fmt: skip
    try:
        with forgetting(model):
            yield
    finally:
        with torch.no_grad():
            for module, name, held, was in before:
                module._buffers[name] = held.copy_(was)


@contextmanager
def asking(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let the chosen parameters of a model, and no others, ask for gradients; no gradient is left behind."""
    before = {p: p.requires_grad for p in model.parameters()}
    for p in before:
        p.requires_grad_(False)
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None
