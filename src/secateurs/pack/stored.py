"""What a folder stores of the matrices that a server puts into one layer: which they are, and their tensors as they come.

Knows nothing of any server; vllm_plugin.py does. O outputs, I inputs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, PackError
from secateurs.kernels import shards
from secateurs.kernels.formats import FORMATS, VERSIONS, Packed, pack_dense, read_bitmask, read_integers
from secateurs.matrix.grids import Grid, parse
from secateurs.model.unpacked import PARTS as BESIDE

# the parts of a matrix, by the end of their stored names
PARTS = ("weight", *(f"weight{part}" for part in BESIDE))

Entry = dict[str, Any]


def check_version(version: Any) -> None:
    """Raises CheckpointError for a format version that this release does not read."""
    if version not in VERSIONS:
        raise CheckpointError(
            f"this folder is packed in format version {version}, this secateurs reads versions {', '.join(map(str, VERSIONS))}: "
            "use the release that wrote it, or its `secateurs pack --dense`"
        )


def matrices_of(
    prefix: str, layers: Mapping[str, Entry], fused: Mapping[str, Sequence[str]]
) -> dict[str, Entry | None]:
    """{name: its entry of config.json, None if it is stored as a plain matrix} of the matrices that a layer is made of.

    prefix: the layer's name. fused: {last part of such a name: the last parts of the stored names that it is made of}, e.g.
    qkv_proj: q_proj, k_proj, v_proj. A folder may also store such a layer as one matrix.
    """
    place, _, leaf = prefix.rpartition(".")
    parts = [leaf] if prefix in layers else fused.get(leaf, [leaf])
    names = [f"{place}.{part}".lstrip(".") for part in parts]
    return {name: layers.get(name) for name in names}


class Stored:
    """Takes the tensors of a layer's matrices as a loader reads them.

    entries: what matrices_of() found. rows: of each matrix that the server puts into the layer; more than entries where the folder
    stores them as one. dtype: in which floats are multiplied.
    """

    def __init__(
        self, entries: Mapping[str, Entry | None], rows: Sequence[int], inputs: int, dtype: torch.dtype
    ) -> None:
        if len(entries) not in (1, len(rows)):
            raise CheckpointError(f"{', '.join(entries)}: the server makes {len(rows)} matrices of {len(entries)}")
        self.entries, self.rows, self.inputs, self.dtype = entries, list(rows), inputs, dtype
        self._tensors: list[dict[str, Tensor]] = [{} for _ in entries]

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of PARTS."""
        integers = any(entry and entry.get("grid") for entry in self.entries.values())
        return (torch.uint8 if integers else self.dtype, torch.int64, torch.int16, torch.uint8)

    def take(self, part: str, tensor: Tensor, which: int = 0) -> None:
        """Keep a part of a matrix. Raises CheckpointError for a number that the folder does not store."""
        if not 0 <= which < len(self._tensors):
            raise CheckpointError(f"{', '.join(self.entries)}: {part} came for matrix {which} of {len(self._tensors)}")
        self._tensors[which][part] = tensor

    def matrices(self) -> list[Packed]:
        """One of each of `rows`, whole, checked. Raises CheckpointError naming the matrix that is damaged or did not come."""
        found = []
        stored_rows = self.rows if len(self.entries) == len(self.rows) else [sum(self.rows)]
        for (name, entry), outputs, tensors in zip(self.entries.items(), stored_rows, self._tensors, strict=True):
            try:
                found.append(_read(entry, (outputs, self.inputs), tensors, self.dtype))
            except PackError as error:
                raise CheckpointError(f"{name}: {error}; copy or pack it again") from None
        self._tensors = [{} for _ in self.entries]
        if len(found) == len(self.rows):
            return found
        ends = [sum(self.rows[: i + 1]) for i in range(len(self.rows))]
        return [shards.rows(found[0], end - rows, end) for end, rows in zip(ends, self.rows, strict=True)]


def _read(entry: Entry | None, shape: tuple[int, int], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Packed:
    """The matrix of these tensors. Memory of their own, because a loader maps files, and kernels want it aligned."""
    values, mask, scale, zero = (tensors.get(part) for part in PARTS)
    if values is None:
        raise PackError("its weight is missing")
    if entry is None:
        if tuple(values.shape) != shape:
            raise PackError(f"its weight has the shape {list(values.shape)}, wanted is {list(shape)}")
        return pack_dense(values.to(dtype, copy=True).contiguous())
    kind, grid = entry.get("format"), _grid(entry)
    if kind not in FORMATS or (kind == "dense" and grid is None):
        raise PackError(f"it is packed as {kind!r}, which this secateurs does not know")
    mask = None if mask is None else mask.clone()
    if (mask is None) != (kind == "dense"):
        raise PackError(f"it is packed as {kind} and has {'no' if mask is None else 'a'} mask")
    if grid is None:
        assert mask is not None
        return read_bitmask(values.to(dtype, copy=True), mask, shape)
    if scale is None:
        raise PackError("its scales are missing")
    zero = None if zero is None else zero.clone()
    return read_integers(values.clone(), mask, scale.clone(), zero, shape, grid, dtype)


def _grid(entry: Entry) -> Grid | None:
    try:
        return parse(entry["grid"]) if entry.get("grid") else None
    except (TypeError, ValueError) as error:
        raise PackError(str(error)) from None
