"""A small random instance of a model's class: few narrow blocks, a small vocabulary, and inputs that it can be called with.

What a model's code does with its blocks does not depend on how many or how wide they are. So that is found out, and checked, on a
small instance, whatever the size of the real model. Its config is the real one with the fields of _NARROW replaced; lists with one
entry for each block keep entries of every kind.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from secateurs.model.batches import Batch

VOCABULARY = 260
# blocks, unless there are more kinds
_BLOCKS = 4
# most parameters of an instance
_MOST = 30_000_000

# fields of a config, by the value that they get; what follows from others (head_dim) is left to the class where it is not stated
_NARROW: dict[int, tuple[str, ...]] = {
    32: (
        "hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embedding_size", "moe_intermediate_size",
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "projection_dim", "expert_ffn_hidden_size",
        "lru_width", "attention_hidden_size", "image_size",
    ),
    64: (
        "intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim",
        "mlp_hidden_size", "d_inner", "mamba_d_ssm",
    ),
    16: ("kv_lora_rank", "q_lora_rank", "sliding_window", "attention_chunk_size", "rank", "index_topk"),
    8: (
        "head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_kv", "state_size", "ssm_state_size", "mamba_d_state",
        "mamba_n_heads", "mamba_num_heads", "mamba_d_head", "mamba_head_dim", "hidden_size_per_layer_input", "linear_key_head_dim",
        "linear_value_head_dim", "index_head_dim", "global_head_dim", "patch_size",
    ),
    4: (
        "num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank", "mamba_dt_rank", "rotary_dim",
        "linear_num_value_heads", "linear_num_key_heads", "index_n_heads",
    ),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
    1: ("n_group", "topk_group", "first_k_dense_replace"),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    128: ("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions"),
}  # fmt: skip
_DEPTH = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
)


def miniature(model: Any) -> nn.Module:
    """A small random instance in fp32, in evaluation mode, of the class and config of a Hugging Face model.

    Raises ValueError with the reason if the class makes none that runs.
    """
    why = "no attempt was made"
    for narrow in (_set, _made, _fewer):
        try:
            small = _instance(type(model), narrow(model.config))
            with torch.no_grad():
                small(**inputs(small)[0])
            return small
        # a class may raise anything for a config that is not to its liking
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    raise ValueError(f"no small instance of {type(model).__name__} runs ({why})")


def _instance(cls: Any, config: Any) -> nn.Module:
    from accelerate import init_empty_weights

    config.dtype = torch.float32
    with init_empty_weights():
        count = sum(p.numel() for p in cls._from_config(copy.deepcopy(config)).parameters())
    if count > _MOST:
        raise ValueError(f"it would have {count} parameters")
    with _seeded():
        small: nn.Module = cls._from_config(config).eval()
        for parameter in small.parameters():
            parameter.requires_grad_(False)
            if parameter.dim() > 1 and parameter.is_floating_point():
                # large enough that every layer matters
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return small


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------------------------------------------------------- config


def _narrowed(config: Any, depth_only: bool = False) -> dict[str, Any]:
    """The fields of a config that change, with their new values."""
    had = {name: getattr(config, name) for name in config.to_dict() if hasattr(config, name)}
    new: dict[str, Any] = {}
    for name in _DEPTH:
        depth = had.get(name)
        if isinstance(depth, int) and depth > _BLOCKS:
            kept = _kinds(had, depth)
            new[name] = len(kept)
            for other, value in had.items():
                if isinstance(value, list | tuple) and len(value) == depth:
                    new[other] = [value[i] for i in kept]
    if depth_only:
        return new
    for value, names in _NARROW.items():
        for name in names:
            old = had.get(name)
            if isinstance(old, int) and not isinstance(old, bool) and old > value:
                new[name] = value
    heads, groups = had.get("num_attention_heads"), had.get("num_key_value_heads")
    if heads and groups == heads and "num_attention_heads" in new:
        new["num_key_value_heads"] = new["num_attention_heads"]
    for name, old in had.items():
        if name.endswith("token_id") and old is not None:
            new[name] = [1] if isinstance(old, list) else 1
    return new


def _kinds(had: dict[str, Any], depth: int) -> list[int]:
    """The places of the blocks that are kept: two of each kind where there is room, by all lists with an entry a block."""
    lists = [v for v in had.values() if isinstance(v, list | tuple) and len(v) == depth]
    if not lists:
        return list(range(_BLOCKS))
    kinds = [repr([v[i] for v in lists]) for i in range(depth)]
    often = 2 if len(set(kinds)) <= _BLOCKS else 1
    kept: list[int] = []
    for i, kind in enumerate(kinds):
        if sum(kinds[j] == kind for j in kept) < often:
            kept.append(i)
    more = (i for i in range(depth) if i not in kept)
    return sorted([*kept, *(i for i, _ in zip(more, range(_BLOCKS - len(kept)), strict=False))])


def _set(config: Any) -> Any:
    """The config with its fields set afterwards."""
    small = copy.deepcopy(config)
    for name, value in _narrowed(config).items():
        with suppress(Exception):
            setattr(small, name, value)
    for name, part in _parts(config):
        setattr(small, name, _set(part))
    return small


def _made(config: Any) -> Any:
    """The config made anew, so that its class works out what follows from the fields."""
    given = {k: v for k, v in config.to_diff_dict().items() if k not in ("model_type", "transformers_version")}
    parts = {name: _made(part) for name, part in _parts(config)}
    return type(config)(**{**given, **_narrowed(config), **parts})


def _fewer(config: Any) -> Any:
    """The config with fewer blocks and all widths as they are."""
    small = copy.deepcopy(config)
    for name, value in _narrowed(config, depth_only=True).items():
        setattr(small, name, value)
    for name, part in _parts(config):
        setattr(small, name, _fewer(part))
    return small


def _parts(config: Any) -> list[tuple[str, Any]]:
    from transformers import PretrainedConfig

    return [(name, value) for name, value in vars(config).items() if isinstance(value, PretrainedConfig)]


# ---------------------------------------------------------------------------------------------------------------- inputs


def inputs(model: Any) -> list[Batch]:
    """Made-up batches that a model of any kind can be called with: two lengths, and where it reads text, one with padding."""
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    with _seeded():
        if name == "pixel_values":
            return [{name: torch.randn(2, *_image(config))}]
        if name == "input_features":
            bins, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64)
            return [_with_decoder(model, {name: torch.randn(2, bins, frames)}, ids) for ids in _ids(config)]
        if name == "input_values":
            return [{name: torch.randn(2, 4000)}]
        found = [_with_decoder(model, {"input_ids": ids}, ids) for ids in _ids(config)]
    padded = torch.ones_like(found[0]["input_ids"])
    padded[1, :5] = 0
    return [found[0], {**found[0], "attention_mask": padded}, found[1]]


def _ids(config: Any) -> list[torch.Tensor]:
    text = config.get_text_config()
    words = min(int(getattr(text, "vocab_size", None) or VOCABULARY), VOCABULARY)
    return [torch.randint(3, words - 4, (2, length)) for length in (16, 11)]


def _with_decoder(model: Any, batch: Batch, ids: torch.Tensor) -> Batch:
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


def _image(config: Any) -> tuple[int, int, int]:
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or 32
    high, wide = (side, side) if isinstance(side, int) else side
    return int(getattr(vision, "num_channels", None) or 3), int(high), int(wide)
