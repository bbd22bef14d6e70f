"""Lets a packed model decode a token with one call a block, after a proof that its class computes what that call does."""

import copy
from typing import Any

import torch
from torch import nn

from secateurs.base.progress import quiet
from secateurs.kernels.fused_block import fuse, fusible, taken
from secateurs.kernels.packed_linear import DenseLinear
from secateurs.model.miniature import seeded, small_instance

# tokens of the proof's prompt, and the places of those that are decoded after it, some beyond any context: classes do other things
# from some place on (Ministral 3 scales its queries from 16384 on)
_PROMPT = 5
_PLACES = (5, 6, 2**10 + 1, 2**13 + 1, 2**15 + 1, 2**17 + 1, 2**20 + 1, 2**22 + 1, 13, 14, 15, 16)


# what was found of a class and a config: None is proved
_KNOWN: dict[Any, str | None] = {}


def fuse_blocks(model: Any) -> str | None:
    """Fuse the blocks of a model if its class is proved to compute what csrc/block.cc does, or else their attention alone; None,
    or in a clause what is not fused and why.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    whys = []
    for whole in (True, False):
        parts = fusible(model, whole)
        alone = bool(parts) and not any("self_attn" in part._modules for part in parts)
        if not parts or (alone and whole):
            whys.append(
                f"{type(model).__name__} has no block of self_attn with q_proj, k_proj, v_proj and o_proj, mlp with gate_proj, "
                "up_proj and down_proj, and norms around them"
            )
            continue
        key = type(model), config.to_json_string(use_diff=False), whole
        if key not in _KNOWN:
            _KNOWN[key] = doubt(type(model), config, whole)
        why = _KNOWN[key]
        if why is None:
            for part in parts:
                fuse(part)
            if not alone:
                return None
            return f"{whys[0]}; the attention of each is one call"
        whys.append(why)
    return whys[0]


def doubt(cls: Any, config: Any, whole: bool = True) -> str | None:
    """None if a small random instance of a class decodes the same with fused blocks as with its own, in fp32; else what was found.

    Every block has to take the short way for some tokens, and contexts grow beyond the small one's windows. whole=False: their
    attention alone.
    """
    # the only kind that blocks take the short way with
    config._attn_implementation = "sdpa"
    try:
        with quiet():
            small: Any = small_instance(cls, config)
        for module in small.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear
        wanted = _decoded(small)
        blocks = fusible(small, whole)
        for block in blocks:
            fuse(block)
        found = _decoded(small)
    # a class may raise anything for what it does not expect; its own forward is always right
    except Exception as error:
        said = (str(error).strip() or "nothing more").splitlines()[0]
        return f"a small instance of {cls.__name__} does not decode: {type(error).__name__}: {said}"
    refused = sum(not taken(block) for block in blocks)
    if refused or not blocks:
        return (
            f"{refused or 'all'} of {cls.__name__}'s {len(blocks)} blocks compute something else than the one call does"
        )
    off, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    # written so that NaN fails
    if not off <= 1e-4 * size:
        return f"the logits of a small {cls.__name__} change by {off / size:.2g} of the largest"
    return None


@torch.no_grad()
def _decoded(model: Any) -> torch.Tensor:
    """The logits of tokens that are given one by one after a prompt."""
    out: Any
    with seeded():
        ids = torch.randint(0, int(model.config.get_text_config().vocab_size), (1, _PROMPT + len(_PLACES)))
    out = model(input_ids=ids[:, :_PROMPT], use_cache=True)
    logits = []
    for i, place in enumerate(_PLACES, _PROMPT):
        at = torch.tensor([[place]])
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, position_ids=at, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits)
