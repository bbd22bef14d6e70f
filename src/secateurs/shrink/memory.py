"""The peak of a module's activations, and how it depends on the widths of its groups.

Counted are the tensors that operators give, each storage once, from the call that makes it until nothing holds it; parameters, and
what a kernel uses while it runs, are not. A moment is the end of an operator. M moments.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateurs.shrink.outputs import Inputs

Counts = dict[str, int]


class _Live(TorchDispatchMode):
    """Bytes of live results after each operator: `moments`."""

    def __init__(self, apart: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # storages that were there before: parameters, buffers and inputs
        self.apart = apart
        self.holders: dict[int, int] = {}
        self.nbytes = 0
        self.moments: list[int] = []
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self.seen:
                self._add(tensor)
        self.moments.append(self.nbytes)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.apart:
            return
        if not self.holders.get(key):
            self.holders[key] = 0
            self.nbytes += nbytes
        self.holders[key] += 1
        self.seen.add(id(tensor))
        weakref.finalize(tensor, self._drop, key, nbytes, id(tensor))

    def _drop(self, key: int, nbytes: int, number: int) -> None:
        self.seen.discard(number)
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.nbytes -= nbytes


@torch.no_grad()
def moments(model: nn.Module, example: Inputs) -> list[int]:
    """Bytes of live activations after each operator of a pass."""
    held = [*model.parameters(), *model.buffers(), *example]
    live = _Live({t.untyped_storage()._cdata for t in held})
    with live:
        out = model(*example)
    # until here the outputs are held
    del out
    return live.moments


def peak(model: nn.Module, example: Inputs) -> int:
    """The most bytes of activations that are live at once."""
    return max(moments(model, example), default=0)


class Peak:
    """The peak as a function of how many units of every group are left: at each moment a sum over groups.

    dense: {group: units}. whole_M: bytes with all of them. each_M: {group: bytes for each unit}. limit: a step counts by what it
    takes off the moments that are above it; only such steps bring the peak below it.
    """

    rest = 0

    def __init__(self, dense: Counts, whole_M: Tensor, each_M: dict[str, Tensor]) -> None:
        self.dense, self.whole_M, self.each_M = dense, whole_M, each_M
        self.limit = 0.0

    @classmethod
    def of(cls, model: nn.Module, example: Inputs, dense: Counts, made: Callable[[Counts], nn.Module]) -> "Peak":
        """Of passes with half the units of one group after another. made: a module of some widths."""
        whole_M = torch.tensor(moments(model, example), dtype=torch.float64)
        each_M = {}
        for name, units in dense.items():
            fewer = units - units // 2
            if fewer < units:
                less_M = torch.tensor(moments(made({**dense, name: fewer}), example), dtype=torch.float64)
                # a module that takes other steps at another width says nothing of each
                if len(less_M) == len(whole_M):
                    each_M[name] = (whole_M - less_M) / (units - fewer)
        return cls(dict(dense), whole_M, each_M)

    def _bytes(self, counts: Counts) -> Tensor:
        found = self.whole_M.clone()
        for name, each_M in self.each_M.items():
            found -= each_M * (self.dense[name] - counts.get(name, self.dense[name]))
        return found

    def at(self, counts: Counts) -> int:
        """Bytes at the peak."""
        return round(float(self._bytes(counts).max()))

    def saved(self, counts: Counts, group: str, options: Sequence[int]) -> list[float]:
        """For each option of a group's units, the bytes above the limit that it saves, summed over moments."""
        if group not in self.each_M:
            return [0.0] * len(options)
        now_M = self._bytes(counts)
        fewer_N = torch.tensor([counts[group] - option for option in options], dtype=torch.float64)
        then_NM = now_M - fewer_N[:, None] * self.each_M[group]
        above = (now_M - self.limit).clamp(min=0).sum()
        found: list[float] = (above - (then_NM - self.limit).clamp(min=0).sum(1)).tolist()
        return found
