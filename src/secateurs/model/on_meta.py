"""Makes a model without its weights, on a machine that may have no room for one of them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# numbers in a tensor that is not allocated: more than buffers have, whose values count
_LARGE = 1 << 22


@contextmanager
def without_weights() -> Iterator[None]:
    """A context in which modules get their parameters on the meta device, and real buffers.

    accelerate's own allocates each parameter first: 30 GB for the experts of a block of DeepSeek-V3.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _Large():
        yield


class _Large(TorchFunctionMode):
    """Large tensors that are not filled are made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            size = kwargs.get("size") or (args if args and isinstance(args[0], int) else args[0] if args else ())
            if math.prod(size) > _LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
