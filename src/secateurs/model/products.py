"""The matrix products in a call of a torch function: which stored matrix is multiplied with what.

For code that multiplies by a weight without calling the module that holds it: experts fused into one parameter, kernels of a
mixer's own. T rows, O outputs, I inputs, E matrices of a batch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MATMUL = {
    torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__,
}  # fmt: skip


class Product(NamedTuple):
    """x_TI times a matrix at `place` in memory. outputs_first: whether that is stored as [O, I], not as [I, O].

    of: gives the product's part [T, O] of the function's result. whole: whether it is one of a batch of products.
    """

    place: int
    shape: tuple[int, int]
    outputs_first: bool
    x_TI: Tensor
    of: Callable[[Tensor], Tensor]
    whole: bool = False


def products(func: Any, args: Any, kwargs: Any) -> Iterator[Product]:
    """The products that a call computes; none of a function that is not known to multiply."""
    if func is torch.nn.functional.linear:
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        if isinstance(weight, Tensor) and weight.dim() == 2:
            yield _product(weight.T, x, lambda out: out)
    elif func in _MATMUL and len(args) == 2:
        a, b = args
        if b.dim() == 2:
            yield _product(b, a, lambda out: out)
        if a.dim() == 2 and b.dim() > 1:
            yield _product(a.T, b.transpose(-1, -2), lambda out: out.transpose(-1, -2))
        if a.dim() == b.dim() == 3 and len(a) == len(b):
            yield from (_product(b[e], a[e], lambda out, e=e: out[e])._replace(whole=True) for e in range(len(b)))  # type: ignore[misc]


def _product(matrix_IO: Tensor, x: Tensor, of: Callable[[Tensor], Tensor]) -> Product:
    inputs, outputs = matrix_IO.shape
    outputs_first = matrix_IO.stride(0) == 1 and matrix_IO.stride(1) != 1
    return Product(
        matrix_IO.data_ptr(),
        (outputs, inputs),
        outputs_first,
        x.reshape(-1, inputs),
        lambda out: of(out).reshape(-1, outputs),
    )
