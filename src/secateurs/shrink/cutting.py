"""Cuts the dense model to a shape, in memory.

Blocks are removed first. Then one walk cuts each block that is left, on the outputs of the cut blocks before it, and writes it to
the job's work folder, where a run that goes on after a kill finds it. Channels of the residual stream are removed last.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateurs.base.errors import LayerError
from secateurs.base.files import write_json, write_tensors
from secateurs.base.progress import ticker
from secateurs.base.seed import seed_of
from secateurs.matrix.solvers import relative_error
from secateurs.matrix.stats import Stats
from secateurs.model.batches import batched
from secateurs.model.blocks import blocks_of, caller
from secateurs.model.layers import layers_of
from secateurs.model.walk import Step, stream
from secateurs.prune.tune_block import reconstruct
from secateurs.prune.tuning import Moving
from secateurs.shrink import columns, experts, losses, units, width
from secateurs.shrink.bridge import Block, bridge, through
from secateurs.shrink.job import Job
from secateurs.shrink.units import Shape

# tuning steps of a block with removed blocks after it; a block that lost only neurons or heads is not tuned, because it gained
# nothing over least squares (docs/log.md)
_TUNING = 48


def shaped(
    job: Job, windows: Tensor, shape: Shape, kept_layers: Sequence[int], sensitive: dict[str, Tensor], label: str,
    hurry: bool = False,
) -> tuple[Any, list[dict[str, Any]]]:  # fmt: skip
    """Load the dense model and cut it to a shape, on calibration windows [N, S]. Returns it and a record of each block.

    kept_layers: the places of the blocks that stay. sensitive: as estimates.estimate() found it. label: names the stage in the
    progress display. hurry: choose units less carefully, for a model of which only the loss is wanted.
    """
    model = job.dense.load()
    hidden = job.dense.shape.hidden
    records = _Blocks(job, model, windows, shape, kept_layers, sensitive, hurry).cut(label)
    if shape.hidden != hidden:
        _narrow(job, model, windows, sensitive, kept_layers, hidden - shape.hidden)
    return model, records


class _Blocks:
    """Cuts the blocks of a loaded model, in place.

    path: the name of the list of blocks. kept_layers: the places of its blocks in the dense model; sensitivities and records use
    these. gone: {place of a kept block: the removed blocks between it and the next kept one}.
    """

    def __init__(
        self, job: Job, model: nn.Module, windows: Tensor, shape: Shape, kept_layers: Sequence[int],
        sensitive: dict[str, Tensor], hurry: bool,
    ) -> None:  # fmt: skip
        self.job, self.plan, self.cuts, self.dense = job, job.plan, job.dense.cuts, job.dense.shape
        self.model, self.shape, self.kept_layers, self.hurry = model, shape, kept_layers, hurry
        self.sensitive = dict(sensitive)
        self.batches = batched(windows)
        self.like: Any = None
        self.path = blocks_of(model)[0][0].rpartition(".")[0]
        # blocks are called by their places in the dense model: some families give masks and rotations by place
        self.dense_call = caller(model, self.batches)
        # the removed blocks after each kept one, which it may replace
        ends = [*kept_layers[1:], self.dense.layers]
        self.gone = {
            was: [functools.partial(self.dense_call, i) for i in range(was + 1, end)]
            for was, end in zip(kept_layers, ends, strict=True)
        }
        self.bridged = self.plan.refit and any(self.gone.values()) and self.cuts.last is not None
        self.todo = {kind: self.dense.steps(kind) - shape.steps(kind) for kind in units.IN_BLOCKS}
        self.kinds = [kind for kind, count in self.todo.items() if count]

    def cut(self, label: str) -> list[dict[str, Any]]:
        """Remove blocks, then cut each block that is left. Returns their records."""
        if self.shape.layers != self.dense.layers:
            units.keep_blocks(self.model, self.path, self.kept_layers, self.cuts.depth)
        changes = bool(self.kinds) or self.bridged
        records: list[dict[str, Any]] = []
        tick = ticker(self.job.progress, label, (2 * self.shape.layers - 1) * len(self.batches))
        for step in stream(self.model, self.batches if changes else [], tick=tick):
            file = self.job.work / f"block-{step.index:04d}.safetensors"
            if file.is_file():
                self._restore(step.block, step.index, load_file(file))
                records.append(json.loads(file.with_suffix(".json").read_text()))
                continue
            record = self._cut_block(step)
            if changes:
                write_json(file.with_suffix(".json"), record)
                write_tensors(file, {n: p.detach() for n, p in step.block.named_parameters()})
            records.append(record)
        return records

    def _restore(self, block: nn.Module, index: int, tensors: dict[str, Tensor]) -> None:
        """Give a block the parameters that it had when it was written."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            units.put(block.get_submodule(path) if path else block, leaf, tensor)
        self._tell(block, index)

    def _cut_block(self, step: Step) -> dict[str, Any]:
        """Cut a block's units, then let it replace the removed blocks after it. Returns its record."""
        was = self.kept_layers[step.index]
        record: dict[str, Any] = {"block": f"{self.path}.{was}"}
        takes_over: list[Block] = []
        if self.bridged and self.gone[was]:
            dense_block = functools.partial(self.dense_call, was, block=copy.deepcopy(step.block))
            takes_over = [dense_block, *self.gone[was]]
        record["units"] = self._cut_units(step, f"{self.path}.{was}")
        if takes_over:
            record["bridge"] = {"blocks": len(self.gone[was]), "left": self._bridge(step, self.gone[was])}
            record["reconstruction"] = self._reconstruct(step, takes_over)
        return record

    def _cut_units(self, step: Step, at_first: str) -> dict[str, Any]:
        """Cut a block's experts, neurons and heads. at_first: the block's name in the dense model."""
        found: dict[str, Any] = {}
        now = replace(self.dense, layers=self.shape.layers)
        of_columns = [kind for kind in self.kinds if kind != "experts"]
        consumers = {u.consumer.name: u.consumer for u in (self._units(k, step, now) for k in of_columns)}
        stats = step.observe(list(consumers.values()), gram=True) if of_columns else {}
        if self.todo["experts"]:
            x_TH = experts.inputs(step, self.cuts.fused)
            removed, cost = experts.removal(
                step.block, self.cuts.fused, x_TH, self.sensitive.get(at_first), self.todo["experts"]
            )
            experts.cut(step.block, self.cuts.fused, removed)
            found["experts"] = {"removed": sorted(removed), "loss": cost[-1]}
        for kind in of_columns:
            here = self._units(kind, step, now)
            name = here.consumer.name
            dense_name = f"{at_first}.{name.removeprefix(step.name + '.')}"
            done = self._remove(step.block, here, stats[name], dense_name)
            found[kind] = {"removed": done.removed, "error": done.error}
            # the next kind of units may be columns of the same consumer
            stats[name] = stats[name].reordered(done.kept_K)
            if f"taylor {dense_name}" in self.sensitive:
                self.sensitive[f"taylor {dense_name}"] = self.sensitive[f"taylor {dense_name}"][:, done.kept_K]
            now = replace(now, **{kind: self.shape.steps(kind)})
        if self.kinds:
            self._tell(step.block, step.index)
        return found

    def _tell(self, block: nn.Module, index: int) -> None:
        """Let a cut block's modules state what those of a model of its shape do."""
        if self.like is None:
            here = replace(self.shape, hidden=self.dense.hidden)
            self.like = self.cuts.skeleton(here, self.kept_layers)
            # how attention and experts are run is stated, too
            now: Any = self.model.config
            self.like.set_attn_implementation(now._attn_implementation)
            with suppress(ValueError, RuntimeError, AttributeError):
                self.like.set_experts_implementation(now._experts_implementation)
        units.tell(block, self.like.get_submodule(f"{self.path}.{index}"))

    def _units(self, kind: str, step: Step, now: Shape) -> units.Units:
        return self.cuts.units(kind, step.block, step.name, now)

    def _remove(self, block: nn.Module, found: units.Units, stats: Stats, name: str) -> "_Removed":
        """Cut units out of a block, in place. name: the consumer's in the dense model."""
        plan, layer = self.plan, found.consumer
        at_once = losses.at_once(len(found.groups_GC)) if self.hurry else 1
        count = self.todo[found.kind] * (1 if found.parents_G is None else int(found.parents_G.max()) + 1)
        weight_OI = layer.read().float()
        taylor = self.sensitive.get(f"taylor {name}")
        taylor_G = None if taylor is None else taylor[:, found.groups_GC].sum(2).abs().mean(0)
        side = columns.Side(losses.weighted(found, self.sensitive.get(name)), stats, found.groups_GC, taylor_G)
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

    def _bridge(self, step: Step, gone: Sequence[Block]) -> float | None:
        """Fit the block's last matrix to what the removed blocks did: bridge() of it, or None if there is no such matrix."""
        assert self.cuts.last
        layer = self.cuts.layers(step.block, step.name)[self.cuts.last]
        try:
            return bridge(step, layer, gone, self.plan.damping)
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None

    def _reconstruct(self, step: Step, dense: Sequence[Block]) -> dict[str, Any]:
        """Tune the block towards the outputs of the dense block and the removed ones after it, on the same inputs."""

        def target(batch: int, part: slice) -> Tensor:
            with torch.no_grad():
                return through(dense, step.inputs(batch)[part], batch, part)

        with step.evaluating():
            found = reconstruct(
                [Moving.of(p) for p in step.block.parameters()],
                lambda batch, part: step.call(step.inputs(batch)[part], batch, part),
                target, step.windows, _TUNING, seed=seed_of(self.plan.calibration.seed, step.name),
            )  # fmt: skip
        return dataclasses.asdict(found)


