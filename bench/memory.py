"""Peak memory against the number of blocks, on random Llamas of the 8B shape.

    .venv/bin/python bench/memory.py [--blocks 4,16] [--methods wanda] [--tokens 8x256]

One block of the 8B shape (4096 wide, 14336 inner, 32 query and 8 key heads) is 436 MB in bf16; embeddings and head are
1.05 GB each. Every row prunes in a fresh process; its peak resident memory includes pages of mapped weight files.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent


def make(folder: Path, blocks: int) -> Path:
    """A checkpoint with the same random block `blocks` times, and a byte tokenizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    weight_map = {}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    drawn: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        group = parts[2] if parts[1] == "layers" else name
        key = ".".join(parts[3:]) if parts[1] == "layers" else name
        if key not in drawn:
            drawn[key] = (
                torch.ones(shape).bfloat16() if len(shape) == 1 else (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()
            )
        groups.setdefault(group, {})[name] = drawn[key]
    for i, tensors in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="4,16")
    parser.add_argument("--methods", default="wanda")
    parser.add_argument("--tokens", default="8x256", help="samples x seqlen")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory.json")
    arguments = parser.parse_args()
    samples, seqlen = arguments.tokens.split("x")
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for blocks in map(int, arguments.blocks.split(",")):
        with tempfile.TemporaryDirectory() as name:
            model = subprocess_make(Path(name) / "model", blocks)
            for method in arguments.methods.split(","):
                command = [sys.executable, "-m", "secateurs", "prune", model, "--out", Path(name) / method, "--json",
                           "--method", method, "--samples", samples, "--seqlen", seqlen, "--eval-windows", "0"]  # fmt: skip
                out = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE).stdout
                report = json.loads(out)
                spent = sum(s for stage, s in report["seconds"].items() if stage != "evaluate")
                row = {"peak_bytes": report["peak_memory_bytes"], "seconds": spent}
                results[f"{method}, {blocks} blocks, {arguments.tokens} tokens"] = row
                print(
                    f"{method:16s} {blocks:3d} blocks: peak {row['peak_bytes'] / 1e9:.2f} GB, {row['seconds']:.0f} s",
                    flush=True,
                )
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def subprocess_make(folder: Path, blocks: int) -> Path:
    """make() in a process of its own, so that its memory is gone when pruning is measured."""
    code = "import memory, pathlib, sys; memory.make(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, folder, str(blocks)], check=True, cwd=ROOT / "bench")
    return folder


if __name__ == "__main__":
    main()
