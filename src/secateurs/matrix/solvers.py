"""New weights for one layer: (weight_OI, stats, pattern, sparsity) -> weight_OI in fp32, for any pattern.

O outputs, I inputs. The objective is ||X (W' - W)'||^2 plus a ridge towards the *original* weights:
    loss(W') = tr((W' - W) H (W' - W)'),   H = X'X + damping * mean(diag X'X) * 1
A solver returns weights; the mask is where they are not zero. A new solver is one function and a row in SOLVERS;
`+refit` after a solver's name adds refit() to its mask.

Example: half of a matrix goes, and the rest makes up for a part of it.

    >>> import torch, secateurs as sc
    >>> weight_OI, stats = torch.randn(8, 16), sc.Stats.of(torch.randn(64, 16))
    >>> solver = sc.solvers.find("sparsegpt")
    >>> new_OI = solver.solve(weight_OI, stats, sc.patterns.parse("2:4"), 0.5, 0.01)
    >>> int((new_OI == 0).sum()), sc.solvers.relative_error(weight_OI, new_OI, stats) < 0.5
    (64, True)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.base.errors import nearest
from secateurs.matrix import scores
from secateurs.matrix.patterns import Pattern
from secateurs.matrix.stats import Stats

DAMPING = 0.01


def damping_for(tokens: int, inputs: int) -> float:
    """The damping of a layer where the user chose none: 0.01, or 0.001 with 8 tokens an input or more.

    Held-out errors of ALPS on the anchor layer at 50% with 0.01 and 0.001: 2 tokens an input .0900 and .0961, 8 tokens
    .0811 and .0806. docs/log.md has a whole model.
    """
    return DAMPING if tokens < 8 * inputs else DAMPING / 10


# columns whose updates of later columns are done in one matrix product; changes the speed and not the result
LAZY_BLOCK = 128


def masked(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, score: scores.Score) -> Tensor:
    """The weights with the best scores unchanged, zero elsewhere."""
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
    importance_O: Tensor | None = None,
    nearest: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """SparseGPT: remove weights column by column, each error compensated by the columns after it.

    With U' U = H^-1 upper triangular, for column j:  e = w_j / U_jj where pruned,  W[:, j:] -= e U[j, j:].
    The mask is chosen for `pattern.step` columns at a time by w_j^2 / U_jj^2 of the weights as updated so far. After every
    step as many weights are gone as the pattern removes from so many columns, so the layer's count is exact. keep_OI: a mask to
    use instead. importance_O: how much a row's squared error counts where the mask is chosen.
    nearest: (j, weights so far, [I, O]) -> what survivors of column j are rounded to; that error is compensated as well.
    Weights of dead inputs go first, as they cost next to nothing (Stats.damped()).
    Frantar and Alistarh 2023, arXiv 2301.00774, alg. 1.
    Raises ValueError if H does not factor.
    """
    upper_II = stats.inverse_factor(damping)
    diagonal_I = upper_II.diagonal()
    ratio_II = upper_II / diagonal_I[:, None]
    rows, columns = weight_OI.shape
    # transposed, so that a column of weights is contiguous
    weight_IO = weight_OI.T.float().clone(memory_format=torch.contiguous_format)
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
                if importance_O is not None:
                    score_SO *= importance_O
                quota = (pattern.zeros(rows, last, sparsity) - zeros) / (rows * (last - first))
                keep_SO = pattern.keep(score_SO.T, min(max(quota, 0.0), 1.0)).T
                zeros += int((~keep_SO).sum())
            else:
                keep_SO = keep_OI[:, first:last].T
            for j, kept_O in enumerate(keep_SO.contiguous().unbind(), first):
                new_O = (weight_IO[j] if nearest is None else nearest(j, weight_IO)) * kept_O
                gone_O = torch.sub(weight_IO[j], new_O, out=gone_LO[j - start])
                weight_IO[j + 1 : stop].addr_(ratio_II[j, j + 1 : stop], gone_O, alpha=-1)
                weight_IO[j] = new_O
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
    return _refit(weight_OI, start_OI, stats.damped(damping), iterations, tolerance)[0]


def _refit(
    weight_OI: Tensor, start_OI: Tensor, hessian_II: Tensor, iterations: int, tolerance: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """refit(), and every row's loss after it."""
    mask_OI = start_OI != 0
    inverse_I = 1 / hessian_II.diagonal()
    target_OI = weight_OI.float()
    x_OI = start_OI.float().clone()
    delta_OI = target_OI - x_OI
    residual_OI = delta_OI @ hessian_II
    before_O = (delta_OI * residual_OI).sum(1)
    residual_OI.mul_(mask_OI)
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
    after_O = row_loss(x_OI - target_OI, hessian_II)
    better_O = after_O <= before_O
    return torch.where(better_O[:, None], x_OI, start_OI.float()), torch.where(better_O, after_O, before_O)


