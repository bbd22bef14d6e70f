"""A block's mixture: where its tokens are sent, what each expert makes of them, and how experts are taken out.

The class's own code routes. A hook on the experts sees what they are called with: tokens, the experts chosen for each and their
weights. So a softmax before or after the choice, normalised weights, correction biases and groups are as in the class. An expert
that is never chosen has its logit and its bias at -inf. E experts, T tokens, K choices of each, H hidden width, I neurons of an
expert.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from secateurs.model.layers import Layer, layers_of
from secateurs.model.products import Product, products
from secateurs.shrink.units import put

_COUNTS, _PER_TOKEN = re.compile("experts"), re.compile("per_tok|shared|active|selected")
_ACTIVE = re.compile("^(moe_)?(top_?k|k)$|experts_per_tok|selected_experts")
_GROUPS = re.compile("^(n|num)_(expert_)?groups?$")


def number(block: nn.Module, fused: Collection[str]) -> int:
    """How many experts a block has; 0 of one without a mixture."""
    return next((len(p) for m in block.modules() for n, p in m._parameters.items() if n in fused and p is not None), 0)


class _Seen(Exception):
    """Ends a pass where the experts are called."""


class Otherwise(ValueError):
    """Why a mixture is not the sum of its experts' outputs, each times a weight."""


