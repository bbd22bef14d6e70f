"""Published figures of machines that were not measured here: enough to say what cannot pay, never shown as a measurement.

A measured profile (`secateurs probe`) always takes precedence. Each figure has its source.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Peak rates and sparse kernels of one machine, as published.

    flops_per_second: dense, bf16 (fp32 where CPUs have no bf16), multiply-adds as two. bytes_per_second: of memory.
    two_four: how much faster 2:4 products are in prefill (thousands of tokens) and in decoding; None where there is no such kernel.
    bitmask: whether our packed kernels run, which read survivors and a bit a weight. sources: of each figure.
    """

    name: str
    about: str
    flops_per_second: float
    bytes_per_second: float
    two_four: tuple[float, float] | None
    bitmask: bool
    sources: dict[str, str]


_AMPERE = "NVIDIA A100 Tensor Core GPU data sheet (2021), SXM 80 GB, without sparsity"
_SLIDE = "SlideSparse README (2026-03), bf16 2:4 over dense cuBLASLt, lowest of its range"
_FEW = "the same and pytorch/ao#576: below 256 tokens 2:4 loses or gains nothing, so none is counted"

HARDWARE = {
    h.name: h
    for h in (
        Hardware(
            "a100", "NVIDIA A100 SXM, 80 GB", 312e12, 2.039e12, (1.52, 1.0), False,
            {"flops_per_second": _AMPERE, "bytes_per_second": _AMPERE, "two_four prefill": _SLIDE, "two_four decode": _FEW},
        ),
        Hardware(
            "h100", "NVIDIA H100 SXM, 80 GB", 989e12, 3.35e12, (1.59, 1.0), False,
            {
                "flops_per_second": "NVIDIA H100 Tensor Core GPU data sheet (2023), SXM, half of the figure with sparsity",
                "bytes_per_second": "the same data sheet", "two_four prefill": _SLIDE, "two_four decode": _FEW,
            },
        ),
        Hardware(
            "l4", "NVIDIA L4, 24 GB", 121e12, 0.3e12, (1.5, 1.0), False,
            {
                "flops_per_second": "NVIDIA L4 data sheet (2023), half of the figure with sparsity",
                "bytes_per_second": "the same data sheet",
                "two_four prefill": "no measurement is published for Ada; the A100's, rounded down", "two_four decode": _FEW,
            },
        ),
        Hardware(
            "rtx3090", "NVIDIA GeForce RTX 3090, 24 GB (consumer Ampere)", 71e12, 0.936e12, (1.5, 1.0), False,
            {
                "flops_per_second": "NVIDIA Ampere GA102 white paper (2020), fp16 with fp32 accumulation, without sparsity",
                "bytes_per_second": "the same white paper",
                "two_four prefill": "no measurement is published for this card; the A100's, rounded down", "two_four decode": _FEW,
            },
        ),
        Hardware(
            "avx2", "AMD EPYC 7543, 32 cores, no AVX-512", 2.87e12, 204.8e9, None, True,
            {
                "flops_per_second": "32 cores x 2.8 GHz x 32 fp32 operations a cycle (two 256-bit multiply-adds)",
                "bytes_per_second": "AMD EPYC 7003 data sheet (2021): 8 channels of DDR4-3200",
                "bitmask": "our AVX2 kernels; decoding taken as bound by bytes, prefill as no gain",
            },
        ),
    )
}  # fmt: skip
