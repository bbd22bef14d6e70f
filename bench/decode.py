"""Decoding of a random model end to end: packed zeros and integers against torch's ways and llama.cpp's.

    .venv/bin/python bench/decode.py [--model llama|mixtral] [--bits 16 8 4] [--work FOLDER] [--repeats 5] [--new 32]
        [--compile] [--make]

llama: 1B-shaped, 2048 wide, 8192 in the MLP, 16 layers, 8 key-value heads, 32000 tokens of vocabulary. mixtral: as wide, 4 layers
of 8 experts of 4096 neurons, 2 of a token, 4096 tokens of vocabulary: experts are 80% of what a token reads. All ways of one number
of bits run in turn. 16 bits: dense, and 50% zeros. 8 and 4 bits: all integers, 50% zeros and 2:4 on llama.cpp's own grids (q8_0,
q4_0), rounded to nearest, the embedding on q8_0, so that llama.cpp's file and ours hold the same numbers. Rows of llama.cpp need
its package (pip install xllamacpp); of mixtral there are none, and its integers run beside the dense model of 16 bits. --compile:
rows under torch.compile too, which compiles for minutes; of mixtral there are none, its loop over experts is not compiled. Each
number of bits of llama needs 10 GB of disk; mixtral 6 GB for all, as its plain folders go once they are packed. --make only fills
--work. Writes results/decode-BITS.json, or decode-mixtral-BITS.json.
"""

import argparse
import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from kernels import rounded
from torch import nn

from secateurs.machine.bench import Variant, bench
from secateurs.machine.llama_cpp import PACKAGE
from secateurs.matrix.grids import parse as parse_grid
from secateurs.matrix.patterns import parse as parse_pattern
from secateurs.model.scales import SCALES_FILE, write_scales
from secateurs.pack import folder
from secateurs.pack.export import export

TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
GRIDS = {16: None, 8: "q8_0", 4: "q4_0"}
CASES = {"all weights": None, "50% zeros": "unstructured", "2:4": "2:4"}


def model_of(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000},
        "mixtral": {"intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 4096, "num_local_experts": 8},
    }
    config = AutoConfig.for_model(
        kind, hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=4096, dtype="bfloat16", **sizes[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def make(folder: Path, kind: str, pattern: str | None, grid: str | None) -> None:
    from transformers import AutoTokenizer

    model = model_of(kind)
    # a router is no layer
    weights = {name: m.weight.data for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    weights.pop("lm_head")
    for name, fused in model.named_parameters():
        if fused.dim() == 3:
            weights |= {f"{name}.{i}": weight for i, weight in enumerate(fused.data)}
    scales = {}
    for name, weight in weights.items():
        embedding = "embed" in name
        if pattern and not embedding:
            weight.masked_fill_(~parse_pattern(pattern).keep(torch.rand(weight.shape), 0.5), 0)
        if grid:
            on_grid, scales[name] = rounded(weight, parse_grid("q8_0" if embedding else grid))
            weight.copy_(on_grid)
    model.save_pretrained(folder)
    if TOKENIZER.is_dir():
        # a GGUF file has to have one
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    if scales:
        write_scales(folder / SCALES_FILE, scales)


def variants(work: Path, kind: str, bits: int, compiled: bool) -> list[Variant]:
    """The ways to run the model with so many bits; makes what they need."""
    there = []
    if kind == "mixtral" and bits != 16:
        # no other program runs it here, so the dense model is what its integers are compared with
        there += dense_ways(plain_folder(work, kind, 16, "all weights"), False)
    for case, pattern in CASES.items():
        if bits == 16 and pattern == "2:4":
            continue
        if pattern or bits != 16:
            packed = work / f"{kind} {bits} {case} packed"
            if not (packed / "config.json").is_file():
                plain = plain_folder(work, kind, bits, case)
                folder.pack(plain, packed)
                if kind == "mixtral":
                    shutil.rmtree(plain)
            there.append(Variant(f"{case}, packed", str(packed), "packed"))
            if compiled:
                there.append(Variant(f"{case}, packed, torch.compile", str(packed), "packed compiled"))
        else:
            there += dense_ways(plain_folder(work, kind, bits, case), compiled)
        if kind == "llama" and pattern is None and find_spec(PACKAGE) and TOKENIZER.is_dir():
            file = work / f"{bits}.gguf"
            if not file.is_file():
                export(plain_folder(work, kind, bits, case), "gguf", file)
            there.append(Variant("all weights, llama.cpp", str(file), "llama.cpp"))
    return there


def plain_folder(work: Path, kind: str, bits: int, case: str) -> Path:
    """The model of that case as a plain folder; it is made if it is not there."""
    plain = work / f"{kind} {bits} {case} plain"
    if not (plain / "config.json").is_file():
        # config.json is saved before the weights: a folder that was cut off would pass for a whole one
        half = work / f"{plain.name} half"
        shutil.rmtree(half, ignore_errors=True)
        make(half, kind, CASES[case], GRIDS[bits])
        half.rename(plain)
    return plain


def dense_ways(plain: Path, compiled: bool) -> list[Variant]:
    ways = [
        Variant("dense, torch", str(plain), "dense"),
        Variant("dense, our kernels", str(plain), "accelerated dense"),
    ]
    if compiled:
        ways.insert(1, Variant("dense, torch.compile with frozen weights", str(plain), "compiled"))
    return ways


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", choices=("llama", "mixtral"), default="llama")
    arguments.add_argument("--bits", type=int, nargs="+", choices=tuple(GRIDS), default=list(GRIDS))
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--new", type=int, default=32)
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--make", action="store_true", help="only fill --work")
    given = arguments.parse_args()
    if given.model == "llama" and not find_spec(PACKAGE):
        print(f"no rows of llama.cpp: {PACKAGE} is not installed; pip install {PACKAGE}")
    for bits in given.bits:
        with tempfile.TemporaryDirectory() as temporary:
            ways = variants(given.work or Path(temporary), given.model, bits, given.compile and given.model == "llama")
            if given.make:
                continue
            result = bench(ways, (64,), new=given.new, repeats=given.repeats)
        rows = {row["name"]: row for row in result["variants"]}
        kept = [r for r in rows.values() if "zeros" not in r["name"] and "2:4" not in r["name"]]
        base = max(
            [r for r in kept if given.model == "llama" or r["name"].startswith("dense")],
            key=lambda r: ("llama.cpp" in r["name"], r["decode"]["tokens_per_second"]),
        )
        print(f"{bits} bits; over {base['name']}:")
        for row in rows.values():
            speeds = ", ".join(
                f"{stage} {row[stage]['tokens_per_second']:.2f} tokens/s "
                f"({row[stage]['tokens_per_second'] / base[stage]['tokens_per_second']:.2f}x)"
                for stage in ("prefill", "decode")
            )
            print(
                f"{row['name']:42s} {speeds}, {row['weights_bytes'] / 1e6:.0f} MB, peak {row['peak_memory_bytes'] / 1e9:.2f} GB"
            )
            row["folder"] = Path(row["folder"]).name
        file = Path(__file__).parent / "results" / f"decode-{'mixtral-' if given.model == 'mixtral' else ''}{bits}.json"
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
