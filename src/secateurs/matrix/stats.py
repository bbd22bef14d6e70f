"""Sums over calibration tokens: all that a solver knows about a layer's inputs. Being sums, two Stats are merged by +.

T tokens, I inputs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateurs.base.precision import exact_products
from secateurs.base.processes import Ranks

# an input that was zero for every token, in units of the mean of all: enough to rank its weights, too little to count
_DEAD = 1e-12


@dataclass(eq=False)
class Stats:
    """tokens; sqnorm_I = sum_t x_ti^2; gram_II = sum_t x_t x_t' (None where only norms were asked for);
    drift_II = sum_t (d_t - x_t) x_t', where d is what the dense model would have at x's place (None where nobody asked).

    All in fp32. A 16-bit accumulator would stop growing after a few hundred tokens (2048 + 1 = 2048 in fp16,
    256 + 1 = 256 in bf16), and a Gram matrix that is not positive definite has no Cholesky factor.

    While they grow, sums are held in fp64 and each batch's products are formed in fp32. A sum of fp32 numbers is exact in fp64
    unless one is less than a 10^7th of the others, so it does not matter in which order batches come, or which process adds them:
    a solver that ranks weights, ADMM above all, would otherwise remove another 1% of them after a change in the last bit.

    Example, of one batch of two tokens:

        >>> import torch, secateurs as sc
        >>> stats = sc.Stats.of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> stats.tokens, stats.sqnorm_I.tolist()
        (2, [10.0, 20.0])
    """

    tokens: int
    sqnorm_I: Tensor
    gram_II: Tensor | None = None
    drift_II: Tensor | None = None
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)
    _growing: "_Growing | None" = field(default=None, repr=False)

    @classmethod
    def of(cls, x_TI: Tensor, gram: bool = True) -> "Stats":
        """Stats of one batch of inputs, [..., I]."""
        total = cls.zeros(x_TI.shape[-1], gram, x_TI.device)
        total.add_(x_TI)
        return total.finish()

    @classmethod
    def zeros(cls, width: int, gram: bool, device: torch.device | str = "cpu") -> "Stats":
        """Empty sums for inputs of this width, to add_() to."""
        sqnorm_I = torch.zeros(width, device=device)
        return cls(0, sqnorm_I, torch.zeros(width, width, device=device) if gram else None)

    def add_(self, x_TI: Tensor, dense_TI: Tensor | None = None) -> None:
        """Add a batch in place, and its products with the dense model's inputs for the same tokens if they are given.

        Call finish() after the last batch.
        """
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        self.tokens += x_TI.shape[0]
        self._growing = self._growing or _Growing.of(self)
        self._growing.add(x_TI, None if dense_TI is None else dense_TI.reshape(x_TI.shape))

    def finish(self) -> "Stats":
        """Round the sums to fp32, mirror the upper half of the Gram matrix into the lower; returns self."""
        if self._growing is not None:
            self._growing.into(self)
            self._growing = None
        return self

    def __add__(self, other: "Stats") -> "Stats":
        """The sums of both: what one pass over all tokens would have given."""
        if (self.gram_II is None) != (other.gram_II is None):
            raise ValueError("one of the two Stats has a Gram matrix and the other has not; collect both the same way")
        if (self.drift_II is None) != (other.drift_II is None):
            raise ValueError("one of the two Stats has products with dense inputs and the other has not")
        gram_II = None if self.gram_II is None or other.gram_II is None else self.gram_II + other.gram_II
        drift_II = None if self.drift_II is None or other.drift_II is None else self.drift_II + other.drift_II
        return Stats(self.tokens + other.tokens, self.sqnorm_I + other.sqnorm_I, gram_II, drift_II)

    def summed(self, ranks: Ranks, owner: int, drift: bool = False) -> "Stats":
        """The sums over all ranks, finished: norms on all of them, matrices on the owner only. Called before finish(), which would
        round; this one is used up. drift: another rank has products with dense inputs.
        """
        growing = self._growing or _Growing.of(self)
        total = Stats(int(ranks.total(self.tokens)), self.sqnorm_I)
        growing.sum(ranks, owner, drift)
        if growing.panels is None or ranks.rank == owner:
            total.gram_II = self.gram_II
            growing.into(total)
        else:
            total.sqnorm_I = growing.sqnorm_I.float()
        self._growing = None
        return total

    def reordered(self, order_I: Tensor) -> "Stats":
        """The sums of the same inputs in another order: x[order_I] in x's place."""
        gram_II, drift_II = (None if m is None else m[order_I][:, order_I] for m in (self.gram_II, self.drift_II))
        return Stats(self.tokens, self.sqnorm_I[order_I], gram_II, drift_II)

    @property
    def drifts(self) -> bool:
        """Whether it has products with dense inputs."""
        return (self if self._growing is None else self._growing).drift_II is not None

    @property
    def dead_I(self) -> Tensor:
        """Inputs that were zero for every token, bool [I]."""
        return self.sqnorm_I == 0

    def damped(self, damping: float) -> Tensor:
        """H + damping * mean(diag H) * 1, [I, I]; H is the Gram matrix. The damping is at least I * 2^-23: below that, sums in fp32
        may not be positive definite. Dead inputs have 1e-12 of the mean on their diagonal instead: their weights cost next to
        nothing, the smaller the less.

        Raises ValueError without a Gram matrix, without tokens, or if it is not finite.
        """
        if self.gram_II is None:
            raise ValueError("this method needs a Gram matrix and only norms were collected")
        diagonal_I = self.gram_II.diagonal()
        mean = diagonal_I.mean()
        if self.tokens == 0 or not mean.isfinite():
            raise ValueError(f"the Gram matrix of {self.tokens} tokens is empty or not finite (mean diagonal {mean})")
        if mean == 0:
            mean = torch.ones_like(mean)
        ridge = max(damping, len(diagonal_I) * torch.finfo(torch.float32).eps)
        damped_II = self.gram_II.clone()
        damped_II.diagonal().add_(torch.where(self.dead_I, _DEAD, ridge) * mean)
        return damped_II

    def inverse_factor(self, damping: float) -> Tensor:
        """U upper triangular with U' U = damped(damping)^-1, [I, I]; cached, so that layers with the same inputs factor it once.

        Row j of U is the first row of inv(H[j:, j:]) over the root of its first entry (SparseGPT, sec. 3.2).
        Raises ValueError, with the damping, if the matrix is not positive definite.
        """
        if damping not in self._factors:
            lower_II, failed = torch.linalg.cholesky_ex(self.damped(damping))
            if failed:
                raise ValueError(
                    f"the Gram matrix of {self.tokens} tokens is singular at damping {damping:g}: its leading "
                    f"{int(failed)}x{int(failed)} part is not positive definite; calibrate on more text or raise --damping"
                )
            inverse_II = torch.cholesky_inverse(lower_II)
            upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if failed:
                raise ValueError(
                    f"the inverse of the Gram matrix of {self.tokens} tokens is not positive definite in fp32 at "
                    f"damping {damping:g}; calibrate on more text or raise --damping"
                )
            self._factors[damping] = upper_II
        return self._factors[damping]


