"""The scales of a folder's weights: grids.safetensors beside the plain checkpoint, whose weights are scale * integer.

Loaders that do not know the file pass it over. It belongs to these very weights: whoever changes them leaves it behind.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from secateurs.base.errors import CheckpointError
from secateurs.base.files import write_tensors
from secateurs.matrix.grids import Scales, scales_from, tensors_of

SCALES_FILE = "grids.safetensors"


def write_scales(file: Path, scales: Mapping[str, Scales]) -> None:
    """Scales by layer, with each layer's grid in the file's metadata."""
    tensors, grids = tensors_of(dict(scales))
    write_tensors(file, tensors, {"grids": json.dumps(grids)})


def read_scales(file: Path) -> dict[str, Scales]:
    """The inverse; empty where there is no such file. Raises CheckpointError for a file that is damaged."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            grids = json.loads((opened.metadata() or {})["grids"])
        return dict(scales_from(load_file(file), grids))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; prune again") from None
