"""What a forward or backward pass is run with: hooks that are removed after it, and parameters that ask for gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def hooked(found: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call every module's hook after its forward pass."""
    hooks = [module.register_forward_hook(hook) for module, hook in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
