"""Embeddings whose rows are stored as integers, and the modules that are one matrix with one: heads and other embeddings.

A PackedEmbedding holds the tensors of a PackedLinear whose integers are all stored, so a row lies in known places. A TiedHead
multiplies with those very tensors, a TiedEmbedding looks rows up in them. Where an embedding's class does more with rows than look
them up (Gemma's and BART's scale them), its own forward is run on those that are asked for.
T tokens, J words of 64 inputs, G groups.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.kernels.dispatch import multiply
from secateurs.kernels.formats import INTEGER_PADDING, PANEL, WORD, mask_shape, unpack
from secateurs.kernels.fused_block import FusedBlock, separate
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, put


class _Lookup(nn.Module):
    """What is common to modules that take an embedding's place.

    kept: the module that was there, if its class is not nn.Embedding, with a table without columns: so transformers sets up what
    else is in it, and no tensor of it is stored. padding_idx: of that module, for which only gradients care.
    """

    def keep(self, module: Any) -> None:
        self.padding_idx = module.padding_idx
        if type(module) is nn.Embedding:
            return
        no_columns = module.weight.detach()[:, :0]
        del module.weight
        module.register_buffer("weight", no_columns, persistent=False)
        module.padding_idx = None
        self.kept = module

    def made_of(self, rows_TI: Tensor, ids: Tensor) -> Tensor:
        """What the class makes of ids, whose rows are given."""
        kept: Any = self._modules.get("kept")
        if kept is None:
            return rows_TI.view(*ids.shape, rows_TI.shape[1])
        return _forward(kept, rows_TI, torch.arange(len(rows_TI)).view(ids.shape))

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """The module that was there, with that weight."""
        found: Any = self._modules.get("kept")
        if found is None:
            found = nn.Embedding(1, 1, device="meta")
            found.num_embeddings, found.embedding_dim = weight.shape
        else:
            del found.weight
        found.weight, found.padding_idx = weight, getattr(self, "padding_idx", None)
        return found  # type: ignore[no-any-return]


def _forward(module: Any, table: Tensor, ids: Tensor) -> Tensor:
    """What the class of an embedding makes of ids with another table."""
    found: Tensor
    if torch.compiler.is_compiling():
        found = torch.func.functional_call(module, {"weight": table}, (ids,))
    else:
        # a copy, because another thread may be at it
        alone = copy.copy(module)
        alone._parameters, alone._buffers = {}, {**module._buffers, "weight": table}
        found = alone.forward(ids)
    return found


class PackedEmbedding(PackedLinear, _Lookup):
    """nn.Embedding on a grid: the rows of W (V, I) that are asked for, bit for bit those of the plain weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.made_of(self.rows(ids.reshape(-1)), ids)

    def rows(self, rows_T: Tensor) -> Tensor:
        """Rows by their numbers. Raises IndexError for one that is not there."""
        assert self.grid is not None
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
        return rows.to(self.dtype)

    @property
    def num_embeddings(self) -> int:
        """V, by the name that nn.Embedding gives it."""
        return self.out_features

    def dense(self) -> nn.Module:
        return self.plain(nn.Parameter(unpack(self.packed()), requires_grad=False))