def dense_target(weight_OI: Tensor, stats: Stats, damping: float, blend: float) -> Tensor:
    """The weights that a solver should aim at when its inputs x are no longer the dense model's inputs d:
        W + blend (W* - W),   W* = W (C + ridge) (H + ridge)^-1 = W + W (C - H) (H + ridge)^-1,   C = sum d x',   H = sum x x'
    W* minimises ||D W' - X W*'||^2 + ridge ||W* - W||^2, so with blend = 1 any solver's loss is, up to a constant, the
    distance from the dense model's outputs; 0 keeps W. d = x gives W. Raises ValueError if H does not factor or nobody
    summed C. The target of FISTAPruner, Zhao et al. 2024, arXiv 2408.03728, in closed form.
    """
    if stats.drift_II is None:
        raise ValueError("a blend needs the dense model's inputs beside the pruned ones, and they were not collected")
    moved_OI = (weight_OI.float() @ stats.drift_II).T
    upper_II = stats.inverse_factor(damping)
    # H^-1 = U' U
    return weight_OI.float() + blend * (upper_II.T @ (upper_II @ moved_OI)).T


def swaps(
    weight_OI: Tensor,
    start_OI: Tensor,
    stats: Stats,
    pattern: Pattern,
    damping: float = DAMPING,
    rounds: int = 50,
    candidates: int = 16,
) -> Tensor:
    """Local search: in every row swap the survivor and the removed weight whose swap lowers the loss most, until no swap helps
    or `rounds` are done; then refit(). Rows that did not gain keep start_OI. Counts and pattern stay as they are.

    With g = (W' - W) H, removing i and setting j to its best value changes a row's loss by
        w_i^2 H_ii - 2 w_i g_i - (g_j - w_i H_ij)^2 / H_jj
    exactly, if the other weights are fixed. The `candidates` cheapest survivors i are tried, each with the most promising j: of
    the row, or of i's group where the pattern has groups. Patterns that decide whole tiles are left alone. After SparseSwaps,
    Zimmer et al. 2025, with weights that move along.
    """
    width = pattern.trades
    if width is None:
        return start_OI
    hessian_II = stats.damped(damping)
    diagonal_I = hessian_II.diagonal()
    x_OI = start_OI.float().clone()
    gradient_OI = (x_OI - weight_OI.float()) @ hessian_II
    rows, inputs = x_OI.shape
    row_O = torch.arange(rows, device=x_OI.device)
    tried = min(candidates, inputs)
    tiny_O = row_loss(x_OI - weight_OI.float(), hessian_II) * 1e-4
    for _ in range(rounds):
        off_OI = x_OI == 0
        cost_OI = (x_OI.square() * diagonal_I).addcmul_(x_OI, gradient_OI, value=-2).masked_fill_(off_OI, torch.inf)
        cost_OK, i_OK = cost_OI.topk(tried, dim=1, largest=False)
        if width:
            j_OKJ = (i_OK // width * width)[..., None] + torch.arange(width, device=x_OI.device)
        else:
            gain_OI = (gradient_OI.square() / diagonal_I).masked_fill_(~off_OI, -1.0)
            j_OKJ = gain_OI.topk(tried, dim=1).indices[:, None].expand(rows, tried, tried)
        w_OK1 = x_OI.gather(1, i_OK)[..., None]
        slope_OKJ = gradient_OI[row_O[:, None, None], j_OKJ] - w_OK1 * hessian_II[i_OK[..., None], j_OKJ]
        change_OKJ = cost_OK[..., None] - slope_OKJ.square() / diagonal_I[j_OKJ]
        change_OKJ = change_OKJ.masked_fill_(~off_OI[row_O[:, None, None], j_OKJ], torch.inf)
        best_O, place_O = change_OKJ.flatten(1).min(1)
        act_O = best_O < -tiny_O
        if not act_O.any():
            break
        row = row_O[act_O]
        k, j = place_O[act_O] // j_OKJ.shape[2], place_O[act_O] % j_OKJ.shape[2]
        i, to = i_OK[row, k], j_OKJ[row, k, j]
        value = -slope_OKJ[row, k, j] / diagonal_I[to]
        gradient_OI[row] += value[:, None] * hessian_II[to] - x_OI[row, i][:, None] * hessian_II[i]
        x_OI[row, i] = 0
        x_OI[row, to] = value
    new_OI = refit(weight_OI, x_OI, stats, damping)
    loss_O, before_O = (row_loss(w.float() - weight_OI.float(), hessian_II) for w in (new_OI, start_OI))
    return torch.where((loss_O < before_O)[:, None], new_OI, start_OI.float())


def refit_exact(weight_OI: Tensor, start_OI: Tensor, stats: Stats, damping: float = DAMPING) -> Tensor:
    """What refit() converges to, row by row: w_S' = H[S, S]^-1 (w H)_S, by Cholesky in fp64. O(O I^3): the oracle."""
    hessian_II = stats.damped(damping).double()
    target_OI = weight_OI.double() @ hessian_II
    out_OI = torch.zeros_like(target_OI)
    for row, mask_I in enumerate(start_OI != 0):
        lower = torch.linalg.cholesky(hessian_II[mask_I][:, mask_I])
        out_OI[row, mask_I] = torch.cholesky_solve(target_OI[row, mask_I, None], lower)[:, 0]
    return out_OI.float()


def admm(
    weight_OI: Tensor,
    stats: Stats,
    pattern: Pattern,
    sparsity: float,
    damping: float = DAMPING,
    every: int = 5,
    ladder: tuple[float, ...] | None = None,
    relaxation: float = 1.0,
) -> Tensor:
    """The mask by ADMM, then refit(): minimises loss(W') subject to W' = D, D in the pattern.

    In coordinates scaled by the root of diag(H), so that G = H / (s s') has ones on its diagonal:
        B = (W G - V + rho D) (G + rho)^-1,   D = the best of (B + V / rho)^2,   V += rho (B - D)
    where the last two take B + (relaxation - 1) (B - D) for B (Boyd et al. 2011, sec. 3.4.3),
    from D the best of W^2 and V = 0. rho grows every `every` iterations, and which rule says how much:
    - ladder None: ALPS. From 0.1, the faster the more of the mask still changes, by 1.3 above 10%, 1.2 above 0.5%, 1.1 above 0;
      a mask that stands still before rho ever grew starts over with rho / 5; it ends when the mask no longer changes. Meng et
      al. 2024, arXiv 2406.07831, alg. 1, with the restarts of its authors' code and their `every` of 3 raised to 5, which finds a
      0.2% smaller error on the anchor layer (docs/log.md).
    - ladder: these values of rho, one after another. (0.4, 0.8) relaxed by 1.6 takes a third of ALPS's time for a squared error
      2 to 3% larger in SmolLM2's layers; one that ends below 0.6 leaves a mask that has not settled, +30% (docs/log.md).
    Where refitting the mask that it starts from gives less, that is what it returns (_no_worse()): so it is exact where inputs
    do not correlate.
    Raises ValueError if H is not usable.
    """
    hessian_II = stats.damped(damping)
    scale_I = hessian_II.diagonal().sqrt()
    scaled_II = hessian_II / (scale_I[:, None] * scale_I)
    start_OI = weight_OI.float() * scale_I
    target_OI = start_OI @ scaled_II
    first_OI = start_OI * pattern.keep(start_OI.square(), sparsity)
    sparse_OI, dual_OI = first_OI, torch.zeros_like(start_OI)
    before_OI = first_OI != 0
    rho, grew, inverted = ladder[0] if ladder else 0.1, False, 0.0
    rounds = len(ladder) if ladder else _MOST_ROUNDS
    for i in range(1, every * rounds + 1):
        if rho != inverted:
            inverse_II, inverted = _inverse(scaled_II, rho), rho
        dense_OI = (target_OI - dual_OI).add_(sparse_OI, alpha=rho) @ inverse_II
        relaxed_OI = torch.lerp(sparse_OI, dense_OI, relaxation) if relaxation != 1 else dense_OI
        wanted_OI = torch.add(relaxed_OI, dual_OI, alpha=1 / rho)
        keep_OI = pattern.keep(wanted_OI.square(), sparsity)
        sparse_OI = wanted_OI.mul_(keep_OI)
        dual_OI.add_(relaxed_OI, alpha=rho).sub_(sparse_OI, alpha=rho)
        if i % every:
            continue
        if ladder:
            rho = ladder[min(i // every, rounds - 1)]
            continue
        changed = int((keep_OI ^ before_OI).sum()) / max(1, int(keep_OI.sum()))
        before_OI = keep_OI
        if (changed == 0 and grew) or (i >= 10 * every and changed < 3e-4):
            break
        if changed > 0.005 or (changed and grew):
            rho, grew = rho * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), True
        else:
            rho, sparse_OI, dual_OI = rho / 5, first_OI, torch.zeros_like(start_OI)
    # B is near the refit's own solution, so a few steps are enough
    new_OI, _ = _refit(weight_OI, dense_OI.mul_(keep_OI).div_(scale_I), hessian_II, iterations=8)

    def refitted(weight_OI: Tensor, start_OI: Tensor) -> Tensor:
        return _refit(weight_OI, start_OI, hessian_II, iterations=20)[0]

    # where inputs hardly correlate, the first mask is the best there is and the iteration wanders off
    return _no_worse(weight_OI, new_OI, weight_OI * (first_OI != 0), hessian_II, refitted)


# rows that are compared before all are
_COMPARED = 64


def _no_worse(
    weight_OI: Tensor,
    new_OI: Tensor,
    start_OI: Tensor,
    hessian_II: Tensor,
    finish: Callable[[Tensor, Tensor], Tensor] = lambda weight_OI, start_OI: start_OI,
) -> Tensor:
    """new_OI, or finish(weight_OI, start_OI) if its loss is lower: where inputs have few directions, or tiles decide, a solver can
    end worse than the mask that it starts from.

    The rows that weigh most are compared, and all of them only if those are not better: two products more would double
    SparseGPT's time.
    """
    weight_OI = weight_OI.float()
    rows = (weight_OI.square() @ hessian_II.diagonal()).topk(min(_COMPARED, len(weight_OI))).indices
    part_OI = weight_OI[rows]

    def loss(found_OI: Tensor, weight_OI: Tensor) -> Tensor:
        return row_loss(found_OI - weight_OI, hessian_II).sum()

    if loss(new_OI[rows], part_OI) < loss(finish(part_OI, start_OI[rows]), part_OI):
        return new_OI
    other_OI = finish(weight_OI, start_OI)
    return new_OI if loss(new_OI, weight_OI) < loss(other_OI, weight_OI) else other_OI


# a mask that still changes after this many values of rho is taken as it is
_MOST_ROUNDS = 60


def _inverse(scaled_II: Tensor, rho: float) -> Tensor:
    """(G + rho)^-1. Raises ValueError if that does not factor."""
    shifted_II = scaled_II.clone()
    shifted_II.diagonal().add_(rho)
    lower_II, failed = torch.linalg.cholesky_ex(shifted_II)
    if failed:
        raise ValueError(f"the Gram matrix is not positive definite in fp32, {rho:g} on its diagonal included")
    return torch.cholesky_inverse(lower_II)


def row_loss(delta_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """d H d' of every row d, [O]."""
    return ((delta_OI @ hessian_II) * delta_OI).sum(1)


def relative_error(weight_OI: Tensor, new_OI: Tensor, stats: Stats | None) -> float:
    """||X (W' - W)'||_F / ||X W'||_F, undamped, as far as stats can tell.

    With a Gram matrix exact; with norms only, as if inputs were uncorrelated; without stats, of the weights.
    """
    weight_OI = weight_OI.float()
    unit = _unit(weight_OI)
    weight_OI, delta_OI = weight_OI * unit, (new_OI.float() - weight_OI) * unit
    if stats is None:
        error, whole = delta_OI.square().sum(), weight_OI.square().sum()
    elif stats.gram_II is None:
        error, whole = ((w.square() @ stats.sqnorm_I).sum() for w in (delta_OI, weight_OI))
    else:
        error, whole = (row_loss(w, stats.gram_II).sum() for w in (delta_OI, weight_OI))
    return float((error.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


Solve = Callable[[Tensor, Stats | None, Pattern, float, float], Tensor]


@dataclass(frozen=True)
class Solver:
    """One method, a row of `secateurs methods`. needs: what must be collected beforehand, 'weights' (nothing), 'norms' or 'gram'.

    solve: (weight_OI, stats, pattern, sparsity, damping) -> weight_OI. score: what a global threshold ranks by.
    scope: the field's default for unstructured patterns. joint: where weights go to a grid as well, mask and integers may be
    chosen together instead (quantize.joint()).
    """

    name: str
    needs: str
    solve: Solve
    score: scores.Score
    scope: str
    about: str
    joint: bool = False


def _by_score(name: str, needs: str, scope: str, about: str) -> Solver:
    score = scores.SCORES[name]

    def solve(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        return masked(weight_OI, stats, pattern, sparsity, score)

    return Solver(name, needs, solve, score, scope, about)


def _unit(weight_OI: Tensor) -> float:
    """The power of two that takes the largest weight into [1/2, 1): multiplying by it rounds nothing, and no square overflows."""
    exponent = int(torch.frexp(weight_OI.float().abs().amax()).exponent)
    return 2.0 ** -max(-126, min(exponent, 126))


def _with_gram(
    name: str,
    solve: Callable[[Tensor, Stats, Pattern, float, float], Tensor],
    score: scores.Score,
    scope: str,
    about: str,
    joint: bool = False,
) -> Solver:
    """The row of a solver that needs a Gram matrix, for weights of any size. Weights of dead inputs are removed or unchanged."""

    def at_unit(weight_OI: Tensor, stats: Stats | None, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        if stats is None:
            raise ValueError(f"{name} needs calibration: the Gram matrix of the layer's inputs")
        unit = _unit(weight_OI)
        new_OI = solve(weight_OI.float() * unit, stats, pattern, sparsity, damping) / unit
        return torch.where(stats.dead_I & (new_OI != 0), weight_OI.float(), new_OI)

    return Solver(name, "gram", at_unit, score, scope, about, joint)


def _sparsegpt(weight_OI: Tensor, stats: Stats, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
    new_OI = obs(weight_OI, stats, pattern, sparsity, damping)
    hessian_II = stats.damped(damping)
    start_OI = weight_OI * pattern.keep(weight_OI.square() * hessian_II.diagonal(), sparsity)
    return _no_worse(weight_OI, new_OI, start_OI, hessian_II)


def _by_admm(name: str, about: str, ladder: tuple[float, ...] | None = None, relaxation: float = 1.0) -> Solver:
    def solve(weight_OI: Tensor, stats: Stats, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        return admm(weight_OI, stats, pattern, sparsity, damping, ladder=ladder, relaxation=relaxation)

    return _with_gram(name, solve, scores.wanda, "layer", about, joint=True)


SOLVERS: dict[str, Solver] = {
    s.name: s
    for s in (
        _by_score("random", "weights", "layer", "uniform noise, the control; no calibration"),
        _by_score("magnitude", "weights", "layer", "|W|; no calibration; breaks language models from 50%"),
        _by_score("wanda", "norms", "row", "|W| times input norm; weights unchanged; seconds"),
        _by_score("ria", "norms", "layer", "relative importance times root of input norm; weights unchanged"),
        _with_gram(
            "sparsegpt", _sparsegpt, scores.wanda, "layer", "columns removed in turn, errors compensated (OBS)", True
        ),
        _by_admm("admm", "mask and weights together (ADMM), few steps; survivors refit", (0.4, 0.8), 1.6),
        _by_admm("alps", "the same until the mask rests (ALPS): three times the time, 1 to 2% less error"),
    )
}


# what a method's name may be followed by after a plus: (weight_OI, start_OI, stats, pattern, damping) -> weight_OI
EXTRAS: dict[str, tuple[Callable[[Tensor, Tensor, Stats, Pattern, float], Tensor], str]] = {
    "refit": (
        lambda weight_OI, start_OI, stats, pattern, damping: refit(weight_OI, start_OI, stats, damping),
        "survivors refit by least squares",
    ),
    "swaps": (swaps, "survivors and removed weights traded one by one, then refit"),
}


def find(method: str) -> Solver:
    """'wanda', 'wanda+refit' or 'alps+swaps' -> Solver. Raises ValueError naming the known ones."""
    name, *extras = method.split("+")
    unknown = [extra for extra in extras if extra not in EXTRAS]
    if name not in SOLVERS or unknown:
        known = ", ".join(SOLVERS)
        near = nearest(name, SOLVERS) if name not in SOLVERS else nearest(unknown[0], EXTRAS)
        raise ValueError(
            f"unknown method '{method}'; known: {known}; each may be followed by +{' or +'.join(EXTRAS)}{near}"
        )
    base = SOLVERS[name]
    if not extras:
        return base

    def solve(weight_OI: Tensor, stats: Stats, pattern: Pattern, sparsity: float, damping: float) -> Tensor:
        new_OI = base.solve(weight_OI, stats, pattern, sparsity, damping)
        for extra in extras:
            new_OI = EXTRAS[extra][0](weight_OI, new_OI, stats, pattern, damping)
        return new_OI

    about = "; ".join([base.about, *(EXTRAS[extra][1] for extra in extras)])
    return _with_gram(method, solve, base.score, base.scope, about, base.joint and set(extras) <= {"refit"})
