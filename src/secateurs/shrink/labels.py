"""Numbers of channels: one for each element of a tensor, which of them go together, and why some stay.

A tensor of labels has the shape of the tensor that it describes. Along axes where the number does not change it is expanded (its
stride is 0), so that it takes the memory of its channels alone, and operations that move elements are run on it as they are.
Two numbers are no channels: FREE, of constants, which may go with anything, and STAYS.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FREE, STAYS = 0, 1


class Numbers:
    """A union-find forest of numbers. The root is the lowest of the numbers that go together."""

    def __init__(self) -> None:
        self._parent: NDArray[np.int64] = np.arange(2)
        self._fixed: list[tuple[NDArray[np.int64], str]] = []

    def new(self, *shape: int) -> Tensor:
        """New numbers, one for each element."""
        start, count = len(self._parent), int(np.prod(shape))
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        return torch.arange(start, start + count).reshape(shape)

    def find(self, labels: Tensor) -> Tensor:
        """The roots, expanded wherever they do not change along an axis."""
        few = _few(labels)[0]
        roots = torch.from_numpy(self._roots(few.numpy()))
        for axis, size in enumerate(roots.shape):
            if size > 1 and bool((roots == roots.narrow(axis, 0, 1)).all()):
                roots = roots.narrow(axis, 0, 1)
        return roots.expand(labels.shape)

    def join(self, a: Tensor, b: Tensor, why: str) -> None:
        """Tie each number of a to that of b in the same place. What is tied to one that stays does so too, for the reason given."""
        x, y = (self._roots(part.numpy().ravel()) for part in _few(a, b))
        for mine, other in ((x, y), (y, x)):
            stays = mine[(other == STAYS) & (mine > STAYS)]
            if len(stays):
                self._fixed.append((np.unique(stays), why))
        both = (x > STAYS) & (y > STAYS)
        x, y = x[both], y[both]
        while (differ := x != y).any():
            x, y = x[differ], y[differ]
            # a root is hung below the lowest of those that it is tied to; the other ties are seen again
            np.minimum.at(self._parent, np.maximum(x, y), np.minimum(x, y))
            x, y = self._roots(x), self._roots(y)

    def fix(self, labels: Tensor, why: str) -> None:
        """Say why numbers stay."""
        found = np.unique(_few(labels)[0].numpy())
        if len(found := found[found > STAYS]):
            self._fixed.append((found, why))

    def reasons(self) -> dict[int, str]:
        """{root: the first reason why it stays}."""
        found: dict[int, str] = {}
        for labels, why in self._fixed:
            for root in np.unique(self._roots(labels)).tolist():
                found.setdefault(root, why)
        return found

    def _roots(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        roots = self._parent[labels]
        while (above := self._parent[roots]).tobytes() != roots.tobytes():
            roots = above
        self._parent[labels] = roots
        return roots


def same(number: int, shape: tuple[int, ...]) -> Tensor:
    """One number for all elements."""
    return torch.tensor(number).expand(shape)


def changing(labels: Tensor) -> list[int]:
    """The axes along which numbers change."""
    return [
        a for a, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)) if size > 1 and stride
    ]


def _few(*labels: Tensor) -> list[Tensor]:
    """Tensors of one shape with one element along each axis where none of them changes."""
    axes = {axis for part in labels for axis in changing(part)}
    for axis in set(range(labels[0].dim())) - axes:
        labels = tuple(part.narrow(axis, 0, min(1, part.shape[axis])) for part in labels)
    return list(labels)


def either(a: Tensor, b: Tensor) -> Tensor:
    """The numbers of a, and of b where a has none."""
    if a.dim() and not changing(a) and a.numel() and int(a.flatten()[0]) != FREE:
        return a
    x, y = _few(a, b)
    return torch.where(x == FREE, y, x).expand(a.shape)
