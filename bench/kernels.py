"""One layer, 11008 x 4096: packed products against the best dense ones, and against peers where they are installed.

    .venv/bin/python bench/kernels.py [--rounds 15]
    SECATEURS_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 .venv/bin/python bench/kernels.py

Then weights on a grid: all integers against the best dense bf16, survivors' integers against all integers of the same bits.
Weights are rotated past the last cache and all ways are interleaved. Dense ways: torch and prepacked oneDNN in the stored dtype
and in fp32, and our own dense kernels. Peers (openvino, onnxruntime) are timed if they can be imported. Writes
results/kernels.json; results/kernels-avx2.json under SECATEURS_MAX_ISA=avx2.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from secateurs.base.device import machine
from secateurs.kernels.dispatch import Call, kernels, select
from secateurs.kernels.formats import pack
from secateurs.machine.probe import bandwidth
from secateurs.machine.timing import dense_runs, interleaved
from secateurs.matrix.grids import Scales
from secateurs.matrix.grids import parse as parse_grid
from secateurs.matrix.patterns import parse

SHAPE = (11008, 4096)
# [(pattern, sparsity)]
CASES = [("unstructured", 0.5), ("2:4", 0.5), ("unstructured", 0.7), ("unstructured", 0.9)]
# dtype, tokens, cases
TABLE = [
    *((torch.bfloat16, tokens, CASES) for tokens in (1, 16, 64, 256)),
    (torch.float16, 1, [("unstructured", 0.5), ("unstructured", 0.9)]),
    (torch.float32, 1, [("unstructured", 0.5), ("unstructured", 0.9)]),
    (torch.float32, 64, [("unstructured", 0.5), ("unstructured", 0.8), ("unstructured", 0.9)]),
]
# the least speedup over the best dense that we ask of ourselves, by instruction set; taken at 14.6 GB/s of memory on AVX2
MARKS = {
    "avx512": {
        ("bf16", 1, "unstructured", 0.5): 1.65, ("bf16", 1, "2:4", 0.5): 1.65, ("bf16", 1, "unstructured", 0.7): 2.4,
        ("bf16", 1, "unstructured", 0.9): 4.5, ("fp32", 64, "unstructured", 0.8): 2.5, ("fp32", 64, "unstructured", 0.9): 4.3,
        **{("bf16", t, p, s): 1.0 for t in (16, 64, 256) for p, s in CASES[:3]},
    },
    "avx2": {
        ("bf16", 1, "unstructured", 0.5): 1.65, ("bf16", 1, "2:4", 0.5): 1.65, ("bf16", 1, "unstructured", 0.7): 2.3,
        ("bf16", 1, "unstructured", 0.9): 4.0,
        **{("bf16", t, p, s): 1.3 if s == 0.9 else 1.0 for t in (16, 64, 256) for p, s in CASES},
    },
}  # fmt: skip
# grid, tokens; each for all integers and for GRID_CASES
GRIDS = [(grid, tokens) for grid in ("int8", "int4") for tokens in (1, 16, 64, 256)] + [("int3", 1), ("int2", 1)]
GRID_CASES = [("unstructured", 0.5), ("2:4", 0.5), ("unstructured", 0.7), ("unstructured", 0.9)]
# as MARKS: over the best dense bf16 where no zeros are left out (None), else over all integers of the same bits
GRID_MARKS = {
    "avx512": {
        ("int8", 1, None, 0.0): 1.7, ("int4", 1, None, 0.0): 2.8, ("int8", 1, "unstructured", 0.5): 1.35,
        ("int4", 1, "unstructured", 0.5): 1.15, ("int4", 1, "2:4", 0.5): 1.2, ("int4", 1, "unstructured", 0.7): 1.4,
        **{(g, t, p, s): 0.95 for g, t in GRIDS if t > 1 for p, s in GRID_CASES},
    },
    "avx2": {
        ("int8", 1, None, 0.0): 1.7, ("int4", 1, None, 0.0): 2.8, ("int8", 1, "2:4", 0.5): 1.25, ("int4", 1, "2:4", 0.5): 1.2,
    },
}  # fmt: skip
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def peers(weights, x, sparsity):
    """fp32 products of other runtimes on the same pruned weights: OpenVINO, dense and with its sparse decompression, and
    ONNX Runtime."""
    runs = {}
    threads = torch.get_num_threads()
    try:
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops

        for name, rate in (("OpenVINO", None), (f"OpenVINO sparse {sparsity - 0.05:.2f}", sparsity - 0.05)):
            copies = []
            for w in weights:
                given = ops.parameter(list(x.shape), np.float32)
                model = ov.Model([ops.matmul(given, ops.constant(w.numpy()), False, True)], [given])
                settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
                if rate is not None:
                    settings["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = rate
                request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
                request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
                copies.append(request.infer)
            runs[name] = copies
    except Exception as error:
        print(f"not timed: OpenVINO ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
    try:
        import numpy as np
        import onnx
        import onnxruntime as ort

        copies = []
        for w in weights:
            node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
            graph = onnx.helper.make_graph(
                [node], "g", [onnx.helper.make_tensor_value_info("x", 1, list(x.shape))],
                [onnx.helper.make_tensor_value_info("y", 1, [x.shape[0], w.shape[0]])],
                [onnx.numpy_helper.from_array(np.ascontiguousarray(w.numpy().T), "w")],
            )  # fmt: skip
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            copies.append(lambda s=session: s.run(None, {"x": x.numpy()}))
        runs["ONNX Runtime"] = copies
    except Exception as error:
        print(f"not timed: ONNX Runtime ({type(error).__name__}: {str(error).splitlines()[0][:100]})")
    return runs


def overhead():
    """Seconds that a call of a 64x64 PackedLinear takes above its kernel, called from Python with ready arguments."""
    import time
    from statistics import median

    from secateurs.kernels.dispatch import call_of
    from secateurs.kernels.library import library
    from secateurs.kernels.packed_linear import PackedLinear

    layer = PackedLinear.of(pack(torch.eye(64, dtype=torch.bfloat16)))
    x, y = torch.randn(1, 64).bfloat16(), torch.empty(64, dtype=torch.bfloat16)
    call = call_of([layer.weight, layer.weight_mask, None, None, None], layer.layout, torch.bfloat16)
    arguments = (call.kernel(1), call._address, 1, x.data_ptr(), y.data_ptr(), 0, 1, 1)
    function = library().secateurs_linear

    def seconds(run):
        samples = []
        for _ in range(30):
            begin = time.perf_counter()
            for _ in range(500):
                run()
            samples.append((time.perf_counter() - begin) / 500)
        return median(samples)

    return seconds(lambda: layer(x)) - seconds(lambda: function(*arguments))


def rounded(weight_OI, grid):
    """The nearest weights on a symmetric grid whose scales are a group's greatest weight, and the scales."""
    parts = grid.grouped(weight_OI.float())
    scales = Scales(grid, (parts.abs().amax(-1) / max(1, grid.middle - 1)).to(grid.scale_dtype))
    return scales.rounded(weight_OI).to(weight_OI.dtype), scales


