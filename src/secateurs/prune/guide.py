"""What the folder and the live run share: the guide of a model's layers, warnings of what was left out, the record of tuning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateurs.base.progress import Progress
from secateurs.model import families
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.blocks import blocks_of, entwined
from secateurs.prune.assign import Shares
from secateurs.prune.block import Guide, take_up
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord, Report
from secateurs.prune.tuning import Outcome


def left_out(plan: Plan, found: dict[str, Tensor], whole: str = "") -> list[str]:
    """Warnings: what the plan asks for and this model cannot have. whole: why it is pruned as a whole, '' if in blocks."""
    if whole:
        asked = {
            "sensitivities": plan.sensitivity,
            "reordering": plan.permute and any(p.fixed_sparsity is not None for p in plan.layer_patterns),
            "tuning of blocks": plan.reconstruct,
            "tuning of the whole": plan.distill,
        }
        names = [name for name, value in asked.items() if value]
        return [f"left out: {', '.join(names)}; {whole}"] if names else []
    if plan.sensitivity and not found:
        return ["sensitivities were not measured: the model predicts no next token"]
    return []


# layers named in a warning
_NAMED = 5


def emptied(records: Sequence[LayerRecord]) -> list[str]:
    """Warnings: layers without a weight left, and layers with outputs or N:M groups that had weights and have none."""
    pruned = [r for r in records if r.skipped is None]
    gone = [r.name for r in pruned if not r.kept]
    found = [f"no weight is left of {_named(gone)}; lower --max-sparsity"] if gone else []
    for what, count in (
        ("output", {r.name: r.emptied_rows for r in pruned}),
        ("N:M group", {r.name: r.emptied_groups for r in pruned}),
    ):
        some = {name: n for name, n in count.items() if n and name not in gone}
        if some:
            names = sorted(some, key=lambda name: -some[name])
            total = sum(some.values())
            found.append(
                f"{total} {what}{'s' if total > 1 else ''} without a weight left: "
                + _named([f"{some[name]} of {name}" for name in names])
            )
    return found


def _named(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and of {more} more layers" if more > 0 else "")


def note_distillation(
    model: nn.Module,
    plan: Plan,
    report: Report,
    outcome: Outcome | None,
    batches: Sequence[Batch],
    dense: Callable[[int], Mapping[str, Tensor]],
    store: Activations,
    progress: Progress,
) -> None:
    if outcome is None:
        report.warnings.append("the whole model was not tuned: it predicts no next token")
        return
    report.distillation = {"before": outcome.before, "after": outcome.after, "steps": outcome.steps}
    if outcome.accepted:
        report.layers, vectors = take_up(model, plan, report.layers, batches, dense, store, progress)
        report.tuned = sorted({*report.tuned, *vectors})


def guide_of(model: nn.Module, plan: Plan, shares: Shares | None, found: dict[str, Tensor]) -> Guide:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type") or entwined(model, blocks_of(model)[0]):
        return Guide(shares, found)
    return Guide(shares, found, families.find(config.model_type), config)