@dataclass(frozen=True)
class _Removed:
    """Units that were cut, the consumer's columns that stay, and the relative error of its output."""

    removed: list[int]
    kept_K: Tensor
    error: float


def _narrow(
    job: Job, model: nn.Module, windows: Tensor, sensitive: dict[str, Tensor], kept_layers: Sequence[int], count: int
) -> None:
    """Remove `count` channels from the residual stream of a model whose blocks are cut, in place."""
    plan, written = job.plan, job.dense.cuts.stream
    names, _ = blocks_of(model)
    path = names[0].rpartition(".")[0]
    # sensitivities have the names of the dense model's layers
    now = {}
    for index, was in enumerate(kept_layers):
        old, new = f"{path}.{was}.", f"{path}.{index}."
        now.update({new + n.removeprefix(old): t for n, t in sensitive.items() if n.startswith(old)})
    for layer in [x for name in names for x in layers_of(model.get_submodule(name), name)]:
        if layer.name in now and len(now[layer.name]) != layer.shape[0]:
            # which of its rows were cut is not known, so all count alike
            now[layer.name] = now[layer.name].mean().expand(layer.shape[0])
    tick = ticker(job.progress, "cutting the residual width", len(windows))
    reading = width.readers(model, names, written, windows, now, tick)
    try:
        removed, _ = width.removal(reading, count, plan.damping)
        width.cut(model, names, written, reading, removed, plan.damping, plan.refit)
    except ValueError as error:
        raise LayerError(f"residual width: {error}") from None
