"""In which precision a CPU forms products of 16-bit tensors.

A CPU without instructions for a 16-bit dtype emulates its products: 8 GFLOP/s of bf16 where fp32 does 60 (two cores with AVX2).
Inside widened(), torch's products of such tensors are formed in fp32 and the results are rounded. Everything that is stored keeps
its dtype, and results are rounded as on hardware that multiplies bf16, which adds in fp32 too. No fp32 copy of a weight outlives
its product, forward or backward.

T tokens, O outputs, I inputs.
"""

import functools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.base.device import cpu_flags

# weights widened at a time: 4 MB of fp32, which stay in a cache until they are multiplied
_WEIGHTS = 1 << 20
# products of fewer tokens are limited by memory, and widening would read and write more of it
_FEW = 64


def compute_dtype(stored: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype in which products of `stored` tensors are formed: fp32 on a CPU without instructions for them, else `stored`.

    The CPU's flags decide. Instructions that ONEDNN_MAX_CPU_ISA or ATEN_CPU_CAPABILITY forbid to torch count as absent.
    Nothing is measured, so a run that is continued computes as it began.
    """
    if stored not in (torch.bfloat16, torch.float16) or torch.device(device).type != "cpu" or _has(stored):
        return stored
    return torch.float32


# oneDNN's names of instruction sets, from the first that has products of bf16, and of fp16
_ISAS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "ALL", "DEFAULT")
# flags of which a CPU needs one, and what ONEDNN_MAX_CPU_ISA may say
_NEEDS = {
    torch.bfloat16: (("avx512_bf16", "amx_bf16"), _ISAS),
    torch.float16: (("avx512_fp16", "amx_fp16"), _ISAS[1:]),
}


@functools.cache
def _has(stored: torch.dtype) -> bool:
    """True if this CPU has instructions for products of this dtype, and torch may use them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        onednn = torch.ops.mkldnn
        here = onednn._is_mkldnn_bf16_supported if stored == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
        return bool(here())
    # not asked of oneDNN, which says yes to bf16 on any AVX-512 and then widens it in registers
    flags, limits = _NEEDS[stored]
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper() in limits
    wide = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return allowed and wide and not cpu_flags().isdisjoint(flags)


def described(stored: torch.dtype, device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For reports: the stored dtype, the dtype of its products on the device, and why they differ, or None."""
    computed = compute_dtype(stored, device)
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, computed)]
    why = None if stored == computed else f"this CPU has no instructions for products of {names[0]}"
    return {"stored": names[0], "products": names[1], "why": why}


@contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply in bf16 and add in fp32 when the values are bf16 to begin with.

    The product of two bf16 numbers is exact in fp32, so nothing is lost, and CPUs with AVX512-BF16 or AMX do it at
    twice the fp32 rate or more. Any other dtype multiplies in plain fp32.
    """
    flags: Any = torch.backends.mkldnn
    flags = flags.matmul
    before = flags.fp32_precision
    exact = dtype == torch.bfloat16 and compute_dtype(dtype) == dtype
    flags.fp32_precision = "bf16" if exact else "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


def widened() -> AbstractContextManager[object]:
    """A context in which products of 16-bit tensors are formed in fp32 if this CPU has no instructions for them.

    Gradients flow as they do without it. It does nothing where the CPU has the instructions, and for tensors on other devices.
    """
    slow = {dtype for dtype in (torch.bfloat16, torch.float16) if compute_dtype(dtype) != dtype}
    return _Widened(slow) if slow else nullcontext()


class _Widened(TorchFunctionMode):
    def __init__(self, slow: set[torch.dtype]) -> None:
        super().__init__()
        self.slow = slow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not self._is_slow(args, kwargs):
            return func(*args, **kwargs)
        return _PRODUCTS[func](func, args, kwargs)

    def _is_slow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        # einsum takes a list
        given += [a for some in args if isinstance(some, list | tuple) for a in some if isinstance(a, Tensor)]
        return bool(given) and all(
            a.device.type == "cpu" and (a.dtype in self.slow or not a.is_floating_point()) for a in given
        )


def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return _product(input, weight, bias)

    return linear(*args, **kwargs)


def _addmm(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) == 3 and not kwargs and args[0].dim() == 1:
        return _product(args[1], args[2].T, args[0])
    return _in_fp32(func, args, kwargs)


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Any:
    if x.numel() < _FEW * x.shape[-1]:
        return nn.functional.linear(x, weight_OI, bias_O)
    apply: Any = _Linear.apply
    return apply(x, weight_OI, bias_O)


def _in_fp32(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function on fp32 copies of its tensors and round the result back."""
    dtypes: list[torch.dtype] = []

    def wide(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(wide(y) for y in x)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        dtypes.append(x.dtype)
        return x.float()

    out = func(*wide(args), **{k: wide(v) for k, v in kwargs.items()})
    return out.to(dtypes[0])


class _Linear(torch.autograd.Function):
    """y = x W' + b of 16-bit tensors in fp32, a piece of W at a time; only the 16-bit tensors are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.has_bias = bias_O is not None
        x_TI = x.reshape(-1, x.shape[-1]).float()
        y_TO = x.new_empty(len(x_TI), len(weight_OI))
        for part in _pieces(weight_OI):
            y_TO[:, part] = nn.functional.linear(
                x_TI, weight_OI[part].float(), None if bias_O is None else bias_O[part].float()
            )
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        by_y_TO = gradients[0].reshape(-1, len(weight_OI))
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x_TI = torch.zeros(len(by_y_TO), weight_OI.shape[1])
            for part in _pieces(weight_OI):
                by_x_TI.addmm_(by_y_TO[:, part].float(), weight_OI[part].float())
            by_x = by_x_TI.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            x_TI = x.reshape(-1, x.shape[-1]).float()
            by_weight = torch.empty_like(weight_OI)
            for part in _pieces(weight_OI):
                by_weight[part] = by_y_TO[:, part].float().T @ x_TI
        if ctx.has_bias and ctx.needs_input_grad[2]:
            by_bias = by_y_TO.float().sum(0).to(x.dtype)
        return by_x, by_weight, by_bias


def _pieces(weight_OI: Tensor) -> list[slice]:
    rows = max(1, _WEIGHTS // weight_OI.shape[1])
    return [slice(start, start + rows) for start in range(0, len(weight_OI), rows)]


_F = nn.functional
_PRODUCTS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    _F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys(
        (
            torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
            torch.baddbmm, Tensor.baddbmm, Tensor.addmm, torch.einsum, _F.scaled_dot_product_attention,
            torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        ),
        _in_fp32,
    ),
}  # fmt: skip
