"""What this machine is, for reports: names and counts, nothing measured."""

import functools
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, memory, operating system, and versions of what computes."""
    libraries = ("secateurs", "torch", "transformers", "safetensors", "numpy")
    return {
        "processor": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "limits": limits(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
    }


@functools.cache
def compute_dtype(stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """The dtype that products of `stored` weights are fastest in: fp32 where the CPU has no instructions for a 16-bit one.

    ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY, which keep torch from using instructions, count as their absence.
    """
    needs = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    if device != "cpu" or stored not in needs or platform.machine() not in ("x86_64", "AMD64"):
        return stored
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return torch.float32
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    # oneDNN's names from the first with 16-bit products; each has all of those before it
    levels = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "ALL", "DEFAULT")
    allowed = levels[1:] if stored == torch.float16 else levels
    if limit not in allowed:
        return torch.float32
    return stored if any(flag in _cpu_flags() for flag in needs[stored]) else torch.float32


def _cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    return set()


# environment variables that keep instructions from oneDNN, torch and our kernels
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "SECATEURS_MAX_ISA")


def limits() -> dict[str, str]:
    """The variables of LIMITS that are set."""
    return {name: os.environ[name] for name in LIMITS if os.environ.get(name)}


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not getrusage: a child starts with the peak of the process that started it
        high = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if high:
            return int(high[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    A block's tensors are freed in another order than they were taken, and glibc keeps the holes: 8 MB more a block of
    SmolLM2-135M, though nothing holds them.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
