"""A small random instance of a model's class: few narrow blocks and a small vocabulary.

What a model's code does with its blocks does not depend on how many or how wide they are. So that is found out, and checked, on a
small instance, whatever the size of the real model. Its config is the real one with sizes replaced by the name of the field
(_SIZES); what a type is stays: one KV head stays one, groups stay groups, and every kind of block occurs. made_up.py has inputs.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import CheckpointError, said
from secateurs.model.layers import kind_of
from secateurs.model.made_up import inputs as inputs
from secateurs.model.on_meta import without_weights

VOCABULARY = 260
# special tokens that the vocabulary has no room for get numbers from here downwards
_SPECIAL = 255
# blocks, unless there are more kinds; and the most that kinds may ask for
_BLOCKS, _MOST_BLOCKS = 4, 16
# values of _SIZES that are widths
_WIDTHS = (8, 32, 64)
# most parameters of an instance
_MOST = 60_000_000

# the value that a number of a config gets at most, by the first pattern that is found in its name; None leaves it
_SIZES: tuple[tuple[str, int | None], ...] = (
    (r"kernel|stride|ratio|factor|padd|type_vocab|num_channels|conv_pos|mel|loss|coef|seed|expand|d_conv|merge", None),
    (r"(num_mem|_frames|sample|feature_size|input_feat|feat_extract|num_labels|_id$|_index$|spatial)", None),
    (r"vocab", VOCABULARY),
    (r"experts_per_tok|selected_experts|moe_top_?k|moe_k$|top_?k_experts|experts_top_?k|^top_k$", 2),
    (r"n_group$|topk_group|expert_group", 1),
    (r"n_groups$|ngroups$|num_groups$", 2),
    (r"experts$", 4),
    (r"(key_value|kv)_(attention_)?heads|query_groups|multi_query_group", 2),
    (r"(heads|n_head)$", 4),
    (r"head_?dim|head_size|d_head|dim_head|d_kv|kv_channels|key_dim|d_state|state_size|state_dim|per_layer_input", 8),
    (r"moe_|expert", 32),
    (r"intermediate|ffn|ff|mlp|inner|feed_?forward|d_ssm", 64),
    (r"dt_rank|step_rank|rotary_dim", 4),
    (r"rank", 16),
    (r"window|chunk|topk|block_size|local_attention", 8),
    (r"position|n_ctx|seq_len|max_length|text_len|context_length", 128),
    (r"image_size|img_size|canvas|resolution|spec_size|crop_size", 32),
    (r"patch_size", 8),
    (r"tokens_per_image|quer(y|ies)|latents", 4),
    (r"size|dim|width|channels|embd|d_model|units|filters|groups_width|^dim", 32),
)  # fmt: skip
_DEPTH = re.compile(
    r"^(num_(hidden_)?|n_|encoder_|decoder_|num_(en|de)coder_|(en|de)coder_num_(hidden_)?)?(layers?|depth|blocks)$"
)
# numbers of blocks at the beginning, or at the end, that are of a kind
_FIRST = re.compile(r"first_k|num_dense_layers|num_first|max_window_layers|first_.*layers|layer_end")
_LAST = re.compile(r"kv_shared_layers|num_last")
# lists of the numbers of some blocks
_CHOSEN = re.compile(r"(index|indices|indexes|idxs|ids|layers|blocks)$")


def miniature(model: Any, blocks: int = 0) -> nn.Module:
    """small_instance() of a Hugging Face model's class and config."""
    return small_instance(type(model), model.config, blocks)


