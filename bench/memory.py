"""Peak memory against the number of blocks, on random models.

    .venv/bin/python bench/memory.py [--shape 8b] [--blocks 4,16] [--runs prune:wanda] [--tokens 8x256]
    .venv/bin/python bench/memory.py --shape wide --blocks 4,16,64 --runs shrink:heads,shrink:layers --tokens 4x128

A run is prune:METHOD or shrink:UNITS, the latter to 0.95x the parameters. One block of the 8B shape (4096 wide, 14336 inner, 32
query and 8 key heads) is 436 MB in bf16; embeddings and head are 1.05 GB each. `wide` and `experts` have small vocabularies and
blocks of 84 and 107 MB, so that 64 of them fit on a disk. Every row is a fresh process; its peak resident memory includes pages of
mapped weight files. `nothing` is the peak of a process that imports what the others do.
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
_SMALL = {"vocab_size": 512, "max_position_embeddings": 2048}
# name: (class, model type, its config)
SHAPES = {
    "8b": (
        "LlamaForCausalLM", "llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 8192,
        },
    ),
    "wide": (
        "LlamaForCausalLM", "llama",
        {
            **_SMALL, "hidden_size": 2048, "intermediate_size": 5120, "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
    ),
    "experts": (
        "Qwen3MoeForCausalLM", "qwen3_moe",
        {
            **_SMALL, "hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 512, "num_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
    # 0.4 GB a block: 20 of them are 8 GB
    "many": (
        "Qwen3MoeForCausalLM", "qwen3_moe",
        {
            **_SMALL, "hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 512, "num_experts": 128,
            "num_experts_per_tok": 4,
        },
    ),
}  # fmt: skip


def make(folder: Path, shape: str, blocks: int) -> Path:
    """A checkpoint with the same random block `blocks` times, and a byte tokenizer."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    architecture, model_type, sizes = SHAPES[shape]
    config = transformers.AutoConfig.for_model(
        model_type, **sizes, num_hidden_layers=blocks, dtype="bfloat16", architectures=[architecture]
    )
    folder.mkdir()
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    torch.manual_seed(0)
    weight_map = {}
    groups: dict[str, dict[str, torch.Tensor]] = {}
    drawn: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        parts = name.split(".")
        group = parts[2] if parts[1] == "layers" else name
        key = ".".join(parts[3:]) if parts[1] == "layers" else name
        if key not in drawn:
            size = parameter.shape
            drawn[key] = torch.ones(size).bfloat16() if len(size) == 1 else torch.empty(size, dtype=torch.bfloat16)
            if len(size) > 1:
                # a matrix at a time, for memory
                for part in drawn[key].reshape(-1, *size[-2:]):
                    part.copy_(torch.randn(part.shape) / size[-1] ** 0.5)
        groups.setdefault(group, {})[name] = drawn[key]
    for i, tensors in enumerate(groups.values()):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        stored = {name: x.contiguous() for name, x in revert_weight_conversion(model, tensors).items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(stored, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def command_of(run: str, model: Path, out: Path, samples: str, seqlen: str) -> list[str]:
    kind, _, what = run.partition(":")
    chosen = ["--method", what] if kind == "prune" else ["--units", what.replace("+", ","), "--budget", "params=0.95x"]
    common = ["--samples", samples, "--seqlen", seqlen, "--eval-windows", "0", "--out", str(out), "--json"]
    return [sys.executable, "-m", "secateurs", kind, str(model), *chosen, *common]


def nothing() -> int:
    """The peak of a process that has imported what a run imports."""
    code = (
        "from secateurs.base.device import peak_memory; import secateurs.shrink.run, secateurs.prune.run, transformers; "
        "from transformers import AutoTokenizer, LlamaForCausalLM, Qwen3MoeForCausalLM; print(peak_memory())"
    )
    return int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--blocks", default="4,16")
    parser.add_argument("--runs", default="prune:wanda")
    parser.add_argument("--tokens", default="8x256", help="samples x seqlen")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory.json")
    arguments = parser.parse_args()
    samples, seqlen = arguments.tokens.split("x")
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    results["nothing"] = {"peak_bytes": nothing()}
    for blocks in map(int, arguments.blocks.split(",")):
        with tempfile.TemporaryDirectory() as name:
            model = subprocess_make(Path(name) / "model", arguments.shape, blocks)
            for run in arguments.runs.split(","):
                out = Path(name) / "run"
                command = command_of(run, model, out, samples, seqlen)
                report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                subprocess.run(["rm", "-r", str(out)], check=True)
                spent = sum(s for stage, s in report["seconds"].items() if stage != "evaluate")
                row = {"peak_bytes": report["peak_memory_bytes"], "seconds": spent}
                results[f"{arguments.shape}, {run}, {blocks} blocks, {arguments.tokens} tokens"] = row
                print(
                    f"{run:16s} {blocks:3d} blocks: peak {row['peak_bytes'] / 1e9:.3f} GB, {row['seconds']:.0f} s",
                    flush=True,
                )
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def subprocess_make(folder: Path, shape: str, blocks: int) -> Path:
    """make() in a process of its own, so that its memory is gone when a run is measured."""
    code = "import memory, pathlib, sys; memory.make(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
    subprocess.run([sys.executable, "-c", code, folder, shape, str(blocks)], check=True, cwd=ROOT / "bench")
    return folder


if __name__ == "__main__":
    main()
