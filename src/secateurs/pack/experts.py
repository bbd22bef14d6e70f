"""The fused parameters of a plain folder's experts that can be packed, and what they are stored in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateurs.kernels.packed_experts import fence, packed_name
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.fused import packable_experts
from secateurs.model.unpacked import PARTS, packed_tensors
from secateurs.pack.matrices import Matrices


@dataclass(frozen=True)
class StoredExperts:
    """A fused parameter [E, O, I], or [E, I, O] if transposed, of a plain folder. keys: the stored tensors that it is made of.

    converted: they are converted to it when they are loaded; else there is one, which is the parameter.
    """

    name: str
    transposed: bool
    keys: tuple[str, ...]
    converted: bool

    @property
    def stored(self) -> str | None:
        """For config.json: the name under which the plain folder has the parameter, or None."""
        return None if self.converted else self.keys[0]

    def read(self, checkpoint: Checkpoint, skeleton: Any) -> Tensor | str:
        """The parameter, or why packing it would not give the stored tensors back."""
        stored = checkpoint.read(self.keys)
        dtypes = {str(t.dtype).removeprefix("torch.") for t in stored.values()}
        wanted = str(skeleton.get_parameter(self.name).dtype).removeprefix("torch.")
        if dtypes != {wanted}:
            return f"it is stored in {' and '.join(sorted(dtypes))} and loaded in {wanted}"
        if not self.converted:
            return stored[self.keys[0]]
        made = checkpoint.made_of(skeleton, self.name, list(self.keys))
        back = checkpoint.stored_as(skeleton, self.name, made)
        if back.keys() != stored.keys() or not all(_same_bits(back[key], stored[key]) for key in stored):
            return "transformers would save other tensors than it was made of"
        return made

    def packed(
        self, checkpoint: Checkpoint, skeleton: Any, matrices: Matrices
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The tensors to store, and a record for each expert; or {"left_out": why} where none can be packed. Raises PackError.

        Where an expert is packed, those that are not are stored matrix by matrix, too; else all stays as it was.
        """
        whole = self.read(checkpoint, skeleton)
        if isinstance(whole, str):
            return checkpoint.read(self.keys), [{"left_out": f"{self.name}: {whole}"}]
        parts = (w.T.contiguous() if self.transposed else w for w in whole)
        made = [matrices.packed(f"{self.name}.{i}", weight_OI, self.transposed) for i, weight_OI in enumerate(parts)]
        records = [record for _, record in made]
        if all(isinstance(stored, Tensor) for stored, _ in made):
            plain = checkpoint.read(self.keys)
            merged = {key: t.masked_fill(t == 0, 0) for key, t in plain.items()} if matrices.merge_zeros else plain
            return merged, records
        tensors = {self.name: fence()}
        for i, (stored, record) in enumerate(made):
            key = packed_name(self.name, i)
            tensors |= {key: stored} if isinstance(stored, Tensor) else packed_tensors(key, stored)
            record["experts"] = self.name
        return tensors, records


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def stored_experts(checkpoint: Checkpoint, skeleton: Any) -> tuple[list[StoredExperts], dict[str, str]]:
    """The fused parameters of a plain folder that can be packed, and {path: why not} of the others."""
    able, refused = packable_experts(skeleton)
    names: dict[int, list[str]] = {}
    for path, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(path)
    found = []
    for name, transposed in able.items():
        keys = tuple(k for k in checkpoint.ordered_keys() if name in checkpoint.targets_of(k))
        converted = [k for k in keys if k in checkpoint.converted]
        slices = (f"{packed_name(name, 0)}{part}" for part in ("", *PARTS))
        if len(names[id(skeleton.get_parameter(name))]) > 1:
            refused[name] = "its weight is shared with others"
        elif (
            not keys or any(checkpoint.targets_of(k) != {name} for k in keys) or (converted and converted != list(keys))
        ):
            refused[name] = "what it is made of is stored together with other parameters"
        elif not converted and len(keys) > 1:
            refused[name] = f"it is stored as {' and as '.join(keys)}"
        elif not all(checkpoint.renamed(key, {key: True}) == (key, None) for key in (name, *slices)):
            refused[name] = "transformers would not find its matrices by their stored names"
        else:
            found.append(StoredExperts(name, transposed, keys, bool(converted)))
    return found, refused
