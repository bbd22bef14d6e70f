"""secateurs import."""

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import options
from secateurs.cli.options import OUTPUT, option
from secateurs.cli.output import console, on_cpu, print_json


def import_(
    model: Annotated[
        Path,
        typer.Argument(
            help="A folder of an old version, or one file: .pth, .bin, .onnx, .safetensors.", show_default=False
        ),
    ],
    out: Annotated[Path, option(OUTPUT, "The folder to make. It must be empty or not there. E.g. rescued.")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Read a sparse model that nothing loads any more into a plain folder.

    compressed-tensors' sparse-bitmask, sparse-24-bitmask and marlin-24; masks of torch.nn.utils.prune; SparseML's .pth and ONNX.

    Example: secateurs import old-24-bitmask --out rescued
    """
    from secateurs.report.run_tables import print_rescued
    from secateurs.rescue.folder import rescue

    with on_cpu(quiet, as_json) as progress:
        result = rescue(model, out, progress)
    if as_json:
        print_json(result)
    elif not quiet:
        print_rescued(result, console())
