"""LoRA (Hu et al. 2021, arXiv 2106.09685) that keeps zeros: the low-rank product is masked like the weight.

    W + mask * (up @ down)        mask = W != 0, up [..., O, r] zeros at first, down [..., r, I] normal

The usual merge, W + up @ down, is dense and would fill the zeros of a pruned model.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateurs.base.errors import PlanError
from secateurs.train.matrices import make_plain, prunable


class _Masked(nn.Module):
    """The parametrization of one weight."""

    mask: Tensor

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *outer, rows, columns = weight.shape
        down = torch.randn(*outer, rank, columns, generator=generator) / columns**0.5
        self.up = nn.Parameter(torch.zeros(*outer, rows, rank, dtype=weight.dtype, device=weight.device))
        self.down = nn.Parameter(down.to(weight))
        self.register_buffer("mask", weight.detach() != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down) * self.mask


class Lora:
    """The low-rank parameters of a model. Call merge() before the model is saved.

    lora() makes one. places: the modules, with the parameter's name in each; added: the parameters of all.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> for weight in (net[0].weight, net[2].weight):
        ...     weight.data[weight.abs() < weight.abs().median()] = 0
        >>> added = sc.train.lora(net, rank=2)
        >>> optimizer = torch.optim.AdamW(added.parameters(), 1e-2)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> added.merge()
        >>> float((net[0].weight == 0).float().mean()) >= 0.49
        True
    """

    def __init__(self, model: nn.Module, places: list[tuple[nn.Module, str]], added: list[nn.Parameter]) -> None:
        self.model, self.places, self._added = model, places, added

    def parameters(self) -> list[nn.Parameter]:
        """The low-rank parameters, for the optimizer."""
        return self._added

    def merge(self, *copies: nn.Module) -> None:
        """Add the low-rank products to the weights, which are plain parameters again, zero where they were.

        copies: of the model, made since, such as an average; each gets its own products.
        """
        for module, leaf in self.places:
            make_plain(module, leaf)
        self.places = []
        for module in [module for copy in copies for module in copy.modules()]:
            if parametrize.is_parametrized(module):
                chains: Any = module.parametrizations
                for leaf, chain in list(chains.items()):
                    if any(isinstance(p, _Masked) for p in chain):
                        make_plain(module, leaf)


# tensors that are made in inference mode could not be trained
@torch.inference_mode(False)
def lora(model: nn.Module, rank: int = 16, seed: int = 0) -> Lora:
    """Add low-rank parameters to every matrix that has zeros and one owner, and freeze all else.

    They add 0 until they are trained. Raises PlanError for a rank below 1 and for a model without zeros.
    model: changed in place. rank: of each product. seed: of their first values. Returns what is trained and merged.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> for weight in (net[0].weight, net[2].weight):
        ...     weight.data[weight.abs() < weight.abs().median()] = 0
        >>> added = sc.train.lora(net, rank=2)
        >>> [list(p.shape) for p in added.parameters()]
        [[16, 2], [2, 8], [2, 2], [2, 16]]
        >>> added.merge()
        >>> type(net[0].weight).__name__
        'Parameter'
    """
    if rank < 1:
        raise PlanError(f"LoRA of rank {rank}; give 1 or more")
    # a matrix that two modules hold, such as tied embeddings, would get two additions; it is left alone
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = (p for _, p in prunable(model) if p.dim() in (2, 3) and holders[id(p)] == 1)
    wanted = {id(p) for p in found if bool((p.detach() == 0).any())}
    if not wanted:
        raise PlanError("the model has no zeros to keep: prune it first, or use an ordinary LoRA")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    places: list[tuple[nn.Module, str]] = []
    added: list[nn.Parameter] = []
    for module in list(model.modules()):
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in wanted:
                low = _Masked(parameter, rank, generator)
                parametrize.register_parametrization(module, leaf, low)
                places.append((module, leaf))
                added += [low.up, low.down]
    return Lora(model, places, added)
