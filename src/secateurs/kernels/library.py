"""Loads the compiled kernels of csrc/ through ctypes, checks their version and gives them torch's thread pool.

Two thread pools would compete for the cores, so the kernels have none: they split their work with torch_parallel_for of
torch's C interface, whatever OpenMP the wheel was built with.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from secateurs.base.errors import DeviceError

ABI = 5


class Weight(ctypes.Structure):
    """secateurs_weight of csrc/secateurs.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("most", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("step_starts", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("half", ctypes.c_int32),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p),
    )


class Product(ctypes.Structure):
    """secateurs_product of csrc/secateurs.h."""

    _fields_ = (("weight", Weight), ("bias", ctypes.c_void_p))


class Products(ctypes.Structure):
    """secateurs_call of csrc/secateurs.h."""

    _fields_ = (
        ("products", ctypes.POINTER(Product)),
        ("biases", ctypes.POINTER(ctypes.c_void_p)),
        ("count", ctypes.c_int32),
        ("kernel", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("outputs", ctypes.c_int64),
    )


class Block(ctypes.Structure):
    """secateurs_block of csrc/secateurs.h."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("width", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("residual", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("eps_of_heads", ctypes.c_float),
        ("plus", ctypes.c_float),
        ("heads_together", ctypes.c_int32),
        ("attention_norm", ctypes.c_void_p),
        ("attention_out_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp_out_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", Products * 3),
        ("out", Products * 1),
        ("gate_up", Products * 2),
        ("down", Products * 1),
    )


class Info(ctypes.Structure):
    """secateurs_kernel of csrc/secateurs.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("format", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("strategy", ctypes.c_char_p),
        ("runnable", ctypes.c_int32),
    )


@functools.cache
def library() -> Any:
    """The loaded library. Raises DeviceError if it was not built or is of another version."""
    import secateurs

    places = [Path(folder) / "libsecateurs_kernels.so" for folder in secateurs.__path__]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        looked = " or ".join(str(p.parent) for p in places)
        raise DeviceError(f"no libsecateurs_kernels.so in {looked}; install secateurs with a C++ compiler at hand")
    loaded = ctypes.CDLL(str(found))
    if loaded.secateurs_abi() != ABI:
        raise DeviceError(
            f"{found} has interface {loaded.secateurs_abi()}, this Python code wants {ABI}; install again"
        )
    loaded.secateurs_kernel_info.argtypes = [ctypes.c_int32, ctypes.POINTER(Info)]
    loaded.secateurs_linear.argtypes = [
        ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64,
        ctypes.c_int32,
    ]  # fmt: skip
    loaded.secateurs_decode.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32,
    ]  # fmt: skip
    loaded.secateurs_check_bitmask.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    for function in (loaded.secateurs_write_integers, loaded.secateurs_read_integers):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    loaded.secateurs_rows.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p,
    ]  # fmt: skip
    loaded.secateurs_count_steps.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.secateurs_count_steps.restype = ctypes.c_int64
    loaded.secateurs_fill_steps.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    loaded.secateurs_fill_steps.restype = None
    loaded.secateurs_fill_pairs.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    loaded.secateurs_fill_pairs.restype = None
    loaded.secateurs_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    loaded.secateurs_read.restype = ctypes.c_double
    loaded.secateurs_spin.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
    loaded.secateurs_spin.restype = ctypes.c_double
    loaded.secateurs_use_threads.argtypes = [ctypes.c_void_p]
    loaded.secateurs_use_threads.restype = None
    loaded.secateurs_use_threads(_torch_parallel_for())
    return loaded


def _torch_parallel_for() -> int | None:
    """The address of torch_parallel_for in the libtorch of this process; None where torch has none (before 2.10)."""
    name = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(name)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def threads_note() -> str | None:
    """Why the kernels run on one thread, or None if they use torch's thread pool."""
    if _torch_parallel_for():
        return None
    return f"torch {torch.__version__} has no torch_parallel_for, so the kernels run on one thread; use torch 2.10 or later"
