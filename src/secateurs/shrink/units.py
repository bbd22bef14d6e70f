"""The units of a transformer's blocks: which matrices hold them, how they are cut, and what config.json says afterwards.

    mlp      a neuron: a column of down, its rows of up and gate, their biases
    heads    a KV head with its query heads: their columns of o, rows of v, k and q, their biases
    queries  a query head, as many of every KV head: its columns of o, rows of q, their biases
    experts  an expert of a mixture, and its row of the router (experts.py)
    hidden   a channel of the residual stream (width.py)
    layers   a whole block

O outputs, I inputs, G units of C columns or R rows each.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.model.coupling import Coupling
from secateurs.model.families import Family
from secateurs.model.layers import Layer

KINDS = ("mlp", "heads", "queries", "experts", "hidden", "layers")
# units that are columns of one matrix; units inside a block; units whose number is a field of Shape
COLUMNS = ("mlp", "heads", "queries")
IN_BLOCKS = (*COLUMNS, "experts")
COUNTED = (*IN_BLOCKS, "hidden")


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
    residual stream.
    """

    layers: int
    mlp: int
    heads: int
    queries: int = 1
    experts: int = 0
    hidden: int = 0

    @classmethod
    def of(cls, config: Any, family: Family) -> "Shape":
        queries = int(config.num_attention_heads)
        heads = int(getattr(config, "num_key_value_heads", None) or queries)
        return cls(
            int(config.num_hidden_layers),
            int(getattr(config, family.width, None) or 4 * config.hidden_size),
            heads,
            queries // heads,
            int(getattr(config, "num_local_experts", 0)) if family.experts else 0,
            int(config.hidden_size),
        )

    def steps(self, kind: str) -> int:
        """How many units of a kind (of COUNTED) there are to remove; a query head goes from every KV head at once."""
        return int(getattr(self, kind))


def refuses(kind: str, family: Family, config: Any) -> str | None:
    """The reason why units of a kind cannot be removed from models of this family, or None."""
    if kind == "mlp" and family.mlp is None:
        return f"{family.name}'s MLPs are experts, whose neurons are not cut"
    if kind in ("heads", "queries") and family.projections is None:
        return f"{family.name}'s config cannot state fewer heads of the same width"
    if kind == "hidden" and not family.residual:
        return f"{family.name}'s norms or embeddings do not let its residual width be cut"
    if kind == "experts" and not family.experts:
        return f"{family.name} has no experts"
    if kind == "queries" and Shape.of(config, family).queries == 1:
        return f"every KV head of this {family.name} has one query head"
    return None


def units_of(kind: str, prefix: str, layers: Sequence[Layer], family: Family, shape: Shape) -> Units:
    """The units of a kind (of COLUMNS) in a block of this shape. Call refuses() first."""
    named = {layer.name.removeprefix(f"{prefix}."): layer for layer in layers}
    if kind == "mlp":
        assert family.mlp
        producers, consumer = tuple(named[n] for n in family.mlp[0]), named[family.mlp[1]]
        rows_GR = Coupling(producers, consumer, ("stacked",) * len(producers)).rows(0).T.contiguous()
        groups_GC = torch.arange(consumer.shape[1])[:, None]
        return Units(kind, consumer, groups_GC, tuple((layer, rows_GR) for layer in producers))
    assert family.projections is not None
    query, key, value, output = (named[name] for name in family.projections)
    inputs = output.shape[1]
    if kind == "queries":
        groups_GC = torch.arange(inputs).reshape(shape.heads * shape.queries, -1)
        parents_G = torch.arange(shape.heads).repeat_interleave(shape.queries)
        # where one matrix makes queries, keys and values, queries are its first rows
        return Units(kind, output, groups_GC, ((query, groups_GC),), parents_G)
    groups_GC = torch.arange(inputs).reshape(shape.heads, -1)
    shared = inputs // shape.queries
    shared_GR = torch.arange(shared).reshape(shape.heads, -1)
    if query is value:
        rows_GR = torch.cat([groups_GC, inputs + shared_GR, inputs + shared + shared_GR], 1)
        return Units(kind, output, groups_GC, ((query, rows_GR),))
    return Units(kind, output, groups_GC, ((query, groups_GC), (key, shared_GR), (value, shared_GR)))


def cut(block: nn.Module, units: Units, removed: Tensor, consumer_OK: Tensor) -> None:
    """Remove units from a block, in place: producers lose rows, the consumer gets `consumer_OK` for its kept columns, ascending."""
    _resize(units.consumer, consumer_OK)
    for layer, rows_GR in units.rows:
        kept_O = torch.ones(layer.shape[0], dtype=torch.bool)
        kept_O[rows_GR[removed]] = False
        _resize(layer, layer.read()[kept_O])
        bias = layer.module._parameters.get("bias")
        if bias is not None:
            put(layer.module, "bias", bias.detach()[kept_O])


def tell(block: nn.Module, shape: Shape) -> None:
    """Set the numbers of heads that a block's attention keeps as attributes, and those in its config."""
    for module in block.modules():
        sized: Any = module
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            sized.num_key_value_groups = shape.queries
        if isinstance(getattr(module, "num_key_value_heads", None), int):
            sized.num_key_value_heads = shape.heads
            # a copy: the model's config is shared by all blocks, and they are cut one after another
            sized.config = copy.copy(sized.config)
            sized.config.num_attention_heads = shape.heads * shape.queries


def _resize(layer: Layer, weight_OI: Tensor) -> None:
    weight_OI = weight_OI.to(layer.parameter.dtype)
    put(layer.module, "weight", weight_OI.T if layer.kind == "conv1d" else weight_OI)


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by one of another shape, and set the sizes that Linear and Conv1D state."""
    module._parameters[name] = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)
    sized: Any = module
    if name == "weight" and isinstance(module, nn.Linear):
        sized.out_features, sized.in_features = tensor.shape
    elif name == "weight" and hasattr(module, "nf"):
        sized.nx, sized.nf = tensor.shape


def stated(
    raw: dict[str, Any], config: Any, family: Family, shape: Shape, kept_layers: Sequence[int]
) -> dict[str, Any]:
    """config.json for a shape. raw: the dense model's, whose other entries are kept."""
    before = Shape.of(config, family)
    out = dict(raw)
    if shape.mlp != before.mlp:
        out[family.width] = shape.mlp
    if shape.hidden != before.hidden:
        out["hidden_size"] = shape.hidden
    if (shape.heads, shape.queries, shape.hidden) != (before.heads, before.queries, before.hidden):
        out["head_dim"] = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        out["num_key_value_heads"] = shape.heads
        out["num_attention_heads"] = shape.heads * shape.queries
    if shape.experts != before.experts:
        # the name that the dense model's file uses
        out["num_experts" if "num_experts" in raw else "num_local_experts"] = shape.experts
    if shape.layers != before.layers:
        out[family.depth] = shape.layers
        kinds = getattr(config, "layer_types", None)
        if kinds:
            out["layer_types"] = [kinds[i] for i in kept_layers]
    return out


def not_loadable(config: Any, family: Family, shape: Shape) -> str | None:
    """Why transformers would not load a model of that shape, or None."""
    try:
        type(config)(**stated(config.to_dict(), config, family, shape, range(shape.layers)))
    # transformers raises its own exception, which wraps a ValueError
    except Exception as error:
        return str(error.__cause__ or error).strip().splitlines()[-1].strip()
    return None
