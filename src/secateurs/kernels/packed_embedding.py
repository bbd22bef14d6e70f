"""Embeddings whose rows are stored as integers, and the modules that are one matrix with one: heads and other embeddings.

A PackedEmbedding holds the tensors of a PackedLinear whose integers are all stored, so a row lies in known places. A TiedHead
multiplies with those very tensors, a TiedEmbedding looks rows up in them. Where an embedding's class does more with rows than look
them up (Gemma's and BART's scale them), its own forward is run on those that are asked for.
T tokens.
"""

import copy
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PackError
from secateurs.kernels.dispatch import CODES, multiply
from secateurs.kernels.formats import packed_length, scales_shape, unpack
from secateurs.kernels.fused_block import Fused, separate
from secateurs.kernels.library import Weight, library
from secateurs.kernels.packed_experts import dense_again
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear, put
from secateurs.kernels.sparse_convolution import SparseConvolution
from secateurs.matrix.grids import Grid


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
        parts, layout = PackedLinear.given([self])
        found: Tensor = _operator(rows_T, parts[0], parts[2], parts[3], layout, self.dtype)
        return found

    @property
    def num_embeddings(self) -> int:
        """V, by the name that nn.Embedding gives it."""
        return self.out_features

    def dense(self) -> nn.Module:
        return self.plain(nn.Parameter(unpack(self.packed()), requires_grad=False))


_library: Any = torch.library.Library("secateurs", "FRAGMENT")  # type: ignore[no-untyped-call]
# layout: LAYOUT of kernels/formats.py
_library.define(
    "rows(Tensor rows, Tensor values, Tensor scale, Tensor? zero, int[] layout, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator: Any = torch.ops.secateurs.rows.default


@torch.library.impl(_library, "rows", "CPU")
def _rows(
    rows_T: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, layout: list[int], dtype: torch.dtype
) -> Tensor:
    outputs, inputs, bits, group, half = layout
    grid = Grid(bits, group, zero is None, bool(half))
    shape = (outputs, inputs)
    wanted = packed_length(shape, grid), math.prod(scales_shape(shape, grid))
    if (values.numel(), scale.numel()) != wanted or (zero is not None and zero.numel() != wanted[1]):
        raise PackError(
            f"an embedding of {outputs} x {inputs} on {grid} is stored in {wanted[0]} bytes and {wanted[1]} scales"
        )
    wide = dtype if dtype in CODES else torch.float32
    found = torch.empty(len(rows_T), inputs, dtype=wide)
    ids = rows_T.to(torch.int64).contiguous()
    weight = Weight(
        outputs, inputs, None, values.data_ptr(), None, 0, None, None, bits, group, half, scale.data_ptr(),
        None if zero is None else zero.data_ptr(), None,
    )  # fmt: skip
    if library().secateurs_rows(ctypes.addressof(weight), ids.data_ptr(), len(ids), CODES[wide], found.data_ptr()):
        wrong = next(i for i in ids.tolist() if not 0 <= i < outputs)
        raise IndexError(f"row {wrong} of an embedding of {outputs} rows")
    return found.to(dtype)


@torch.library.register_fake("secateurs::rows", lib=_library)  # type: ignore[untyped-decorator]
def _rows_fake(
    rows_T: Tensor, values: Tensor, scale: Tensor, zero: Tensor | None, layout: list[int], dtype: torch.dtype
) -> Tensor:
    return values.new_empty((rows_T.shape[0], layout[1]), dtype=dtype)


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
    for module in list(model.modules()):
        dense_again(module)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            made[id(module)] = module.dense()
            put(model, name, made[id(module)])
        elif isinstance(module, SparseConvolution):
            put(model, name, module.dense())
        elif isinstance(module, Fused):
            separate(module)
        elif type(module) is DenseLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
    for name, user in tied:
        put(model, name, user.dense(made[id(user.embedding)].weight))
    return model
