"""Decoding of a 1B-shaped random Llama, end to end through generate: 50% zeros packed, against every dense way to run it.

    .venv/bin/python bench/decode.py [--work FOLDER] [--repeats 5] [--new 32]

2048 wide, 8192 in the MLP, 16 layers, 8 key-value heads, 32000 tokens of vocabulary, bf16. Writes results/decode.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from secateurs.machine.bench import Variant, bench
from secateurs.pack import folder


def make(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.5, 0)
    model.save_pretrained(folder)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--new", type=int, default=32)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        plain, packed = work / "plain", work / "packed"
        if not (plain / "config.json").is_file():
            make(plain)
        if not (packed / "config.json").is_file():
            folder.pack(plain, packed)
        ways = {
            "dense, torch": (plain, "dense"),
            "dense, torch.compile with frozen weights": (plain, "compiled"),
            "dense, our kernels": (plain, "accelerated dense"),
            "packed": (packed, "packed"),
            "packed, torch.compile": (packed, "packed compiled"),
        }
        variants = [Variant(name, str(folder), how) for name, (folder, how) in ways.items()]
        result = bench(variants, (64,), new=given.new, repeats=given.repeats)
    for row in result["variants"]:
        speeds = ", ".join(
            f"{stage} {row[stage]['tokens_per_second']:.2f} tokens/s ({row[stage]['speedup']:.2f}x)"
            for stage in ("prefill", "decode")
        )
        print(f"{row['name']:42s} {speeds}, peak {row['peak_memory_bytes'] / 1e9:.2f} GB")
    dense = max(r["decode"]["tokens_per_second"] for r in result["variants"] if r["how"] in ("dense", "compiled"))
    best = max(r["decode"]["tokens_per_second"] for r in result["variants"] if r["how"].startswith("packed"))
    print(f"decode, packed over the best dense way of torch: {best / dense:.2f}x")
    for row in result["variants"]:
        row["folder"] = Path(row["folder"]).name
    file = Path(__file__).parent / "results" / "decode.json"
    file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
