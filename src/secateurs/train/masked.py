"""A linear layer with its mask as a buffer, and SR-STE: training that finds an N:M pattern."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateurs.base.errors import PlanError
from secateurs.matrix import patterns
from secateurs.train.copies import Copy, found_in
from secateurs.train.matrices import apart, as_matrix, check_pattern, chosen, holders, make_plain


class MaskedLinear(nn.Module):
    """y = x (W * mask)' + b. Gradients of removed weights are exactly 0; mask_OI is a buffer, so it is in the state_dict.

    weight_OI, mask_OI: [O, I], True stays. bias_O: [O] or None. Raises PlanError for a mask of another shape.

    Example:

        >>> import torch, secateurs as sc
        >>> layer = sc.train.MaskedLinear(torch.ones(1, 2), torch.tensor([[True, False]]))
        >>> layer(torch.tensor([[2.0, 3.0]])).item(), layer.plain().weight.tolist()
        (2.0, [[1.0, 0.0]])
    """

    mask_OI: Tensor

    # tensors that are made in inference mode could not be trained
    @torch.inference_mode(False)
    def __init__(self, weight_OI: Tensor, mask_OI: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        if mask_OI.shape != weight_OI.shape:
            raise PlanError(
                f"a weight of {tuple(weight_OI.shape)} and a mask of {tuple(mask_OI.shape)}; they must be alike"
            )
        self.weight = nn.Parameter(weight_OI.detach().clone())
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach().clone())
        self.register_buffer("mask_OI", mask_OI.detach().to(weight_OI.device, torch.bool, copy=True))

    @classmethod
    def of(cls, linear: nn.Linear, mask_OI: Tensor | None = None) -> "MaskedLinear":
        """A copy of a linear layer with a mask, by default its own zeros."""
        return cls(linear.weight, linear.weight != 0 if mask_OI is None else mask_OI, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """y_TO of x_TI, by the weights that stay."""
        return F.linear(x, torch.where(self.mask_OI, self.weight, 0), self.bias)

    def plain(self) -> nn.Linear:
        """An ordinary linear layer with zeros where the mask has them."""
        out, inputs = self.weight.shape
        linear = nn.Linear(inputs, out, self.bias is not None, self.weight.device, self.weight.dtype)
        linear.weight.data.copy_(torch.where(self.mask_OI, self.weight, 0))
        if self.bias is not None:
            linear.bias.data.copy_(self.bias)
        return linear


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, keep)
        ctx.decay = decay
        return torch.where(keep, weight, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, keep = ctx.saved_tensors
        return torch.where(keep, gradients[0], gradients[0] + ctx.decay * weight), None, None


class SparseRefined(nn.Module):
    """A parametrization: the weight pruned to its pattern by magnitude, anew in every forward pass."""

    def __init__(self, pattern: patterns.Pattern, to: Any, back: Any, decay: float) -> None:
        super().__init__()
        self.pattern, self.to_matrix, self.from_matrix, self.decay = pattern, to, back, decay

    def forward(self, weight: Tensor) -> Tensor:
        size_OI = self.to_matrix(weight.detach()).abs().float()
        keep = self.from_matrix(self.pattern.keep(size_OI, self.pattern.fixed_sparsity or 0.0))
        found: Tensor = _Straight.apply(weight, keep, self.decay)  # type: ignore[no-untyped-call]
        return found


def sr_ste(
    model: nn.Module, pattern: str = "2:4", decay: float = 2e-4, skip: tuple[str, ...] = (), frozen: str | None = None
) -> list[str]:
    """Train an N:M pattern from dense weights. Returns the names of the parametrized parameters; finish() makes them plain.

    The forward pass uses pruned weights. Gradients reach all weights, and removed ones decay: grad + decay (1 - mask) w.
    Zhou et al. 2021, arXiv 2102.04010, eq. 9. Create the optimizer afterwards. The decay is added in every backward pass as it is:
    passes that are accumulated add it as often, and a GradScaler divides it by its scale (bf16 needs none). frozen: 'prune' prunes
    frozen matrices now, by magnitude, 'skip' leaves them dense; without it they are refused by name. Raises PlanError.
    model: changed in place. pattern: 'N:M', N kept of M inputs in a row. skip: parameters that stay dense.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> sc.train.sr_ste(net, "2:4")
        ['0.weight']
        >>> sc.train.finish(net)
        >>> (net[0].weight != 0).view(4, 2, 4).sum(2).tolist()
        [[2, 2], [2, 2], [2, 2], [2, 2]]
    """
    parsed = patterns.parse(pattern)
    if parsed.fixed_sparsity is None:
        raise PlanError(f"SR-STE trains N:M patterns, and {pattern} has no sparsity of its own")
    found = chosen(model, skip)
    trained, once = apart(found, frozen, "SR-STE finds its pattern by training")
    found = {**trained, **once}
    layouts = {name: as_matrix(model, parameter) for name, parameter in found.items()}
    for name, parameter in found.items():
        check_pattern(name, layouts[name][0](parameter.detach()), pattern)
    for name, parameter in once.items():
        to, back = layouts[name]
        weight = parameter.detach()
        weight.masked_fill_(~back(parsed.keep(to(weight).abs().float(), parsed.fixed_sparsity)), 0)
    for name, parameter in trained.items():
        # a shared matrix is pruned wherever it is used, and decays once
        own = decay
        for module, leaf in holders(model, parameter):
            refined = SparseRefined(parsed, *layouts[name], own)
            parametrize.register_parametrization(module, leaf, refined)
            own = 0.0
    return list(trained)


def finish(model: nn.Module, *copies: Copy) -> None:
    """Make the parameters that sr_ste() parametrized plain again, with their zeros.

    copies: of the model, such as the average that is shipped. Those that were made after sr_ste() are finished too, by their own
    weights. Warns of one that has fewer zeros than the model.
    model: changed in place. Raises nothing of its own.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = sc.train.sr_ste(net)
        >>> sc.train.finish(net)
        >>> type(net[0]).__name__, float((net[0].weight == 0).float().mean())
        ('Linear', 0.5)
    """
    found = _finish(model)
    for copy in copies:
        if isinstance(copy, nn.Module):
            _finish(copy)
        shapes = {name: tuple(weight.shape) for name, weight in found.items()}
        full = [n for n, t in found_in(copy, shapes).items() if int((t == 0).sum()) < int((found[n] == 0).sum())]
        if full:
            warnings.warn(
                f"{type(copy).__name__} is not as sparse as the model: {len(full)} of {len(found)} matrices have fewer zeros, "
                f"first {full[0]}; make the copy after sr_ste()",
                stacklevel=2,
            )


def _finish(model: nn.Module) -> dict[str, Tensor]:
    """Make a model's parameters plain; returns them by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for leaf, chain in list(module.parametrizations.items()):
                if any(isinstance(p, SparseRefined) for p in chain):
                    make_plain(module, leaf)
                    found[f"{path}.{leaf}".strip(".")] = getattr(module, leaf).detach()
    return found
