"""Cuts the dense model to a shape, block by block, into a new folder.

The blocks that stay are walked in order; each is cut on the outputs of the cut blocks before it and written as a shard of the
folder. Channels of the residual stream are removed last, in two more walks. A kill loses one block: records, the place and the
inputs of the next block are in the work folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import return_memory
from secateurs.base.errors import LayerError
from secateurs.base.files import write_json
from secateurs.base.progress import ticker
from secateurs.base.seed import seed_of
from secateurs.matrix.solvers import relative_error
from secateurs.matrix.stats import Stats
from secateurs.model.activations import OnDisk, note_place, read_place
from secateurs.model.batches import batched
from secateurs.model.blocks import caller
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.coupling import Coupling
from secateurs.model.layers import layers_of
from secateurs.model.output import Output
from secateurs.model.walk import Step, stream
from secateurs.prune.tune_block import reconstruct
from secateurs.prune.tuning import Moving
from secateurs.shrink import columns, cut_experts, losses, units, width
from secateurs.shrink.bridge import bridge
from secateurs.shrink.job import Job
from secateurs.shrink.units import Shape

# tuning steps of a block with removed blocks after it; a block that lost only neurons or heads is not tuned, because it gained
# nothing over least squares (docs/log.md)
_TUNING = 48


def shaped(
    job: Job, windows: Tensor, shape: Shape, kept_layers: Sequence[int], sensitive: dict[str, Tensor], label: str,
    folder: Path, hurry: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the dense model, cut to a shape on calibration windows [N, S], as a model folder. Returns a record of each block.

    kept_layers: the places of the blocks that stay. sensitive: as estimates.estimate() found it. label: names the stage in the
    progress display. hurry: choose units less carefully, for a model of which only the loss is wanted.
    """
    hidden = job.dense.shape.hidden
    wide = replace(shape, hidden=hidden)
    narrows = shape.hidden != hidden
    first = job.work / "wide" if narrows else folder
    records = _Blocks(job, windows, wide, kept_layers, sensitive, hurry).cut(label, first)
    if narrows:
        # the wide model stays in work/ until the run is done: one that goes on narrows it again
        _narrow(job, windows, sensitive, kept_layers, shape, first, folder)
    return records


def _describe(job: Job, source: Checkpoint, folder: Path, shape: Shape, kept_layers: Sequence[int]) -> None:
    """Write the small files of a model of a shape: the dense one's, and its own config.json."""
    source.copy_small_files(folder, but=("config.json",))
    write_json(folder / "config.json", job.dense.cuts.stated(source.raw_config, shape, kept_layers))