def small_instance(cls: Any, config: Any, blocks: int = 0) -> nn.Module:
    """A small random model of a Hugging Face class, in fp32 and in evaluation mode, that runs on made-up inputs.

    blocks: at least so many where the config has as many; 0 for as few as hold every kind.
    Raises ValueError with the reason if the class makes none that runs.
    """
    reasons = []
    for make in (_whole, _anew, _one_by_one, _as_large, _wider, _as_wide, _fewer):
        try:
            small = _instance(cls, config, make, blocks)
            with unchanged(small):
                inputs(small)
            return small
        except CheckpointError:
            raise
        # a class may raise anything for a config that is not to its liking
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {said(error, 2)}")
    raise ValueError(f"no small instance of {cls.__name__} runs ({reasons[0]})")


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A context in which no weight may change. Raises CheckpointError."""
    before = {name: p._version for name, p in model.named_parameters() if not p.is_inference()}
    yield
    changed = [name for name, p in model.named_parameters() if name in before and p._version != before[name]]
    if changed:
        raise CheckpointError(
            f"{type(model).__name__} changes its weights when it runs ({changed[0]}), so it does not multiply with those that are "
            "stored, which would be pruned"
        )


# ---------------------------------------------------------------------------------------------------------------- weights


def _instance(cls: Any, config: Any, make: Callable[[Any, "_Sizes"], Any], least: int) -> nn.Module:
    narrow = make(config, _Sizes())
    skeleton = empty(cls, narrow)
    blocks = max(least, _blocks_needed(cls, make(config, _Sizes(depth=False)), skeleton))
    if blocks > _BLOCKS:
        narrow = make(config, _Sizes(blocks))
        skeleton = empty(cls, narrow)
    count = sum(p.numel() for p in skeleton.parameters())
    if count > _MOST:
        raise ValueError(f"it would have {count} parameters")
    with seeded():
        small: nn.Module = cls._from_config(narrow).eval()
        for module in small.modules():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    _randomize(module, parameter)
    return small


def empty(cls: Any, config: Any) -> nn.Module:
    """A model with its parameters on the meta device."""
    from transformers.initialization import no_init_weights

    config.dtype = torch.float32
    with without_weights(), no_init_weights():
        found: nn.Module = cls._from_config(copy.deepcopy(config))
    return found


def _randomize(module: nn.Module, parameter: Tensor) -> None:
    """Weights large enough that every layer matters; what is no matrix (norms, biases, decays) is moved a little.

    Norms of ones and biases of zeros would hide that they were forgotten when channels change places.
    """
    if parameter.dim() > 1 and (_is_matrix(module) or _centred(parameter)):
        convolution = kind_of(module) == "conv"
        parameter.normal_(std=(parameter[0].numel() if convolution else parameter.shape[-1]) ** -0.5)
    else:
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or kind_of(module) is not None


def _centred(parameter: Tensor) -> bool:
    """True if the class drew the values around 0, or set all to 0: not decays and steps in time."""
    mean, spread = float(parameter.mean()), float(parameter.std())
    return bool(abs(mean) <= 6 * spread * parameter.numel() ** -0.5)


@contextmanager
def seeded() -> Iterator[None]:
    """A context in which the same random numbers are drawn every time, and none of the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# ----------------------------------------------------------------------------------------------------------------- blocks


def _blocks_needed(cls: Any, deep: Any, small: nn.Module) -> int:
    """How many of the first blocks have every kind that the model of full depth has, if the small one lacks some; else 0."""
    try:
        model = empty(cls, deep)
    # what is wrong with the widths is said by the small one
    except Exception:
        return 0
    needed = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > _BLOCKS:
            kinds = [_kind(block) for block in module]
            has = {_kind(block) for block in _list(small, path)}
            if not has >= set(kinds):
                needed = max(needed, 1 + max(kinds.index(kind) for kind in set(kinds)))
    return min(needed, _MOST_BLOCKS)


def _list(model: nn.Module, path: str) -> Any:
    with suppress(AttributeError):
        return model.get_submodule(path)
    return ()


