"""Facts about a model folder: for each layer its shape, zeros, the N:M patterns that it holds, and its bytes as stored."""

from dataclasses import dataclass
from pathlib import Path

from secateurs.base.progress import Progress, silent
from secateurs.matrix.patterns import NM
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.walk import layers_at

# tightest first
KNOWN_NM = (NM(1, 4), NM(2, 4), NM(4, 8), NM(8, 16), NM(16, 32))


@dataclass(frozen=True)
class LayerFacts:
    """One prunable layer. holds: the N:M patterns (N kept) that no group in its rows breaks. nbytes: of its weight."""

    name: str
    shape: tuple[int, int]
    zeros: int
    sparsity: float
    holds: tuple[str, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class ModelFacts:
    """folder; its prunable layers; bytes of all weight files; bytes in them that are no prunable layer."""

    folder: str
    layers: tuple[LayerFacts, ...]
    file_bytes: int
    other_bytes: int


def inspect(folder: str | Path, progress: Progress = silent) -> ModelFacts:
    """The facts about a model folder, a run directory's model or a hub id. Raises CheckpointError if it cannot be read."""
    checkpoint = Checkpoint(folder)
    model = checkpoint.skeleton()
    names = checkpoint.block_names(model)
    facts: list[LayerFacts] = []
    for i, name in enumerate(names):
        checkpoint.load(model, name)
        for layer in layers_at(model, name):
            weight_OI = layer.read()
            mask_OI = weight_OI != 0
            zeros = weight_OI.numel() - int(mask_OI.sum())
            holds = tuple(
                str(p) for p in KNOWN_NM if p.refuses(*layer.shape) is None and p.violation(mask_OI, 0) is None
            )
            dtype = str(weight_OI.dtype).removeprefix("torch.")
            nbytes = weight_OI.numel() * weight_OI.element_size()
            facts.append(LayerFacts(layer.name, layer.shape, zeros, zeros / weight_OI.numel(), holds, dtype, nbytes))
        checkpoint.release(model)
        progress("inspecting", i + 1, len(names))
    file_bytes = checkpoint.nbytes
    return ModelFacts(str(checkpoint.folder), tuple(facts), file_bytes, file_bytes - sum(f.nbytes for f in facts))
