"""Experts that a class holds in one 3-D parameter, stored matrix by matrix, each in a format of its own.

The class keeps its own forward: its code gets a Fused in the parameter's place, takes a Slice of it by an expert's number and
multiplies by that, which calls the kernel of that expert's matrix. So routing, biases and activation are the class's own.
E experts, O outputs, I inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PackError
from secateurs.kernels.formats import unpack
from secateurs.kernels.packed_linear import DenseLinear, PackedLinear

# the module that holds the matrices of a parameter `name` is named so: what converts a stored `name` leaves it alone
PREFIX = "packed_"

_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_BATCHES = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}


def packed_name(name: str, expert: int) -> str:
    """The stored name of the values of an expert's matrix of a fused parameter."""
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.{PREFIX}{leaf}.{expert}.weight".strip(".")


class PackedExperts(nn.Module):
    """The matrices of a fused parameter, each a PackedLinear, or a DenseLinear where packing has nothing to gain.

    transposed: the class stores [E, I, O] and multiplies x W; else [E, O, I] and x W'.
    """

    def __init__(self, matrices: Sequence[PackedLinear | DenseLinear], transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        for i, matrix in enumerate(matrices):
            self.add_module(str(i), matrix)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Any:
        return self._modules[str(range(len(self))[index])]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def dense(self) -> nn.Parameter:
        """The fused parameter, bit for bit."""
        weights = [unpack(m.packed()) if isinstance(m, PackedLinear) else m.weight.detach() for m in self]
        return nn.Parameter(torch.stack([w.T if self.transposed else w for w in weights]), requires_grad=False)

    def extra_repr(self) -> str:
        return f"transposed={self.transposed}"


class _Stored:
    """What the code of a class asks of a tensor beside its values."""

    # the initialization of a class passes it over
    _is_hf_initialized = True
    shape: tuple[int, ...]

    def __init__(self, like: PackedLinear | DenseLinear) -> None:
        self._like = like

    @property
    def dtype(self) -> torch.dtype:
        like = self._like
        return like.dtype if isinstance(like, PackedLinear) else like.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._like.weight.device

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def dim(self) -> int:
        return len(self.shape)


class Slice(_Stored):
    """The matrix of one expert: [O, I] for F.linear, or [I, O], if transposed, for x @ it."""

    def __init__(self, matrix: PackedLinear | DenseLinear, transposed: bool) -> None:
        super().__init__(matrix)
        self.transposed = transposed
        sides = matrix.out_features, matrix.in_features
        self.shape = sides[::-1] if transposed else sides

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _MATMUL and len(args) == 2 and not kwargs and isinstance(args[1], Slice) and args[1].transposed:
            return args[1]._like(args[0])
        raise _refused(func)


def _linear(input: Tensor, weight: Slice, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Slice) or weight.transposed:
        raise _refused(nn.functional.linear)
    y: Tensor = weight._like(input)
    return y if bias is None else y + bias


class Fused(_Stored):
    """What the code of a class finds in a fused parameter's place."""

    def __init__(self, experts: PackedExperts) -> None:
        super().__init__(experts[0])
        self.experts = experts
        self.shape = (len(experts), *Slice(experts[0], experts.transposed).shape)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, index: int | Tensor) -> Slice:
        if isinstance(index, Tensor) and index.dim():
            raise _refused("indexing by several experts at once")
        return Slice(self.experts[int(index)], self.experts.transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every expert on tokens of its own
        if func in _BATCHES and len(args) == 2 and not kwargs:
            x, weight = args
            if isinstance(weight, Fused) and weight.experts.transposed and x.dim() == 3 and len(x) == len(weight):
                return torch.stack([matrix(x[e]) for e, matrix in enumerate(weight.experts)])
        raise _refused(func)

    def __getattr__(self, name: str) -> Any:
        # torch looks for marks of its own on whatever it meets
        if name.startswith("_"):
            raise AttributeError(name)
        raise _refused(name)


def _refused(what: Any) -> PackError:
    name = what if isinstance(what, str) else getattr(what, "__name__", str(what))
    return PackError(
        f"packed experts are multiplied one after the other, and {name} asks for something else: "
        "model.set_experts_implementation('eager') first, or make_dense(model)"
    )


def put_experts(owner: nn.Module, name: str, experts: PackedExperts) -> None:
    """Put packed experts in the place of the fused parameter of that name of a module."""
    if name in owner._parameters:
        del owner._parameters[name]
    experts.train(False)
    owner.add_module(f"{PREFIX}{name}", experts)
    owner.__dict__[name] = Fused(experts)


def packed_in(owner: nn.Module) -> dict[str, PackedExperts]:
    """{name of a fused parameter: what stands in its place} of a module."""
    return {name: x.experts for name, x in owner.__dict__.items() if isinstance(x, Fused)}


def dense_again(owner: nn.Module) -> None:
    """Give a module its fused parameters back."""
    for name, experts in packed_in(owner).items():
        del owner.__dict__[name]
        del owner._modules[f"{PREFIX}{name}"]
        owner.register_parameter(name, experts.dense())


def fence() -> Tensor:
    """What is stored under the name of a fused parameter that is packed: of its shape no loader makes the parameter.

    Without it a loader that does not know the format would find no experts, and go on with random ones.
    """
    return torch.zeros(0, dtype=torch.uint8)


def with_fences(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are stored of a model with packed experts."""
    names = (f"{path}.{name}".strip(".") for path, module in model.named_modules() for name in packed_in(module))
    return {**model.state_dict(), **{name: fence() for name in names}}


def run_one_by_one(model: Any) -> None:
    """Let a transformers model's mixtures call one expert after the other, which packed experts need."""
    if hasattr(model, "set_experts_implementation"):
        # classes that have no other way refuse to be told
        with suppress(ValueError, RuntimeError, AttributeError):
            model.set_experts_implementation("eager")
