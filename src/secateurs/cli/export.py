"""secateurs export."""

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import options
from secateurs.cli.options import MODEL, OUTPUT, option
from secateurs.cli.output import console, on_cpu, print_json


def export(
    model: Annotated[
        str, typer.Argument(help="A run directory, or a folder with grids.safetensors.", show_default=False)
    ],
    to: Annotated[
        str,
        option(
            MODEL,
            "compressed-tensors: 4 and 8 bits, for transformers and vLLM. gguf: Llama-like models for llama.cpp, --grid q4_0 and "
            "q8_0 exactly. onnx: a causal language model for onnxruntime, without a cache. dense: the plain 16-bit folder.",
        ),
    ],
    out: Annotated[
        Path, option(OUTPUT, "The folder to make, or the file NAME.gguf. It must not be there. E.g. served.")
    ],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Write a quantized model in a format that other engines load; its zeros are values there.

    Example: secateurs export runs/int4 --to gguf --out int4.gguf
    """
    from secateurs.pack.export import export as write
    from secateurs.report.run_tables import print_exported

    with on_cpu(quiet, as_json, model) as progress:
        result = write(model, to, out, progress)
    if as_json:
        print_json(result)
    elif not quiet:
        print_exported(result, console())
