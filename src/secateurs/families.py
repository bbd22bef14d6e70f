"""Where each model family keeps its blocks. Data only; walk.py is what reads it.

`types` are values of config.model_type. `blocks` is the path of the block list inside the base model. `experts` names
the fused 3-D parameters [experts, outputs, inputs] of the modules that hold them. A new family is a row, and a tiny
config in tests/families.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    name: str
    types: tuple[str, ...]
    blocks: str
    experts: tuple[str, ...] = ()


_FUSED = ("gate_up_proj", "down_proj")

_ROWS = (
    Family("llama", ("llama",), "layers"),
    Family("mistral", ("mistral",), "layers"),
    Family("qwen2", ("qwen2",), "layers"),
    Family("qwen3", ("qwen3",), "layers"),
    Family("gemma2", ("gemma2",), "layers"),
    Family("gemma3", ("gemma3_text",), "layers"),
    Family("phi3", ("phi3",), "layers"),
    Family("opt", ("opt",), "decoder.layers"),
    Family("gpt2", ("gpt2",), "h"),
    Family("gpt_neox", ("gpt_neox",), "layers"),
    Family("mixtral", ("mixtral",), "layers", _FUSED),
    Family("qwen3_moe", ("qwen3_moe",), "layers", _FUSED),
    Family("bert", ("bert",), "encoder.layer"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ROWS}


def find(model_type: str) -> Family:
    """The row for a config's model_type. Raises ValueError naming the known types."""
    for family in _ROWS:
        if model_type in family.types:
            return family
    known = ", ".join(t for family in _ROWS for t in family.types)
    raise ValueError(f"no family for model_type '{model_type}'; known: {known}. Add a row to families.py")
