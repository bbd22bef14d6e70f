"""What the folder and the live run share: the guide of a model's layers, warnings of what was left out, the record of tuning."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateurs.base.progress import Progress
from secateurs.model import families
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch
from secateurs.model.discover import WHOLE, Layout, layout_of
from secateurs.prune.assign import Shares
from secateurs.prune.block import Guide, take_up
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord, Report
from secateurs.prune.tuning import Outcome


def within(plan: Plan, layout: Layout) -> tuple[Plan, list[str]]:
    """The plan without what a model of this layout cannot have, and warnings that name what was left out and why."""
    asked = {
        "sensitivity": ("sensitivities", bool(plan.sensitivity), layout.simple),
        "blend": ("blend", bool(plan.blend), layout.simple),
        "permute": ("reordering", plan.permute, layout.how != WHOLE),
        "reconstruct": ("tuning of blocks", bool(plan.reconstruct), layout.how != WHOLE),
        "distill": ("tuning of the whole", bool(plan.distill), layout.simple),
    }
    gone = [name for name, (_, wanted, possible) in asked.items() if wanted and not possible]
    warnings = [f"the model is walked as a whole: {layout.why}"] if layout.how == WHOLE and layout.lists else []
    # where nothing can be reordered, nothing is missed
    named = [
        asked[n][0] for n in gone if n != "permute" or any(p.fixed_sparsity is not None for p in plan.layer_patterns)
    ]
    if named:
        why = layout.why or f"blocks lie in {len(layout.lists)} lists, {', '.join(layout.lists)}"
        warnings.append(f"left out: {', '.join(named)}; {why}")
    return dataclasses.replace(plan, **{name: type(getattr(plan, name))(0) for name in gone}), warnings


UNMEASURED = "sensitivities were not measured: the model gives no logits of its inputs or their tokens"

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
        report.warnings.append("the whole model was not tuned: it gives no logits")
        return
    report.distillation = {"before": outcome.before, "after": outcome.after, "steps": outcome.steps}
    if outcome.accepted:
        report.layers, vectors = take_up(model, plan, report.layers, batches, dense, store, progress)
        report.tuned = sorted({*report.tuned, *vectors})


def guide_of(model: nn.Module, plan: Plan, shares: Shares | None, found: dict[str, Tensor]) -> Guide:
    config: Any = getattr(model, "config", None)
    if layout_of(model).how == WHOLE:
        return Guide(shares, found)
    known = (row for row in families.FAMILIES.values() if config.model_type in row.types)
    return Guide(shares, found, next(known, None), config)
