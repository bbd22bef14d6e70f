"""Compiles every Triton kernel for GPUs that need not be here, and prints what each takes of them.

    python tools/gpu_kernels.py [--targets 80,89,90,100] [--only WORD] [--out FILE.json]

A line a kernel, variant and target: registers of a thread, shared memory of a program, bytes that spill from registers, and
how many instructions of machine code its inner loop has for each weight. Exits 1 if one does not compile or spills.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# kernels that are interpreted cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from secateurs.base.files import write_json
from secateurs.kernels import on_gpu, triton_kernels

TARGETS = (80, 89, 90, 100)
# bits, masked, kept, group, zeros: what a matrix may be; floats have 0 bits
FLOATS = {"bitmask": (0, True, 0, 1, False), "2:4": (0, True, 2, 1, False), "1:4": (0, True, 1, 1, False)}
INTEGERS = {
    "int8 bitmask": (8, True, 0, 128, False), "int8 2:4": (8, True, 2, 128, False), "int8 dense": (8, False, 0, 128, False),
    "int4 bitmask": (4, True, 0, 64, False), "int4 2:4": (4, True, 2, 64, False), "int4 dense": (4, False, 0, 64, False),
    "int4 asymmetric bitmask": (4, True, 0, 64, True), "int3 bitmask": (3, True, 0, 64, False),
}  # fmt: skip
DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
# of a 4096x4096 matrix whose inputs are not split
INPUTS = 4096


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants. weights: of the tile that its inner loop expands; pointers: dtypes of arguments."""

    kernel: str
    what: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    weights: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.what}"


@dataclass(frozen=True)
class Found:
    """What one variant takes on one target. spills: bytes of local memory of a thread. popc: instructions that count bits."""

    name: str
    target: int
    registers: int
    shared: int
    spills: int
    instructions: float
    popc: int


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        for form, (bits, masked, kept, group, zeros) in (FLOATS | (INTEGERS if dtype == "bf16" else {})).items():
            constants = {
                "BITS": bits, "MASKED": masked, "KEPT": kept, "GROUP": group, "MIDDLE": 1 << bits >> 1 if bits else 0,
                "ZEROS": zeros, "EVEN": True,
            }  # fmt: skip
            pointers = {
                "x": dtype, "values": "u8" if bits else dtype, "mask": "i64", "starts": "i64", "scale": "bf16", "zero": "u8",
                "bias": dtype, "y": dtype, "weight": dtype,
            }  # fmt: skip
            product = {**constants, "BIASED": False, "WHOLE": True}
            quads = on_gpu.FEW_QUADS
            for tokens in (1, 4, 8) if dtype == "fp32" else (1, 4):
                own = {**product, "TOKENS": tokens, "QUADS": quads, "BLOCKS": INPUTS // (4 * quads)}
                yield Variant("few_tokens", f"{dtype} {form}, {tokens} tokens", pointers, own, 4, 16 * quads)
            if dtype != "fp32":
                for tokens, rows, tile, warps in on_gpu.TILES:
                    own = {
                        **product, "TOKENS": tokens, "ROWS": rows, "QUADS": tile, "BLOCKS": INPUTS // (4 * tile), "WIDE": False,
                    }  # fmt: skip
                    yield Variant(
                        "many_tokens", f"{dtype} {form}, {tokens} tokens", pointers, own, warps, 4 * rows * tile
                    )
            rows, tile = on_gpu.EXPAND_TILE
            own = {**constants, "ROWS": rows, "QUADS": tile}
            yield Variant("expand", f"{dtype} {form}", pointers, own, 4, 4 * rows * tile)
    pointers = {"sums": "fp32", "bias": "bf16", "y": "bf16"}
    yield Variant("add_splits", "bf16", pointers, {"SPLITS": 4, "BIASED": True, "BLOCK": 256}, 4, 256)


def compiled(variant: Variant, target: int) -> Any:
    """What Triton makes of a variant, pointers aligned to 16 bytes and sizes multiples of 16, as they are for most models."""
    function = getattr(triton_kernels, variant.kernel)
    signature, attributes = {}, {}
    for place, name in enumerate(function.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{variant.pointers[name]}" if name in variant.pointers else "i32"
        if name not in ("tokens", "groups"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, dict(variant.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": variant.warps})


def look(variant: Variant, target: int) -> Found:
    made = compiled(variant, target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _told("--dump-resource-usage", cubin)
        code = _told("--dump-sass", cubin)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    local = int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1])
    a_thread = variant.weights / (32 * variant.warps)
    return Found(
        variant.name,
        target,
        registers,
        int(made.metadata.shared),
        local,
        round(inner_loop(code) / a_thread, 2),
        code.count("POPC"),
    )


def _told(option: str, cubin: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def inner_loop(code: str) -> int:
    """Instructions of the longest loop; all of them where there is none."""
    # the address of an instruction, and where it branches
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)]
    spans = []
    for at, text in lines:
        branch = re.search(r"\bBRA(?:\.\w+)*\s+(?:\S+,\s*)*(?:`\(\S+\)|0x([0-9a-f]+))", text)
        if branch and branch[1] and int(branch[1], 16) < at:
            spans.append((int(branch[1], 16), at))
    if not spans:
        return len(lines)
    begin, end = max(spans, key=lambda s: s[1] - s[0])
    return sum(begin <= at <= end for at, _ in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets", default=",".join(map(str, TARGETS)), help="Compute capabilities. Default: all four."
    )
    parser.add_argument("--only", default="", help="Variants whose name holds this.")
    parser.add_argument("--out", type=Path, help="A JSON file for the results.")
    options = parser.parse_args(arguments)
    found, wrong = [], 0
    for target in map(int, options.targets.split(",")):
        for variant in variants():
            if options.only not in variant.name:
                continue
            try:
                row = look(variant, target)
            # whatever the compiler raises, the next variant is tried
            except Exception as error:
                wrong += 1
                print(
                    f"sm_{target} {variant.name}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
                )
                continue
            found.append(row)
            wrong += row.spills > 0
            print(
                f"sm_{target} {row.name}: {row.registers} registers, {row.shared} bytes shared, {row.spills} spilled, "
                f"{row.instructions} instructions a weight", flush=True,
            )  # fmt: skip
    if options.out:
        write_json(options.out, {"triton": triton.__version__, "found": [vars(f) for f in found]})
    print(f"{len(found)} compiled, {wrong} wrong")
    return int(wrong > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
