"""What the folder and the live run share: the guide of a model's layers, warnings of what was left out, the record of tuning."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateurs.base.device import memory_bytes
from secateurs.base.errors import PlanError
from secateurs.base.processes import ALONE, Ranks
from secateurs.base.progress import Progress
from secateurs.matrix.grids import Scales
from secateurs.model.activations import Activations
from secateurs.model.batches import Batch, text_config
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.couplings import couplings_of
from secateurs.model.discover import WHOLE, Layout, assume, layout_of, lists_of
from secateurs.model.proof import prove
from secateurs.prune.allocation import Shares
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


def check_memory(plan: Plan, source: Checkpoint, model: nn.Module, here: int = 1) -> None:
    """Raise PlanError now if what needs the whole model will not fit into memory. here: the processes on this machine."""
    layout, there = layout_of(model), memory_bytes()
    if layout.how == WHOLE and source.nbytes > there / 2:
        raise PlanError(
            f"{source.folder} can only be pruned as a whole, which takes more than {2 * source.nbytes / 1e9:.1f} GB of memory, "
            f"this machine has {there / 1e9:.1f}: {layout.why}"
        )
    if not plan.distill:
        return
    blocks = (model.get_submodule(name) for name in source.block_names(model))
    weights = sum(p.numel() for block in blocks for p in block.parameters())
    # fp32 copies, gradients and two moments, of every rank
    needed = (source.nbytes + 16 * weights) * here
    if needed > there:
        raise PlanError(
            f"tuning all blocks together (distill {plan.distill}) takes at least {needed / 1e9:.1f} GB of memory, this "
            f"machine has {there / 1e9:.1f}; leave it out with --distill 0, or choose --effort balanced"
        )


def chosen(model: nn.Module, plan: Plan, layout: Layout) -> tuple[Plan, list[str]]:
    """The plan with all blocks but those of its part left dense, and a warning that names what is left out.

    Raises PlanError for a part that the model does not have, or that calibration does not reach.
    """
    lists, text = lists_of(model), _text_lists(model)
    if plan.part in (None, "all"):
        wanted = layout.lists if plan.part == "all" or not text else text
    else:
        wanted = tuple(path for path in lists if (path in text if plan.part == "text" else str(plan.part) in path))
    if not wanted and plan.part not in (None, "all"):
        raise PlanError(
            f"no part '{plan.part}': the model's lists of blocks are {', '.join(lists)}; or write all, or text"
        )
    away = next((path for path in wanted if path not in layout.lists), None)
    if away is not None:
        raise PlanError(
            f"{away} is not called on such inputs, so it cannot be pruned; calibrate on inputs that reach it"
        )
    left = [path for path in layout.lists if path not in wanted]
    if not left:
        return plan, []
    skips = (*plan.skip, *(f"{path}.*" for path in left))
    return dataclasses.replace(plan, skip=skips), [f"left dense: {', '.join(left)}; --part says which lists are pruned"]


def reach(model: nn.Module, plan: Plan, batches: Sequence[Batch]) -> None:
    """Let the layout of a model be that of its passes over more than text, if the plan's part is not reached by text."""
    asked = [path for path in lists_of(model) if plan.part and (plan.part == "all" or plan.part in path)]
    if batches and {*batches[0]} - {"input_ids", "attention_mask"} and not {*asked} <= {*layout_of(model).lists}:
        found = prove(model, kind="images and text")
        if found.how != WHOLE:
            assume(model, found)


def _text_lists(model: Any) -> tuple[str, ...]:
    """The lists of the text part of a model that reads text and more; none of other models."""
    config = getattr(model, "config", None)
    if text_config(config) is config or not hasattr(model, "get_decoder"):
        return ()
    text = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is text), "")
    return tuple(name for name in lists_of(model) if path and name.startswith(f"{path}."))


UNMEASURED = "sensitivities were not measured: the model gives no logits of its inputs or their tokens"

ALIKE = "every layer gets the same sparsity: without sensitivities the scores of different layers do not compare"


def in_passes(passes: int) -> str:
    """What to know of a block whose experts were looked at in groups."""
    return (
        f"the Gram matrices of a block's experts take more than a quarter of the memory here, so each block was run {passes} times "
        "for them; the result is the same"
    )


def alike(plan: Plan, wanted: int | None, found: Mapping[str, Tensor]) -> bool:
    """True if all layers get one sparsity, since sensitivities were wanted to tell them apart and were not found."""
    return bool(wanted) and not found and plan.allocation == "global"


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
    scales: Mapping[str, Scales],
    store: Activations,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    if outcome is None:
        report.warnings.append("the whole model was not tuned: it gives no logits")
        return
    report.distillation = {"before": outcome.before, "after": outcome.after, "steps": outcome.steps}
    if outcome.accepted:
        report.layers, vectors = take_up(model, plan, report.layers, batches, dense, scales, store, progress, ranks)
        report.tuned = sorted({*report.tuned, *vectors})


def guide_of(model: nn.Module, plan: Plan, shares: Shares | None, found: dict[str, Tensor]) -> Guide:
    config: Any = getattr(model, "config", None)
    if layout_of(model).how == WHOLE:
        return Guide(shares, found)
    wanted = plan.permute and any(p.fixed_sparsity is not None for p in plan.layer_patterns)
    return Guide(shares, found, couplings_of(model), config) if wanted else Guide(shares, found)
