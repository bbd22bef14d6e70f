"""New weights for one layer: (weight_OI, stats, pattern, sparsity) -> weight_OI in fp32. Blind to the pattern's kind.

O outputs, I inputs. The objective is ||X (W' - W)'||^2 plus a ridge towards the *original* weights:
    loss(W') = tr((W' - W) H (W' - W)'),   H = X'X + damping * mean(diag X'X) * 1
A solver returns weights; the mask is where they are not zero. A new solver is one function and a row in SOLVERS;
`+refit` after a solver's name adds refit() to its mask.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs import scores
from secateurs.patterns import Pattern
from secateurs.stats import Stats

DAMPING = 0.01
# columns whose updates to the columns after them are gathered into one matrix product; exact, so only speed
LAZY_BLOCK = 128


def masked(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, score: scores.Score) -> Tensor:
    """The best-scored weights as they are, zero elsewhere."""
    keep_OI = pattern.keep(score(weight_OI, stats), sparsity)
    return weight_OI.masked_fill(~keep_OI, 0)


def obs(
    weight_OI: Tensor,
    stats: Stats,
    pattern: Pattern,
    sparsity: float,
    damping: float = DAMPING,
    lazy_block: int = LAZY_BLOCK,
    keep_OI: Tensor | None = None,
) -> Tensor:
    """SparseGPT: remove weights column by column, each error compensated by the columns after it.

    With U' U = H^-1 upper triangular, for column j:  e = w_j / U_jj where pruned,  W[:, j:] -= e U[j, j:].
    The mask is chosen for `pattern.step` columns at a time by w_j^2 / U_jj^2 of the weights as updated so far; counts
    carry their rounding from step to step, so the layer's count is exact. keep_OI fixes the mask instead.
    Columns of dead inputs become zero. Frantar and Alistarh 2023, arXiv 2301.00774, alg. 1.
    Raises ValueError if H does not factor.
    """
    upper_II = stats.inverse_factor(damping)
    diagonal_I = upper_II.diagonal()
    # rows scaled to 1 on the diagonal, so that a pruned weight becomes w - 1 * w, exactly 0
    ratio_II = upper_II / diagonal_I[:, None]
    rows, columns = weight_OI.shape
    # transposed, so that a column of weights is contiguous
    weight_IO = weight_OI.T.float().clone(memory_format=torch.contiguous_format)
    weight_IO[stats.dead_I] = 0
    step = pattern.step
    lazy = max(step, lazy_block // step * step)
    zeros = 0
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        gone_LO = torch.empty(stop - start, rows, device=weight_IO.device)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if keep_OI is None:
                score_SO = (weight_IO[first:last] / diagonal_I[first:last, None]).square()
                quota = (sparsity * rows * last - zeros) / (rows * (last - first))
                keep_SO = pattern.keep(score_SO.T, min(max(quota, 0.0), 1.0)).T
                zeros += int((~keep_SO).sum())
            else:
                keep_SO = keep_OI[:, first:last].T
            for j, pruned_O in enumerate((~keep_SO).contiguous().unbind(), first):
                gone_O = torch.mul(weight_IO[j], pruned_O, out=gone_LO[j - start])
                weight_IO[j:stop].addr_(ratio_II[j, j:stop], gone_O, alpha=-1)
        weight_IO[stop:].addmm_(ratio_II[start:stop, stop:].T, gone_LO, alpha=-1)
    return weight_IO.T.contiguous()


def refit(
    weight_OI: Tensor,
    start_OI: Tensor,
    stats: Stats,
    damping: float = DAMPING,
    iterations: int = 20,
    tolerance: float = 1e-2,
) -> Tensor:
    """Least squares on the survivors of start_OI: argmin loss(W') with W' zero where start_OI is.

    Conjugate gradients on the masked normal equations, all rows at once, preconditioned by diag(H): each iteration is
    one [O, I] x [I, I] product. A row stops when its residual, in the preconditioner's norm, is `tolerance` of its first:
    at 0.01 the error is within 0.1% of refit_exact() on the anchor layer. The loss falls with every iterate in exact
    arithmetic; a row that rounding made worse keeps its start.
    """
    hessian_II = stats.damped(damping)
    mask_OI = start_OI != 0
    inverse_I = 1 / hessian_II.diagonal()
    target_OI = weight_OI.float()
    x_OI = start_OI.float().clone()
    residual_OI = ((target_OI - x_OI) @ hessian_II).mul_(mask_OI)
    loss_O = _row_loss(x_OI - target_OI, hessian_II)
    z_OI = residual_OI * inverse_I
    direction_OI = z_OI.clone()
    power_O = (residual_OI * z_OI).sum(1)
    enough_O = power_O * tolerance**2
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        active_O = power_O > enough_O
        if not active_O.any():
            break
        image_OI = (direction_OI @ hessian_II).mul_(mask_OI)
        length_O = power_O / (direction_OI * image_OI).sum(1).clamp(min=tiny) * active_O
        x_OI.addcmul_(direction_OI, length_O[:, None])
        residual_OI.addcmul_(image_OI, length_O[:, None], value=-1)
        torch.mul(residual_OI, inverse_I, out=z_OI)
        power_next_O = (residual_OI * z_OI).sum(1)
        direction_OI.mul_((power_next_O / power_O.clamp(min=tiny))[:, None]).add_(z_OI)
        power_O = torch.where(active_O, power_next_O, power_O)
    better_O = _row_loss(x_OI - target_OI, hessian_II) <= loss_O
    return torch.where(better_O[:, None], x_OI, start_OI.float())


def refit_exact(weight_OI: Tensor, start_OI: Tensor, stats: Stats, damping: float = DAMPING) -> Tensor:
    """What refit() converges to, row by row: w_S' = H[S, S]^-1 (w H)_S, by Cholesky in fp64. O(O I^3): the oracle."""
    hessian_II = stats.damped(damping).double()
    target_OI = weight_OI.double() @ hessian_II
    out_OI = torch.zeros_like(target_OI)
    for row, mask_I in enumerate(start_OI != 0):
        lower = torch.linalg.cholesky(hessian_II[mask_I][:, mask_I])
        out_OI[row, mask_I] = torch.cholesky_solve(target_OI[row, mask_I, None], lower)[:, 0]
    return out_OI.float()


def _row_loss(delta_OI: Tensor, hessian_II: Tensor) -> Tensor:
    return ((delta_OI @ hessian_II) * delta_OI).sum(1)


def relative_error(weight_OI: Tensor, new_OI: Tensor, stats: Stats | None) -> float:
    """||X (W' - W)'||_F / ||X W'||_F, undamped, as far as stats can tell.

    With a Gram matrix exact; with norms only, as if inputs were uncorrelated; without stats, of the weights.
    """
    weight_OI, delta_OI = weight_OI.float(), new_OI.float() - weight_OI.float()
    if stats is None:
        error, whole = delta_OI.square().sum(), weight_OI.square().sum()
    elif stats.gram_II is None:
        error, whole = ((w.square() @ stats.sqnorm_I).sum() for w in (delta_OI, weight_OI))
    else:
        error, whole = (_row_loss(w, stats.gram_II).sum() for w in (delta_OI, weight_OI))
    return float((error.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


Solve = Callable[[Tensor, Stats | None, Pattern, float, float], Tensor]


@dataclass(frozen=True)
class Solver:
    """One row of `secateurs methods`. needs: 'weights', 'norms' or 'gram', what must be collected beforehand.

    solve: (weight_OI, stats, pattern, sparsity, damping) -> weight_OI. score: what a global threshold ranks by.
    scope: the field's default for unstructured patterns.
    """

    name: str
    needs: str
    solve: Solve
    score: scores.Score
    scope: str
    about: str


def _by_score(name: str, needs: str, scope: str, about: str) -> Solver:
    score = scores.SCORES[name]

    def solve(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        return masked(weight_OI, stats, pattern, sparsity, score)

    return Solver(name, needs, solve, score, scope, about)


def _sparsegpt(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
    if stats is None:
        raise ValueError("sparsegpt needs calibration: the Gram matrix of the layer's inputs")
    return obs(weight_OI, stats, pattern, sparsity, damping)


SOLVERS: dict[str, Solver] = {
    s.name: s
    for s in (
        _by_score("random", "weights", "layer", "uniform noise, the control; no calibration"),
        _by_score("magnitude", "weights", "layer", "|W|; no calibration; breaks language models from 50%"),
        _by_score("wanda", "norms", "row", "|W| times input norm; weights unchanged; seconds"),
        _by_score("ria", "norms", "layer", "relative importance times root of input norm; weights unchanged"),
        Solver(
            "sparsegpt", "gram", _sparsegpt, scores.wanda, "layer", "columns removed in turn, errors compensated (OBS)"
        ),
    )
}


def find(method: str) -> Solver:
    """'wanda' or 'wanda+refit' -> Solver. Raises ValueError naming the known ones."""
    name, plus, extra = method.partition("+")
    if name not in SOLVERS or (plus and extra != "refit"):
        known = ", ".join(SOLVERS)
        raise ValueError(f"unknown method '{method}'; known: {known}; each may be followed by '+refit'")
    base = SOLVERS[name]
    if not plus:
        return base

    def solve(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        if stats is None:
            raise ValueError(f"{method} needs calibration: the Gram matrix of the layer's inputs")
        return refit(weight_OI, base.solve(weight_OI, stats, pattern, sparsity, damping), stats, damping)

    return Solver(method, "gram", solve, base.score, base.scope, base.about + "; then survivors refit")
