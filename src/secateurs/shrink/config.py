"""Reads and writes the sizes that a config states.

Fields have the names of config.json; those of a part of it have the part's name before a dot (text_config.hidden_size).
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Raw = dict[str, Any]

# vLLM 0.32 reads no head_dim of these (seen in its code; qwen2 was run)
_HEADS_BY_WIDTH = ("qwen2", "qwen2_moe", "olmoe", "stablelm", "granitemoe")


def fields_with(config: Any, value: int | None) -> list[str]:
    """The fields that hold a number, or a list of it alone; for None those that hold nothing."""

    def holds(found: Any) -> bool:
        return found is None if value is None else type(found) is int and found == value

    return [n for n, x in flat(config) if holds(x) or (isinstance(x, list) and x and all(map(holds, x)))]


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All fields of a config and of its parts, and what they hold."""
    for name, value in config.to_dict().items():
        if isinstance(value, dict) and hasattr(getattr(config, name, None), "model_type"):
            yield from flat(getattr(config, name), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def changed(raw: Raw, config: Any, changes: Mapping[str, int], kept_layers: Sequence[int] | None = None) -> Raw:
    """The entries of a config.json with other numbers. raw: those that there are; config: as they are read.

    kept_layers: the places of the blocks that stay, if `changes` are of their number; lists with an entry a block keep theirs.
    """
    out = copy.deepcopy(raw)
    for part, name, value in _edits(config, changes, kept_layers):
        inside, read = out, config
        for step in part:
            inside, read = inside.setdefault(step, {}), getattr(read, step)
        inside[_as_written(inside, read, name)] = value
    return out


def states(config: Any, wanted: Any, changes: Mapping[str, int], kept_layers: Sequence[int] | None = None) -> bool:
    """True if a config says what changed() of another asked for: some classes correct what they are given."""
    for part, name, value in _edits(wanted, changes, kept_layers):
        inside = config
        for step in part:
            inside = getattr(inside, step)
        if getattr(inside, name) != value:
            return False
    return True


def change(config: Any, changes: Mapping[str, int], kept_layers: Sequence[int] | None = None) -> None:
    """changed() of a config, in place."""
    for part, name, value in list(_edits(config, changes, kept_layers)):
        inside = config
        for step in part:
            inside = getattr(inside, step)
        setattr(inside, name, value)


def _edits(
    config: Any, changes: Mapping[str, int], kept_layers: Sequence[int] | None
) -> Iterator[tuple[list[str], str, Any]]:
    had = dict(flat(config))
    for field, value in changes.items():
        *part, name = field.split(".")
        yield part, name, [value] * len(had[field]) if isinstance(had.get(field), list) else value
        if kept_layers is not None:
            prefix = field.removesuffix(name)
            for other, entries in had.items():
                leaf = other.removeprefix(prefix)
                if (
                    other.startswith(prefix)
                    and "." not in leaf
                    and isinstance(entries, list)
                    and len(entries) == had[field]
                ):
                    yield part, leaf, [entries[i] for i in kept_layers]


def _as_written(raw: Raw, config: Any, name: str) -> str:
    """The name that a file uses for a field: its own, or another one that transformers takes for it."""
    others = [other for other, field in (config.attribute_map or {}).items() if field == name and other in raw]
    return others[0] if others and name not in raw else name


def not_in_vllm(config: Any) -> list[str]:
    """A sentence on heads that vLLM has no place for, if the config has such."""
    heads, width = getattr(config, "num_attention_heads", 0), getattr(config, "head_dim", None)
    if config.model_type not in _HEADS_BY_WIDTH or not width or heads * width == config.hidden_size:
        return []
    return [
        f"vLLM (0.32) would not load this {config.model_type}: it takes a head to be hidden_size / num_attention_heads = "
        f"{config.hidden_size / heads:g} wide, and these are {width}; if it is to serve the model, keep heads and hidden width "
        "(--units mlp,layers)"
    ]


def sentence(error: Exception) -> str:
    """What an error says; transformers wraps those of a config's checks."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