def _kind(block: nn.Module) -> str:
    """A block's modules, shapes and choices, as text."""
    parts = []
    for name, module in block.named_modules():
        choices = {k: v for k, v in vars(module).items() if isinstance(v, bool | str) and k != "training"}
        shapes = {k: tuple(p.shape) for k, p in module._parameters.items() if p is not None}
        parts.append(f"{name} {type(module).__name__} {choices} {shapes}")
    return "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class _Sizes:
    """What the fields of a config and of its parts become. blocks: how many, the first ones; None for four, of every kind.

    scale: what the widths of _SIZES are multiplied with; 0 leaves them as they are. depth, images, rest: False leaves the number of
    blocks, the sizes of images and of their parts, and all else.
    """

    blocks: int | None = None
    depth: bool = True
    scale: int = 1
    images: bool = True
    rest: bool = True
    _tokens: dict[int, int] = field(default_factory=dict)

    def of(self, config: Any) -> dict[str, Any]:
        """The fields that change, with their new values; those of parts are not among them."""
        had: dict[str, Any] = {k: v for k, v in config.to_dict().items() if not isinstance(v, bool)}
        new: dict[str, Any] = {}
        if self.depth:
            for name, depth in had.items():
                if isinstance(depth, int) and depth > _BLOCKS and _DEPTH.search(name):
                    new |= self._shallow(had, name, depth)
        if self.rest:
            new |= self._narrow({**had, **new})
        return new

    def _shallow(self, had: Mapping[str, Any], depth_name: str, depth: int) -> dict[str, Any]:
        """Fewer blocks, and what lists say of those that are left."""
        listed = {k: v for k, v in had.items() if isinstance(v, list | tuple) and len(v) == depth}
        # stages are counted from 1, where 0 is what comes before the blocks
        stages = {k: [_stage(x) for x in had.get(k) or []] for k in ("out_indices", "out_features")}
        chosen = {k: v for k, v in had.items() if k not in listed and _CHOSEN.search(k) and _numbers(v, depth)} | {
            k: v for k, v in stages.items() if _numbers(v, depth)
        }
        apart: dict[str, Any] = {}
        for k, v in (had.get("per_layer_config") or {}).items():
            apart[str(int(k))] = v
        first = {k: v for k, v in had.items() if _FIRST.search(k) and isinstance(v, int) and 0 < v < depth}
        last = {k: v for k, v in had.items() if _LAST.search(k) and isinstance(v, int) and 0 < v < depth}

        def kind(i: int) -> str:
            of_lists = [v[i] for v in listed.values()]
            # of a few chosen blocks each is wanted
            of_chosen = [(v.index(i) if len(v) <= _BLOCKS else 0) if i in v else -1 for v in chosen.values()]
            ends = [i < v for v in first.values()] + [i >= depth - v for v in last.values()]
            return repr((of_lists, of_chosen, apart.get(str(i)), ends))

        kept = list(range(min(self.blocks, depth))) if self.blocks else _kept([kind(i) for i in range(depth)])
        new: dict[str, Any] = {depth_name: len(kept)}
        new |= {k: [v[i] for i in kept] for k, v in listed.items()}
        new |= {k: [n for n, i in enumerate(kept) if i in v] or [len(kept) - 1] for k, v in chosen.items()}
        for k in stages:
            if k in new:
                new[k] = [f"stage{n + 1}" if k == "out_features" else n + 1 for n in new[k]]
        new |= {k: sum(i < v for i in kept) for k, v in first.items()}
        new |= {k: sum(i >= depth - v for i in kept) for k, v in last.items()}
        if apart:
            new["per_layer_config"] = {n: apart[str(i)] for n, i in enumerate(kept) if str(i) in apart}
        return new

    def _narrow(self, had: Mapping[str, Any]) -> dict[str, Any]:
        new = {name: self._size(name, value) for name, value in had.items() if name != "per_layer_config"}
        for total, parts in _SUMS:
            if all(type(had.get(f)) is int for f in (total, *parts)) and had[total] == sum(had[f] for f in parts):
                new[total] = sum(new[f] for f in parts)
        for wide, narrow in _MULTIPLES:
            if _whole_number(had, wide, narrow) and had[wide] % had[narrow] == 0:
                new[wide] = had[wide] // had[narrow] * new[narrow]
        for heads, width, whole, times in _PRODUCTS:
            factor = had.get(times) or 1 if times else 1
            if _whole_number(had, heads, width, whole) and had[heads] * had[width] == factor * had[whole]:
                new[heads] = max(1, int(factor * new[whole] // new[width]))
        for heads, groups in _PAIRS:
            if _whole_number(had, heads, groups):
                new[groups] = _groups(had[heads], had[groups], new[heads])
        for name, value in had.items():
            if isinstance(value, dict) and name.startswith("rope"):
                new[name] = _rotary(value, had, new)
        if had.get("per_layer_config"):
            apart: dict[Any, Any] = had["per_layer_config"]
            new["per_layer_config"] = {
                i: {k: v for k, v in {**new, **self._narrow({**_shared(had), **fields})}.items() if k in fields}
                for i, fields in apart.items()
            }
        return {name: value for name, value in new.items() if value != had[name]}

    def _size(self, name: str, value: Any) -> Any:
        if re.search(r"(token|index|_start|_end|bos|eos|pad)_?(ids?|index)$", name):
            return [self._token(v) for v in value] if isinstance(value, list) else self._token(value)
        if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            return self._sizes(name, list(value))
        if type(value) is not int or _DEPTH.search(name):
            return value
        most = self._most(name)
        return value if most is None else min(value, most)

    def _most(self, name: str) -> int | None:
        most = next((most for pattern, most in _SIZES if re.search(pattern, name)), None)
        if re.search(r"image|img|patch|window", name) and not self.images:
            return None
        if most not in _WIDTHS:
            return most
        return most * self.scale if self.scale else None

    def _sizes(self, name: str, values: list[int]) -> list[int]:
        """A list of sizes, of stages one after the other, keeps its ratios."""
        if re.search(r"^depths?$|repeats|blocks_per_stage|num_blocks", name):
            return [min(v, 2) for v in values]
        most = self._most(name)
        if most is None or _CHOSEN.search(name) or min(values) <= 0:
            return values
        if len(set(values)) == 1 or "image_size" in name or "patch_size" in name:
            return [min(v, most) for v in values]
        scale = max(1, most // 4) / min(values)
        return values if scale >= 1 else [max(1, round(v * scale)) for v in values]

    def _token(self, value: Any) -> Any:
        """A special token; two that were one stay one."""
        if type(value) is not int or value < VOCABULARY:
            return value
        return self._tokens.setdefault(value, _SPECIAL - len(self._tokens))


# (heads, groups of them that share keys and values)
_PAIRS = (
    ("num_attention_heads", "num_key_value_heads"), ("num_attention_heads", "num_kv_heads"),
    ("num_attention_heads", "num_query_groups"), ("linear_num_value_heads", "linear_num_key_heads"),
    ("encoder_num_attention_heads", "encoder_num_key_value_heads"), ("decoder_num_attention_heads", "decoder_num_key_value_heads"),
)  # fmt: skip
# a sum of others, and a multiple of another, where it was so before
_SUMS = tuple((total, ("qk_nope_head_dim", "qk_rope_head_dim")) for total in ("qk_head_dim", "head_dim"))
_MULTIPLES = (("attention_hidden_size", "hidden_size"), ("window_size", "patch_size"))
# heads x width of one = width of all, times a factor, where that was so before
_PRODUCTS = (
    ("num_attention_heads", "head_dim", "hidden_size", None), ("num_attention_heads", "attention_head_dim", "hidden_size", None),
    ("num_attention_heads", "attention_head_dim", "attention_hidden_size", None),
    ("num_heads", "head_dim", "hidden_size", "expand"), ("mamba_n_heads", "mamba_d_head", "hidden_size", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "hidden_size", "mamba_expand"), ("mamba_n_heads", "mamba_d_head", "mamba_d_ssm", None),
)  # fmt: skip


def _groups(heads: int, groups: int, left: int) -> int:
    """How many groups of heads there are among those left: one stays one, one for each head stays so, and others lie between."""
    least, most = min(groups, 2), left if groups == heads else max(1, left // 2)
    return min(most, max(least, left * groups // heads))


def _whole_number(fields: Mapping[str, Any], *names: str) -> bool:
    return all(type(fields.get(name)) is int and fields[name] > 0 for name in names)


def _shared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that hold for all blocks."""
    return {k: v for k, v in fields.items() if k != "per_layer_config"}


def _stage(value: Any) -> int:
    """The block that ends a stage, given as a number or as 'stage12'; -1 for anything else."""
    text = str(value).removeprefix("stage")
    return int(text) - 1 if text.isdigit() else -1


def _numbers(value: Any, depth: int) -> bool:
    """True for a list of numbers of blocks."""
    inside = isinstance(value, list | tuple) and bool(value) and all(type(v) is int and 0 <= v <= depth for v in value)
    return inside and len(set(value)) == len(value)


def _kept(kinds: list[str]) -> list[int]:
    """The places of the blocks that are kept: two of each kind where there is room."""
    often = 2 if 2 * len(set(kinds)) <= _BLOCKS else 1
    kept: list[int] = []
    for i, kind in enumerate(kinds):
        if sum(kinds[j] == kind for j in kept) < often:
            kept.append(i)
    more = (i for i in range(len(kinds)) if i not in kept)
    return sorted([*kept, *(i for i, _ in zip(more, range(_BLOCKS - len(kept)), strict=False))])


def _rotary(value: dict[str, Any], had: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose lists have an entry, or a share, of every pair of a head's channels."""

    def pairs(fields: Mapping[str, Any]) -> int:
        heads, width = fields.get("num_attention_heads"), fields.get("head_dim")
        return int(width or (fields.get("hidden_size") or 0) // (heads or 1)) // 2

    old, now = pairs(had), pairs(new)
    found: dict[str, Any] = {}
    for name, x in value.items():
        if isinstance(x, dict):
            found[name] = _rotary(x, had, new)
        elif isinstance(x, list) and name.endswith("_factor") and old:
            found[name] = x[: len(x) * now // old]
        elif isinstance(x, list) and name.endswith("section") and old:
            total, parts = sum(x) * now // old, len(x)
            found[name] = [total // parts + (i < total % parts) for i in range(parts)]
        else:
            found[name] = x
    return found


def _whole(config: Any, sizes: _Sizes) -> Any:
    """The config read from its fields, all of them stated."""
    return type(config).from_dict(_fields(config, sizes, config.to_dict()))


def _anew(config: Any, sizes: _Sizes) -> Any:
    """The config made from the fields that differ from its class's own, so that the class works out what follows from them."""
    return type(config).from_dict(_fields(config, sizes, config.to_diff_dict()))


def _as_large(config: Any, sizes: _Sizes) -> Any:
    """The config with images, patches and windows as they are, for stages that would have less than a window."""
    return _whole(config, replace(sizes, images=False))


def _wider(config: Any, sizes: _Sizes) -> Any:
    """The config with widths that are less narrow, for classes that round them up."""
    return _whole(config, replace(sizes, scale=4))


def _as_wide(config: Any, sizes: _Sizes) -> Any:
    """The config with widths as they are, for classes of stages that take them from several fields."""
    return _whole(config, replace(sizes, scale=0))


def _fewer(config: Any, sizes: _Sizes) -> Any:
    """The config with fewer blocks and all widths as they are."""
    return _whole(config, replace(sizes, rest=False))


def _fields(config: Any, sizes: _Sizes, given: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: _fields(part, sizes, _given(given, name, part)) for name, part in _parts(config)}
    return {**copy.deepcopy(dict(given)), **sizes.of(config), **parts, "model_type": config.model_type}


def _given(given: Mapping[str, Any], name: str, part: Any) -> Mapping[str, Any]:
    found = given.get(name)
    return found if isinstance(found, dict) else part.to_diff_dict()


def _one_by_one(config: Any, sizes: _Sizes) -> Any:
    """The config with its fields set afterwards, those that let themselves be set."""
    small = copy.deepcopy(config)
    for name, value in sizes.of(config).items():
        with suppress(Exception):
            setattr(small, name, value)
    for name, part in _parts(config):
        setattr(small, name, _one_by_one(part, sizes))
    return small


def _parts(config: Any) -> list[tuple[str, Any]]:
    """The configs inside a config, by name."""
    from transformers import PretrainedConfig

    return [(name, value) for name, value in vars(config).items() if isinstance(value, PretrainedConfig)]
