"""The vLLM plugin: `vllm serve DIR/packed` multiplies packed layers on the sparse kernels.

vLLM finds register() by its entry point, in every process. A packed layer takes what a folder stores of the matrices that vLLM puts
into one (q, k and v; gate and up), cuts this process's share out, and stacks those that are of one kind. Layers that are stored as
plain weights are vLLM's own. Packed experts are refused. O outputs, I inputs, T tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from secateurs.base.errors import CheckpointError
from secateurs.kernels import shards
from secateurs.kernels.dispatch import multiply
from secateurs.kernels.formats import DTYPES, Packed, layout_of, parts_of
from secateurs.pack.stored import PARTS, Entry, Stored, check_version, matrices_of

METHOD = "secateurs"
_SHARDS = ("q", "k", "v")


def register() -> None:
    """Tell vLLM of the method. vLLM may call it more than once."""
    register_quantization_config(METHOD)(SecateursConfig)


class SecateursConfig(QuantizationConfig):  # type: ignore[misc]
    """quantization_config of a packed folder."""

    def __init__(self, layers: dict[str, Entry]) -> None:
        super().__init__()
        self.layers = layers

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SecateursConfig":
        check_version(config.get("format_version"))
        for name in config.get("experts") or ():
            raise CheckpointError(
                f"{name}: packed experts are not served by vLLM; serve what `secateurs pack --dense` makes of the folder"
            )
        return cls(config.get("layers") or {})

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            found = matrices_of(prefix, self.layers, self.packed_modules_mapping)
            return PackedMethod(found) if any(found.values()) else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix
            if not prefix and not isinstance(layer, ParallelLMHead):
                # some classes do not say what it is called
                name = next((n for n in self.layers if n.rpartition(".")[2] == "embed_tokens"), "")
            if name in self.layers:
                return PackedMethod({name: self.layers[name]})
            return _Head() if isinstance(layer, ParallelLMHead) else None
        return None


class PackedMethod(LinearMethodBase):  # type: ignore[misc]
    """y = x W' + b of matrices of which some are stored packed; and rows of one, where it is an embedding.

    entries: what matrices_of() found.
    """

    def __init__(self, entries: Mapping[str, Entry | None]) -> None:
        super().__init__()
        self.entries = entries

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int, output_size: int,
        params_dtype: torch.dtype, **_: Any,
    ) -> None:  # fmt: skip
        stored = Stored(self.entries, _stored_rows(layer, output_size), input_size, params_dtype)
        layer.stored, layer.inputs_each = stored, input_size_per_partition
        for part, dtype in zip(PARTS, stored.dtypes(), strict=True):
            place: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            place.weight_loader = _loader(stored, part)
            layer.register_parameter(part, place)

    def process_weights_after_loading(self, layer: Any) -> None:
        matrices = layer.stored.matrices()
        for part in PARTS:
            delattr(layer, part)
        own = [
            shards.inputs(shards.rows(matrix, *rows), *_own_inputs(layer))
            for matrix, rows in zip(matrices, _own_rows(layer), strict=True)
        ]
        del layer.stored
        layer.pieces = [_put(layer, f"piece_{i}", matrix) for i, matrix in enumerate(shards.stacked(own))]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs, row = [], 0
        for i, (plain, layout) in enumerate(layer.pieces):
            end = row + layout[0]
            part = bias if bias is None or len(layer.pieces) == 1 else bias[row:end]
            outputs.append(_product(layer, f"piece_{i}", plain, layout, x, part))
            row = end
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if isinstance(layer, VocabParallelEmbedding) and layer.tp_size > 1:
            # the last share has fewer rows than the others
            y = nn.functional.pad(y, (0, layer.num_embeddings_per_partition - row))
        return y

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        (_, layout), ids = layer.pieces[0], input_.reshape(-1)
        values, _, scale, zero = _parts(layer, "piece_0")
        rows: Tensor = torch.ops.secateurs.rows(ids, values, scale, zero, layout, layer.params_dtype)
        return rows.view(*input_.shape, layout[1])


class _Head(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """A plain head, until it is tied to a packed embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        if not isinstance(embed_tokens.quant_method, PackedMethod):
            return super().tie_weights(layer, embed_tokens)
        del layer.weight
        layer.quant_method = _TiedHead(embed_tokens)
        return layer


class _TiedHead(LinearMethodBase):  # type: ignore[misc]
    """The head whose matrix is that of a packed embedding."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding_layer = embedding

    def create_weights(self, *_: Any, **__: Any) -> None:
        """It has none of its own."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = self.embedding_layer.quant_method.apply(self.embedding_layer, x, bias)
        return found


def _loader(stored: Stored, part: str) -> Callable[..., None]:
    """What vLLM calls with a stored tensor, and with which matrix of the layer it belongs to."""

    def take(param: Any, loaded_weight: Tensor, loaded_shard_id: Any = None) -> None:
        if isinstance(loaded_shard_id, tuple):
            raise CheckpointError(
                f"{', '.join(stored.entries)}: this class stores several of its matrices as one, which is not served packed; "
                "serve what `secateurs pack --dense` makes"
            )
        which = _SHARDS.index(loaded_shard_id) if loaded_shard_id in _SHARDS else loaded_shard_id or 0
        stored.take(part, loaded_weight, which)

    return take


def _stored_rows(layer: Any, outputs: int) -> list[int]:
    """Rows of the matrices of a layer, as a folder has them; all processes together."""
    if hasattr(layer, "total_num_kv_heads"):
        return [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    if isinstance(layer, VocabParallelEmbedding):
        return [layer.org_vocab_size]
    return list(getattr(layer, "output_sizes", None) or [outputs])


def _own_rows(layer: Any) -> list[tuple[int, int]]:
    """The first and the end of this process's rows of each matrix."""
    if isinstance(layer, VocabParallelEmbedding):
        return [(layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index)]
    sizes = getattr(layer, "output_partition_sizes", None) or [layer.output_size]
    # in a group of more processes than KV heads, several have the same
    ranks = [layer.tp_rank // (getattr(layer, "num_kv_head_replicas", 1) if i else 1) for i in range(len(sizes))]
    if sum(sizes) == sum(_stored_rows(layer, layer.output_size)):
        ranks = [0] * len(sizes)
    return [(rank * size, (rank + 1) * size) for rank, size in zip(ranks, sizes, strict=True)]


def _own_inputs(layer: Any) -> tuple[int, int]:
    each = layer.inputs_each
    rank = layer.tp_rank if each < layer.input_size else 0
    return rank * each, (rank + 1) * each


def _put(layer: Any, name: str, matrix: Packed) -> tuple[bool, tuple[int, ...]]:
    """Keep a matrix's tensors in a layer; returns whether it is a plain one, and its layout."""
    for part, tensor in zip(PARTS, parts_of(matrix), strict=False):
        layer.register_buffer(f"{name}_{part}", tensor, persistent=False)
    return matrix.format == "dense" and matrix.grid is None, layout_of(matrix.shape, matrix.grid)


def _parts(layer: Any, name: str) -> list[Tensor | None]:
    return [getattr(layer, f"{name}_{part}") for part in PARTS]


def _product(layer: Any, name: str, plain: bool, layout: tuple[int, ...], x: Tensor, bias: Tensor | None) -> Tensor:
    parts = _parts(layer, name)
    if plain:
        assert parts[0] is not None
        return nn.functional.linear(x, parts[0], bias)
    return multiply(x, [*parts, bias], layout).view(*x.shape[:-1], layout[0])