def _codes(run_TJN: Tensor, bits: int) -> Tensor:
    """The 64 codes of every run of bytes, uint8 [T, J, 64]; the first lies in the lowest bits of the first byte."""
    if bits == 8:
        return run_TJN
    one = (run_TJN[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    by_code = one.reshape(*run_TJN.shape[:-1], WORD, bits) << torch.arange(bits, dtype=torch.uint8)
    return by_code.sum(-1, dtype=torch.uint8)


class _Tied(nn.Module):
    """A module whose matrix is a PackedEmbedding's."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # no child: what it holds has one name
        self.__dict__["embedding"] = embedding
        # transformers ties it to the embedding's once that is loaded
        self.weight = embedding.weight
        self.out_features, self.in_features = embedding.shape

    @property
    def embedding(self) -> PackedEmbedding:
        found: PackedEmbedding = self.__dict__["embedding"]
        return found


class TiedEmbedding(_Tied, _Lookup):
    """An embedding whose rows are a PackedEmbedding's."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.made_of(self.embedding.rows(ids.reshape(-1)), ids)

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The layer that it replaces, with the weight of a plain embedding."""
        return self.plain(weight)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, tied"


class TiedHead(_Tied):
    """The head whose matrix is a PackedEmbedding's, which it multiplies with."""

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__(embedding)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        self.fit_bias()
        own, held = self.embedding._parameters, self.embedding._buffers
        parts = own["weight"], None, held["weight_scale"], held["weight_zero"], self.bias
        return multiply(x, parts, self.embedding.layout).view(*x.shape[:-1], self.out_features)

    def fit_bias(self) -> None:
        """Cut off the zeros with which transformers, when it ties a head, makes its bias as long as the stored vector."""
        if self.bias is not None and len(self.bias) > self.out_features:
            self.bias.data = self.bias.data[: self.out_features].clone()

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The layer that it replaces, with the weight of a plain embedding."""
        plain = nn.Linear(1, 1, bias=False, device="meta")
        plain.in_features, plain.out_features = self.in_features, self.out_features
        self.fit_bias()
        plain.weight, plain.bias = weight, self.bias  # type: ignore[assignment]
        return plain

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied"


def tied_to(embedding: PackedEmbedding, module: Any) -> nn.Module:
    """What takes the place of a head or an embedding that is one matrix with that embedding."""
    if isinstance(module, nn.Embedding):
        found = TiedEmbedding(embedding)
        found.keep(module)
        return found
    return TiedHead(embedding, module.bias)


def tables(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """(name, module, why it cannot be packed or None) of the embeddings, each weight once, with all that is tied to it."""
    users: dict[int, list[nn.Module]] = {}
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            names.setdefault(id(parameter), []).append(f"{path}.{name}")
            if module not in users.setdefault(id(parameter), []):
                users[id(parameter)].append(module)
    listed = getattr(model, "all_tied_weights_keys", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or users[id(module.weight)][0] is not module:
            continue
        why = None
        for user in users[id(module.weight)]:
            why = why or _refused(user)
        others = names[id(module.weight)][1:]
        unlisted = [other for other in others if listed is not None and listed.get(other) != f"{name}.weight"]
        if unlisted:
            why = why or f"{unlisted[0]} is its weight too, and the class does not list it as tied"
        yield name, module, why


def _refused(module: nn.Module) -> str | None:
    """Why a module that holds an embedding's weight cannot take it as packed, or None."""
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return None
    if not isinstance(module, nn.Embedding):
        return f"another {kind} holds its weight too"
    if module.max_norm is not None:
        return "its rows are scaled where they lie when they are looked up"
    if type(module) is nn.Embedding:
        return None
    own = [name for name in module.state_dict() if name != "weight"]
    if own:
        return f"a {kind} has more than a table: {own[0]}"
    if not _by_row(module):
        return f"a {kind} does more than look rows up and change each of them"
    return None


def _by_row(module: Any) -> bool:
    """Whether an embedding's class makes the same of a row wherever that lies in the table: tried on all rows of a narrow one."""
    rows = module.num_embeddings
    table = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
    alone = copy.copy(module)
    alone.padding_idx = None
    try:
        ids = torch.arange(rows)[None]
        whole, moved = _forward(module, table, ids.flip(1)), _forward(alone, table.flip(0), ids)
    # a class may raise anything for what it does not expect
    except Exception:
        return False
    return whole.shape == (1, rows, 8) and torch.equal(whole, moved)


def make_dense(model: nn.Module) -> nn.Module:
    """Undo packing: every packed layer becomes the dense one that it replaced, bit for bit."""
    tied = [(name, module) for name, module in model.named_modules() if isinstance(module, TiedHead | TiedEmbedding)]
    made: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            made[id(module)] = module.dense()
            put(model, name, made[id(module)])
        elif isinstance(module, FusedBlock):
            separate(module)
        elif type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    for name, user in tied:
        put(model, name, user.dense(made[id(user.embedding)].weight))
    return model
