"""Zeros in convolutions: packed products over places beside oneDNN's convolutions, interleaved, fp32, one image, one thread.

    OMP_NUM_THREADS=1 .venv/bin/python bench/convolutions.py [--rounds 21]

A 1x1 convolution is a linear layer over places: [H W, I] times W'. `packed` multiplies a bitmask in place, on inputs in torch's
channels_last; `packed, nchw` turns the inputs and outputs of a network in the usual layout around. `csr` is torch's product of a
sparse CSR matrix with [I, H W], the usual layout. A 3x3 convolution is unfolded first. Dense: conv2d in both layouts, with oneDNN's
weights reordered in advance (as torch.compile does), and a linear layer over places.
Numbers are the best dense time over theirs, of medians. Time is that of the thread on its CPU,
so that other processes count less. Patterns: random zeros, and 1:8 (of 8 inputs, 1 kept).
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from methods import ROOT
from torch import Tensor

from secateurs.kernels.dispatch import linear
from secateurs.kernels.formats import pack
from secateurs.matrix import patterns

# outputs, inputs, side, kernel: of EfficientNet-Lite0, of ResNet-50, and a wide one
SHAPES = (
    (240, 40, 28, 1), (80, 480, 14, 1), (672, 112, 14, 1), (192, 1152, 7, 1), (1280, 320, 7, 1),
    (64, 256, 56, 1), (512, 128, 28, 1), (256, 1024, 14, 1), (2048, 512, 7, 1), (1024, 1024, 20, 1), (128, 128, 28, 3),
)  # fmt: skip
ZEROS = ("0.8", "0.9", "0.95", "1:8")


def pruned(weight_OI: Tensor, zeros: str) -> Tensor:
    if ":" in zeros:
        pattern = patterns.parse(zeros)
        return weight_OI * pattern.keep(weight_OI.abs(), pattern.fixed_sparsity)
    return weight_OI * (torch.rand(weight_OI.shape) >= float(zeros))


def ways(weight_OI: Tensor, kernel: int, side: int) -> dict[str, Callable[[], Tensor]]:
    """{name: a function of nothing that gives [1, O, side, side]}, each checked against float64."""
    outputs = len(weight_OI)
    inputs = weight_OI.shape[1] // kernel**2
    x = torch.randn(1, inputs, side, side)
    last = x.contiguous(memory_format=torch.channels_last)
    # columns of the matrix: places of the kernel, then channels, as an unfolded channels_last image has them
    weight = weight_OI.reshape(outputs, kernel, kernel, inputs).permute(0, 3, 1, 2).contiguous()
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    same = kernel // 2
    ready = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), [same] * 2, [1] * 2, [1] * 2, 1, x.shape)
    packed = pack(weight_OI.contiguous())

    def places(image: Tensor) -> Tensor:
        """[H W, I K]: a view where the image is channels_last and the kernel 1."""
        if kernel == 1:
            return image.permute(0, 2, 3, 1).reshape(-1, inputs)
        padded = F.pad(image.permute(0, 2, 3, 1), (0, 0, same, same, same, same))
        return padded.unfold(1, kernel, 1).unfold(2, kernel, 1).permute(0, 1, 2, 4, 5, 3).reshape(side**2, -1)

    def image(rows: Tensor) -> Tensor:
        return rows.view(1, side, side, outputs).permute(0, 3, 1, 2)

    csr = weight.flatten(1).to_sparse_csr()

    def unfolded(given: Tensor) -> Tensor:
        return csr @ (given.view(inputs, -1) if kernel == 1 else F.unfold(given, kernel, padding=same)[0])

    found = {
        "conv": lambda: F.conv2d(x, weight, padding=same),
        "conv, channels_last": lambda: F.conv2d(last, weight_last, padding=same),
        "conv, reordered": lambda: torch.ops.mkldnn._convolution_pointwise(
            x, ready, None, [same] * 2, [1] * 2, [1] * 2, 1, "none", [], ""
        ),
        "linear": lambda: image(F.linear(places(last), weight_OI)),
        "csr": lambda: unfolded(x).view(1, outputs, side, side),
        "packed": lambda: image(linear(places(last), packed)),
        "packed, nchw": lambda: image(linear(places(x), packed)).contiguous(),
    }
    want = F.conv2d(x.double(), weight.double(), padding=same)
    for name, run in found.items():
        gap = float((run().double() - want).abs().max() / want.abs().max())
        assert gap < 1e-4, f"{name}: {gap}"
    return found


def interleaved(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds that this thread was on the CPU for a call, of samples of ten, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.thread_time()
            for _ in range(10):
                run()
            if number:
                samples[name].append((time.thread_time() - begin) / 10)
    return {name: median(found) for name, found in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for outputs, inputs, side, kernel in SHAPES:
            for zeros in ZEROS:
                weight_OI = pruned(torch.randn(outputs, inputs * kernel**2), zeros)
                timed = interleaved(ways(weight_OI, kernel, side), arguments.rounds)
                dense = min(s for n, s in timed.items() if not n.startswith(("packed", "csr")))
                packed = min(s for n, s in timed.items() if n.startswith("packed"))
                gains = {"packed": dense / packed, "csr": dense / timed["csr"]}
                rows.append({"shape": [outputs, inputs, side, kernel], "zeros": zeros, **gains, "seconds": timed})
                us = "  ".join(f"{n} {s * 1e6:.0f}" for n, s in timed.items())
                what = f"{outputs}x{inputs} {kernel}x{kernel} at {side}x{side}, {zeros}"
                print(f"{what}: packed {gains['packed']:.2f}x, csr {gains['csr']:.2f}x  ({us} us)", flush=True)
    file = ROOT / "bench" / "results" / "convolutions.json"
    file.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
