"""torch's MultiheadAttention with heads that need not make up its width together.

torch.nn.functional.multi_head_attention_forward takes as many channels from its query as its heads have together, so torch's own
class cannot lose a head while what surrounds it keeps its width. Attention is that class with another forward function: the same
arguments, parameters, names and results, without torch's fused kernels for evaluation (scaled_dot_product_attention instead).

N examples, H heads, D channels of a head, L places of the query, S of the keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.MultiheadAttention):
    """Multi-head attention of `embed_dim` channels with any number of heads of any width.

    A module of torch's class becomes one by becomes_open(); it is not built. Its heads have D = rows of the query's projection over
    num_heads; head_dim is not read.
    """

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # layers that hold it ask this before they call a fused kernel, which counts heads by the width
        return False

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """softmax(q k^T / sqrt(D) + mask) v of each head, projected; and the softmax if need_weights. As nn.MultiheadAttention.

        Raises RuntimeError if is_causal comes without a mask, or a mask of each head is of another number of heads.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what a mask is like, and no attn_mask was given; give one")
        together = query is key and key is value
        single = query.dim() == 2
        turned = not (single or self.batch_first)
        # as in torch: a hint stands for the mask where nothing else is added and no weights are asked for
        hinted = is_causal and key_padding_mask is None and not need_weights
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, query)
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value, together)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), -1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[-1])], 1) for x in (k, v))
        if mask is not None:
            # what was added to the keys is seen by all
            mask = F.pad(mask, (0, k.shape[1] - mask.shape[-1]))
        q_NHLD, k_NHSD, v_NHSD = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q_NHLD * q_NHLD.shape[-1] ** -0.5 @ k_NHSD.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v_NHSD
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q_NHLD, k_NHSD, v_NHSD, mask, dropout, is_causal=hinted)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if single:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if turned else out, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, together: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of all heads."""
        if together and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        packed = self.in_proj_weight is not None
        weights = (
            self.in_proj_weight.chunk(3) if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """What is added to the scores of N, H, L, S, or axes of one in their place."""
        padding = F._canonical_mask(
            mask=key_padding_mask, mask_name="key_padding_mask", other_type=F._none_or_dtype(attn_mask),
            other_name="attn_mask", target_type=query.dtype,
        )  # fmt: skip
        mask = F._canonical_mask(
            mask=attn_mask, mask_name="attn_mask", other_type=None, other_name="", target_type=query.dtype, check_other=False
        )  # fmt: skip
        if mask is not None and mask.dim() == 3:
            examples = 1 if query.dim() == 2 else query.shape[0 if self.batch_first else 1]
            if len(mask) != examples * self.num_heads:
                raise RuntimeError(
                    f"attn_mask is of {len(mask)} heads, and {examples} examples with {self.num_heads} heads each have "
                    f"{examples * self.num_heads}; give one for each, or one [L, S] for all"
                )
            mask = mask.reshape(examples, self.num_heads, *mask.shape[1:])
        if padding is None:
            return mask
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        return padding if mask is None else mask + padding


def is_torchs(module: nn.Module) -> bool:
    """True for a module of torch's class, which is not one of a class of its own."""
    return type(module) is nn.MultiheadAttention and "forward" not in vars(module)


def becomes_open(model: nn.Module, path: str) -> None:
    """Let an attention of torch's class be one of Attention, in place. Encoders around it then pass it no nested tensors."""
    module = model.get_submodule(path)
    if not is_torchs(module):
        return
    module.__class__ = Attention
    for name, outer in model.named_modules():
        if isinstance(outer, nn.TransformerEncoder) and f"{path}.".startswith(f"{name}." if name else ""):
            outer.use_nested_tensor = False


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """All attentions of torch's class run as Attention, so that the layers in them can be seen."""
    found = [module for module in model.modules() if is_torchs(module)]
    for module in found:
        module.__class__ = Attention
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.MultiheadAttention
