"""2:4 on CUDA through PyTorch's to_sparse_semi_structured: cuSPARSELt, with its algorithm searched, or CUTLASS.

It gives the GPU's rows of `secateurs probe`, and says why where a kernel cannot run. T tokens, O outputs, I inputs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

NAME = "nm24_cuda_semi_structured"
DTYPES = (torch.float16, torch.bfloat16, torch.int8)
BACKENDS = ("cusparselt", "cutlass")
# weights are rotated through at least this much memory: an H200's L2 holds 50 MB, and 2:4 is 9/16 of dense
_COLD_BYTES = 160 << 20
# passes that warm up and are not timed; tokens whose products are checked
_WARM, _CHECKED = 3, 256
# torch._int_mm takes more tokens than this; cuSPARSELt takes int8 in multiples of it
_INT8_TOKENS = 16

Run = Callable[[], Any]


def lacks(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why this machine has no 2:4 kernel for the dtype, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip or major < 8:
        return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no 2:4 tensor cores; 8.0 has"
    if dtype not in DTYPES:
        return f"2:4 takes fp16, bf16 and int8, not {str(dtype).removeprefix('torch.')}"
    return None


@dataclass
class Measured:
    """Times of one product by kernel ('dense', 'cusparselt', 'cutlass'): median seconds and every sample, or why_not."""

    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)

    def speedup(self, kernel: str) -> float | None:
        """A kernel's speed over the dense product's; None if one of them did not run."""
        if kernel not in self.seconds or "dense" not in self.seconds:
            return None
        return self.seconds["dense"] / self.seconds[kernel]


def measure(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, rounds: int = 20, device: str = "cuda", graph: bool = False
) -> Measured:
    """Time dense and 2:4 products on the GPU, interleaved. Call it where lacks() is None.

    A sample is one pass over several copies of the weights, so that none lies in the cache, divided by their number. graph: the
    pass is replayed as a CUDA graph, which leaves out the time that Python takes to launch a kernel. A kernel with a wrong product
    gets no time but a reason. int8: sums in int32; dense is torch._int_mm.
    """
    found = Measured()
    weights = _weights(shape, dtype, device)
    x_TI = _random((tokens, shape[1]), dtype, device)
    runs: dict[str, list[Run]] = {}
    if reason := _dense_lacks(dtype, tokens, shape):
        found.why_not["dense"] = reason
    else:
        runs["dense"] = [_dense(x_TI, w) for w in weights]
    for name in BACKENDS:
        try:
            made = _sparse(name, x_TI, weights)
            error = _error(made[0](), x_TI, weights[0])
            if not error < 0.01:
                found.why_not[name] = f"its product is wrong: relative error {error:.3g}"
                continue
            runs[name] = made
        # what is refused (a shape, a dtype, a compute capability), and how, differs between versions of torch
        except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
            found.why_not[name] = str(error).strip().split("\n")[0] or type(error).__name__
    samples = interleaved(runs, device, rounds, graph)
    found.samples = samples
    found.seconds = {name: median(values) for name, values in samples.items()}
    return found


def interleaved(runs: dict[str, list[Run]], device: str, rounds: int, graph: bool) -> dict[str, list[float]]:
    """Seconds of a run by name: a sample is a pass over all runs of a name, divided by their number; names take turns.

    graph: a pass is replayed as a CUDA graph.
    """
    passes = {name: _replayed(r) if graph else _in_turn(r) for name, r in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + _WARM):
        for name, run in passes.items():
            took = _seconds(run, device) / len(runs[name])
            if number >= _WARM:
                samples[name].append(took)
    return samples


def _random(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)


def _weights(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Copies of a 2:4 matrix, rows rolled, more than the cache holds when packed."""
    outputs, inputs = shape
    copies = max(2, -(-_COLD_BYTES * 16 // (9 * outputs * inputs * dtype.itemsize))) if device != "cpu" else 2
    keep_I = torch.tensor([1, 1, 0, 0], dtype=dtype, device=device).repeat(inputs // 4)
    first_OI = _random(shape, dtype, device) * keep_I
    return [first_OI.roll(i, 0) for i in range(copies)]


def _dense_lacks(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> str | None:
    if dtype != torch.int8:
        return None
    if tokens <= _INT8_TOKENS:
        return f"torch._int_mm takes more than {_INT8_TOKENS} tokens, asked for {tokens}"
    if any(n % 8 for n in shape):
        return f"torch._int_mm takes multiples of 8, the matrix is {shape[0]}x{shape[1]}"
    return None


def _dense(x_TI: Tensor, weight_OI: Tensor) -> Run:
    if x_TI.dtype == torch.int8:
        return lambda: torch._int_mm(x_TI, weight_OI.T)
    return lambda: torch.nn.functional.linear(x_TI, weight_OI)


def _sparse(name: str, x_TI: Tensor, weights: Sequence[Tensor]) -> list[Run]:
    """The products by one backend, each with packed weights of its own."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    backend: Any = {
        "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": SparseSemiStructuredTensorCUTLASS,
    }[name]
    int8 = x_TI.dtype == torch.int8
    if int8 and name == "cutlass":
        raise NotImplementedError("int8 is measured through cuSPARSELt")
    packed = [backend.from_dense(w) for w in weights]
    if name != "cusparselt":
        return [_linear(x_TI, p) for p in packed]
    # cuSPARSELt takes multiples of these only; F.linear pads by itself
    padded_TI = torch.nn.functional.pad(x_TI, (0, 0, 0, -len(x_TI) % (_INT8_TOKENS if int8 else 8)))
    more: dict[str, Any] = {"out_dtype": torch.int32} if int8 else {}
    # the default algorithm is often slower than dense: pytorch issues 115178, 179926
    algorithm = torch._cslt_sparse_mm_search(packed[0].packed, padded_TI.T, **more)
    if int8:
        return [_int8(padded_TI, p.packed, algorithm, len(x_TI)) for p in packed]
    for p in packed:
        p.alg_id_cusparselt = algorithm
    return [_linear(x_TI, p) for p in packed]


def _linear(x_TI: Tensor, weight: Tensor) -> Run:
    return lambda: torch.nn.functional.linear(x_TI, weight)


def _int8(x_TI: Tensor, packed: Tensor, algorithm: int, tokens: int) -> Run:
    """The int8 product. F.linear would round its sums to int8."""
    more: dict[str, Any] = {"out_dtype": torch.int32, "alg_id": algorithm}
    return lambda: torch._cslt_sparse_mm(packed, x_TI.T, **more).T[:tokens]


def _error(got_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> float:
    """Relative error of the first tokens' products."""
    want_TO = x_TI[:_CHECKED].double() @ weight_OI.double().T
    return float((got_TO[:_CHECKED].double() - want_TO).norm() / want_TO.norm())


def _in_turn(runs: Sequence[Run]) -> Callable[[], None]:
    def run() -> None:
        for one in runs:
            one()

    return run


def _replayed(runs: Sequence[Run]) -> Callable[[], None]:
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _in_turn(runs)()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _in_turn(runs)()
    replay: Callable[[], None] = graph.replay
    return replay


def _seconds(run: Callable[[], None], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