class _Blocks:
    """Cuts the blocks of the dense model.

    path: the name of the list of blocks. kept_layers: the places of those that stay; the walk, sensitivities and records use
    these. gone: {place of a kept block: the removed blocks between it and the next kept one}.
    """

    def __init__(
        self, job: Job, windows: Tensor, shape: Shape, kept_layers: Sequence[int], sensitive: dict[str, Tensor],
        hurry: bool,
    ) -> None:  # fmt: skip
        self.job, self.plan, self.cuts, self.dense = job, job.plan, job.dense.cuts, job.dense.shape
        self.shape, self.kept_layers, self.hurry = shape, kept_layers, hurry
        self.source, self.model = job.dense.open()
        self.sensitive = dict(sensitive)
        self.batches = batched(windows)
        self.path = self.cuts.path
        self.place = {was: index for index, was in enumerate(kept_layers)}
        self.like = self._like()
        # the removed blocks after each kept one, which it may replace
        ends = [*kept_layers[1:], self.dense.layers]
        self.gone = {was: range(was + 1, end) for was, end in zip(kept_layers, ends, strict=True)}
        self.bridged = self.plan.refit and any(self.gone.values()) and self.cuts.last is not None
        self.todo = {kind: self.dense.steps(kind) - shape.steps(kind) for kind in units.IN_BLOCKS}
        active = shape.active if shape.active != self.dense.active else None
        self.of_experts = cut_experts.How(
            self.plan.experts, self.todo["experts"], active, self.plan.refit, self.plan.damping
        )
        self.kinds = [k for k, count in self.todo.items() if count or (k == "experts" and active is not None)]
        # the removed blocks on what enters the dense block, and on what leaves the cut one
        self.target, self.wanted = (OnDisk(job.work / name) for name in ("target", "wanted"))

    def cut(self, label: str, folder: Path) -> list[dict[str, Any]]:
        """Write a folder with the blocks that are left, each cut. Returns their records."""
        work, place = self.job.work, self.job.work / "place.json"
        batches = self.batches if self.kinds or self.bridged else []
        output = Output(folder, self.like, self.path, len(self.kept_layers))
        start = read_place(place)
        passes = 2 * sum(was >= start for was in self.kept_layers) - 1
        tick = ticker(self.job.progress, label, passes * len(batches))
        if self.bridged and start < self.dense.layers:
            self.call = caller(self.model, batches, self.source)
        store = OnDisk(work / "activations")
        walk = stream(self.model, batches, self.source, store, start, tick=tick, only=self.kept_layers)
        for step in walk:
            note_place(place, step.index)
            record = self._cut_block(step)
            output.write_block(self.place[step.index], step.block, self.model)
            write_json(self._record(step.index), record)
            # the next block must not meet this one's tensors
            return_memory()
        note_place(place, self.dense.layers)
        self.source.load_outside(self.model)
        output.finish(self.model)
        self.source.release(self.model)
        _describe(self.job, self.source, folder, self.shape, self.kept_layers)
        shutil.rmtree(store.folder, ignore_errors=True)
        return [json.loads(self._record(was).read_text()) for was in self.kept_layers]

    def _record(self, was: int) -> Path:
        return self.job.work / f"block-{was:04d}.json"

    def _like(self) -> Any:
        """A model of this shape without weights; its blocks run attention and experts as the dense one's do."""
        found = self.cuts.skeleton(self.shape, self.kept_layers)
        now: Any = self.model.config
        found.set_attn_implementation(now._attn_implementation)
        with suppress(ValueError, RuntimeError, AttributeError):
            found.set_experts_implementation(now._experts_implementation)
        return found

    def _cut_block(self, step: Step) -> dict[str, Any]:
        """Cut a block's units, then let it replace the removed blocks after it. Returns its record."""
        record: dict[str, Any] = {"block": step.name}
        gone = self.gone[step.index] if self.bridged else range(0)
        if gone:
            self._see(step, self.target)
        record["units"] = self._cut_units(step)
        if gone:
            self._see(step, self.wanted)
            self._carry(step, gone)
            record["bridge"] = {"blocks": len(gone), "left": self._bridge(step)}
            record["reconstruction"] = self._reconstruct(step)
            for store in (self.target, self.wanted):
                store.drop(0)
        return record

    def _see(self, step: Step, store: OnDisk) -> None:
        """Store what leaves a block, as it now is."""
        with step.evaluating():
            for batch in range(step.batches):
                store.write(0, batch, step.call(step.inputs(batch), batch))

    def _carry(self, step: Step, gone: Sequence[int]) -> None:
        """Run removed blocks one after another on what is stored, each loaded for it."""
        for index in gone:
            name = f"{self.path}.{index}"
            self.source.load(self.model, name)
            with step.evaluating():
                for store in (self.target, self.wanted):
                    for batch in range(len(self.batches)):
                        store.write(0, batch, self.call(index, store.read(0, batch), batch))
            self.source.release(self.model.get_submodule(name))

    def _cut_units(self, step: Step) -> dict[str, Any]:
        """Cut a block's experts, neurons and heads."""
        found: dict[str, Any] = {}
        now = replace(self.dense, layers=self.shape.layers)
        of_columns = [kind for kind in self.kinds if kind != "experts"]
        consumers = {u.consumer.name: u.consumer for u in (self._units(k, step, now) for k in of_columns)}
        stats = step.observe(list(consumers.values()), gram=True) if of_columns else {}
        if "experts" in self.kinds:
            found |= self._cut_experts(step)
        for kind in of_columns:
            here = self._units(kind, step, now)
            name = here.consumer.name
            done = self._remove(step.block, here, stats[name])
            found[kind] = {"removed": done.removed, "error": done.error}
            # the next kind of units may be columns of the same consumer
            stats[name] = stats[name].reordered(done.kept_K)
            if f"taylor {name}" in self.sensitive:
                self.sensitive[f"taylor {name}"] = self.sensitive[f"taylor {name}"][:, done.kept_K]
            now = replace(now, **{kind: self.shape.steps(kind)})
        if self.kinds:
            # let its modules state what those of a model of its shape do
            units.tell(step.block, self.like.get_submodule(f"{self.path}.{self.place[step.index]}"))
        return found

    def _cut_experts(self, step: Step) -> dict[str, Any]:
        def couplings() -> list[Coupling]:
            of = self.cuts.couplings.of
            return of(step.name, step.block, list(self.cuts.layers(step.block, step.name).values()), self.cuts.config)

        try:
            done = cut_experts.cut(step, self.cuts.fused, self.sensitive.get(step.name), self.of_experts, couplings)
        except ValueError as error:
            raise LayerError(f"{step.name}: {error}") from None
        return {} if done is None else {"experts": done}

    def _units(self, kind: str, step: Step, now: Shape) -> units.Units:
        return self.cuts.units(kind, step.block, step.name, now)

    def _remove(self, block: nn.Module, found: units.Units, stats: Stats) -> "_Removed":
        """Cut units out of a block, in place."""
        plan, layer = self.plan, found.consumer
        at_once = losses.at_once(len(found.groups_GC)) if self.hurry else 1
        count = self.todo[found.kind] * (1 if found.parents_G is None else int(found.parents_G.max()) + 1)
        weight_OI = layer.read().float()
        taylor = self.sensitive.get(f"taylor {layer.name}")
        taylor_G = None if taylor is None else taylor[:, found.groups_GC].sum(2).abs().mean(0)
        side = columns.Side(losses.weighted(found, self.sensitive.get(layer.name)), stats, found.groups_GC, taylor_G)
        try:
            removed = columns.CRITERIA[plan.criterion][0]([side], count, plan.damping, found.parents_G, at_once)
            kept_K = columns.kept_columns(found.groups_GC, removed)
            new_OK = columns.refit(weight_OI, stats, kept_K, plan.damping) if plan.refit else weight_OI[:, kept_K]
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None
        whole_OI = torch.zeros_like(weight_OI)
        # as it will be written
        whole_OI[:, kept_K] = new_OK.to(layer.parameter.dtype).float()
        units.cut(block, found, removed, new_OK)
        return _Removed(sorted(removed.tolist()), kept_K, relative_error(weight_OI, whole_OI, stats))

    def _bridge(self, step: Step) -> float | None:
        """Fit the block's last matrix to what the removed blocks did: bridge() of it."""
        assert self.cuts.last
        layer = self.cuts.layers(step.block, step.name)[self.cuts.last]
        try:
            return bridge(step, layer, lambda batch: self.wanted.read(0, batch), self.plan.damping)
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None

    def _reconstruct(self, step: Step) -> dict[str, Any]:
        """Tune the block towards the outputs of the dense block and the removed ones after it, on the same inputs."""
        with step.evaluating():
            found = reconstruct(
                [Moving.of(p) for p in step.block.parameters()],
                lambda batch, part: step.call(step.inputs(batch)[part], batch, part),
                lambda batch, part: self.target.read(0, batch)[part],
                step.windows, _TUNING,
                seed=seed_of(self.plan.calibration.seed, f"{self.path}.{self.place[step.index]}"),
            )  # fmt: skip
        return dataclasses.asdict(found)


