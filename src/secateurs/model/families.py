"""Where each model family keeps its blocks, and which layers of a block are coupled. Data only.

`types` are values of config.model_type. `blocks` is the path of the block list inside the base model. `experts` names
the fused 3-D parameters [experts, outputs, inputs] of the modules that hold them. `mlp` and `attention` say whose outputs
are whose inputs inside a block, so that both can be reordered or cut alike. parts.py reads `blocks` and `experts`, prune and
shrink the rest. A new family is a row here and a tiny config in tests/tiny.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    name: str
    types: tuple[str, ...]
    blocks: str
    experts: tuple[str, ...] = ()
    # (layers whose outputs enter, the layer they enter); a layer that stacks gate and up has two outputs an input
    mlp: tuple[tuple[str, ...], str] | None = None
    # (layer that makes the values, layer they enter), by heads
    attention: tuple[str, str] | None = None
    # (query, key, value, output) where config.json can state fewer heads of the same width; one layer may stack the first three
    projections: tuple[str, str, str, str] | None = None
    # (norm of a block, the part that reads it, the part's layer that adds to the residual stream), where a norm is x / rms(x)
    # times a weight and embeddings enter as they are
    residual: tuple[tuple[str, str, str], ...] = ()
    # what config.json calls the width of the MLP and the number of blocks
    width: str = "intermediate_size"
    depth: str = "num_hidden_layers"


_FUSED = ("gate_up_proj", "down_proj")
_GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_SELF = ("self_attn.v_proj", "self_attn.o_proj")
_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_STACKED = ("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj")

_STREAM = (
    ("input_layernorm", "self_attn", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp", "mlp.down_proj"),
)

_ROWS = (
    Family("llama", ("llama",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO, residual=_STREAM),
    Family("mistral", ("mistral",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO, residual=_STREAM),
    Family("qwen2", ("qwen2",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO, residual=_STREAM),
    Family("qwen3", ("qwen3",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO, residual=_STREAM),
    Family("gemma2", ("gemma2",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO),
    Family("gemma3", ("gemma3_text",), "layers", mlp=_GATED, attention=_SELF, projections=_QKVO),
    Family(
        "phi3",
        ("phi3",),
        "layers",
        mlp=(("mlp.gate_up_proj",), "mlp.down_proj"),
        projections=_STACKED,
        residual=_STREAM,
    ),
    Family(
        "opt",
        ("opt",),
        "decoder.layers",
        mlp=(("fc1",), "fc2"),
        attention=("self_attn.v_proj", "self_attn.out_proj"),
        width="ffn_dim",
    ),
    Family("gpt2", ("gpt2",), "h", mlp=(("mlp.c_fc",), "mlp.c_proj"), width="n_inner", depth="n_layer"),
    Family("gpt_neox", ("gpt_neox",), "layers", mlp=(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
    Family("mixtral", ("mixtral",), "layers", _FUSED, attention=_SELF, projections=_QKVO),
    Family("qwen3_moe", ("qwen3_moe",), "layers", _FUSED, attention=_SELF, projections=_QKVO),
    Family(
        "bert",
        ("bert",),
        "encoder.layer",
        mlp=(("intermediate.dense",), "output.dense"),
        attention=("attention.self.value", "attention.output.dense"),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}


def find(model_type: str) -> Family:
    """The row for a config's model_type. Raises ValueError naming the known types."""
    for family in _ROWS:
        if model_type in family.types:
            return family
    known = ", ".join(t for family in _ROWS for t in family.types)
    raise ValueError(
        f"shrink does not know where model_type '{model_type}' keeps its units and how its config.json states them; it knows: "
        f"{known}; pruning takes any type"
    )