def checked(packed, weight_OI, x_TI, kernel):
    """The run of a kernel, after its outputs were found right: off by less than rounding x to 127 steps a block can do."""
    call = Call([packed], [None])
    found = call(x_TI, kernel.index).view(len(x_TI), -1).double()
    want = x_TI.double() @ weight_OI.double().T
    # the errors of integers of x are even within half a step, 1/254 of a block's greatest; weights round at 2^-9
    spread = (x_TI.abs().double().amax() / 254 + 2**-8) * weight_OI.double().norm(dim=1)
    assert bool(((found - want).abs() <= 6 * spread + want.abs() * 2**-7).all()), kernel.name
    return partial(call, x_TI, kernel.index)


def integer_rows(weights, isa, given):
    """Timed rows of matrices on grids."""
    rows = []
    for text, tokens in GRIDS:
        grid = parse_grid(text)
        x = torch.randn(tokens, SHAPE[1]).to(weights[0].dtype)
        runs, nbytes, ways = dense_runs(weights, x), {}, {}
        dense = set(runs)
        for pattern, sparsity in [(None, 0.0), *GRID_CASES]:
            kept = [
                w if pattern is None else w.masked_fill(~parse(pattern).keep(torch.rand(SHAPE), sparsity), 0)
                for w in weights
            ]
            on_grid = [rounded(w, grid) for w in kept]
            format = "dense" if pattern is None else "bitmask"
            packed = [pack(w, format, scales) for w, scales in on_grid]
            chosen = select(packed[0], tokens)
            ways[pattern, sparsity] = f"{chosen.name} {pattern or 'all'} {sparsity:.0%}"
            nbytes[pattern, sparsity] = packed[0].nbytes
            runs[ways[pattern, sparsity]] = [
                checked(p, w, x, chosen) for p, (w, _) in zip(packed, on_grid, strict=True)
            ]
        found = interleaved(runs, given.rounds, given.seconds, droppable=dense)
        best = min(dense, key=lambda n: found[n].seconds)
        for (pattern, sparsity), way in ways.items():
            over = best if pattern is None else ways[None, 0.0]
            row = {
                "isa": isa, "dtype": text, "tokens": tokens, "pattern": pattern, "sparsity": sparsity, "kernel": way.split()[0],
                "nbytes": nbytes[pattern, sparsity], "over": over, "speedup": found[over].seconds / found[way].seconds,
                "fastest_speedup": found[over].low / found[way].low,
                "mark": GRID_MARKS.get(isa, {}).get((text, tokens, pattern, sparsity)),
                "seconds": {n: [found[n].seconds, found[n].low, found[n].high] for n in (way, over)},
            }  # fmt: skip
            rows.append(row)
            mark = f", mark {row['mark']}x" if row["mark"] else ""
            print(
                f"{text} {tokens:3d} tokens, {pattern or 'all integers'} {sparsity:.0%}: {found[way].seconds * 1e3:.2f} ms "
                f"[{found[way].low * 1e3:.2f}-{found[way].high * 1e3:.2f}], {row['nbytes'] / 1e6:.1f} MB, "
                f"{row['speedup']:.2f}x {over} ({row['fastest_speedup']:.2f}x of the 10th percentiles){mark}",
                flush=True,
            )
    return rows


