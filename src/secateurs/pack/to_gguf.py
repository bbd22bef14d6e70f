"""Llama-like models as GGUF, which llama.cpp loads: symmetric 4- and 8-bit grids as Q4_0 and Q8_0, exactly.

A block is 32 weights of a row: an fp16 scale, then 32 signed bytes; or 16 bytes of two weights, each plus 8: weight i is the low
half of byte i, weight i + 16 the high half. A group of 64 is two blocks of one scale. Other matrices keep their bits, or are
rounded as llama.cpp's own quantizer rounds them; vectors are fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import CheckpointError, PackError
from secateurs.base.progress import Progress
from secateurs.matrix.grids import Scales
from secateurs.pack import gguf_tokenizer
from secateurs.pack.on_grids import OnGrids, exactly

BLOCK = 32
# model_type -> llama.cpp's name, and whether it turns neighbours (rows of q and k are reordered) instead of halves of a head
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Stored:
    """One tensor of the file: of which stored tensor it is made (or the tensor itself), and as what. nbytes: of a row."""

    name: str
    key: str | Tensor
    kind: str
    shape: tuple[int, ...]


def prepare(found: OnGrids, bits: int | None = None) -> Callable[[Path, Progress], dict[str, Any]]:
    """bits: 8 or 4, to which matrices that are on no grid are rounded, embedding and head to 8; None: they keep their dtype.

    Raises CheckpointError for a model that llama.cpp would run otherwise, PackError for scales that fp16 does not hold.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("gguf files need the library gguf; pip install 'secateurs[models]'") from None
    folder, config = found.checkpoint.folder, found.model.config
    arch, metadata = _metadata(found)
    words = gguf_tokenizer.read(folder, config.vocab_size)
    enum = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    layers, left, plan = [], [], []
    for key in found.checkpoint.ordered_keys():
        target = found.checkpoint.target_of[key]
        name = names.get_name(target, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(
                f"{folder}: llama.cpp has no place for {target} in a model of type {config.model_type}"
            )
        kind, why = _kind(found, key, name, bits)
        if (layer := found.layer_of.get(key)) is not None:
            layers.append({"name": layer, "grid": str(found.scales[layer].grid), "stored": kind})
        if why:
            left.append(f"{layer or target}: {why}")
        plan.append(_Stored(name, key, kind, _shape(found, key)))
    factors = _factors(config)
    if factors is not None:
        plan.append(_Stored("rope_freqs.weight", factors, "F32", tuple(factors.shape)))

    def write(out: Path, progress: Progress) -> dict[str, Any]:
        writer = gguf.GGUFWriter(None, arch)
        kinds = [layer["stored"] for layer in layers] or [tensor.kind for tensor in plan if len(tensor.shape) > 1]
        common = max(sorted(set(kinds)), key=kinds.count)
        named = common if common.startswith("Q") else None
        file_type = f"MOSTLY_{named or common}" if common != "F32" else "ALL_F32"
        writer.add_type("model")
        writer.add_name(folder.parent.name if folder.name == "model" else folder.name)
        writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for add, value in metadata:
            getattr(writer, add)(value)
        words.write(writer)
        for tensor in plan:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            width, nbytes = gguf.GGML_QUANT_SIZES[kind]
            row = tensor.shape[-1] // width * nbytes
            shape = (*tensor.shape[:-1], row)
            total = row * (tensor.shape[0] if len(shape) > 1 else 1)
            writer.add_tensor_info(tensor.name, shape, torch.empty(0, dtype=torch.uint8).numpy().dtype, total, kind)
        try:
            writer.write_header_to_file(out)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for i, tensor in enumerate(plan):
                progress("tensors", i, len(plan))
                writer.write_tensor_data(_bytes(found, tensor).numpy())
        finally:
            writer.close()
        progress("tensors", len(plan), len(plan))
        return {"layers": layers, "left": left, "warnings": words.warnings + list(_warnings(config))}

    return write


def _metadata(found: OnGrids) -> tuple[str, list[tuple[str, Any]]]:
    """llama.cpp's name of the architecture, and what it needs to know: (method of GGUFWriter, value)."""
    config, folder = found.model.config, found.checkpoint.folder
    kind = config.model_type
    if kind not in ARCHITECTURES or not type(found.model).__name__.endswith("ForCausalLM"):
        raise CheckpointError(
            f"{folder} is a {type(found.model).__name__}; to GGUF go causal language models of type {', '.join(ARCHITECTURES)}"
        )
    arch, _ = _architecture(config)
    rope: dict[str, Any] = config.rope_parameters or {}
    turns = rope.get("rope_type", "default")
    other = None
    if config.hidden_act not in ("silu", "swish"):
        other = f"hidden_act '{config.hidden_act}'"
    elif turns not in ("default", "linear", "llama3"):
        other = f"positions of type '{turns}'"
    elif rope.get("partial_rotary_factor", 1) != 1:
        other = "positions in a part of each head"
    elif kind == "qwen3" and config.attention_bias:
        other = "biases of its attention"
    if other:
        raise CheckpointError(f"{folder} has {other}, which llama.cpp's {arch} or this export does not know")
    heads, groups, width = _heads(config)
    metadata = [
        ("add_vocab_size", config.vocab_size),
        ("add_context_length", min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 1 << 62)),
        ("add_embedding_length", config.hidden_size),
        ("add_block_count", config.num_hidden_layers),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", heads),
        ("add_head_count_kv", groups),
        ("add_key_length", width),
        ("add_value_length", width),
        ("add_rope_dimension_count", width),
        ("add_rope_freq_base", float(rope.get("rope_theta", 10000.0))),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
    ]
    if turns == "linear":
        import gguf

        metadata.append(("add_rope_scaling_type", gguf.RopeScalingType.LINEAR))
        metadata.append(("add_rope_scaling_factor", float(rope["factor"])))
    return arch, metadata