class _Growing:
    """Sums in fp64 of Stats that grow. panels: the upper half of the Gram matrix as strips, each from its diagonal to the right."""

    def __init__(self, sqnorm_I: Tensor, panels: list[Tensor] | None, drift_II: Tensor | None) -> None:
        self.sqnorm_I, self.panels, self.drift_II = sqnorm_I, panels, drift_II

    @classmethod
    def of(cls, stats: Stats) -> "_Growing":
        gram_II, width = stats.gram_II, len(stats.sqnorm_I)
        panels = None if gram_II is None else [gram_II[at, at.start :].double() for at in _strips(width)]
        return cls(stats.sqnorm_I.double(), panels, None if stats.drift_II is None else stats.drift_II.double())

    def add(self, x_TI: Tensor, dense_TI: Tensor | None) -> None:
        full_TI = x_TI.float()
        if self.panels is None:
            self.sqnorm_I += full_TI.square().sum(0)
            return
        with exact_products(x_TI.dtype):
            for at, panel in zip(_strips(full_TI.shape[1]), self.panels, strict=True):
                panel += full_TI[:, at].T @ full_TI[:, at.start :]
            if dense_TI is not None:
                # d - x may be rounded to 16 bits; sums of d x' and x x', subtracted afterwards, may not
                product_II = (dense_TI - x_TI).float().T @ full_TI
                self.drift_II = product_II.double() if self.drift_II is None else self.drift_II.add_(product_II)

    def sum(self, ranks: Ranks, owner: int, drift: bool) -> None:
        """Sum over all ranks, in place: norms on all, matrices on the owner only."""
        if self.panels is not None:
            self.sqnorm_I = self._diagonal()
        ranks.sum(self.sqnorm_I)
        if drift and self.drift_II is None:
            self.drift_II = self.sqnorm_I.new_zeros(len(self.sqnorm_I), len(self.sqnorm_I))
        for matrix in (*(self.panels or ()), *(() if self.drift_II is None else (self.drift_II,))):
            ranks.sum(matrix, owner)

    def _diagonal(self) -> Tensor:
        assert self.panels is not None
        return torch.cat([panel.diagonal() for panel in self.panels])

    def into(self, stats: Stats) -> None:
        """Round all sums into a Stats; its Gram matrix is symmetric bit for bit."""
        gram_II = stats.gram_II
        if self.panels is None or gram_II is None:
            stats.sqnorm_I = self.sqnorm_I.float()
            return
        stats.sqnorm_I = self._diagonal().float()
        for at in _strips(len(gram_II)):
            # a strip that is rounded is not held any longer
            panel = self.panels.pop(0)
            gram_II[at, at.start :].copy_(panel)
            square = gram_II[at, at]
            square.copy_(square.triu() + square.triu(1).T)
            gram_II[at.stop :, at].copy_(gram_II[at, at.stop :].T)
        stats.drift_II = None if self.drift_II is None else self.drift_II.float()


def _strips(width: int) -> list[slice]:
    """With six strips 58% of the products are formed and held; more and narrower ones would each be slower."""
    each = max(96, -(-width // 6))
    return [slice(start, min(start + each, width)) for start in range(0, width, each)]
