"""What an installed wheel must do where there is no compiler: `PYTHON tools/wheel_check.py FOLDER`, where it is installed.

Prunes a tiny model, packs it, loads it, and compares its logits and every kernel's product with floats. The instruction sets
that the kernels find must be those that the system says the processor has: a compiler whose library cannot tell would leave
plain C, and say nothing.
"""

import importlib.metadata
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import secateurs as sc
from secateurs.kernels.dispatch import Call, kernels
from secateurs.kernels.library import library
from secateurs.kernels.packed_linear import PackedLinear
from secateurs.matrix.grids import Scales
from secateurs.matrix.grids import parse as parse_grid
from secateurs.pack.folder import pack

# as /proc/cpuinfo writes them; the least that makes each kind of kernel run
FLAGS = {
    "avx512": "avx512f avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bf16 bmi2",
    "avx2": "avx2 fma f16c bmi2",
}
SHAPE, TOKENS = (40, 200), (1, 5, 70)


def compare(packed: sc.formats.Packed, weight_OI: torch.Tensor, x_TI: torch.Tensor, bound_TO: torch.Tensor) -> int:
    """How many kernels took the matrix; the product of each is within the bound of the float64 one."""
    want_TO, ran = x_TI.double() @ weight_OI.double().T, 0
    for kernel in kernels():
        if kernel.accepts(packed, len(x_TI)) is None:
            got_TO = Call([packed], [None])(x_TI, kernel.index).view(want_TO.shape).double()
            assert bool(((got_TO - want_TO).abs() <= bound_TO).all()), f"{kernel.name}, {len(x_TI)} tokens"
            ran += 1
    return ran


def products(dtype: torch.dtype) -> int:
    """Kernels for floats: sums in fp32, one rounding at the end."""
    ran = 0
    weight_OI = torch.randn(SHAPE).to(dtype).masked_fill(torch.rand(SHAPE) < 0.5, 0)
    for tokens in TOKENS:
        x_TI = torch.randn(tokens, SHAPE[1]).to(dtype)
        terms_TO = x_TI.double().abs() @ weight_OI.double().abs().T
        # any order of n float adds: |error| <= n * eps * sum|terms|  (Higham 2002, sec. 4.2); then the result is rounded
        bound_TO = SHAPE[1] * torch.finfo(torch.float32).eps * terms_TO + torch.finfo(dtype).eps * terms_TO
        for format in ("bitmask", "dense"):
            ran += compare(sc.formats.pack(weight_OI, format), weight_OI, x_TI, bound_TO)
    return ran


def integers(text: str) -> int:
    """Kernels for weights on a grid: they round x to 127 steps of a block's greatest."""
    ran, grid = 0, parse_grid(text)
    kept_OI = torch.randn(SHAPE).masked_fill(torch.rand(SHAPE) < 0.5, 0)
    scales = Scales(grid, (grid.grouped(kept_OI).abs().amax(-1) / (grid.middle - 1)).to(grid.scale_dtype))
    weight_OI = scales.rounded(kept_OI).to(torch.bfloat16)
    for tokens in TOKENS:
        x_TI = torch.randn(tokens, SHAPE[1]).to(torch.bfloat16)
        # every number of x is off by half a step at most, every weight and the result by a rounding to bf16
        terms_TO = x_TI.double().abs() @ weight_OI.double().abs().T
        bound_TO = x_TI.double().abs().amax() / 254 * weight_OI.double().abs().sum(1) + 2**-7 * terms_TO
        for format in ("bitmask", "dense"):
            ran += compare(sc.formats.pack(weight_OI, format, scales), weight_OI, x_TI, bound_TO)
    return ran


def main() -> None:
    torch.manual_seed(0)
    installed = Path(sys.argv[1]).resolve()
    for found in (Path(sc.__file__), Path(library()._name)):
        assert found.resolve().is_relative_to(installed), f"{found} is not of the wheel in {installed}"
    assert importlib.metadata.version("secateurs") == sc.__version__
    assert not any(map(shutil.which, ("cc", "gcc", "g++", "c++", "clang"))), "there is a compiler on the PATH"

    flags = next(
        (line.split(":")[1].split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), []
    )  # fmt: skip
    want = {isa for isa, needed in FLAGS.items() if set(needed.split()) <= set(flags)}
    runnable = {k.isa for k in kernels() if not k.lacks}
    assert runnable & set(FLAGS) == want, f"kernels run for {sorted(runnable)}, the processor has {sorted(want)}"
    ran = sum(products(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)) + sum(
        map(integers, ("int8/32", "int4/64"))
    )
    assert ran, "no kernel was run"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    stats = sc.Stats.of(torch.randn(128, module.in_features))
                    pruned = sc.solvers.find("sparsegpt").solve(
                        module.weight, stats, sc.patterns.parse("unstructured"), 0.5, 0.01
                    )
                    module.weight.copy_(pruned)
        model.save_pretrained(folder / "pruned")
        pack(folder / "pruned", folder / "packed")
        packed = AutoModelForCausalLM.from_pretrained(folder / "packed")
        layers = sum(isinstance(module, PackedLinear) for module in packed.modules())
        # the head too
        assert layers == 15, f"{layers} of 15 layers are packed"
        off = 0.0
        # one token goes through our kernels, a prompt may be expanded for torch's
        for ids in (torch.tensor([[7]]), torch.arange(12)[None]):
            with torch.no_grad():
                off = max(off, float((packed(ids).logits - model(ids).logits).abs().max()))
        assert 0 < off <= 1e-4, f"packed logits are off by {off}; 0 would be torch's own product"
    print(
        f"secateurs {sc.__version__} in {installed}: {ran} products by {', '.join(sorted(runnable))}, "
        f"logits of {layers} packed layers within {off:.1e} of the plain model's"
    )


if __name__ == "__main__":
    main()
