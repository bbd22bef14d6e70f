"""Refits what is left of a mixture to what the whole one gave, on the block's inputs: the router's rows, then every last matrix.

With w the weight that a token has for an expert and a what the expert's last matrix W is multiplied with, the mixture gives the
sum of w W a over a token's experts, and the shared expert. So W changes by a ridge regression of what is missing on w a, expert
after expert, some rounds. The router's rows enter through a softmax or a sigmoid and the choice: they follow the gradient of the
same error. Some tokens are held out: what does not lower their error is taken back, and they choose among ridges. T tokens, N
tokens of an expert, K choices of each, H hidden width, I inputs of a matrix, E experts, D numbers kept of an output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.shrink.experts import Trial
from secateurs.shrink.mixture import Mixture

# inputs of a block on which a mixture is refit, and those on which its router is
TOKENS, _ROUTED = 16384, 4096
# one token in so many is held out
_HELD = 8
# rounds over the experts; ridges that are tried, in units of the damping; steps of the router
_ROUNDS, _RIDGES, _STEPS = 3, (1, 10, 100), 20


@dataclass(frozen=True)
class Refit:
    """How much of the error is left on held-out tokens, weighted by E[g^2]: after the router, and after all. tokens: of the fit."""

    router: float
    all: float
    tokens: int


def refit(mixture: Mixture, x_TH: Tensor, wanted_TH: Tensor, weight_H: Tensor | None, damping: float) -> Refit:
    """Refit a mixture, in place, to give wanted_TH for x_TH. damping: the ridge, in units of the Gram matrix's mean diagonal."""
    held = torch.arange(len(x_TH)) % _HELD == _HELD - 1
    fit = _Fit(mixture, x_TH, wanted_TH, held, weight_H, damping)
    first = fit.error()
    if not first > 0:
        return Refit(1.0, 1.0, int((~held).sum()))
    routed = fit.unless_worse([mixture.rows_EH], fit.router, first)
    matrices: list[Any] = [p for n, p in mixture.experts._parameters.items() if n in mixture.fused]
    shared = mixture.shared(x_TH)
    if shared is not None:
        matrices.append(shared[0].weight)
    last = fit.unless_worse(matrices, lambda: fit.matrices(shared), routed)
    return Refit(routed / first, last / first, int((~held).sum()))


