"""compressed-tensors' sparse-bitmask and sparse-24-bitmask, which its versions up to 0.14 wrote and 0.15 no longer reads.

Of a tensor of R x C numbers: .compressed, those whose bit is set, row by row; .bitmask uint8 [R, C / 8 rounded up], the first of a
byte's columns in its lowest bit; .shape; of sparse-bitmask .row_offsets, how many values lie before each row. Up to 0.8 all tensors
were stored so, NAME.weight.compressed; later the weights of Linear layers alone, as NAME.compressed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.rescue.tensors import Lazy, damaged, scattered

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def with_bitmasks(stored: Lazy) -> tuple[Lazy, list[str]]:
    """The tensors with those of bitmasks made whole, and their names. Raises CheckpointError for parts that do not fit together."""
    names = [key.removesuffix(".bitmask") for key in stored if key.endswith(".bitmask")]
    # no module is called weight: where a name ends so, names are those of tensors
    whole = any(name.endswith(".weight") for name in names)
    taken = {f"{name}.{part}" for name in names for part in _PARTS}
    out = {key: read for key, read in stored.items() if key not in taken}
    made = []
    for name in names:
        made.append(name if whole else f"{name}.weight")
        out[made[-1]] = _reader(stored, name, made[-1])
    return out, made


def _reader(stored: Lazy, prefix: str, name: str) -> Callable[[], Tensor]:
    for part in ("compressed", "shape"):
        if f"{prefix}.{part}" not in stored:
            raise damaged(name, f"its bitmask is there, and {prefix}.{part} is not")

    def read() -> Tensor:
        parts = {part: stored[f"{prefix}.{part}"]() for part in _PARTS if f"{prefix}.{part}" in stored}
        return from_bitmask(name, **parts)

    return read


def from_bitmask(
    name: str, compressed: Tensor, bitmask: Tensor, shape: Tensor, row_offsets: Tensor | None = None
) -> Tensor:
    """The tensor, bit for bit as it was but for negative zeros. Raises CheckpointError unless mask, values and shape agree."""
    size = [int(n) for n in shape.flatten()]
    bytes_of = [*size[:-1], -(-size[-1] // 8)] if size else []
    if bitmask.dtype != torch.uint8 or list(bitmask.shape) != bytes_of:
        raise damaged(name, f"its shape is {size}, and its bitmask {list(bitmask.shape)} of {bitmask.dtype}")
    bits = bitmask[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.bool().flatten(-2)[..., : size[-1]]
    ones = int(mask.sum())
    if ones != compressed.numel():
        raise damaged(name, f"its bitmask has {ones} ones, and {compressed.numel()} values are stored")
    if row_offsets is not None:
        counts = mask.sum(-1).flatten()
        if not torch.equal(row_offsets.flatten(), counts.cumsum(0) - counts):
            raise damaged(name, "its row_offsets are not those of its bitmask")
    return scattered(compressed, mask)
