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

from secateurs.base.seed import seed_of
from secateurs.model.walk import Step
from secateurs.shrink.mixture import Mixture, Otherwise, never

# inputs of a block on which sets of experts are compared
_TOKENS = 2048
# numbers that are kept of an expert's output
_KEPT = 256


def inputs(step: Step, fused: Mapping[str, str], count: int = _TOKENS) -> Tensor | None:
    """About so many inputs of a block's mixture, [T, H], evenly from all batches; None for a block without one."""
    if not any(name in fused for module in step.block.modules() for name in module._parameters):
        return None
    mixture = Mixture(step.block, fused)
    seen: list[Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]))

    handle = mixture.parent.register_forward_pre_hook(hook)
    found = []
    try:
        with step.evaluating():
            for batch in range(step.batches):
                seen.clear()
                step.call(step.inputs(batch), batch)
                x_TH = torch.cat(seen)
                each = -(-count * step.windows[batch] // sum(step.windows))
                found.append(x_TH[torch.linspace(0, len(x_TH) - 1, min(each, len(x_TH))).round().long()])
    finally:
        handle.remove()
    return torch.cat(found)


def curve(step: Step, fused: Mapping[str, str], weight_H: Tensor | None, criterion: str, count: int) -> list[float]:
    """The loss with 0, 1, ... `count` experts of a block removed; all 0 for a block without any."""
    x_TH = inputs(step, fused)
    if x_TH is None:
        return [0.0] * (count + 1)
    with step.evaluating():
        return [0.0, *removal(trial_of(Mixture(step.block, fused), x_TH, weight_H), criterion, count)[1]]


class Trial:
    """What a mixture gives on some tokens if some of its experts are never chosen.

    An output is kept times the root of weight_H, E[g^2] of the block's output, if that is known; of more than 256 numbers a random
    projection is kept, which changes a squared length by a few percent (Johnson and Lindenstrauss 1984). mixture: the dense one.
    dense_TD: what it gave when the trial was made.
    """

    def __init__(self, mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None = None) -> None:
        self.mixture, self.x_TH = mixture, x_TH
        self.weight_H = torch.ones(x_TH.shape[1]) if weight_H is None else weight_H.float()
        self.scale_HD = self.weight_H.sqrt().diag()
        if x_TH.shape[1] > _KEPT:
            draw = torch.Generator().manual_seed(seed_of(0, "outputs of experts"))
            random_HD = torch.randn(x_TH.shape[1], _KEPT, generator=draw) / _KEPT**0.5
            self.scale_HD = self.weight_H.sqrt()[:, None] * random_HD
        # what an expert makes of a token, once it was asked for
        self._known_ETD = torch.full((mixture.number, len(x_TH), self.scale_HD.shape[1]), torch.nan)
        self.dense_TD = self.mixed(torch.arange(len(x_TH)), *mixture.routed(x_TH))

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

    def __init__(self, mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None = None) -> None:
        self.mixture, self.x_TH = mixture, x_TH
        self.weight_H = torch.ones(x_TH.shape[1]) if weight_H is None else weight_H.float()
        self.dense_TD = mixture(x_TH)

    def loss(self, gone: Sequence[int]) -> float:
        with never([self.mixture], gone):
            now_TH = self.mixture(self.x_TH)
        return float(((now_TH - self.dense_TD).square().mean(0) * self.weight_H).sum() / 2)


def trial_of(mixture: Mixture, x_TH: Tensor, weight_H: Tensor | None) -> Trial:
    """A trial on so many of the inputs as sets of experts are compared on."""
    few_TH = x_TH[:: max(1, len(x_TH) // _TOKENS)]
    try:
        mixture.is_sum_of_experts()
    except Otherwise:
        return Whole(mixture, few_TH, weight_H)
    return Trial(mixture, few_TH, weight_H)


Criterion = Callable[[Trial, int], list[int]]
"""(trial, count) -> the experts to remove, in the order of their removal."""


def loss(trial: Trial, count: int) -> list[int]:
    """Remove the expert whose removal costs least beside those that are gone, its tokens sent to their next choice; repeat.

    Lu et al. 2024, arXiv 2402.14800, search sets by the same error, unweighted.
    """
    mixture, everyone_T = trial.mixture, torch.arange(len(trial.x_TH))
    order: list[int] = []
    if isinstance(trial, Whole):
        while len(order) < count:
            order.append(min(trial.may_go(order), key=lambda e: trial.loss([*order, e])))
        return order
    index_TK, weight_TK = mixture.routed(trial.x_TH)
    now_TD = trial.mixed(everyone_T, index_TK, weight_TK)
    alone = _routes_tokens_alone(trial, index_TK, weight_TK)
    while len(order) < count:
        before_T = (now_TD - trial.dense_TD).square().sum(1)
        costs = {}
        for e in trial.may_go(order):
            tokens_N = (index_TK == e).any(1).nonzero()[:, 0] if alone else everyone_T
            costs[e] = float(before_T.sum())
            if len(tokens_N):
                moved_ND = trial.mixed(tokens_N, *mixture.routed(trial.x_TH[tokens_N], [*order, e]))
                after_N = (moved_ND - trial.dense_TD[tokens_N]).square().sum(1)
                costs[e] += float(after_N.sum() - before_T[tokens_N].sum())
        order.append(min(costs, key=lambda e: costs[e]))
        index_TK, weight_TK = mixture.routed(trial.x_TH, order)
        now_TD = trial.mixed(everyone_T, index_TK, weight_TK)
    return order


def _routes_tokens_alone(trial: Trial, index_TK: Tensor, weight_TK: Tensor) -> bool:
    """True if tokens that are not sent to an expert do not notice that it is gone; a softmax over all experts does."""
    if trial.mixture.groups > 1:
        return False
    others_T = ~(index_TK == 0).any(1)
    index_NK, weight_NK = trial.mixture.routed(trial.x_TH[others_T], [0])
    return torch.equal(index_NK, index_TK[others_T]) and torch.allclose(weight_NK, weight_TK[others_T])


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
    """The order in which a criterion removes experts, and the loss after each; merging and refitting are not in it."""
    order = CRITERIA[criterion].order(trial, count)
    return order, [trial.loss(order[: n + 1]) for n in range(count)]
