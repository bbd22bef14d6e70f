"""A quantized model in llama.cpp and in transformers, beside llama.cpp's own rounding of the dense model.

    python3 -m venv PEER; PEER/bin/pip install xllamacpp
    .venv/bin/python bench/llama_cpp.py PEER/bin/python DENSE [RUN ...] [--text FILE] [--tokens 500]

RUN: a run directory or folder of `secateurs prune DENSE --grid q4_0` (or q8_0). For each, and for the dense model's layers rounded
as llama.cpp's own quantizer rounds them (gguf.quants, the same bits), the GGUF is written by `secateurs export` and its perplexity
measured by llama.cpp and by transformers, on the first tokens of the text. They must be fewer than the model's context.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

from methods import ROOT

# each next token is forced by a bias and comes with the probability that it had before
_PEER = """
import json, sys
import xllamacpp
asked = json.load(sys.stdin)
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = asked["file"], len(asked["ids"]) + 8, 1, False
server = xllamacpp.Server(settings)
losses = []
ids = asked["ids"]
for i in range(1, len(ids)):
    request = {"prompt": ids[:i], "n_predict": 1, "n_probs": 1, "cache_prompt": True, "logit_bias": [[ids[i], 1e4]]}
    answer = server.handle_completions(request)
    found = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["logprobs"]
    # a token that is half a character comes without
    losses.append(-found["content"][0]["logprob"] if found else None)
json.dump(losses, sys.stdout)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="the interpreter of a virtual environment that has xllamacpp")
    parser.add_argument("dense", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "data" / "wikitext-2-raw.test.txt")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--grid", default="q4_0", choices=("q4_0", "q8_0"), help="of llama.cpp's own rounding")
    arguments = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateurs.model.checkpoint import Checkpoint
    from secateurs.pack.export import export

    ids = AutoTokenizer.from_pretrained(arguments.dense)(arguments.text.read_text(encoding="utf-8"))["input_ids"]
    ids = ids[: arguments.tokens]
    with tempfile.TemporaryDirectory() as name:
        places = {
            "dense": arguments.dense,
            f"llama.cpp's {arguments.grid}": _rounded(arguments, Path(name) / "rounded"),
        }
        places |= {str(run): run for run in arguments.runs}
        print(f"{len(ids)} tokens of {arguments.text.name}")
        for i, (title, place) in enumerate(places.items()):
            file = Path(name) / f"{i}.gguf"
            nbytes = export(place, "gguf", file)["nbytes"]
            asked = json.dumps({"file": str(file), "ids": ids})
            done = subprocess.run([arguments.peer, "-c", _PEER], input=asked, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"llama.cpp failed:\n{done.stderr[-3000:]}")
            theirs = json.loads(done.stdout)
            model = AutoModelForCausalLM.from_pretrained(Checkpoint(place).folder, dtype=torch.float32).eval()
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1]
            ours = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
            both = [(a, b) for a, b in zip(theirs, ours, strict=True) if a is not None]
            there, here = (math.exp(sum(column) / len(both)) for column in zip(*both, strict=True))
            print(f"{title}: {nbytes / 1e6:.2f} MB; perplexity {there:.3f} in llama.cpp, {here:.3f} in transformers")


def _rounded(arguments: argparse.Namespace, out: Path) -> Path:
    """The dense model with the layers of its blocks rounded by llama.cpp's rule."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateurs.matrix.grids import Scales, parse
    from secateurs.model.scales import SCALES_FILE, write_scales

    grid, kind = parse(arguments.grid), gguf.GGMLQuantizationType[arguments.grid.upper()]
    model = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype="auto")
    head, scales = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % grid.group == 0:
            rows = gguf.quantize(module.weight.detach().float().numpy(), kind)
            blocks = torch.from_numpy(rows).view(len(rows), module.in_features // grid.group, -1)
            scale_OG = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
            scales[name] = Scales(grid, scale_OG)
            module.weight.data = torch.from_numpy(gguf.dequantize(rows, kind)).to(module.weight.dtype)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(arguments.dense).save_pretrained(out)
    write_scales(out / SCALES_FILE, scales)
    return out


if __name__ == "__main__":
    main()
