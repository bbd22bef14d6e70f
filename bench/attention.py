"""Tiled causal attention against PyTorch's kernel, in bf16, interleaved: milliseconds and error against fp64.

.venv/bin/python bench/attention.py
"""

import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from secateurs.model.attention import tiled


def main() -> None:
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for batch, positions in ((8, 512), (1, 2048), (4, 2048)):
        query, key, value = (torch.randn(batch, heads, positions, 64).bfloat16() for heads in (9, 3, 3))
        ways = {
            "torch": lambda q=query, k=key, v=value: sdpa(q, k, v, is_causal=True, enable_gqa=True),
            "tiled": lambda q=query, k=key, v=value: tiled(q, k, v, 0.125).transpose(1, 2),
        }
        exact = sdpa(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
        errors = {name: float((way().double() - exact).norm() / exact.norm()) for name, way in ways.items()}
        if not all(error < 0.01 for error in errors.values()):
            raise SystemExit(f"wrong results, no times: {errors}")
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(15):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                samples[name].append(1e3 * (time.perf_counter() - began))
        median = {name: statistics.median(times) for name, times in samples.items()}
        for name in ways:
            print(f"{batch} x {positions}: {name} {median[name]:6.1f} ms [{min(samples[name]):.1f}-{max(samples[name]):.1f}], "
                  f"error {errors[name]:.4f}, {median['torch'] / median[name]:.2f}x")  # fmt: skip


if __name__ == "__main__":
    main()