def useful(tokens):
    """Strategies that may be the fastest for so many tokens."""
    return ("stream", "gather") if tokens <= 8 else ("tile", "skip")


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument(
        "--seconds", type=float, default=20.0, help="at most so long for a row, three rounds at least"
    )
    arguments.add_argument("--no-peers", action="store_true")
    arguments.add_argument("--only-integers", action="store_true", help="print those rows and write nothing")
    given = arguments.parse_args()
    torch.manual_seed(0)
    rows = []
    isa = next(k.isa for k in kernels() if k.format == "bitmask" and not k.lacks)
    print(
        f"{machine()['processor']}, {isa} kernels, torch with {machine()['isa']}, {torch.get_num_threads()} threads",
        flush=True,
    )
    integers = integer_rows([torch.randn(SHAPE).bfloat16() for _ in range(2)], isa, given)
    if given.only_integers:
        return
    weights = []
    for dtype, tokens, cases in TABLE:
        name = NAMES[dtype]
        if not weights or weights[0].dtype != dtype:
            base = torch.randn(SHAPE).to(dtype)
            weights = [base, base.roll(1, 0)]
            wide = [w.float() for w in weights]
        for pattern, sparsity in cases:
            pruned = [w.masked_fill(~parse(pattern).keep(torch.rand(SHAPE), sparsity), 0) for w in weights]
            packed = [pack(w) for w in pruned]
            x = torch.randn(tokens, SHAPE[1]).to(dtype)
            runs = dense_runs(weights, x, wide)
            dense = set(runs)
            if dtype == torch.float32 and tokens == 64 and not given.no_peers:
                runs.update(peers(pruned, x, sparsity))
            chosen = select(packed[0], tokens).name
            for k in kernels():
                if (
                    k.format == "bitmask"
                    and k.dtype == name
                    and not k.lacks
                    and k.isa == isa
                    and k.strategy in useful(tokens)
                ):
                    runs[k.name] = [partial(Call([p], [None]), x, k.index) for p in packed]
            streaming = bandwidth(0.3)
            found = interleaved(runs, given.rounds, given.seconds, droppable=dense)
            streaming = (streaming + bandwidth(0.3)) / 2
            best = min(dense, key=lambda n: found[n].seconds)
            row = {
                "isa": isa, "dtype": name, "tokens": tokens, "pattern": pattern, "sparsity": sparsity, "kernel": chosen,
                "nbytes": packed[0].nbytes, "dense_nbytes": packed[0].dense_nbytes, "best_dense": best,
                "speedup": found[best].seconds / found[chosen].seconds,
                "bandwidth_share": packed[0].nbytes / found[chosen].seconds / streaming,
                "streaming_bytes_per_second": streaming, "mark": MARKS.get(isa, {}).get((name, tokens, pattern, sparsity)),
                "seconds": {n: [t.seconds, t.low, t.high] for n, t in found.items()},
            }  # fmt: skip
            rows.append(row)
            mark = f", mark {row['mark']}x" if row["mark"] else ""
            print(
                f"{name} {tokens:3d} tokens, {sparsity:.0%} {pattern}: {found[chosen].seconds * 1e3:.2f} ms, "
                f"{row['speedup']:.2f}x {best}{mark}; "
                f"{row['bandwidth_share']:.0%} of {streaming / 1e9:.0f} GB/s",
                flush=True,
            )
            for other, t in found.items():
                print(f"    {other:34s} {t.seconds * 1e3:8.2f} ms [{t.low * 1e3:.2f}-{t.high * 1e3:.2f}]")
    with torch.no_grad():
        above = overhead()
    print(f"a call through Python takes {above * 1e6:.1f} us above its kernel")
    file = Path(__file__).parent / "results" / ("kernels.json" if isa == "avx512" else f"kernels-{isa}.json")
    file.write_text(
        json.dumps(
            {
                "machine": machine(),
                "isa": isa,
                "shape": SHAPE,
                "rows": rows,
                "integers": integers,
                "call_overhead_seconds": above,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