class Mixture:
    """The mixture of a block. parent: the module that calls the router and the experts. router: the module that chooses; rows_EH:
    its matrix, a parameter.

    number: of experts. groups: among how many groups of neighbours experts are chosen, all of one size; 1 if any K may be. fused:
    {name of the parameters that hold a matrix of each expert: kind of layer}. Raises ValueError if the router is not one matrix
    [E, H].
    """

    def __init__(self, block: nn.Module, fused: Mapping[str, str]) -> None:
        self.fused = fused
        self.number = number(block, fused)
        self.parent, self.router, self.rows_EH, self.experts = _found(block, fused)
        counted = (x for m in (self.router, self.parent) for n, x in vars(m).items() if _GROUPS.search(n))
        self.groups = next((x for x in counted if type(x) is int and x > 0), 1)

    # ------------------------------------------------------------------------------------------------------------- running

    def __call__(self, x_TH: Tensor) -> Tensor:
        """What the mixture gives, shared experts included: [T, H]."""
        out = self.parent(x_TH[None])
        found: Tensor = (out[0] if isinstance(out, tuple) else out).reshape(x_TH.shape)
        return found.float()

    def routed(self, x_TH: Tensor, gone: Sequence[int] = (), known_TE: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts chosen for each token, [T, K], and their weights, if those of `gone` are never chosen.

        known_TE: the router's products for these tokens, as product() gave them; None to multiply. Raises Otherwise if the experts
        are not called with tokens, choices and weights, ValueError if they are not chosen by the tokens' hidden states alone.
        """
        with never([self], gone, known_TE):
            return self._chosen(x_TH, {})

    def routed_by(self, x_TH: Tensor, rows_EH: Tensor) -> tuple[Tensor, Tensor]:
        """routed() with other rows of the router, of which the weights have a gradient; all that chooses is in fp32."""
        inside = {id(m) for m in self.experts.modules()}
        other: dict[str, Any] = {}
        for path, module in self.parent.named_modules():
            if id(module) not in inside:
                for n, t in (*module._parameters.items(), *module._buffers.items()):
                    if t is not None and t.is_floating_point():
                        other[f"{path}.{n}" if path else n] = rows_EH if t is self.rows_EH else t.float()
        return self._chosen(x_TH.float(), other)

    def _chosen(self, x_TH: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """routed(), with other tensors in place of some of the mixture's."""
        seen: list[Any] = []

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            seen[:] = [*args, *kwargs.values()]
            raise _Seen

        handle = self.experts.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            functional_call(self.parent, dict(tensors), (x_TH[None],))
        except _Seen:
            pass
        # DeepSeek-V4's first blocks choose by the token's number, which is not given here
        except (TypeError, AttributeError):
            raise ValueError("its experts are chosen by more than a token's hidden state") from None
        finally:
            handle.remove()
        index, weight = [*seen, None, None, None][1:3]
        if not (isinstance(index, Tensor) and isinstance(weight, Tensor)) or not (
            index.shape == weight.shape
            and index.dim() == 2
            and len(index) == len(x_TH)
            and not index.is_floating_point()
        ):
            raise Otherwise("its experts are not called with tokens, the experts chosen for each, and their weights")
        return index, weight.float()

    @property
    def active(self) -> int:
        """How many experts a token is sent to."""
        return self.routed(self.rows_EH.detach()[:1])[0].shape[1]

    def is_sum_of_experts(self) -> None:
        """Raise Otherwise unless the experts give, for some tokens, the weighted sum of what each of them gives alone."""
        x_TH = self.rows_EH.detach()
        index_TK, weight_TK = self.routed(x_TH)
        with torch.no_grad():
            whole_TH = self.experts(x_TH, index_TK, weight_TK.to(x_TH.dtype)).reshape(x_TH.shape).float()
            alone_ETH = torch.stack([self.expert(x_TH, e) for e in range(self.number)])
        chosen_TKH = alone_ETH[index_TK, torch.arange(len(x_TH))[:, None]]
        odd = (chosen_TKH * weight_TK[..., None]).sum(1) - whole_TH
        # rounding of the dtype that the model runs in
        if not odd.norm() <= 0.02 * whole_TH.norm():
            raise Otherwise("its experts do not give the weighted sum of what each gives alone")

    def expert(self, x_TH: Tensor, e: int) -> Tensor:
        """What expert e makes of every token, [T, H]."""
        index_T1 = torch.full((len(x_TH), 1), e, dtype=torch.long, device=x_TH.device)
        found: Tensor = self.experts(x_TH, index_T1, torch.ones_like(x_TH[:, :1]))
        return found.reshape(x_TH.shape).float()

    def down(self, x_TH: Tensor, e: int) -> tuple[Layer, Tensor]:
        """Expert e's last matrix, and what it is multiplied with, [T, I].

        Raises ValueError if that is not seen: the experts are to run one by one (evaluation_mode).
        """
        layers = {layer.read().data_ptr(): layer for layer in layers_of(self.experts, "", self.fused)}
        with _Products() as seen:
            self.expert(x_TH, e)
        for product in reversed(seen.found):
            layer = layers.get(product.place)
            if layer is not None and layer.shape == product.shape and layer.shape[0] == x_TH.shape[1]:
                return layer, product.x_TI.float()
        raise ValueError("no last matrix of its experts was seen at work")

    def logits(self, x_TH: Tensor) -> Tensor:
        """The router's logits, [T, E]."""
        found = self.product(x_TH)
        if found is None:
            raise ValueError("its router does not multiply with F.linear")
        return found.float()

    def product(self, x_TH: Tensor) -> Tensor | None:
        """The router's logits in the dtype that it multiplies in, [T, E]; None if it does not multiply once with F.linear."""
        seen = _Logits([self.rows_EH], [])
        with seen:
            self.routed(x_TH)
        return seen.found[0].reshape(len(x_TH), -1) if len(seen.found) == 1 else None

    def send_to(self, active: int) -> None:
        """Let the router send every token to so many experts. Raises ValueError if no number that it states is this one."""
        before = self.active
        for module in (self.router, self.parent):
            for name, value in list(vars(module).items()):
                if value == before and _ACTIVE.search(name):
                    setattr(module, name, active)
        if self.active != active:
            raise ValueError(f"its router does not send tokens to {active} experts")

    def shared(self, x_TH: Tensor) -> tuple[nn.Linear, Tensor] | None:
        """The shared expert's last matrix, and what the mixture adds its product with, [T, I]; None if there is none.

        A gate that multiplies its output is in the inputs: the shared part of the mixture is the matrix times these.
        """
        inside = {id(m) for child in (self.router, self.experts) for m in child.modules()}
        lasts = [m for m in self.parent.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            if out.shape[-1] == x_TH.shape[1]:
                seen[:] = [(module, args[0].reshape(len(x_TH), -1).float(), out.reshape(x_TH.shape).float())]

        handles = [m.register_forward_hook(hook) for m in lasts]
        try:
            whole_TH = self(x_TH)
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            return None
        index_TK, weight_TK = self.routed(x_TH)
        layer, a_TI, out_TH = seen[0]
        rest_TH = whole_TH - self.experts(x_TH, index_TK, weight_TK.to(x_TH.dtype)).reshape(x_TH.shape).float()
        gate_T1 = (rest_TH * out_TH).sum(1, keepdim=True) / out_TH.square().sum(1, keepdim=True).clamp(min=1e-30)
        odd = (rest_TH - gate_T1 * out_TH).square().sum()
        # rounding of the dtype that the model runs in
        return (layer, a_TI * gate_T1) if odd <= 1e-3 * rest_TH.square().sum() else None

    # ------------------------------------------------------------------------------------------------------------- cutting

    def cut(self, removed: Collection[int]) -> None:
        """Take experts out, in place: their matrices, the router's rows and biases, the numbers that the modules state."""
        stays = torch.tensor([e for e in range(self.number) if e not in removed])
        holder = next(m for m in self.router.modules() if m._parameters.get("weight") is self.rows_EH)
        for module in (self.parent, self.experts, *self.router.modules()):
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    axis = (
                        None if tensor is None or _is_other(module, self.parent, name) else _axis(tensor, self.number)
                    )
                    if tensor is not None and axis is not None:
                        put(module, name, tensor.detach().index_select(axis, stays.to(tensor.device)))
            for name, value in list(vars(module).items()):
                if type(value) is int and value == self.number and _COUNTS.search(name) and not _PER_TOKEN.search(name):
                    setattr(module, name, len(stays))
        self.number, self.rows_EH = len(stays), holder._parameters["weight"]


def _found(block: nn.Module, fused: Collection[str]) -> tuple[nn.Module, nn.Module, Any, nn.Module]:
    """(the mixture, its router, the router's matrix, its experts) of a block."""
    for path, module in block.named_modules():
        held = [p for n, p in module._parameters.items() if n in fused and p is not None]
        if held:
            if len({len(p) for p in held}) > 1:
                raise ValueError("its experts have unequal numbers of matrices")
            parent = block.get_submodule(path.rpartition(".")[0])
            for child in parent.children():
                for inner in child.modules() if child is not module else ():
                    weight = inner._parameters.get("weight")
                    if weight is not None and weight.dim() == 2 and len(weight) == len(held[0]):
                        return parent, child, weight, module
    raise ValueError("no router with one row for every expert was found")


def _is_other(module: nn.Module, parent: nn.Module, name: str) -> bool:
    """True for a parameter of the mixture itself that is not known to have an entry an expert."""
    return module is parent and not re.search("expert|bias|score", name)


def _axis(tensor: Tensor, experts: int) -> int | None:
    """The axis of a parameter that has an entry an expert."""
    return next((i for i, size in enumerate(tensor.shape) if size == experts), None)


@contextmanager
def never(mixtures: Sequence[Mixture], gone: Sequence[int], known_TE: Tensor | None = None) -> Iterator[None]:
    """A context in which mixtures choose some experts never: their logits are -inf, and so are the biases they are chosen by.

    known_TE: logits that are taken in place of a product; of one mixture.
    """
    if not gone and known_TE is None:
        yield
        return
    biases = [
        (tensor, tensor.detach().clone())
        for m in mixtures
        for module in (m.parent, *m.router.modules())
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.numel() == m.number and "bias" in name
    ]
    try:
        for tensor, _ in biases:
            tensor.detach().reshape(-1)[list(gone)] = -torch.inf
        with _Logits([m.rows_EH for m in mixtures], gone, known_TE):
            yield
    finally:
        for tensor, before in biases:
            tensor.detach().copy_(before)


class _Logits(TorchFunctionMode):
    """Sees the logits, and sets some to -inf, where F.linear multiplies with a router's matrix, or with a copy of it in another
    dtype. known_TE: what such a product gives; None to multiply.
    """

    def __init__(self, weights: Sequence[Any], gone: Sequence[int], known_TE: Tensor | None = None) -> None:
        super().__init__()
        self.known_TE = known_TE
        # the tensors themselves, lest another one gets the id of a copy that is gone
        self.weights, self.gone = {id(weight): weight for weight in weights}, list(gone)
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        routes = func is nn.functional.linear and len(args) > 1 and id(args[1]) in self.weights
        if routes and self.known_TE is not None:
            out = self.known_TE.reshape(*args[0].shape[:-1], -1)
        else:
            out = func(*args, **(kwargs or {}))
        if routes:
            out = out.clone()
            out[..., self.gone] = -torch.inf
            self.found.append(out)
        elif args and isinstance(out, Tensor) and id(args[0]) in self.weights and out.shape == args[0].shape:
            self.weights[id(out)] = out
        return out


class _Products(TorchFunctionMode):
    """Keeps the matrix products that run in its context, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += products(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
