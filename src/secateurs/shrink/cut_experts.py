"""Removes experts from a block: chooses, merges where the criterion says so, cuts, and refits what is left; on the block's
inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from secateurs.model.coupling import Coupling
from secateurs.model.walk import Step
from secateurs.shrink import experts, merging, refit_experts
from secateurs.shrink.experts import CRITERIA
from secateurs.shrink.mixture import Mixture

# an expert that fewer tokens are sent to is named, of so many blocks: what is measured of it says little
FEW, _NAMED = 64, 8


@dataclass(frozen=True)
class How:
    """What is done to a mixture. criterion: of CRITERIA. gone: how many experts go. active: to how many a token is sent then, or
    None for as many as before. refit: least squares on what is left; damping: its ridge.
    """

    criterion: str
    gone: int
    active: int | None
    refit: bool
    damping: float


def cut(
    step: Step, fused: Mapping[str, str], weight_H: Tensor | None, how: How, couplings: Callable[[], Sequence[Coupling]]
) -> dict[str, Any] | None:
    """Cut a block's mixture, in place. Returns what was done, or None for a block without one.

    fused: as of Mixture. weight_H: E[g^2] of the block's output, if known. couplings: those of the block, asked for by merging.
    """
    x_TH = experts.inputs(step, fused, refit_experts.TOKENS)
    if x_TH is None:
        return None
    with step.evaluating():
        mixture, ranks = Mixture(step.block, fused), step.ranks
        trial = experts.trial_of(mixture, x_TH, weight_H, ranks)
        summed = not isinstance(trial, experts.Whole)
        wanted_TH = mixture(x_TH) if how.refit and summed and ranks.first else None
        found: dict[str, Any] = {"tokens": experts.tokens_of(mixture, x_TH).tolist() if summed else []}
        if how.active is not None:
            mixture.send_to(how.active)
        row = CRITERIA[how.criterion]
        removed = row.order(trial, how.gone)
        found |= {"removed": sorted(removed), "loss": trial.loss(removed) if removed else 0.0}
        # what follows goes from expert to expert, so it is the first rank's, with the threads of all
        with ranks.all_threads() if ranks.first else nullcontext():
            if row.merges and removed and ranks.first:
                found["merged"] = merging.merge(trial, removed, couplings())
            mixture.cut(removed)
            if wanted_TH is not None:
                found["refit"] = asdict(refit_experts.refit(mixture, x_TH, wanted_TH, weight_H, how.damping))
            found = ranks.tell(found)
        if how.refit and not summed:
            found["refit"] = "left out: its experts do not give the weighted sum of what each gives alone"
        for parameter in mixture.parent.parameters():
            ranks.hand_out(parameter.detach(), owner=0)
    return found


def uncovered(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on the experts that hardly any calibration text was sent to. records: of blocks, as in report.json."""
    named, few, total = [], 0, 0
    for record in records:
        tokens = record["units"].get("experts", {}).get("tokens", [])
        here = [str(e) for e, count in enumerate(tokens) if count < FEW]
        few, total = few + len(here), total + len(tokens)
        if here:
            named.append(f"{record['block']}: {', '.join(here)}")
    if not named:
        return []
    more = f"; and of {len(named) - _NAMED} blocks more, see report.json" if len(named) > _NAMED else ""
    return [
        f"{few} of {total} experts saw fewer than {FEW} of the calibration tokens looked at ({'; '.join(named[:_NAMED])}{more}); "
        "name more --calibration text, or other text"
    ]
