"""Writes a model whose sizes have changed, a shard a block, under the names that save_pretrained() gives."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateurs.model import shards
from secateurs.model.blocks import prefixes_of

# weights outside the blocks that are written together
_SHARD_WEIGHTS = 1 << 27


class Output:
    """A folder of weights that is filled while a model is walked.

    like: a model of the written one's class and sizes, without weights. path: of its list of blocks; count: how many it has.
    """

    def __init__(self, folder: Path, like: Any, path: str, count: int) -> None:
        self.folder, self.like, self.path, self.blocks = folder, like, path, count
        self.outside = _outside(like)
        self.count = len(self.outside) + count

    def write_block(self, index: int, block: nn.Module, model: Any) -> None:
        """Write a block in place `index`. model: the one that it was loaded into."""
        tensors = {f"{self.path}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
        shards.write_shard(self.folder, len(self.outside) + index, self.count, self._saved(tensors, model))

    def finish(self, model: Any) -> None:
        """Write what lies outside the blocks, which must be loaded, and the index over all shards."""
        tensors = model.state_dict()
        for i, names in enumerate(self.outside):
            shards.write_shard(self.folder, i, self.count, self._saved({n: tensors[n] for n in names}, model))
        shards.write_index(self.folder, self.count)

    def _saved(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Tensors as they are stored: experts apart that the class holds in one, names as the files had them."""
        from transformers.core_model_loading import revert_weight_conversion

        # those of the conversions that something was loaded by
        self.like._weight_conversions = getattr(model, "_weight_conversions", None)
        found: dict[str, Tensor] = revert_weight_conversion(self.like, tensors)
        return found


def _outside(like: Any) -> list[list[str]]:
    """The names of what is stored outside the blocks, in groups for a shard each; what is tied has one name."""
    inside, ignored = prefixes_of(like), getattr(like, "_keys_to_ignore_on_save", None) or ()
    seen: set[int] = set()
    groups: list[list[str]] = []
    room = 0
    for name, tensor in like.state_dict(keep_vars=True).items():
        if name.startswith(inside) or name in ignored or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not groups or tensor.numel() > room:
            groups.append([])
            room = _SHARD_WEIGHTS
        groups[-1].append(name)
        room -= tensor.numel()
    return groups
