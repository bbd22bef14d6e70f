"""Rounds a layer's survivors to a grid: scales by search, integers by GPTQ and coordinate descent, the mask as it is or joint.

    weight_OI, scales = quantize(weight_OI, start_OI, stats, grid, damping)              # the mask of start_OI
    weight_OI, scales = joint(weight_OI, stats, pattern, sparsity, grid, damping)        # mask and integers in one pass

The objective is the solvers' (solvers.py): loss(W') = tr((W' - W) H (W' - W)'). What a mask removed stays zero; a survivor may be
rounded to zero. O outputs, I inputs, G groups, N inputs of a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from secateurs.matrix.grids import Grid, Scales
from secateurs.matrix.patterns import Pattern, Unstructured
from secateurs.matrix.solvers import LAZY_BLOCK, obs, row_loss
from secateurs.matrix.stats import Stats

# fractions of the scale that would reach the largest weight: clipping it makes the others' steps finer
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
# least squares for the scale of integers, and integers for that scale, in turn
_TURNS = 3
# from so many bits on rounding harms less than the mask, which is then chosen without it: on the anchor layer the joint mask is
# 4 to 8% worse at 8 bits, alike at 4, 2 to 8% better below (docs/log.md)
_MASK_FIRST = 4


def fit(weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None) -> Scales:
    """Scales, and zeros of an asymmetric grid, by search: for every group the least sum of importance_I * (rounded - w)^2 among
    _CLIPS, both signs of a symmetric scale, and _TURNS of least squares after them.
    """
    part_OGN = grid.grouped(weight_OI.float())
    one_I = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    weight_1GN = grid.grouped((one_I if importance_I is None else importance_I)[None])
    scale_OG, zero_OG = _search(part_OGN, weight_1GN, grid)
    return Scales(grid, scale_OG.to(grid.scale_dtype), None if grid.symmetric else zero_OG.to(torch.uint8))


def _search(part_OGN: Tensor, weight_1GN: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scales, already rounded to their dtype, and the zeros of groups of weights, [..., N] -> [...]."""
    high, low = part_OGN.amax(-1).clamp(min=0), -part_OGN.amin(-1).clamp(max=0)
    middle = torch.full_like(high, grid.middle)
    if grid.symmetric:
        # the least step that reaches both ends, with the extra level below zero and above it
        starts = [torch.maximum(high / (grid.middle - 1), low / grid.middle)]
        starts += [-torch.maximum(low / (grid.middle - 1), high / grid.middle)]
    else:
        starts = [(high + low) / (grid.levels - 1)]
    best_OG = torch.full_like(high, torch.inf)
    scale_OG, zero_OG = torch.zeros_like(high), middle

    def tried(tried_OG: Tensor, tried_zero_OG: Tensor) -> Tensor:
        """Note where a scale is better; returns its integers."""
        nonlocal best_OG, scale_OG, zero_OG
        tried_OG = tried_OG.to(grid.scale_dtype).float()
        integer_OGN = _nearest(part_OGN, tried_OG[..., None], tried_zero_OG[..., None], grid)
        error_OG = ((integer_OGN * tried_OG[..., None] - part_OGN).square() * weight_1GN).sum(-1)
        better_OG = (error_OG < best_OG) & tried_OG.isfinite()
        best_OG = torch.where(better_OG, error_OG, best_OG)
        scale_OG = torch.where(better_OG, tried_OG, scale_OG)
        zero_OG = torch.where(better_OG, tried_zero_OG, zero_OG)
        return integer_OGN

    for start_OG in starts:
        for clip in _CLIPS:
            step_OG = start_OG * clip
            zero = middle if grid.symmetric else (low / step_OG).nan_to_num(0, 0, 0).round().clamp(max=grid.levels - 1)
            tried(step_OG, zero)
    for _ in range(_TURNS):
        integer_OGN = _nearest(part_OGN, scale_OG[..., None], zero_OG[..., None], grid)
        weighed_OGN = integer_OGN * weight_1GN
        square_OG = (weighed_OGN * integer_OGN).sum(-1)
        tried((weighed_OGN * part_OGN).sum(-1) / square_OG.clamp(min=torch.finfo(torch.float32).tiny), zero_OG)
    return scale_OG, zero_OG


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor | float, grid: Grid) -> Tensor:
    """The nearest integers, as floats; 0 where the scale is 0."""
    low, high = -zero, grid.levels - 1 - zero
    return torch.clamp((weight / scale).nan_to_num_(0, 0, 0).round_(), low, high)  # type: ignore[arg-type]