def _heads(config: Any) -> tuple[int, int, int]:
    """How many heads, how many of keys and values, and the width of each."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _architecture(config: Any) -> tuple[str, bool]:
    """A row of ARCHITECTURES. llama.cpp's qwen2 has no place for fewer heads than the hidden width is of; its llama has, and for
    the biases too."""
    heads, _, width = _heads(config)
    kind = config.model_type
    return ARCHITECTURES["llama" if kind == "qwen2" and heads * width != config.hidden_size else kind]


def _warnings(config: Any) -> Iterator[str]:
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        yield f"the model attends to the last {window} tokens and llama.cpp's to all, so its context is set to {window} tokens"


def _factors(config: Any) -> Tensor | None:
    """What Llama 3's positions divide each frequency by, as transformers computes it; None for other models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    width = _heads(config)[2]
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    turned: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    factors: Tensor = plain / turned
    return factors


def _kind(found: OnGrids, key: str, named: str, bits: int | None) -> tuple[str, str | None]:
    """The GGUF type of a stored tensor, and why it is not a quantized one although that was wanted. named: as the file names it."""
    shape = _shape(found, key)
    dtype = found.model.get_parameter(found.checkpoint.target_of[key]).dtype
    plain = _DTYPES[dtype] if len(shape) > 1 else "F32"
    name = found.layer_of.get(key)
    if name is None:
        if bits and len(shape) > 1 and shape[-1] % BLOCK == 0:
            # llama.cpp gives these two more bits than the blocks have, too
            return f"Q{8 if named.startswith(('token_embd', 'output')) else bits}_0", None
        return plain, f"blocks of {BLOCK} do not divide its {shape[-1]} inputs" if bits and len(shape) > 1 else None
    scales = found.scales[name]
    grid = scales.grid
    if grid.bits not in (4, 8) or not grid.symmetric:
        raise PackError(
            f"{name} is on the grid {grid}; GGUF holds symmetric 4 and 8 bits: prune with --grid q4_0 or q8_0"
        )
    if shape[-1] % BLOCK or grid.width(shape[-1]) % BLOCK:
        return plain, f"blocks of {BLOCK} do not divide its {shape[-1]} inputs"
    if exactly(scales.scale_OG, torch.float16) is None:
        raise PackError(
            f"{name}: scales of {grid} are bf16, and fp16, as GGUF stores them, does not hold all of them; prune with "
            f"--grid q{grid.bits}_0"
        )
    return f"Q{grid.bits}_0", None


def _shape(found: OnGrids, key: str) -> tuple[int, ...]:
    return tuple(found.model.get_parameter(found.checkpoint.target_of[key]).shape)


def _bytes(found: OnGrids, stored: _Stored) -> Tensor:
    """A tensor's bytes, [rows, bytes of a row]."""
    if isinstance(stored.key, Tensor):
        return stored.key.contiguous().view(torch.uint8)
    tensor, name = found.read(stored.key), found.layer_of.get(stored.key)
    order = _order(found.model.config, found.checkpoint.target_of[stored.key], len(tensor))
    if order is not None:
        tensor = tensor[order]
    if not stored.kind.startswith("Q"):
        return (tensor if tensor.ndim > 1 else tensor.float()).contiguous().view(torch.uint8)
    if name is None:
        return _rounded(tensor, stored.kind)
    scales = found.scales[name] if order is None else found.scales[name].reordered(order)
    return blocks(scales, tensor)


def _rounded(weight_OI: Tensor, kind: str) -> Tensor:
    """Blocks as llama.cpp's own quantizer makes them: each scale by its block's greatest weight."""
    import gguf

    numbers = gguf.quants.quantize(weight_OI.float().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(numbers)


def _order(config: Any, name: str, rows: int) -> Tensor | None:
    """The order of the rows of q and k: transformers turns row i of a head with row i + half, llama.cpp 2i with 2i + 1."""
    layer = name.rpartition(".")[0]
    if not _architecture(config)[1] or not layer.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def blocks(scales: Scales, weight_OI: Tensor) -> Tensor:
    """Q4_0 or Q8_0 blocks, uint8 [O, bytes of a row]."""
    grid, (rows, inputs) = scales.grid, weight_OI.shape
    integer = scales.integers(weight_OI).reshape(rows, inputs // BLOCK, BLOCK)
    if grid.bits == 4:
        level = (integer + grid.middle).to(torch.uint8)
        held = level[..., :16] | (level[..., 16:] << 4)
    else:
        held = integer.to(torch.int8).view(torch.uint8)
    scale = grid.spread(scales.scale_OG, inputs)[:, ::BLOCK].to(torch.float16)
    head = scale.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(rows, -1, 2)
    return torch.cat([head, held], -1).reshape(rows, -1)
