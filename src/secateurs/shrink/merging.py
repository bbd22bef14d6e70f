"""Merges experts that go into those that stay: REAM (Jha et al. 2026, arXiv 2604.04356).

From the most salient of those that stay, each takes the most similar of those that go, up to an eighth of all together.
Similarity is that of mean outputs weighted by the router's softmax, and that of logits over tokens. Before their matrices are
averaged, weighted by saliency, the neurons of an expert are put into the order of those that they are most like, by activations
and by weights (Hungarian algorithm). E experts, T tokens, H hidden width, I neurons.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from secateurs.model.coupling import Coupling
from secateurs.shrink.experts import Trial, saliency

# of all experts, the fraction that a group has at most: the paper's 16 of 128; tokens whose activations are compared
_GROUP, _COMPARED = 8, 512


def merge(trial: Trial, removed: Sequence[int], couplings: Sequence[Coupling]) -> dict[str, list[int]]:
    """Merge experts into those that stay, in place. Returns {expert that stays: those merged into it}.

    couplings: of the block; those of its experts are used. Raises ValueError if the neurons of its experts are not known.
    """
    of = {
        coupling.consumer.index: coupling for coupling in couplings if coupling.consumer.module is trial.mixture.experts
    }
    if len(of) != trial.mixture.number:
        raise ValueError(
            "criterion ream: which rows of its experts belong to a neuron is not known; choose another one"
        )
    score_E = saliency(trial)
    # one without tokens has no weight, but is still merged
    score_E[score_E == 0] = min(0.5, float(score_E[score_E > 0].min()))
    groups = grouped(score_E, _similar(trial), removed, max(2, trial.mixture.number // _GROUP))
    for center, others in groups.items():
        share = score_E[[center, *others]] / score_E[[center, *others]].sum()
        mean = [part * share[0] for part in _parts(of[center])]
        for e, weight in zip(others, share[1:], strict=True):
            order_I = _alike(trial, of[center], of[e])
            of[e].reorder(order_I)
            for total, part in zip(mean, _parts(of[e]), strict=True):
                total += part * weight
        for old, new in zip(_parts(of[center], copy=False), mean, strict=True):
            old.copy_(new)
    return {str(center): others for center, others in groups.items()}


def grouped(score_E: Tensor, similar_EE: Tensor, removed: Sequence[int], size: int) -> dict[int, list[int]]:
    """{expert that stays: those that go into it}, the most salient choosing first. size: of a group at most.

    What finds no group, where more go than the groups hold, is not merged.
    """
    stays = [e for e in score_E.argsort(descending=True, stable=True).tolist() if e not in removed]
    left, found = set(removed), {}
    for center in stays:
        mine = sorted(left, key=lambda e: -float(similar_EE[center, e]))[: size - 1]
        if mine:
            found[center] = mine
        left -= set(mine)
    return found


def _similar(trial: Trial) -> Tensor:
    """How similar experts are, [E, E], from 0 to 1."""
    mixture, x_TH = trial.mixture, trial.x_TH
    logits_TE = mixture.logits(x_TH)
    gate_TE = logits_TE.softmax(1)
    mean_EH = torch.stack([(mixture.expert(x_TH, e) * gate_TE[:, e, None]).mean(0) for e in range(mixture.number)])
    outputs_EE = (cosine_similarity(mean_EH[:, None], mean_EH[None], -1) + 1) / 2
    rows_ET = normalize(logits_TE.T, dim=1)
    apart_EE = torch.cdist(rows_ET, rows_ET)
    return (outputs_EE + 1 - apart_EE / apart_EE.max().clamp(min=1e-30)) / 2


def _alike(trial: Trial, center: Coupling, other: Coupling) -> Tensor:
    """The order of the other expert's neurons in which each is like the center's."""
    cost = torch.zeros(())
    for weighs in (_activations, _weights):
        cost = cost + torch.cdist(normalize(weighs(trial, center), dim=1), normalize(weighs(trial, other), dim=1))
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def _activations(trial: Trial, coupling: Coupling) -> Tensor:
    """What every neuron of an expert gives, [I, T]."""
    return trial.mixture.down(trial.x_TH[:_COMPARED], coupling.consumer.index)[1].T


def _weights(trial: Trial, coupling: Coupling) -> Tensor:
    """All weights of every neuron of an expert, [I, ...]."""
    rows = [p.read().float()[r] for i, p in enumerate(coupling.producers) for r in coupling.rows(i)]
    return torch.cat([*rows, coupling.consumer.read().float().T], 1)


def _parts(coupling: Coupling, copy: bool = True) -> list[Any]:
    """An expert's parts of all parameters that have one, biases too; in fp32 if copied."""
    module, e = coupling.consumer.module, coupling.consumer.index
    held: Mapping[str, Any] = module._parameters
    number = coupling.consumer.parameter.shape[0]
    parts = [p.detach()[e] for p in held.values() if p is not None and len(p) == number]
    return [part.float().clone() for part in parts] if copy else parts
