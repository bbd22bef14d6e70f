"""Embeddings whose rows are stored as integers, and the head that is one matrix with one.

A PackedEmbedding holds the tensors of a PackedLinear whose integers are all stored, so a row lies in known places. A TiedHead
multiplies with those very tensors. T tokens, J words of 64 inputs, G groups.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.kernels.formats import INTEGER_PADDING, PANEL, WORD, mask_shape, unpack
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, put


class PackedEmbedding(PackedLinear):
    """nn.Embedding on a grid: the rows of W (V, I) that are asked for, bit for bit those of the plain weight."""

    def forward(self, ids: Tensor) -> Tensor:
        assert self.grid is not None
        rows_T = ids.reshape(-1)
        if rows_T.numel() and not torch.compiler.is_compiling():
            low, high = rows_T.aminmax()
            if low < 0 or high >= self.out_features:
                raise IndexError(f"row {int(low if low < 0 else high)} of an embedding of {self.out_features} rows")
        grid, bits, (panels, words, _) = self.grid, self.grid.bits, mask_shape(self.shape)
        at = rows_T // PANEL, slice(None), rows_T % PANEL
        scales: Any = self.weight_scale
        zeros: Any = self.weight_zero
        run_TJN = self.weight[:-INTEGER_PADDING].view(panels, words, PANEL, WORD // 8 * bits)[at]
        codes_TI = _codes(run_TJN, bits).flatten(1)[:, : self.in_features].to(torch.int16)
        scale_TG = scales.view(grid.scale_dtype)[at].float()
        zero_TG = torch.full_like(scale_TG, grid.middle) if zeros is None else zeros[at]
        integer_TI = codes_TI - grid.spread(zero_TG.to(torch.int16), self.in_features)
        # adding a positive zero makes every zero positive
        rows = integer_TI.float() * grid.spread(scale_TG, self.in_features) + 0.0
        return rows.to(self.dtype).view(*ids.shape, self.in_features)

    @property
    def num_embeddings(self) -> int:
        """V, by the name that nn.Embedding gives it."""
        return self.out_features

    def dense(self) -> nn.Module:
        plain = nn.Embedding(1, 1, device="meta")
        plain.num_embeddings, plain.embedding_dim = self.shape
        plain.weight = nn.Parameter(unpack(self.packed()), requires_grad=False)
        return plain


def _codes(run_TJN: Tensor, bits: int) -> Tensor:
    """The 64 codes of every run of bytes, uint8 [T, J, 64]; the first lies in the lowest bits of the first byte."""
    if bits == 8:
        return run_TJN
    one = (run_TJN[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    by_code = one.reshape(*run_TJN.shape[:-1], WORD, bits) << torch.arange(bits, dtype=torch.uint8)
    return by_code.sum(-1, dtype=torch.uint8)


class TiedHead(nn.Module):
    """The head whose matrix is a PackedEmbedding's, which it multiplies with; without a bias."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # no child: what it holds has one name
        self.__dict__["embedding"] = embedding
        # transformers ties it to the embedding's once that is loaded
        self.weight = embedding.weight
        self.out_features, self.in_features = embedding.shape

    def forward(self, x: Tensor) -> Tensor:
        embedding: PackedEmbedding = self.__dict__["embedding"]
        return PackedLinear._multiply([embedding], x)[0]

    def dense(self, embedding: Any) -> nn.Module:
        """The layer that it replaces, with the weight of a plain embedding."""
        plain = nn.Linear(1, 1, bias=False, device="meta")
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight = embedding.weight
        return plain

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def tables(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, why it cannot be packed or None) of the embeddings, each weight once, with a head that is tied to it."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(module)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or users[id(module.weight)][0] is not module:
            continue
        why = None if type(module) is nn.Embedding else f"a {type(module).__name__} does more than look rows up"
        for other in users[id(module.weight)][1:]:
            if type(other) is not nn.Linear:
                why = why or f"another {type(other).__name__} holds its weight too"
            elif other.bias is not None:
                why = (
                    why
                    or "its weight is shared with a head that has a bias, which transformers would make as long as what is stored"
                )
        if module.max_norm is not None:
            why = why or "its rows are scaled when they are looked up"
        yield name, module, why


def make_dense(model: nn.Module) -> nn.Module:
    """Undo packing: every packed layer becomes the dense one that it replaced, bit for bit."""
    tied = [(name, module) for name, module in model.named_modules() if isinstance(module, TiedHead)]
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            made[id(module)] = module.dense()
            put(model, name, made[id(module)])
        elif type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    for name, head in tied:
        put(model, name, head.dense(made[id(head.__dict__["embedding"])]))
    return model
