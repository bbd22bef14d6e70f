"""Chooses which input columns of a matrix to remove, and refits the others.

Columns come in groups: a neuron is a group of one column, an attention head a group of its width. All rows keep the same columns,
so the least-squares refit is one Cholesky solve. O outputs, I inputs, G groups of C columns, K columns kept.
The loss is that of solvers.py: tr((W' - W) H (W' - W)'), H the damped Gram matrix.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateurs.base.processes import ALONE, Ranks
from secateurs.matrix.solvers import DAMPING
from secateurs.matrix.stats import Stats


@dataclass(frozen=True)
class Side:
    """A matrix that reads the units; a unit that several matrices read has a side for each.

    stats: of the matrix's inputs. groups_GC: the columns that belong to each unit. taylor_G: scores, for the criterion taylor.
    """

    weight_OI: Tensor
    stats: Stats
    groups_GC: Tensor
    taylor_G: Tensor | None = None


Criterion = Callable[[Sequence[Side], int, float, Tensor | None, int], Tensor]
"""(sides, count, damping, parents_G, at_once) -> the groups to remove, in the order of their removal.

parents_G: the parent of each group; every parent loses one group before any parent loses a second. at_once: as in removal(); only
criteria that update their costs use it.
"""


def magnitude(
    sides: Sequence[Side], count: int, damping: float = DAMPING, parents_G: Tensor | None = None, at_once: int = 1
) -> Tensor:
    """Remove the groups with the smallest ||W_g||."""
    return _least([s.weight_OI.float().square().sum(0)[s.groups_GC].sum(1) for s in sides], count, parents_G)


def energy(
    sides: Sequence[Side], count: int, damping: float = DAMPING, parents_G: Tensor | None = None, at_once: int = 1
) -> Tensor:
    """Remove the groups with the least output energy, as if inputs were uncorrelated: sum_j ||W_j||^2 ||x_j||^2."""
    return _least(
        [(s.weight_OI.float().square().sum(0) * s.stats.sqnorm_I)[s.groups_GC].sum(1) for s in sides], count, parents_G
    )


def taylor(
    sides: Sequence[Side], count: int, damping: float = DAMPING, parents_G: Tensor | None = None, at_once: int = 1
) -> Tensor:
    """Remove the groups that change the loss least to first order: mean over windows of |sum_{oj in g} W_oj dL/dW_oj|.

    Molchanov et al. 2019, arXiv 1906.10771. The sum over a consumer's columns equals the sum over the group's activations.
    """
    if any(s.taylor_G is None for s in sides):
        raise ValueError("taylor needs gradients, and nobody took them")
    return _least([s.taylor_G for s in sides if s.taylor_G is not None], count, parents_G)


def obs(
    sides: Sequence[Side], count: int, damping: float = DAMPING, parents_G: Tensor | None = None, at_once: int = 1
) -> Tensor:
    """Optimal brain surgeon for columns: remove the group that costs least once the others are refit; repeat.

    Kurtic et al. 2023, ZipLM, arXiv 2302.04089, alg. 1; Meng et al. 2024, OSSCAR, arXiv 2403.12983.
    """
    return removal(sides, count, damping, at_once, parents_G)[0]


def removal(
    sides: Iterable[Side], count: int, damping: float = DAMPING, at_once: int = 1, parents_G: Tensor | None = None,
    folder: Path | None = None, ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The order in which OBS removes groups, [count], and the loss after each, [count], summed over sides.

    With P = H^-1, removing g costs tr(W_g P_gg^-1 W_g') exactly; then W -= W_g P_gg^-1 P_g and P -= P_g' P_gg^-1 P_g.
    at_once: how many of the cheapest groups go before costs are computed again; their joint loss is exact, and divided evenly.
    folder: where the matrices of each side lie between rounds, so that one side's are in memory; None for all in memory. ranks:
    those that share the sides, of which each gives its own.
    """
    surgeons = [
        _Surgeon(side, damping, None if folder is None else folder / str(ranks.number(i)))
        for i, side in enumerate(sides)
    ]
    # costs are kept on the CPU, whatever the device of the sides
    cost_SG = torch.stack(ranks.merged([surgeon.costs().cpu() for surgeon in surgeons]))
    parents_G = torch.zeros(cost_SG.shape[1], dtype=torch.long) if parents_G is None else parents_G
    families = int(parents_G.max()) + 1
    left = torch.ones(len(parents_G), dtype=torch.bool)
    gone_P = torch.zeros(families, dtype=torch.long)
    removed: list[int] = []
    losses: list[float] = []
    total = 0.0
    while len(removed) < count:
        # parents take turns: a second group goes when every parent has lost its first
        may_G = left if families == 1 else left & (gone_P == len(removed) // families)[parents_G]
        cost_G = cost_SG.sum(0).masked_fill_(~may_G, torch.inf)
        chosen = cost_G.argsort(stable=True)[: min(at_once if families == 1 else 1, count - len(removed))]
        done = ranks.merged([(surgeon.remove(chosen), surgeon.costs().cpu()) for surgeon in surgeons])
        together, cost_SG = sum(cost for cost, _ in done), torch.stack([cost_G for _, cost_G in done])
        left[chosen] = False
        gone_P[parents_G[chosen]] += 1
        removed += chosen.tolist()
        losses += [total + together * (i + 1) / len(chosen) for i in range(len(chosen))]
        total += together
    return torch.tensor(removed, dtype=torch.long), torch.tensor(losses, dtype=torch.float64)


class _Surgeon:
    """One side's weights and inverse Hessian, in fp64, updated as groups are removed. file: where they lie; None for in memory."""

    def __init__(self, side: Side, damping: float, file: Path | None = None) -> None:
        upper_II = side.stats.inverse_factor(damping).double()
        inverse_II = upper_II.T @ upper_II
        weight_OI = side.weight_OI.double().clone()
        # the column of a dead input does nothing: its cost is 0
        weight_OI[:, side.stats.dead_I] = 0
        self.groups_GC = side.groups_GC
        self.shapes, self.file = (inverse_II.shape, weight_OI.shape), file
        self.held: tuple[Tensor, ...] = (inverse_II, weight_OI)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            for mapped, tensor in zip(self._mapped(), self.held, strict=True):
                mapped.copy_(tensor)
            self.held = ()

    def _matrices(self) -> tuple[Tensor, ...]:
        """The inverse Hessian and the weights, to be changed in place."""
        return self.held or self._mapped()

    def _mapped(self) -> tuple[Tensor, ...]:
        sizes = [rows * columns for rows, columns in self.shapes]
        # not more than these pages are in memory, and only until the tensors are gone
        whole = torch.from_file(str(self.file), shared=True, size=sum(sizes), dtype=torch.float64)
        return tuple(part.view(shape) for part, shape in zip(torch.split(whole, sizes), self.shapes, strict=True))

    def costs(self) -> Tensor:
        """tr(W_g P_gg^-1 W_g') of every group."""
        inverse_II, weight_OI = self._matrices()
        groups_GC = self.groups_GC
        if groups_GC.shape[1] == 1:
            return weight_OI.square().sum(0)[groups_GC[:, 0]] / inverse_II.diagonal()[groups_GC[:, 0]]
        weight_GCO = weight_OI.T[groups_GC]
        block_GCC = inverse_II[groups_GC[:, :, None], groups_GC[:, None, :]]
        cost_G: Tensor = (weight_GCO * torch.linalg.solve(block_GCC, weight_GCO)).sum((1, 2))
        return cost_G

    def remove(self, chosen: Tensor) -> float:
        """Remove groups together, and return what that costs."""
        inverse_II, weight_OI = self._matrices()
        columns_C = self.groups_GC[chosen].flatten()
        block_CC = inverse_II[columns_C][:, columns_C]
        row_CI = torch.linalg.solve(block_CC, inverse_II[columns_C])
        gone_OC = weight_OI[:, columns_C].clone()
        together = float((torch.linalg.solve(block_CC, gone_OC.T) * gone_OC.T).sum())
        weight_OI.addmm_(gone_OC, row_CI, alpha=-1)
        inverse_II.addmm_(inverse_II[:, columns_C].clone(), row_CI, alpha=-1)
        # exactly zero, so that later products leave them out
        weight_OI[:, columns_C] = 0
        inverse_II[columns_C] = 0
        inverse_II[:, columns_C] = 0
        inverse_II[columns_C, columns_C] = 1
        return together


def _least(scores: Sequence[Tensor], count: int, parents_G: Tensor | None) -> Tensor:
    """The `count` groups with the lowest scores, summed over sides."""
    score_G = torch.stack(list(scores)).sum(0).cpu()
    order = score_G.argsort(stable=True)
    if parents_G is None:
        return order[:count]
    # parents take turns: the cheapest group of each, then the second of each
    turns = torch.zeros_like(order)
    for parent in set(parents_G.tolist()):
        mine = parents_G[order] == parent
        turns[mine] = torch.arange(int(mine.sum()))
    return order[turns.argsort(stable=True)][:count]


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
    """The columns of the groups that are kept, in ascending order."""
    stays = torch.ones(len(groups_GC), dtype=torch.bool)
    stays[torch.as_tensor(removed, dtype=torch.long)] = False
    return groups_GC[stays].flatten().sort().values


CRITERIA: dict[str, tuple[Criterion, str]] = {
    "magnitude": (magnitude, "smallest weights"),
    "energy": (energy, "least output energy, as if inputs were uncorrelated"),
    "taylor": (taylor, "least first-order change of the loss"),
    "obs": (obs, "one after another, each where the others can make up for it best (ZipLM, OSSCAR)"),
}