class _ByColumn:
    """What obs() rounds to: the scales of a group are fitted when its first column comes, on the weights as updated so far."""

    def __init__(self, grid: Grid, importance_I: Tensor, guess: Callable[[int, int, Tensor], Tensor]) -> None:
        """guess: (first, last, weight_IO) -> which weights of these columns will stay, [columns, O]."""
        self.grid, self.importance_I, self.guess = grid, importance_I, guess
        self.scale_GO: list[Tensor] = []
        self.zero_GO: list[Tensor] = []

    def nearest(self, j: int, weight_IO: Tensor) -> Tensor:
        width = self.grid.width(len(weight_IO))
        if j % width == 0:
            last = min(j + width, len(weight_IO))
            part_ON = (weight_IO[j:last] * self.guess(j, last, weight_IO)).T.contiguous()
            scale_O1, zero_O1 = _search(part_ON[:, None], self.importance_I[None, None, j:last], self.grid)
            self.scale_GO.append(scale_O1[:, 0])
            self.zero_GO.append(zero_O1[:, 0])
        scale_O, zero_O = self.scale_GO[-1], self.zero_GO[-1]
        return _nearest(weight_IO[j], scale_O, zero_O, self.grid).mul_(scale_O)

    def scales(self) -> Scales:
        scale_OG, zero_OG = (torch.stack(found, 1).contiguous() for found in (self.scale_GO, self.zero_GO))
        return Scales(
            self.grid, scale_OG.to(self.grid.scale_dtype), None if self.grid.symmetric else zero_OG.to(torch.uint8)
        )


def joint(
    weight_OI: Tensor,
    stats: Stats,
    pattern: Pattern,
    sparsity: float,
    grid: Grid,
    damping: float,
    importance_O: Tensor | None = None,
    keep_OI: Tensor | None = None,
) -> tuple[Tensor, Scales]:
    """SparseGPT and GPTQ in one pass: a column's survivors are rounded, and what that and the mask cost is compensated by the
    columns after it. keep_OI: a mask to use; else it is chosen by the weights as updated so far. Frantar and Alistarh 2023, sec. 3.
    """
    diagonal_I = stats.inverse_factor(damping).diagonal()

    def guess(first: int, last: int, weight_IO: Tensor) -> Tensor:
        if keep_OI is not None:
            return keep_OI[:, first:last].T
        score_NO = (weight_IO[first:last] / diagonal_I[first:last, None]).square()
        fixed = pattern.fixed_sparsity
        return Unstructured("layer").keep(score_NO, sparsity if fixed is None else fixed)

    rounding = _ByColumn(grid, stats.damped(damping).diagonal(), guess)
    new_OI = obs(
        weight_OI,
        stats,
        pattern,
        sparsity,
        damping,
        keep_OI=keep_OI,
        importance_O=importance_O,
        nearest=rounding.nearest,
    )
    return new_OI, rounding.scales()


def descend(
    weight_OI: Tensor, start_OI: Tensor, scales: Scales, keep_OI: Tensor, hessian_II: Tensor, passes: int
) -> Tensor:
    """Coordinate descent on the integers of start_OI, which is on the grid: column by column the integer that minimises the loss
    with all others fixed, exactly, so that the loss never rises. Weights outside of keep_OI stay zero.

    With g = (W' - W) H:  w_j <- nearest(w_j - g_j / H_jj).
    """
    grid, inputs = scales.grid, start_OI.shape[1]
    width = grid.width(inputs)
    scale_GO = scales.scale_OG.float().T.contiguous()
    zero_GO = None if scales.zero_OG is None else scales.zero_OG.float().T.contiguous()
    diagonal_I = hessian_II.diagonal()
    new_IO, keep_IO = start_OI.float().T.contiguous(), keep_OI.T.contiguous()
    gradient_IO = hessian_II @ (new_IO - weight_OI.float().T)
    for _ in range(passes):
        moved = False
        for start in range(0, inputs, LAZY_BLOCK):
            stop = min(start + LAZY_BLOCK, inputs)
            change_LO = torch.empty(stop - start, new_IO.shape[1], device=new_IO.device)
            for j in range(start, stop):
                group = j // width
                zero = grid.middle if zero_GO is None else zero_GO[group]
                wanted_O = torch.addcdiv(new_IO[j], gradient_IO[j], diagonal_I[j], value=-1)
                new_O = _nearest(wanted_O, scale_GO[group], zero, grid).mul_(scale_GO[group]).mul_(keep_IO[j])
                torch.sub(new_O, new_IO[j], out=change_LO[j - start])
                gradient_IO[j + 1 : stop].addr_(hessian_II[j, j + 1 : stop], change_LO[j - start])
                new_IO[j] = new_O
            if not change_LO.any():
                continue
            moved = True
            # what the columns of this block did to those before them in it, to themselves, and to all other columns
            gradient_IO[start:stop].addmm_(hessian_II[start:stop, start:stop].triu(), change_LO)
            gradient_IO[:start].addmm_(hessian_II[:start, start:stop], change_LO)
            gradient_IO[stop:].addmm_(hessian_II[stop:, start:stop], change_LO)
        if not moved:
            break
    return new_IO.T.contiguous()


# numbers of the systems that refit_scales() solves at a time
_SYSTEMS = 1 << 24


