"""A device 'card' that is not there: tensors that say they lie on it, lie in memory, and refuse to meet those of the CPU.

    with second_device() as card:
        model = card(model)              # parameters and buffers moved, in place
        windows = card(windows)

What CUDA would refuse raises RuntimeError here: products, sums, masks and indices of two devices, and a generator of one with
tensors of the other. What it allows is let through: copies, single numbers, and indices that lie on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

NAME = "card"
_A = torch.ops.aten
# between devices: copies
_MAY_MIX = {_A._to_copy.default, _A.copy_.default, _A.set_.source_Tensor}
# indices may lie on the CPU
_INDEXING = {
    _A.index.Tensor,
    _A.index_put_.default,
    _A.index_put.default,
    _A._unsafe_index.Tensor,
    _A._index_put_impl_.default,
}
_LIBRARY: Any = torch.library.Library("aten", "IMPL")
_registered = False


class OnCard(Tensor):
    """A tensor of the card: `inside` has its numbers."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "OnCard":
        made: Any = Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.inside = inside
        return made

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Any = OnCard(self.inside.detach().clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        return self.inside.tolist()

    def __repr__(self) -> str:
        return f"OnCard({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _on_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    cards = [x for x in leaves if isinstance(x, OnCard)]
    asked = kwargs.get("device")
    to_card = _on_card(asked) if asked is not None else bool(cards)
    _check(func, args, kwargs, leaves, bool(cards) or to_card)
    plain = [x.inside if isinstance(x, OnCard) else "cpu" if isinstance(x, torch.device) else x for x in leaves]
    inner_args, inner_kwargs = tree_unflatten(plain, spec)
    out = func(*inner_args, **inner_kwargs)
    known = {id(x.inside): x for x in cards}

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, OnCard):
            return x
        # what was written in place is still the same tensor
        return known[id(x)] if id(x) in known else OnCard(x) if to_card else x

    return tree_map(wrapped, out)


def _check(func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any], on_card: bool) -> None:
    if not on_card or func in _MAY_MIX:
        return
    generator = next((x for x in leaves if isinstance(x, torch.Generator)), None)
    if generator is not None:
        raise RuntimeError(f"{func}: expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    looked = leaves
    if func in _INDEXING and isinstance(args[0], OnCard):
        looked = [args[0], *args[2:]]
    for x in looked:
        if isinstance(x, Tensor) and not isinstance(x, OnCard) and x.dim() > 0:
            raise RuntimeError(f"{func}: expected all tensors on one device, found {NAME}:0 and cpu {list(x.shape)}")


class _Factories(TorchDispatchMode):
    """For what makes tensors out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _empty(name: str, *args: Any, **kwargs: Any) -> Tensor:
    return OnCard(getattr(torch, name.partition(".")[0])(*args, **{**kwargs, "device": "cpu"}))


def _copied(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _inside(to).copy_(_inside(source))
    return to


def _inside(tensor: Tensor) -> Tensor:
    return tensor.inside if isinstance(tensor, OnCard) else tensor


@contextmanager
def second_device() -> Iterator[Any]:
    """What moves a tensor, a module (in place) or a mapping of tensors to the card."""
    global _registered
    if not _registered:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
        # torch.tensor() asks for storage past any mode
        for name in ("empty_strided", "empty.memory_format"):
            _LIBRARY.impl(name, partial(_empty, name), "PrivateUse1")
        _LIBRARY.impl("_copy_from", _copied, "PrivateUse1")
        _registered = True
    with _Factories():
        yield _moved


def _moved(thing: Any) -> Any:
    if isinstance(thing, nn.Module):
        seen: dict[int, nn.Parameter] = {}
        for module in thing.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    moved = seen.setdefault(id(p), nn.Parameter(OnCard(p.detach().clone()), p.requires_grad))
                    module._parameters[name] = moved
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = OnCard(b.detach().clone())
        return thing
    if isinstance(thing, dict):
        return {name: _moved(value) for name, value in thing.items()}
    return OnCard(thing)
