"""Reorder a layer's inputs so that an N:M pattern costs less, with the layers before it reordered alike.

Which weights share a group of M is an accident of storage. Where the layer's inputs are the outputs of other layers of the
same block, one order can be applied to both sides, and the model computes what it did before: a plain checkpoint.
    MLP: rows of up (and gate), columns of down.
    attention: rows of v within a KV head, columns of o within its query heads: one order for all heads of a group.
Inputs that are the residual stream have one order for the whole model, so no layer can have its own; they stay.

The order: deal the inputs, best first, over the groups, back and forth; then, slot by slot, reassign all groups' members of
that slot at once by an exact linear assignment. Zhang et al. 2024, RIA, sec. 4. O outputs, I inputs, Q groups of M.
"""

import torch
from torch import Tensor

from secateurs.matrix.patterns import NM
from secateurs.model.coupling import Coupling

# inputs that are reordered among themselves; an assignment of q groups takes time q^3
_MOST = 4096


def order_of(score_OI: Tensor, pattern: NM, rounds: int = 1) -> Tensor:
    """The order of inputs, [I], under which the pattern keeps the most score: score_OI[:, order] instead of score_OI.

    Never worse than the order given. score: not negative; squared Wanda scores add up to output energy.
    """
    inputs = score_OI.shape[1]
    if inputs % pattern.m:
        raise ValueError(f"{inputs} inputs are not a multiple of {pattern.m}")
    # whole groups; the assignment is scipy's, on the CPU
    most = _MOST // pattern.m * pattern.m
    pieces = [
        _order_of_piece(score_OI[:, start : start + most].float().cpu(), pattern, rounds) + start
        for start in range(0, inputs, most)
    ]
    return torch.cat(pieces)


def _order_of_piece(score_OI: Tensor, pattern: NM, rounds: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    inputs, m = score_OI.shape[1], pattern.m
    dealt_MQ = score_OI.sum(0).argsort(descending=True, stable=True).reshape(m, inputs // m)
    dealt_MQ[1::2] = dealt_MQ[1::2].flip(1)
    group_QM = dealt_MQ.T.contiguous()
    best, best_kept = torch.arange(inputs), kept_score(score_OI, pattern)
    for _ in range(rounds):
        for slot in range(m):
            gain_QQ = _gains(score_OI, group_QM, slot, pattern.n)
            rows, columns = linear_sum_assignment(gain_QQ.numpy(), maximize=True)
            # candidate `rows` of the slot goes to group `columns`
            moved_Q = torch.empty_like(group_QM[:, slot])
            moved_Q[torch.from_numpy(columns)] = group_QM[torch.from_numpy(rows), slot]
            group_QM[:, slot] = moved_Q
        kept = kept_score(score_OI[:, group_QM.reshape(-1)], pattern)
        if kept > best_kept:
            best, best_kept = group_QM.reshape(-1).clone(), kept
    return best


def _gains(score_OI: Tensor, group_QM: Tensor, slot: int, n: int) -> Tensor:
    """[candidate, group]: kept score of a group if a candidate took its slot, less what is kept without anyone there."""
    others = [s for s in range(group_QM.shape[1]) if s != slot]
    candidate_OQ = score_OI[:, group_QM[:, slot]]
    # the last one kept of the others: a candidate pays by how much it exceeds that
    rest_OQM = score_OI[:, group_QM[:, others]]
    bar_OQ = rest_OQM.topk(n, dim=2).values[..., -1]
    # sum_r max(c - b, 0) = (sum_r |c - b| + sum_r c - sum_r b) / 2, and the first is a distance
    distance_QQ = torch.cdist(candidate_OQ.T, bar_OQ.T, p=1.0)
    return (distance_QQ + candidate_OQ.sum(0)[:, None] - bar_OQ.sum(0)) / 2


def kept_score(score_OI: Tensor, pattern: NM) -> float:
    """Sum of the scores that the pattern keeps, at its best."""
    return float(score_OI.reshape(-1, pattern.m).topk(pattern.n, dim=1).values.sum(dtype=torch.float64))


def refuses(coupling: Coupling, pattern: NM) -> str | None:
    """Why a coupling cannot be reordered for a pattern, or None."""
    if coupling.width is not None and coupling.width % pattern.m:
        return f"a head of {coupling.width} inputs is not a multiple of {pattern.m}"
    inputs = coupling.consumer.shape[1]
    return f"{inputs} inputs are not a multiple of {pattern.m}" if inputs % pattern.m else None


def choose(coupling: Coupling, sqnorm_I: Tensor, pattern: NM) -> Tensor | None:
    """The order of the consumer's inputs, [I], that keeps the most squared Wanda score; None if nothing is gained.

    sqnorm_I: of the consumer's inputs. Ask refuses() first.
    """
    score_OI = coupling.consumer.read().float().square() * sqnorm_I
    inputs = score_OI.shape[1]
    shared = coupling.heads
    if shared is None:
        order_I = order_of(score_OI, pattern)
    else:
        heads, groups = shared
        width, each = inputs // heads, heads // groups
        # the heads of a group stand below each other: one order for all of them
        by_group = score_OI.reshape(-1, groups, each, width).permute(1, 0, 2, 3).reshape(groups, -1, width)
        starts = torch.arange(heads).reshape(groups, each, 1) * width
        order_I = (torch.stack([order_of(s, pattern) for s in by_group])[:, None] + starts).reshape(-1)
    return None if torch.equal(order_I, torch.arange(inputs)) else order_I