class _Fit:
    """Steps of a refit. held: which tokens are held out."""

    def __init__(
        self, mixture: Mixture, x_TH: Tensor, wanted_TH: Tensor, held: Tensor, weight_H: Tensor | None, damping: float
    ) -> None:
        self.mixture, self.x_TH, self.wanted_TH, self.held = mixture, x_TH, wanted_TH, held
        self.given_H, self.damping = weight_H, damping
        self.weight_H = torch.ones(x_TH.shape[1]) if weight_H is None else weight_H.float()

    def missing(self) -> Tensor:
        return self.wanted_TH - self.mixture(self.x_TH)

    def error(self) -> float:
        """The weighted squared error on held-out tokens."""
        return float((self.missing()[self.held].square() @ self.weight_H).sum())

    def unless_worse(self, tensors: Sequence[Tensor], step: Callable[[], None], before: float) -> float:
        """The error after a step; if it did not fall, the tensors are put back and it is as before."""
        copies = [t.detach().clone() for t in tensors]
        step()
        after = self.error()
        if after < before:
            return after
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.detach().copy_(copy)
        return before

    # -------------------------------------------------------------------------------------------------------------- router

    def router(self) -> None:
        """Let the router's rows follow the gradient of the error (L-BFGS), the experts as they are."""
        chosen = (~self.held).nonzero()[:, 0]
        chosen = chosen[:: -(-len(chosen) // _ROUTED)]
        x_NH = self.x_TH[chosen]
        trial = Trial(self.mixture, x_NH, self.given_H)
        start_EH = self.mixture.rows_EH.detach().float()
        rows_EH = start_EH.clone().requires_grad_(True)
        everyone_N = torch.arange(len(chosen))
        # the shared expert does what it did
        shared_ND = self.mixture(x_NH) @ trial.scale_HD - trial.dense_TD
        wanted_ND = self.wanted_TH[chosen] @ trial.scale_HD - shared_ND
        first = float((trial.dense_TD - wanted_ND).square().sum())
        # rows that give logits of their own size costs `damping` of the error
        logits = float((x_NH.float() @ start_EH.T).square().sum())
        ridge = self.damping * float(x_NH.float().square().sum()) / x_NH.shape[1] / max(logits, 1e-30)
        optimizer = torch.optim.LBFGS([rows_EH], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                index_NK, weight_NK = self.mixture.routed_by(x_NH, rows_EH)
                now_ND = trial.mixed(everyone_N, index_NK, weight_NK)
                error = (now_ND - wanted_ND).square().sum() / max(first, 1e-30)
                value: Tensor = error + ridge * (rows_EH - start_EH).square().sum()
                value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        if torch.isfinite(rows_EH).all():
            self.mixture.rows_EH.detach().copy_(rows_EH.detach())

    # ------------------------------------------------------------------------------------------------------------ matrices

    def matrices(self, shared: tuple[nn.Linear, Tensor] | None) -> None:
        """Fit the shared expert's last matrix, as Mixture.shared() gives it, and every expert's to what is missing, some rounds."""
        mixture = self.mixture
        index_TK, weight_TK = mixture.routed(self.x_TH)
        missing_TH = self.missing()
        everyone_T = torch.arange(len(self.x_TH))
        for _ in range(_ROUNDS):
            if shared is not None:
                self.matrix(shared[0].weight.detach(), shared[1], missing_TH, everyone_T)
            for e in sorted(set(index_TK.flatten().tolist())):
                tokens_N, place_N = (index_TK == e).nonzero(as_tuple=True)
                layer, a_NI = mixture.down(self.x_TH[tokens_N], e)
                self.matrix(layer.read(), a_NI * weight_TK[tokens_N, place_N, None], missing_TH, tokens_N)

    def matrix(self, weight_OI: Tensor, a_NI: Tensor, missing_TH: Tensor, tokens_N: Tensor) -> None:
        """Fit a matrix, in place, to what is missing of some tokens, for its inputs a; what then is missing changes in place,
        too.
        """
        change_OI = self.ridge(a_NI, missing_TH[tokens_N], self.held[tokens_N])
        if change_OI is not None:
            before_OI = weight_OI.float().clone()
            # as it will be written
            weight_OI.add_(change_OI)
            missing_TH[tokens_N] -= a_NI @ (weight_OI.float() - before_OI).T

    def ridge(self, a_NI: Tensor, missing_NO: Tensor, held_N: Tensor) -> Tensor | None:
        """The change of a matrix that gives what is missing for its inputs; None if no ridge does better on held-out tokens."""
        mine_NI, held_NI = a_NI[~held_N].double(), a_NI[held_N]
        if not len(mine_NI) or not len(held_NI):
            return None
        gram_II = mine_NI.T @ mine_NI
        mean = gram_II.diagonal().mean()
        if not mean > 0:
            return None
        cross_IO = mine_NI.T @ missing_NO[~held_N].double()
        best, least = None, float((missing_NO[held_N].square() @ self.weight_H).sum())
        for times in _RIDGES:
            damped_II = gram_II + times * self.damping * mean * torch.eye(len(gram_II), dtype=torch.float64)
            lower_II, failed = torch.linalg.cholesky_ex(damped_II)
            if failed:
                continue
            change_OI = torch.cholesky_solve(cross_IO, lower_II).T.float()
            error = float(((missing_NO[held_N] - held_NI @ change_OI.T).square() @ self.weight_H).sum())
            if error < least:
                best, least = change_OI, error
        return best
