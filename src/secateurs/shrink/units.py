"""The units of a transformer's blocks: which matrices hold them, how they are cut, and what config.json says afterwards.

    mlp      a neuron: a column of down, its rows of up and gate, their biases
    heads    a KV head with its query heads: their columns of o, rows of v, k and q, their biases
    queries  a query head, as many of every KV head: its columns of o, rows of q, their biases
    experts  an expert of a mixture, and its row of the router (mixture.py)
    hidden   a channel of the residual stream (width.py)
    layers   a whole block

O outputs, I inputs, G units of C columns or R rows each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.model.coupling import FORMS
from secateurs.model.layers import Layer
from secateurs.shrink.config import change

KINDS = ("mlp", "heads", "queries", "experts", "hidden", "layers")
# what may go where nobody named any: those of these that the model can lose
USUAL = ("mlp", "heads", "layers")
# units that are columns of one matrix; units inside a block; units whose number is a field of Shape
COLUMNS = ("mlp", "heads", "queries")
IN_BLOCKS = (*COLUMNS, "experts")
COUNTED = (*IN_BLOCKS, "hidden")


class No(Exception):
    """Why units of a kind cannot go."""


@dataclass(frozen=True)
class Units:
    """All units of one kind in a block.

    groups_GC: the columns of `consumer` that belong to each unit. rows: (producer, its rows [G, R] that belong to each unit).
    parents_G: for query heads the KV head of each, because all KV heads must lose equally many; else None.
    """

    kind: str
    consumer: Layer
    groups_GC: Tensor
    rows: tuple[tuple[Layer, Tensor], ...]
    parents_G: Tensor | None = None

    @property
    def parameters_each(self) -> int:
        """Weights and biases that are removed with one unit."""
        total = self.consumer.shape[0] * self.groups_GC.shape[1]
        for layer, rows_GR in self.rows:
            bias = layer.module._parameters.get("bias")
            total += rows_GR.shape[1] * (layer.shape[1] + (bias is not None))
        return total


@dataclass(frozen=True)
class Shape:
    """The sizes that all blocks of a model share, as config.json states them.

    mlp: neurons. heads: KV heads. queries: query heads of each KV head. experts: 0 if there are none. hidden: channels of the
    residual stream. active: experts that a token is sent to.
    """

    layers: int
    mlp: int
    heads: int
    queries: int = 1
    experts: int = 0
    hidden: int = 0
    active: int = 0

    def steps(self, kind: str) -> int:
        """How many units of a kind (of COUNTED) there are to remove; a query head goes from every KV head at once."""
        return int(getattr(self, kind))


@dataclass(frozen=True)
class Neurons:
    """Where the neurons of a block's MLP are: the layer that reads them, and (layer, form of its rows) that make them; names are
    relative to the block, forms as in model/coupling.py.
    """

    consumer: str
    producers: tuple[tuple[str, str], ...]

    def units(self, kind: str, named: Mapping[str, Layer], shape: Shape) -> Units:
        """The units of a block of this shape. named: its layers."""
        consumer = named[self.consumer]
        made = tuple((named[name], form) for name, form in self.producers)
        rows = tuple((layer, _rows(form, consumer, layer).T.contiguous()) for layer, form in made)
        return Units(kind, consumer, torch.arange(consumer.shape[1])[:, None], rows)


def _rows(form: str, consumer: Layer, producer: Layer) -> Tensor:
    found = FORMS[form](consumer.shape[1], producer.shape[0], None)
    assert found is not None
    return found


@dataclass(frozen=True)
class Heads:
    """Where the heads of a block's attention are: the layer that reads them, and the layers whose rows are theirs.

    rows: {layer: its runs of rows}. A run holds some rows of each KV head, in order; it is True if these are of the query heads, as
    many of each. Names are relative to the block.
    """

    consumer: str
    rows: Mapping[str, tuple[bool, ...]]

    def units(self, kind: str, named: Mapping[str, Layer], shape: Shape) -> Units:
        """KV heads, or query heads, of a block of this shape. named: its layers."""
        consumer = named[self.consumer]
        columns = torch.arange(consumer.shape[1])
        found = []
        for name, runs in self.rows.items():
            layer = named[name]
            each = layer.shape[0] // (shape.heads * sum(shape.queries if wide else 1 for wide in runs))
            mine, start = [], 0
            for wide in runs:
                rows = start + torch.arange(shape.heads * each * (shape.queries if wide else 1))
                start += len(rows)
                if kind == "heads":
                    mine.append(rows.reshape(shape.heads, -1))
                elif wide:
                    mine.append(rows.reshape(shape.heads * shape.queries, -1))
            if mine:
                found.append((layer, torch.cat(mine, 1)))
        if kind == "heads":
            return Units(kind, consumer, columns.reshape(shape.heads, -1), tuple(found))
        parents_G = torch.arange(shape.heads).repeat_interleave(shape.queries)
        return Units(kind, consumer, columns.reshape(len(parents_G), -1), tuple(found), parents_G)


def cut(block: nn.Module, units: Units, removed: Tensor, consumer_OK: Tensor) -> None:
    """Remove units from a block, in place: producers lose rows, the consumer gets `consumer_OK` for its kept columns, ascending."""
    resize(units.consumer, consumer_OK)
    for layer, rows_GR in units.rows:
        kept_O = torch.ones(layer.shape[0], dtype=torch.bool)
        kept_O[rows_GR[removed]] = False
        resize(layer, layer.read()[kept_O])
        bias = layer.module._parameters.get("bias")
        if bias is not None:
            put(layer.module, "bias", bias.detach()[kept_O])


def tell(block: nn.Module, like: nn.Module) -> None:
    """Set what a block's modules state (numbers of heads, their config) to what those of a block of its shape do."""
    others = dict(like.named_modules())
    # some classes put other modules in the place of theirs while they run
    changed = [f"{name}." for name, module in block.named_modules() if type(others.get(name)) is not type(module)]
    for name, module in block.named_modules():
        if any(other.startswith(f"{name}." if name else "") for other in changed):
            continue
        for key, value in vars(others[name]).items():
            if not key.startswith("_") and key not in ("training", "layer_idx") and not isinstance(value, Tensor):
                setattr(module, key, value)


def resize(layer: Layer, weight_OI: Tensor) -> None:
    """Give a layer a weight of another shape."""
    weight_OI = weight_OI.to(layer.parameter.dtype)
    put(layer.module, "weight", weight_OI.T if layer.kind == "conv1d" else weight_OI)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by one of another shape, and set the sizes that Linear and Conv1D state."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    sized: Any = module
    if name == "weight" and isinstance(module, nn.Linear):
        sized.out_features, sized.in_features = tensor.shape
    elif name == "weight" and hasattr(module, "nf"):
        sized.nx, sized.nf = tensor.shape


def keep_blocks(model: Any, path: str, kept_layers: Sequence[int], depth: Sequence[str]) -> None:
    """Remove all but some blocks of a list from a model, in place, and renumber them. depth: the fields that state their number."""
    container: Any = model.get_submodule(path)
    parent: Any = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
    kept = nn.ModuleList([container[i] for i in kept_layers])
    for index, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    setattr(parent, path.rpartition(".")[2], kept)
    change(model.config, dict.fromkeys(depth, len(kept)), kept_layers)
