"""Which of a matrix's input columns to remove, and what the others do instead.

Columns come in groups (a neuron is a group of one, an attention head of as many as it is wide), and all rows share one support,
so least squares on what is left is one Cholesky solve. O outputs, I inputs, G groups of C columns, K columns kept.
The loss is that of solvers.py: tr((W' - W) H (W' - W)'), H the damped Gram matrix.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateurs.solvers import DAMPING
from secateurs.stats import Stats

Criterion = Callable[[Tensor, Stats, Tensor, int, float], Tensor]
"""(weight_OI, stats, groups_GC, count, damping) -> the groups to remove, in the order of their removal."""


def magnitude(weight_OI: Tensor, stats: Stats, groups_GC: Tensor, count: int, damping: float = DAMPING) -> Tensor:
    """The groups with the smallest ||W_g||."""
    return _least(weight_OI.float().square().sum(0)[groups_GC].sum(1), count)


def energy(weight_OI: Tensor, stats: Stats, groups_GC: Tensor, count: int, damping: float = DAMPING) -> Tensor:
    """The groups that add the least output energy if inputs were uncorrelated: sum_j ||W_j||^2 ||x_j||^2."""
    return _least((weight_OI.float().square().sum(0) * stats.sqnorm_I)[groups_GC].sum(1), count)


def obs(weight_OI: Tensor, stats: Stats, groups_GC: Tensor, count: int, damping: float = DAMPING) -> Tensor:
    """Optimal brain surgeon for columns: remove the group whose removal, made up for by all others, costs least; repeat.

    Kurtic et al. 2023, ZipLM, arXiv 2302.04089, alg. 1; Meng et al. 2024, OSSCAR, arXiv 2403.12983.
    """
    return removal(weight_OI, stats, groups_GC, count, damping)[0]


def removal(
    weight_OI: Tensor, stats: Stats, groups_GC: Tensor, count: int, damping: float = DAMPING, at_once: int = 1
) -> tuple[Tensor, Tensor]:
    """The order in which OBS removes groups, [count], and the loss after each, [count].

    With P = H^-1, removing g costs tr(W_g P_gg^-1 W_g') exactly; then W -= W_g P_gg^-1 P_g and P -= P_g' P_gg^-1 P_g.
    at_once: so many of the cheapest go before costs are taken again; their loss together is exact, and shared out evenly.
    """
    upper_II = stats.inverse_factor(damping).double()
    inverse_II = upper_II.T @ upper_II
    weight_OI = weight_OI.double().clone()
    # a dead input's column does nothing, and goes first
    weight_OI[:, stats.dead_I] = 0
    left = torch.ones(len(groups_GC), dtype=torch.bool)
    removed: list[int] = []
    losses: list[float] = []
    total = 0.0
    while len(removed) < count:
        cost_G = _costs(weight_OI, inverse_II, groups_GC).masked_fill_(~left, torch.inf)
        chosen = cost_G.argsort(stable=True)[: min(at_once, count - len(removed))]
        columns_C = groups_GC[chosen].flatten()
        row_CI = torch.linalg.solve(inverse_II[columns_C][:, columns_C], inverse_II[columns_C])
        gone_OC = weight_OI[:, columns_C].clone()
        together = float((torch.linalg.solve(inverse_II[columns_C][:, columns_C], gone_OC.T) * gone_OC.T).sum())
        weight_OI.addmm_(gone_OC, row_CI, alpha=-1)
        inverse_II.addmm_(inverse_II[:, columns_C].clone(), row_CI, alpha=-1)
        # exactly gone, and out of every later product
        weight_OI[:, columns_C] = 0
        inverse_II[columns_C] = 0
        inverse_II[:, columns_C] = 0
        inverse_II[columns_C, columns_C] = 1
        left[chosen] = False
        removed += chosen.tolist()
        losses += [total + together * (i + 1) / len(chosen) for i in range(len(chosen))]
        total += together
    return torch.tensor(removed, dtype=torch.long), torch.tensor(losses, dtype=torch.float64)


def _costs(weight_OI: Tensor, inverse_II: Tensor, groups_GC: Tensor) -> Tensor:
    """tr(W_g P_gg^-1 W_g') of every group."""
    if groups_GC.shape[1] == 1:
        return weight_OI.square().sum(0)[groups_GC[:, 0]] / inverse_II.diagonal()[groups_GC[:, 0]]
    weight_GCO = weight_OI.T[groups_GC]
    block_GCC = inverse_II[groups_GC[:, :, None], groups_GC[:, None, :]]
    cost_G: Tensor = (weight_GCO * torch.linalg.solve(block_GCC, weight_GCO)).sum((1, 2))
    return cost_G


def _least(score_G: Tensor, count: int) -> Tensor:
    return score_G.argsort(stable=True)[:count]


def refit(weight_OI: Tensor, stats: Stats, kept_K: Tensor, damping: float = DAMPING) -> Tensor:
    """argmin of the loss over the kept columns, [O, K]: W_K' = (W H)_K H[K, K]^-1, one Cholesky solve.

    Raises ValueError if H is not positive definite.
    """
    hessian_II = stats.damped(damping).double()
    target_KO = (weight_OI.double() @ hessian_II)[:, kept_K].T
    lower_KK, failed = torch.linalg.cholesky_ex(hessian_II[kept_K][:, kept_K])
    if failed:
        raise ValueError(
            f"the Gram matrix of {stats.tokens} tokens is singular at damping {damping:g}; raise --damping"
        )
    return torch.cholesky_solve(target_KO, lower_KK).T.float()


def kept_columns(groups_GC: Tensor, removed: Sequence[int] | Tensor) -> Tensor:
    """The columns of the groups that stay, ascending."""
    stays = torch.ones(len(groups_GC), dtype=torch.bool)
    stays[torch.as_tensor(removed, dtype=torch.long)] = False
    return groups_GC[stays].flatten().sort().values


CRITERIA: dict[str, tuple[Criterion, str]] = {
    "magnitude": (magnitude, "smallest weights"),
    "energy": (energy, "least output energy, as if inputs were uncorrelated"),
    "obs": (obs, "one after another, each where the others can make up for it best (ZipLM, OSSCAR)"),
}
