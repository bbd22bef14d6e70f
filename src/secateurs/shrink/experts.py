"""Chooses which experts of a mixture go: criteria as rows of CRITERIA, each (Trial, count) -> experts in the order of their
removal.

The loss of removing a set is measured on the block's inputs: half the squared change of the mixture's outputs, weighted by E[g^2]
of the block's output (the mixture is added to it, so both have the same gradient), where tokens of a removed expert go to their
next choice. E experts, T tokens, K choices of each, H hidden width, D numbers that are kept of an output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.base.processes import ALONE, Ranks
from secateurs.base.seed import seed_of
from secateurs.model.walk import Step
from secateurs.shrink.mixture import Mixture, Otherwise, never

# inputs of a block on which sets of experts are compared
_TOKENS = 2048
# numbers that are kept of an expert's output
_KEPT = 256
# experts that are tried together
_TRIED = 8


def inputs(step: Step, fused: Mapping[str, str], count: int = _TOKENS) -> Tensor | None:
    """About so many inputs of a block's mixture, [T, H], evenly from the batches of all ranks; None for a block without one."""
    if not any(name in fused for module in step.block.modules() for name in module._parameters):
        return None
    mixture = Mixture(step.block, fused)
    seen: list[Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    windows = sum(step.ranks.merged(step.windows))
    handle = mixture.parent.register_forward_pre_hook(hook)
    found = []
    try:
        with step.evaluating():
            for batch in range(step.batches):
                seen.clear()
                step.call(step.inputs(batch), batch)
                x_TH = torch.cat(seen)
                each = -(-count * step.windows[batch] // windows)
                found.append(x_TH[torch.linspace(0, len(x_TH) - 1, min(each, len(x_TH))).round().long()])
    finally:
        handle.remove()
    return torch.cat(step.ranks.merged(found))


def bytes_of(number: int, hidden: int) -> int:
    """Bytes of what a Trial keeps of so many experts."""
    return 4 * number * _TOKENS * min(hidden, _KEPT)


def curve(step: Step, fused: Mapping[str, str], weight_H: Tensor | None, criterion: str, count: int) -> list[float]:
    """The loss with 0, 1, ... `count` experts of a block removed; all 0 for a block without any."""
    x_TH = inputs(step, fused)
    if x_TH is None:
        return [0.0] * (count + 1)
    with step.evaluating():
        trial = trial_of(Mixture(step.block, fused), x_TH, weight_H, step.ranks)
        return [0.0, *removal(trial, criterion, count)[1]]


class Trial:
    """What a mixture gives on some tokens if some of its experts are never chosen.

    An output is kept times the root of weight_H, E[g^2] of the block's output, if that is known; of more than 256 numbers a random
    projection is kept, which changes a squared length by a few percent (Johnson and Lindenstrauss 1984). mixture: the dense
    one. dense_TD: what it gave when the trial was made. ranks: those that share the work of choosing, on the same tokens.
    """

    def __init__(self, mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        self.mixture, self.x_TH, self.ranks = mixture, x_TH, ranks
        self.weight_H = torch.ones(x_TH.shape[1]) if weight_H is None else weight_H.float()
        self.scale_HD = self.weight_H.sqrt().diag()
        if x_TH.shape[1] > _KEPT:
            draw = torch.Generator().manual_seed(seed_of(0, "outputs of experts"))
            random_HD = torch.randn(x_TH.shape[1], _KEPT, generator=draw) / _KEPT**0.5
            self.scale_HD = self.weight_H.sqrt()[:, None] * random_HD
        # what an expert makes of a token, once it was asked for
        self._known_ETD = torch.full((mixture.number, len(x_TH), self.scale_HD.shape[1]), torch.nan)
        self.dense_TD = self.mixed(torch.arange(len(x_TH)), *mixture.routed(x_TH))

    def ask_all(self) -> None:
        """Find out what every expert makes of every token; ranks share the experts."""
        with torch.no_grad():
            for e in self.ranks.share(range(self.mixture.number)):
                self._known_ETD[e] = self.mixture.expert(self.x_TH, e) @ self.scale_HD
        for e, known_TD in enumerate(self._known_ETD):
            self.ranks.hand_out(known_TD, self.ranks.owner(e))

    def outputs(self, tokens_N: Tensor, index_NK: Tensor) -> Tensor:
        """What the experts chosen for some tokens make of them, [N, K, D]."""
        with torch.no_grad():
            self._ask(tokens_N, index_NK)
        return self._known_ETD[index_NK, tokens_N[:, None]]

    def _ask(self, tokens_N: Tensor, index_NK: Tensor) -> None:
        missing_NK = self._known_ETD[index_NK, tokens_N[:, None], 0].isnan()
        for e in sorted(set(index_NK[missing_NK].tolist())):
            mine_N = tokens_N[(missing_NK & (index_NK == e)).any(1)]
            self._known_ETD[e, mine_N] = self.mixture.expert(self.x_TH[mine_N], e) @ self.scale_HD

    def mixed(self, tokens_N: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The weighted sums of outputs for some tokens, [N, D]."""
        return (self.outputs(tokens_N, index_NK) * weight_NK[..., None]).sum(1)

    def loss(self, gone: Sequence[int]) -> float:
        """The loss of removing a set of experts: in nats a token where weight_H is E[g^2]."""
        now_TD = self.mixed(torch.arange(len(self.x_TH)), *self.mixture.routed(self.x_TH, gone))
        return float((now_TD - self.dense_TD).square().sum() / (2 * len(self.x_TH)))

    def may_go(self, gone: Sequence[int]) -> list[int]:
        """The experts of which one may go next: groups that tokens choose among lose equally many, in turns."""
        each = self.mixture.number // self.mixture.groups
        turn = len(gone) // self.mixture.groups
        lost = [sum(e // each == group for e in gone) for group in range(self.mixture.groups)]
        return [e for e in range(self.mixture.number) if e not in gone and lost[e // each] == turn]

    def least(self, score_E: Tensor, count: int) -> list[int]:
        """The experts with the lowest scores, the lowest first."""
        order: list[int] = []
        while len(order) < count:
            order.append(min(self.may_go(order), key=lambda e: float(score_E[e])))
        return order


class Whole(Trial):
    """A trial of a mixture that is no weighted sum of its experts, such as Llama 4's, which weighs what goes into them.

    All of it is run for each set, and only the criterion loss() is measured.
    """

    def __init__(self, mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None = None, ranks: Ranks = ALONE) -> None:
        self.mixture, self.x_TH, self.ranks = mixture, x_TH, ranks
        self.weight_H = torch.ones(x_TH.shape[1]) if weight_H is None else weight_H.float()
        self.dense_TD = mixture(x_TH)

    def loss(self, gone: Sequence[int]) -> float:
        with never([self.mixture], gone):
            now_TH = self.mixture(self.x_TH)
        return float(((now_TH - self.dense_TD).square().mean(0) * self.weight_H).sum() / 2)


def trial_of(mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None, ranks: Ranks = ALONE) -> Trial:
    """A trial on so many of the inputs as sets of experts are compared on."""
    few_TH = x_TH[:: max(1, len(x_TH) // _TOKENS)]
    try:
        mixture.is_sum_of_experts()
    except Otherwise:
        return Whole(mixture, few_TH, weight_H, ranks)
    return Trial(mixture, few_TH, weight_H, ranks)


Criterion = Callable[[Trial, int], list[int]]
"""(trial, count) -> the experts to remove, in the order of their removal."""


def loss(trial: Trial, count: int) -> list[int]:
    """Remove the expert whose removal costs least beside those that are gone, its tokens sent to their next choice; repeat.

    The more are gone the more one costs, so those are tried first that cost least when they were tried last, until none that is
    left cost less then than the best does now. Lu et al. 2024, arXiv 2402.14800, search sets by the same error, unweighted.
    """
    search = None if isinstance(trial, Whole) else _Search(trial)
    order: list[int] = []
    # what each added to the loss when it was tried last
    added: dict[int, float] = {}
    now = 0.0
    while len(order) < count:
        left = sorted(trial.may_go(order), key=lambda e: (added.get(e, -torch.inf), e))
        costs: dict[int, float] = {}
        while left and (not costs or now + added.get(left[0], -torch.inf) < min(costs.values())):
            tried = [e for e in left if e not in added] or left[:_TRIED]
            left = left[len(tried) :]
            mine = [search.loss_without(e) if search else trial.loss([*order, e]) for e in trial.ranks.share(tried)]
            costs |= zip(tried, trial.ranks.merged(mine), strict=True)
        added |= {e: cost - now for e, cost in costs.items()}
        order.append(min(costs, key=lambda e: (costs[e], e)))
        now = costs[order[-1]]
        if search:
            search.remove(order)
    return order


class _Search:
    """A mixture without the experts that are gone so far, and what it would lose if one more went.

    A token that is not sent to that one keeps its experts. Their weights stay, or grow alike where a softmax goes over all experts:
    by a factor c its output y becomes c y, and the error |y - d|^2 grows by 2 (c - 1) (y - d)'y + (c - 1)^2 |y|^2. So only those
    are mixed again that are sent elsewhere.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial, self.everyone_T = trial, torch.arange(len(trial.x_TH))
        trial.ask_all()
        # the router multiplies the same tokens for every set
        self.known_TE = trial.mixture.product(trial.x_TH)
        self.remove([])
        self.alone = self._routes_tokens_alone()
        # how far factors of one token's weights may differ, which are rounded to the router's dtype
        self.rounding = max(1e-5, 2 * torch.finfo(trial.x_TH.dtype).eps)

    def _routed(self, tokens_N: Tensor, gone: Sequence[int]) -> tuple[Tensor, Tensor]:
        known_NE = None if self.known_TE is None else self.known_TE[tokens_N]
        return self.trial.mixture.routed(self.trial.x_TH[tokens_N], gone, known_NE)

    def _routes_tokens_alone(self) -> bool:
        """True if tokens that are not sent to an expert do not notice that it is gone; a softmax over all experts does."""
        if self.trial.mixture.groups > 1:
            return False
        others_N = (~(self.index_TK == 0).any(1)).nonzero()[:, 0]
        index_NK, weight_NK = self._routed(others_N, [0])
        return torch.equal(index_NK, self.index_TK[others_N]) and torch.allclose(weight_NK, self.weight_TK[others_N])

    def remove(self, gone: Sequence[int]) -> None:
        """Let these be all that are gone."""
        trial, self.gone = self.trial, list(gone)
        self.index_TK, self.weight_TK = self._routed(self.everyone_T, self.gone)
        now_TD = trial.mixed(self.everyone_T, self.index_TK, self.weight_TK)
        apart_TD = now_TD - trial.dense_TD
        self.before_T = apart_TD.square().sum(1)
        self.along_T, self.square_T = (apart_TD * now_TD).sum(1), now_TD.square().sum(1)

    def loss_without(self, e: int) -> float:
        """The summed squared change of the outputs if e went, too."""
        trial, after_T = self.trial, self.before_T.clone()
        tokens_N = (self.index_TK == e).any(1).nonzero()[:, 0] if self.alone else self.everyone_T
        if len(tokens_N):
            index_NK, weight_NK = self._routed(tokens_N, [*self.gone, e])
            before_NK = self.weight_TK[tokens_N]
            factor_N = weight_NK.sum(1) / before_NK.sum(1)
            stays_N = (index_NK == self.index_TK[tokens_N]).all(1) & factor_N.isfinite()
            stays_N &= ((weight_NK - factor_N[:, None] * before_NK).abs() <= self.rounding * weight_NK.abs()).all(1)
            more_N = factor_N - 1
            grown_N = more_N * (2 * self.along_T[tokens_N] + more_N * self.square_T[tokens_N])
            after_T[tokens_N] += grown_N.where(stays_N, torch.zeros(()))
            sent_N = (~stays_N).nonzero()[:, 0]
            moved_N = tokens_N[sent_N]
            moved_ND = trial.mixed(moved_N, index_NK[sent_N], weight_NK[sent_N])
            after_T[moved_N] = (moved_ND - trial.dense_TD[moved_N]).square().sum(1)
        return float(after_T.sum())


def saliency(trial: Trial) -> Tensor:
    """Mean over the tokens of an expert of its weight times the length of its output; 0 of one without tokens.

    Lasby et al. 2025, REAP, arXiv 2510.13999, eq. 9.
    """
    found = torch.zeros(trial.mixture.number)
    index_TK, weight_TK = trial.mixture.routed(trial.x_TH)
    for e in sorted(set(index_TK.flatten().tolist())):
        tokens_N, place_N = (index_TK == e).nonzero(as_tuple=True)
        length_N = trial.mixture.expert(trial.x_TH[tokens_N], e).norm(dim=1)
        found[e] = (length_N * weight_TK[tokens_N, place_N]).mean()
    return found


def reap(trial: Trial, count: int) -> list[int]:
    """Remove the experts with the least saliency()."""
    return trial.least(saliency(trial), count)


def frequency(trial: Trial, count: int) -> list[int]:
    """Remove the experts that the fewest tokens are sent to."""
    return trial.least(tokens_of(trial.mixture, trial.x_TH).float(), count)


def tokens_of(mixture: Mixture, x_TH: Tensor) -> Tensor:
    """How many of the tokens are sent to each expert, [E]."""
    return torch.bincount(mixture.routed(x_TH)[0].flatten(), minlength=mixture.number)


@dataclass(frozen=True)
class Row:
    """A criterion, what it does in a few words, and whether what goes is merged into what stays (merging.py)."""

    order: Criterion
    about: str
    merges: bool = False


CRITERIA: dict[str, Row] = {
    "loss": Row(loss, "least measured change of the mixture's output, one after another"),
    "reap": Row(reap, "least weight times length of output (REAP)"),
    "frequency": Row(frequency, "fewest tokens"),
    "ream": Row(reap, "as reap, merged into those that stay (REAM)", merges=True),
}


def removal(trial: Trial, criterion: str, count: int) -> tuple[list[int], list[float]]:
    """The order in which a criterion removes experts, and the loss after each; merging and refitting are not in it. All ranks find
    the same.
    """
    order = CRITERIA[criterion].order(trial, count)
    return order, [trial.loss(order[: n + 1]) for n in range(count)]
