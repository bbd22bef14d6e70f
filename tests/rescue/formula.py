"""The weights of the files in data/, by a formula instead of a seed: what old packages were given, and what reading must give back.

Llama-shaped. Of a layer: integers and scales, so that a format with integers and one without are made from the same weights.
"""

from dataclasses import dataclass

import torch

VOCABULARY = 16


@dataclass(frozen=True)
class Shape:
    hidden: int = 32
    inner: int = 64
    blocks: int = 2
    heads: int = 4
    kv_heads: int = 2

    def config(self, dtype):
        """config.json without a quantization_config."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.blocks, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip

    def layers(self):
        """{name: (O, I)} of the Linear layers in blocks."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = {"q_proj": self.hidden, "k_proj": kv, "v_proj": kv, "o_proj": self.hidden}
        found = {}
        for i in range(self.blocks):
            found |= {f"model.layers.{i}.self_attn.{name}": (rows, self.hidden) for name, rows in attention.items()}
            found |= {f"model.layers.{i}.mlp.{name}": (self.inner, self.hidden) for name in ("gate_proj", "up_proj")}
            found[f"model.layers.{i}.mlp.down_proj"] = self.hidden, self.inner
        return found

    def others(self, dtype):
        """{name: tensor} of embedding, head and norms, without zeros."""
        found = {name: _mixed(name, VOCABULARY, self.hidden) % 15 + 1 for name in ("model.embed_tokens", "lm_head")}
        norms = ["model.norm"]
        for i in range(self.blocks):
            norms += [f"model.layers.{i}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
        found |= {name: _mixed(name, 1, self.hidden)[0] % 8 + 8 for name in norms}
        return {f"{name}.weight": (value / 16).to(dtype) for name, value in found.items()}


def _mixed(name, rows, columns):
    """Numbers of 31 bits, by name and place."""
    word = 0xFFFFFFFF
    key = sum((i + 1) * byte for i, byte in enumerate(name.encode()))
    x = torch.arange(rows)[:, None] * 0x9E3779B1 + torch.arange(columns) * 0x85EBCA77 + key * 0x27D4EB2F
    x = x & word
    for _ in range(2):
        x = (x ^ (x >> 15)) * 0x2C1B3C6D & word
    return (x ^ (x >> 13)) >> 1


def kept(name, rows, columns, zeros):
    """Where a weight is not pruned. zeros: 'half', or '2:4' with two of four."""
    x = _mixed(name + ".mask", rows, columns)
    if zeros == "half":
        return x % 2 == 0
    order = x.reshape(rows, -1, 4).argsort(dim=-1, stable=True).argsort(dim=-1)
    return (order < 2).reshape(rows, columns)


def integers(name, rows, columns, bits, zeros):
    """int64 [O, I] in -2^(bits - 1) + (bits == 8) .. 2^(bits - 1) - 1, and 0 where pruned.

    -128 is left out: the writer of sparse-24-bitmask took its absolute value in int8, -128 again, and dropped it.
    """
    levels = (1 << bits) - (bits == 8)
    return (_mixed(name, rows, columns) % levels - levels // 2) * kept(name, rows, columns, zeros)


def scales(name, rows, groups, bits, dtype):
    """[O, G]: in fp16 of ten significant bits; in bf16 of four, and of one for int8, so that a product is not rounded before the
    writer divides by the scale in bf16.
    """
    x = _mixed(name + ".scale", rows, groups)
    steps = 512 if dtype == torch.float16 else 1 if bits == 8 else 8
    return ((steps + x % steps) / steps * 2.0 ** -(5 + x // 512 % 3)).to(dtype)


def zero_points(name, rows, groups, bits):
    """int8 [O, G], near the middle."""
    return (_mixed(name + ".zero", rows, groups) % 5 - 2).to(torch.int8)


def weight(name, rows, columns, zeros, settings, dtype):
    """The weight of a layer, rounded once to dtype. settings: of the quantization, None for one that is not quantized."""
    settings = settings or {"num_bits": 8, "type": "int", "symmetric": True}
    groups = columns // settings.get("group_size", columns)
    scale = scales(name, rows, groups, settings["num_bits"], dtype).float().repeat_interleave(columns // groups, 1)
    value = integers(name, rows, columns, settings["num_bits"], zeros)
    if settings["type"] == "float":
        # a number of fp8 has four significant bits
        value = (value * scale).to(torch.float8_e4m3fn).float()
    if not settings["symmetric"]:
        # the integer itself, with its zero point, stays in its range
        value = value.clamp(-6, 5)
    return (value * scale).to(dtype) + 0.0
