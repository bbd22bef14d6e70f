"""Tries what layers could become on the model itself: the sum of the layers' losses, by which shares are chosen, leaves out what
errors of one layer do to those of the next.

Every block of a candidate is solved in one pass on a few windows that the blocks before it have gone through, without tuning, and
what leaves the model is compared with the dense model's.
"""

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateurs.base.progress import Progress, ticker
from secateurs.model.activations import Activations, InMemory, OnDisk
from secateurs.model.batches import Batch, first_windows
from secateurs.model.blocks import AllLoaded, Loader, blocks_of, leave
from secateurs.model.discover import layout_of
from secateurs.model.layers import Layer
from secateurs.model.walk import stream
from secateurs.prune.allocation import Shares
from secateurs.prune.block import Guide, prune_block
from secateurs.prune.plan import Plan
from secateurs.prune.tune_model import dense_ends, divergence

# of the calibration tokens, in which candidates are solved and compared
_TOKENS = 8192


@dataclass(frozen=True)
class Trial:
    """chosen: which candidate is taken. facts: what the report says of it, None where nothing was tried."""

    chosen: int = 0
    facts: dict[str, Any] | None = None


def nearest_to_dense(
    model: nn.Module,
    loader: Loader | None,
    batches: Sequence[Batch],
    plan: Plan,
    guide: Guide,
    candidates: Sequence[Shares],
    progress: Progress,
    work: Path | None = None,
) -> Trial:
    """Which of the candidates leaves the model nearest to itself; the first where several do, or where it can't be told.

    Compared are KL(dense || candidate) of next-token distributions, or the squared distance of what left the last block where a
    model has none. The model is left as it was. work: a folder for activations, emptied before it is used.
    """
    if len(candidates) < 2 or not layout_of(model).simple:
        return Trial()
    windows = first_windows(batches, _TOKENS)
    # one pass over each block, whatever the plan's solver does later
    plan = dataclasses.replace(plan, method="sparsegpt", reconstruct=0, distill=0, permute=False, blend=0.0)
    names, _ = blocks_of(model)
    tick = ticker(progress, "trying shares", len(names) * len(windows) * (1 + 2 * len(candidates)))
    ends = dense_ends(model, windows, loader or AllLoaded(), _store(work, "dense"), tick)
    found, in_nats = [], True
    for shares in candidates:
        store = _store(work, "tried")
        # of a model in memory, the layers of a block as they were
        dense: list[tuple[Layer, Tensor]] = []
        for step in stream(model, windows, loader, store, keep_last=True, tick=tick):
            _restore(dense)
            dense = [] if loader else [(layer, layer.read().clone()) for layer in step.layers]
            prune_block(step, plan, dataclasses.replace(guide, shares=shares))
        _restore(dense)
        each = [
            _apart(model, loader or AllLoaded(), store.read(len(names), b), ends(b), window)
            for b, window in enumerate(windows)
        ]
        in_nats = all(nats for _, _, nats in each)
        found.append(sum(apart for apart, _, _ in each) / sum(tokens for _, tokens, _ in each))
    if work:
        shutil.rmtree(work, ignore_errors=True)
    taken = found.index(min(found))
    rows = [
        {"share": _words(shares), "apart": apart, "taken": i == taken}
        for i, (shares, apart) in enumerate(zip(candidates, found, strict=True))
    ]
    tokens = sum(tokens for _, tokens, _ in each)
    return Trial(
        taken, {"unit": "nats a token" if in_nats else "squared distance", "tokens": tokens, "candidates": rows}
    )


def _words(shares: Shares) -> str | None:
    """The share that all layers have, e.g. '50% zeros, int4/64'; None where they differ."""
    share, *others = {*shares.values()}
    if others:
        return None
    zeros = f"{share.sparsity:.0%} zeros" if share.sparsity else ""
    return ", ".join(filter(None, (zeros, share.grid))) or "as it is"


def _store(work: Path | None, name: str) -> Activations:
    if work is None:
        return InMemory()
    shutil.rmtree(work / name, ignore_errors=True)
    return OnDisk(work / name)


def _restore(dense: Iterable[tuple[Layer, Tensor]]) -> None:
    for layer, weight_OI in dense:
        layer.write(weight_OI)


def _apart(model: nn.Module, loader: Loader, left: Tensor, dense: Tensor, window: Batch) -> tuple[float, int, bool]:
    """How far a candidate is from the dense model on some windows, their tokens, and whether that is in nats. left, dense: what
    left the last block of each."""
    tokens = left[..., 0].numel()
    here, there = (getattr(leave(model, loader, hidden, window), "logits", None) for hidden in (left, dense))
    if here is None or there is None or here.shape[:-1] != left.shape[:-1]:
        return float((left.float() - dense.float()).square().sum()), tokens, False
    return tokens * divergence(here, there)[0], tokens, True