@dataclass(frozen=True)
class _Removed:
    """Units that were cut, the consumer's columns that stay, and the relative error of its output."""

    removed: list[int]
    kept_K: Tensor
    error: float


def _narrow(
    job: Job, windows: Tensor, sensitive: dict[str, Tensor], kept_layers: Sequence[int], shape: Shape, wide: Path,
    folder: Path,
) -> None:  # fmt: skip
    """Write the model in folder `wide`, whose blocks are cut, with fewer channels in its residual stream.

    sensitive: of the dense model, whose layers they name. shape: what is left.
    """
    plan, cuts = job.plan, job.dense.cuts
    source = Checkpoint(wide)
    model = source.skeleton()
    now = {}
    for index, was in enumerate(kept_layers):
        old, new = f"{cuts.path}.{was}.", f"{cuts.path}.{index}."
        now.update({new + n.removeprefix(old): t for n, t in sensitive.items() if n.startswith(old)})
    for layer in [x for name in cuts.names[: len(kept_layers)] for x in layers_of(model.get_submodule(name), name)]:
        if layer.name in now and len(now[layer.name]) != layer.shape[0]:
            # which of its rows were cut is not known, so all count alike
            now[layer.name] = now[layer.name].mean().expand(layer.shape[0])
    tick = ticker(job.progress, "cutting the residual width", len(kept_layers) * len(batched(windows)))
    output = Output(folder, cuts.skeleton(shape, kept_layers), cuts.path, len(kept_layers))
    try:
        found = width.readers(model, cuts.stream, windows, now, tick, source, job.work / "readers")
        removed, _ = width.removal(found, job.dense.shape.hidden - shape.hidden, plan.damping, job.work / "surgeons")
        cut = width.Cut(found, removed, plan.damping, plan.refit)
        for step in stream(model, [], source):
            cut.block(step.block, step.name)
            output.write_block(step.index, step.block, model)
        source.load_outside(model)
        cut.outside(model)
    except ValueError as error:
        raise LayerError(f"residual width: {error}") from None
    output.finish(model)
    source.release(model)
    _describe(job, Checkpoint(job.dense.folder), folder, shape, kept_layers)
