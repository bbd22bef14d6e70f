"""Cuts the dense model to a shape, block by block, into a new folder.

The blocks that stay are walked in order; each is cut on the outputs of the cut blocks before it and written as a shard of the
folder. Channels of the residual stream are removed last, in two more walks. A kill loses one block: records, the place and the
inputs of the next block are in the work folder.

Ranks share the windows; each kind of units in a block is cut by one of them, which tells the others.
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
from torch import Tensor

from secateurs.base.device import return_memory
from secateurs.base.errors import LayerError
from secateurs.base.files import write_json
from secateurs.base.processes import ALONE
from secateurs.base.progress import ticker
from secateurs.base.seed import seed_of
from secateurs.matrix.solvers import relative_error
from secateurs.matrix.stats import Stats
from secateurs.model.activations import OnDisk, note_place, read_place
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
    progress display. hurry: choose units less carefully, for a model of which only the loss is wanted. With fewer batches
    than ranks the first one does it alone.
    """
    hidden = job.dense.shape.hidden
    wide = replace(shape, hidden=hidden)
    narrows = shape.hidden != hidden
    first = job.work / "wide" if narrows else folder

    def cut(job: Job) -> None:
        _Blocks(job, windows, wide, kept_layers, sensitive, hurry).cut(label, first)
        if narrows:
            # the wide model stays in work/ until the run is done: one that goes on narrows it again
            _narrow(job, windows, sensitive, kept_layers, shape, first, folder)

    if len(job.batches(windows)) < job.ranks.size:
        job.ranks.alone(lambda: cut(replace(job, ranks=ALONE)))
    else:
        cut(job)
    return [json.loads(_record(job, was).read_text()) for was in kept_layers]


def _record(job: Job, was: int) -> Path:
    """The file of what was done to a block."""
    return job.work / f"block-{was:04d}.json"


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
        self.ranks = job.ranks
        self.batches = job.ranks.share(job.batches(windows))
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
        self.target, self.wanted = (OnDisk(job.work / name, job.ranks) for name in ("target", "wanted"))

    def cut(self, label: str, folder: Path) -> None:
        """Write a folder with the blocks that are left, each cut, and their records."""
        work, place, ranks = self.job.work, self.job.work / "place.json", self.ranks
        batches = self.batches if self.kinds or self.bridged else []
        output = Output(folder, self.like, self.path, len(self.kept_layers))
        start = ranks.tell(read_place(place))
        looks = 2 if {*self.kinds} - {"experts"} or self.bridged else 1
        passes = looks * sum(was >= start for was in self.kept_layers) - 1
        tick = ticker(self.job.progress, label, passes * len(batches))
        if self.bridged and start < self.dense.layers:
            self.call = caller(self.model, batches, self.source)
        store = OnDisk(work / "activations", ranks)
        walk = stream(self.model, batches, self.source, store, start, tick=tick, ranks=ranks, only=self.kept_layers)
        for step in walk:
            note_place(place, step.index, ranks)
            record = self._cut_block(step)
            if ranks.first:
                output.write_block(self.place[step.index], step.block, self.model)
                write_json(_record(self.job, step.index), record)
            # the next block must not meet this one's tensors
            return_memory()
        note_place(place, self.dense.layers, ranks)

        def finish() -> None:
            self.source.load_outside(self.model)
            output.finish(self.model)
            self.source.release(self.model)
            _describe(self.job, self.source, folder, self.shape, self.kept_layers)
            shutil.rmtree(store.folder, ignore_errors=True)

        ranks.alone(finish)

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
        while of_columns:
            # one kind of each consumer: these are found at the same time, each by the consumer's owner
            first_of: dict[str, str] = {}
            for kind in of_columns:
                first_of.setdefault(self._units(kind, step, now).consumer.name, kind)
            mine = {
                kind: self._solve(self._units(kind, step, now), stats[name])
                for name, kind in first_of.items()
                if step.mine([consumers[name]])
            }
            facts = {kind: (done.removed, done.error) for kind, done in mine.items()}
            told = {kind: fact for theirs in self.ranks.gather(facts) for kind, fact in theirs.items()}
            for name, kind in first_of.items():
                here, (removed, error) = self._units(kind, step, now), told[kind]
                layer, kept_K = here.consumer, columns.kept_columns(here.groups_GC, removed)
                empty_OK = torch.empty(layer.shape[0], len(kept_K), dtype=layer.parameter.dtype)
                new_OK = mine[kind].new_OK if kind in mine else empty_OK
                self.ranks.hand_out(new_OK, step.owner(layer))
                units.cut(step.block, here, torch.tensor(removed), new_OK)
                found[kind] = {"removed": sorted(removed), "error": error}
                # the next kind of units may be columns of the same consumer
                stats[name] = stats[name].reordered(kept_K)
                if f"taylor {name}" in self.sensitive:
                    self.sensitive[f"taylor {name}"] = self.sensitive[f"taylor {name}"][:, kept_K]
                now = replace(now, **{kind: self.shape.steps(kind)})
                of_columns.remove(kind)
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

    def _solve(self, found: units.Units, stats: Stats) -> "_Solved":
        """Choose the units of a block that go, and refit the others."""
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
        # as it will be written
        written_OK = new_OK.to(layer.parameter.dtype).contiguous()
        whole_OI = torch.zeros_like(weight_OI)
        whole_OI[:, kept_K] = written_OK.float()
        return _Solved(removed.tolist(), relative_error(weight_OI, whole_OI, stats), written_OK)

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
        ranks = self.ranks
        with step.evaluating():
            found = reconstruct(
                [Moving.of(p) for p in step.block.parameters()],
                lambda batch, part: step.call(step.inputs(ranks.local(batch))[part], ranks.local(batch), part),
                lambda batch, part: self.target.read(0, ranks.local(batch))[part],
                ranks.merged(step.windows), _TUNING,
                seed=seed_of(self.plan.calibration.seed, f"{self.path}.{self.place[step.index]}"), ranks=ranks,
            )  # fmt: skip
        return dataclasses.asdict(found)


@dataclass(frozen=True)
class _Solved:
    """Units that go, the relative error of the consumer's output, and its new weight."""

    removed: list[int]
    error: float
    new_OK: Tensor


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
    ranks = job.ranks
    batches = ranks.share(job.batches(windows))
    tick = ticker(job.progress, "cutting the residual width", len(kept_layers) * len(batches))
    output = Output(folder, cuts.skeleton(shape, kept_layers), cuts.path, len(kept_layers))
    try:
        found = width.readers(model, cuts.stream, batches, now, tick, source, job.work / "readers", ranks)
        count = job.dense.shape.hidden - shape.hidden
        removed, _ = width.removal(found, count, plan.damping, job.work / "surgeons", ranks)
        cut = width.Cut(found, removed, plan.damping, plan.refit)
        # nothing passes from block to block, so each rank writes those that it cuts
        for index in ranks.share(range(len(kept_layers))):
            name = cuts.names[index]
            block = model.get_submodule(name)
            source.load(model, name)
            cut.block(block, name)
            output.write_block(index, block, model)
            source.release(block)
    except ValueError as error:
        raise LayerError(f"residual width: {error}") from None

    def finish() -> None:
        source.load_outside(model)
        cut.outside(model)
        output.finish(model)
        source.release(model)
        _describe(job, Checkpoint(job.dense.folder), folder, shape, kept_layers)

    ranks.alone(finish)
