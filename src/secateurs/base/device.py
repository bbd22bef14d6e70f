"""Facts about this machine, for reports: names and counts. Nothing is measured here."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine as reports have it: device that computed, processor, cores, threads, memory, system, versions of libraries."""
    libraries = ("secateurs", "torch", "transformers", "safetensors", "numpy")
    return {
        "device": device_name(device),
        "processor": _processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "limits": limits(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in libraries}},
    }


def device_name(device: torch.device | str) -> str:
    """'cpu', or 'cuda:0 (NVIDIA H200)'."""
    device = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def cpu_note() -> str | None:
    """A sentence saying that commands do not use this machine's GPU; None if it has none."""
    if not torch.cuda.is_available():
        return None
    return (
        f"{torch.cuda.get_device_name()} is not used: commands work on model folders on the CPU; in Python, sc.prune(model.cuda(), "
        "plan, calibration=windows) prunes a live model on the GPU"
    )


def cpu_flags() -> set[str]:
    """The processor's instruction sets by Linux's names, e.g. 'avx2'; empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    return set()


# environment variables that stop oneDNN, torch and our kernels from using some instructions
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "SECATEURS_MAX_ISA")


def limits() -> dict[str, str]:
    """The variables of LIMITS that are set, with their values."""
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

    A block's tensors are freed in another order than they were allocated, and glibc keeps the holes: 8 MB more after each
    block of SmolLM2-135M, though no tensor is left.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


# glibc's name for the size from which memory is asked of the system by itself, and that size
_MMAP_THRESHOLD, _APART = -3, 1 << 20


def return_at_once() -> None:
    """Let tensors of 1 MB and more go back to the system when they are freed, where the C library can (glibc).

    By itself it raises that size to the largest that was ever freed, up to 32 MB; smaller ones then leave holes, more with every
    block. Costs 3% of the CPU time of a small run.
    """
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_option(_MMAP_THRESHOLD, _APART)


def _version(name: str) -> str:
    """The version of a library; that of a source tree on the path is its __version__."""
    try:
        return version(name)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", "not installed"))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The machine's memory, or what the control group of this process may have of it, as in a container."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([there, *_allowed()])


def _allowed(root: Path = Path("/")) -> list[int]:
    """The limits of this process's control group and of those around it, of both versions; none where there are no such groups."""
    own = root / "proc/self/cgroup"
    # a line is 0::PATH, or NUMBER:NAMES:PATH of the first version
    lines = [line.split(":", 2) for line in own.read_text().splitlines()] if own.is_file() else []
    found = []
    for _, names, path in lines:
        if names in ("", "memory"):
            top = root / "sys/fs/cgroup" / names
            # of a container that sees its own group at the top, the path may lead nowhere
            here = top / path.removeprefix("/")
            files = (
                folder / ("memory.limit_in_bytes" if names else "memory.max")
                for folder in (here, *here.parents)
                if folder.is_relative_to(top)
            )
            found += [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in found if text.isdigit()]
