"""Sums over calibration tokens: all that a solver knows about a layer's inputs. Being sums, two Stats are merged by +.

T tokens, I inputs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateurs.base.precision import exact_products

# an input that was zero for every token, in units of the mean of all: enough to rank its weights, too little to count
_DEAD = 1e-12


@dataclass(eq=False)
class Stats:
    """tokens; sqnorm_I = sum_t x_ti^2; gram_II = sum_t x_t x_t' (None where only norms were asked for);
    drift_II = sum_t (d_t - x_t) x_t', where d is what the dense model would have at x's place (None where nobody asked).

    All in fp32. A 16-bit accumulator would stop growing after a few hundred tokens (2048 + 1 = 2048 in fp16,
    256 + 1 = 256 in bf16), and a Gram matrix that is not positive definite has no Cholesky factor.
    """

    tokens: int
    sqnorm_I: Tensor
    gram_II: Tensor | None = None
    drift_II: Tensor | None = None
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)

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

        Only the upper half of the Gram matrix grows: call finish() after the last batch.
        """
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        self.tokens += x_TI.shape[0]
        full_TI = x_TI.float()
        if self.gram_II is None:
            self.sqnorm_I += full_TI.square().sum(0)
            return
        width = full_TI.shape[1]
        # with six panels 58% of the products are formed; more and narrower ones would each be slower
        panel = max(96, -(-width // 6))
        with exact_products(x_TI.dtype):
            for start in range(0, width, panel):
                stop = min(start + panel, width)
                self.gram_II[start:stop, start:].addmm_(full_TI[:, start:stop].T, full_TI[:, start:])
            if dense_TI is not None:
                if self.drift_II is None:
                    self.drift_II = torch.zeros_like(self.gram_II)
                # d - x may be rounded to 16 bits; sums of d x' and x x', subtracted afterwards, may not
                moved_TI = dense_TI.reshape(x_TI.shape) - x_TI
                self.drift_II.addmm_(moved_TI.float().T, full_TI)

    def finish(self) -> "Stats":
        """Mirror the upper half of the Gram matrix into the lower and read the norms off its diagonal; returns self."""
        if self.gram_II is not None:
            self.gram_II.copy_(self.gram_II.triu() + self.gram_II.triu(1).T)
            self.sqnorm_I.copy_(self.gram_II.diagonal())
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

    def reordered(self, order_I: Tensor) -> "Stats":
        """The sums of the same inputs in another order: x[order_I] in x's place."""
        gram_II, drift_II = (None if m is None else m[order_I][:, order_I] for m in (self.gram_II, self.drift_II))
        return Stats(self.tokens, self.sqnorm_I[order_I], gram_II, drift_II)

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
