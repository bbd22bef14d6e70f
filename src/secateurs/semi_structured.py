"""2:4 on CUDA through PyTorch's to_sparse_semi_structured: cuSPARSELt, with its algorithm searched, or CUTLASS.

The GPU row of the probe's table. Where it cannot run it says why.
"""

from functools import partial
from typing import Any

import torch

NAME = "nm24_cuda_semi_structured"


def lacks(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """None, or why this machine has no 2:4 kernel."""
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip or major < 8:
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no 2:4 tensor cores; 8.0 has"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 takes fp16 and bf16, not {dtype}"
    return None


def seconds(shape: tuple[int, int], tokens: int, dtype: torch.dtype, rounds: int = 20) -> dict[str, float]:
    """Median seconds of dense and 2:4 products on the GPU, by kernel, interleaved. Call it where lacks() is None."""
    from statistics import median

    outputs, inputs = shape
    x = torch.randn(max(tokens, 1), inputs, dtype=dtype, device="cuda")
    weight = torch.randn(outputs, inputs, dtype=dtype, device="cuda")
    keep = torch.tensor([1, 1, 0, 0], dtype=dtype, device="cuda").repeat(outputs, inputs // 4)
    weight = weight * keep
    functions: dict[str, Any] = {"dense": partial(torch.nn.functional.linear, x, weight)}
    event: Any = torch.cuda.Event
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    for backend in (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS):
        name = backend.BACKEND
        try:
            sparse: Any = backend.from_dense(weight)
            if name == "cusparselt":
                # the default algorithm is often slower than dense: pytorch issues 115178, 179926
                sparse.alg_id_cusparselt = torch._cslt_sparse_mm_search(sparse.packed, x.T.contiguous())
            got = torch.nn.functional.linear(x, sparse)
            want = torch.nn.functional.linear(x, weight)
            if not torch.allclose(got, want, atol=1e-1, rtol=2e-2):
                continue
            functions[name] = partial(torch.nn.functional.linear, x, sparse)
        except (RuntimeError, NotImplementedError):
            continue
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 3):
        for name, run in functions.items():
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                samples[name].append(begin.elapsed_time(end) / 1e3)
    return {name: median(values) for name, values in samples.items()}