def refit_scales(weight_OI: Tensor, start_OI: Tensor, scales: Scales, hessian_II: Tensor) -> tuple[Tensor, Scales]:
    """The scales that minimise the loss with the integers of start_OI fixed, by least squares in every row: with Q_g the integers
    of group g,  sum_h (Q_g H Q_h') s_h = Q_g H w'. Rows that rounding the scales made worse keep theirs.
    """
    grid, inputs = scales.grid, start_OI.shape[1]
    width, groups = grid.width(inputs), grid.groups(inputs)
    integer_OI = scales.integers(start_OI).float()
    scale_OG = scales.scale_OG.float().clone()
    rows = max(1, _SYSTEMS // (groups * groups))
    for first in range(0, len(start_OI), rows):
        part_RI = integer_OI[first : first + rows]
        target_RG = grid.grouped((weight_OI[first : first + rows].float() @ hessian_II) * part_RI).sum(-1)
        system_RGG = torch.stack(
            [
                grid.grouped((part_RI[:, a : a + width] @ hessian_II[a : a + width]) * part_RI).sum(-1)
                for a in range(0, inputs, width)
            ],
            1,
        )
        diagonal_RG = system_RGG.diagonal(dim1=1, dim2=2)
        # a group without integers keeps its scale
        empty_RG = diagonal_RG == 0
        ridge_R1 = diagonal_RG.mean(1, keepdim=True) * (groups * torch.finfo(torch.float32).eps)
        diagonal_RG.add_(torch.where(empty_RG, 1.0, ridge_R1))
        solved_RG, failed_R = torch.linalg.solve_ex(system_RGG, target_RG[..., None])
        usable_RG = ~empty_RG & (failed_R == 0)[:, None] & solved_RG[..., 0].isfinite()
        scale_OG[first : first + rows] = torch.where(usable_RG, solved_RG[..., 0], scale_OG[first : first + rows])
    found = Scales(grid, scale_OG.to(grid.scale_dtype), scales.zero_OG)
    new_OI = found.weights(integer_OI)
    new_O, before_O = (row_loss(w - weight_OI.float(), hessian_II) for w in (new_OI, start_OI.float()))
    better_O1 = (new_O < before_O)[:, None]
    scale_OG = torch.where(better_O1, found.scale_OG, scales.scale_OG)
    return torch.where(better_O1, new_OI, start_OI.float()), Scales(grid, scale_OG, scales.zero_OG)


def polish(
    weight_OI: Tensor, start_OI: Tensor, scales: Scales, keep_OI: Tensor, hessian_II: Tensor, rounds: int = 2
) -> tuple[Tensor, Scales]:
    """descend() and refit_scales() in turn, `rounds` of descents with new scales between them; the loss never rises."""
    new_OI = start_OI
    for i in range(rounds):
        if i:
            new_OI, scales = refit_scales(weight_OI, new_OI, scales, hessian_II)
        new_OI = descend(weight_OI, new_OI, scales, keep_OI, hessian_II, passes=2)
    # 0 times a negative scale is -0, which a format without a grid stores
    return new_OI + 0.0, scales


def quantize(
    weight_OI: Tensor, start_OI: Tensor, stats: Stats | None, grid: Grid, damping: float
) -> tuple[Tensor, Scales]:
    """The weights on a grid that do what weight_OI does, zero where start_OI is. Without a Gram matrix: start_OI rounded to
    nearest, by scales that weigh errors with the inputs' norms where there are any.
    """
    if stats is None or stats.gram_II is None:
        scales = fit(start_OI, grid, None if stats is None else stats.sqnorm_I)
        return scales.rounded(start_OI), scales
    hessian_II, keep_OI = stats.damped(damping), start_OI != 0
    if grid.bits < _MASK_FIRST:
        # the more rounding errs, the more is won by compensating it
        new_OI, scales = joint(weight_OI, stats, Unstructured(), 0.0, grid, damping, keep_OI=keep_OI)
    else:
        scales = fit(start_OI, grid, hessian_II.diagonal())
        new_OI = scales.rounded(start_OI)
    return polish(weight_OI, new_OI, scales, keep_OI, hessian_II)


def mask_needs_grid(grid: Grid, sparsity: float) -> bool:
    """True where mask and integers are best chosen together: joint() and polish(), instead of a mask and then quantize()."""
    return grid.bits < _MASK_FIRST or sparsity == 0


def joint_polished(
    weight_OI: Tensor,
    stats: Stats,
    pattern: Pattern,
    sparsity: float,
    grid: Grid,
    damping: float,
    importance_O: Tensor | None = None,
) -> tuple[Tensor, Scales]:
    """joint(), then polish() on its mask; weights that it rounded to zero and did not remove may come back."""
    new_OI, scales = joint(weight_OI, stats, pattern, sparsity, grid, damping, importance_O)
    keep_OI = torch.ones_like(new_OI, dtype=torch.bool) if sparsity == 0 else new_OI != 0
    return polish(weight_OI, new_OI, scales, keep_OI, stats.damped(damping))
