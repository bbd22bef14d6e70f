"""Writes tests/rescue/data with versions of compressed-tensors that nothing current reads any more.

    python tools/old_formats.py FOLDER

runs each of VERSIONS in an environment of its own in FOLDER (compressed-tensors and transformers without their dependencies; torch
and what else they need is what this Python has). The weights are those of tests/rescue/formula.py.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "rescue" / "data"
sys.path.insert(0, str(ROOT / "tests" / "rescue"))
NEEDS = ("transformers==4.51.3", "huggingface-hub<1", "tokenizers<0.22", "accelerate==1.6.0")
# name -> (version, format of zeros, what zeros there are, bits and kind of the weights, settings of the quantization, its format)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FILES = {
    "bitmask-0.8.1": ("0.8.1", "sparse-bitmask", "half", None, "dense"),
    "bitmask-0.10.2": ("0.10.2", "sparse-bitmask", "half", None, "dense"),
    "bitmask24-0.9.4": ("0.9.4", "sparse-24-bitmask", "2:4", None, "dense"),
    "bitmask-int8-0.10.2": ("0.10.2", "sparse-bitmask", "half", INT8, "int-quantized"),
    "bitmask24-int8-0.9.4": ("0.9.4", "sparse-24-bitmask", "2:4", INT8, "int-quantized"),
    "bitmask24-fp8-0.10.2": ("0.10.2", "sparse-24-bitmask", "2:4", FP8, "float-quantized"),
    "packed-int4-0.10.2": ("0.10.2", "sparse-24-bitmask", "2:4", {**INT4, "group_size": 32}, "pack-quantized"),
    "packed-int4-zero-0.9.4": (
        "0.9.4", None, "half", {**INT4, "group_size": 32, "symmetric": False}, "pack-quantized"
    ),
    "marlin-int4-0.9.4": ("0.9.4", None, "2:4", {**INT4, "group_size": 128}, "marlin-24"),
    "marlin-int8-0.10.2": ("0.10.2", None, "2:4", INT8, "marlin-24"),
}  # fmt: skip
VERSIONS = sorted({made[0] for made in FILES.values()})


def shape_and_dtype(name):
    """Marlin wants fp16 and whole tiles; three groups of 128 are the least that it shuffles."""
    import formula
    import torch

    if name.startswith("marlin-int4"):
        return formula.Shape(128, 384, 1, 2, 1), torch.float16
    if name.startswith("marlin"):
        return formula.Shape(64, 64, 1, 1, 1), torch.float16
    return formula.Shape(), torch.bfloat16


def write(name):
    """One folder, by the version that is installed here."""
    import formula
    import torch
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import SparsityCompressionConfig
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import save_file

    _, zero_format, zeros, weights, quantized_format = FILES[name]
    shape, dtype = shape_and_dtype(name)
    config = shape.config(dtype)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype)
    settings = None
    if weights:
        settings = QuantizationConfig(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"],
            format=quantized_format,
        )  # fmt: skip
        apply_quantization_config(model, settings)
    with torch.no_grad():
        for key, tensor in shape.others(dtype).items():
            model.get_parameter(key).copy_(tensor)
        for layer, (rows, inputs) in shape.layers().items():
            module = model.get_submodule(layer)
            groups = inputs // weights["group_size"] if weights and "group_size" in weights else 1
            if weights:
                module.weight_scale.data = formula.scales(layer, rows, groups, weights["num_bits"], dtype)
            if weights and not weights["symmetric"]:
                module.weight_zero_point.data = formula.zero_points(layer, rows, groups, weights["num_bits"])
            module.weight.copy_(formula.weight(layer, rows, inputs, zeros, weights, dtype))
    sparsity = None
    if zero_format:
        sparsity = SparsityCompressionConfig.load_from_registry(
            zero_format, format=zero_format, global_sparsity=0.5, targets=["Linear"], ignore=["lm_head"],
            sparsity_structure="2:4" if zeros == "2:4" else "unstructured",
        )  # fmt: skip
    compressor = ModelCompressor(sparsity_config=sparsity, quantization_config=settings)
    tensors = compressor.compress(model, model.state_dict())
    place = DATA / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(place))
    print(name, sum(f.stat().st_size for f in place.iterdir()), "bytes;", sorted(tensors)[-3:])


def environment(folder, version):
    """A Python whose compressed-tensors is of that version."""
    place = folder / version
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        packages = next(place.glob("lib/python*/site-packages"))
        # after its own, so that the versions above come first
        (packages / "zz.pth").write_text(sysconfig.get_paths()["purelib"])
        wanted = [f"compressed-tensors=={version}", *NEEDS]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
    return python


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        for each in sys.argv[2:]:
            write(each)
    else:
        for version in VERSIONS:
            names = [name for name, made in FILES.items() if made[0] == version]
            python = environment(Path(sys.argv[1]), version)
            subprocess.run(
                [python, __file__, "--write", *names], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
