"""What the folder and the live run share: the guide of a model's layers, warnings of what was left out, the record of tuning."""

from typing import Any

from torch import Tensor, nn

from secateurs.model import families
from secateurs.prune.assign import Shares
from secateurs.prune.block import Guide, take_up
from secateurs.prune.plan import Plan
from secateurs.prune.record import Report
from secateurs.prune.tuning import Outcome


def left_out(plan: Plan, found: dict[str, Tensor], whole: bool = False) -> list[str]:
    """Warnings: what the plan asks for and this model cannot have. whole: the model is a module without blocks."""
    if whole:
        asked = {
            "sensitivities": plan.sensitivity,
            "reordering": plan.permute and any(p.fixed_sparsity is not None for p in plan.layer_patterns),
            "tuning of blocks": plan.reconstruct,
            "tuning of the whole": plan.distill,
        }
        names = [name for name, value in asked.items() if value]
        return [f"left out: {', '.join(names)}; only a Hugging Face model's blocks and loss are known"] if names else []
    if plan.sensitivity and not found:
        return ["sensitivities were not measured: the model predicts no next token"]
    return []


def note_distillation(model: nn.Module, plan: Plan, report: Report, outcome: Outcome | None) -> None:
    if outcome is None:
        report.warnings.append("the whole model was not tuned: it predicts no next token")
        return
    report.distillation = {"before": outcome.before, "after": outcome.after, "steps": outcome.steps}
    if outcome.accepted:
        report.layers, vectors = take_up(model, plan, report.layers)
        report.tuned = sorted({*report.tuned, *vectors})


def guide_of(model: nn.Module, plan: Plan, shares: Shares | None, found: dict[str, Tensor]) -> Guide:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return Guide(shares, found)
    return Guide(shares, found, families.find(config.model_type), config)
