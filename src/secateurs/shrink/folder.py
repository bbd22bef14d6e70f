"""A model folder to a smaller dense model under a budget: a plain Hugging Face folder that needs no code of ours.

Every block keeps the same width and heads, so config.json can state what is left. The run directory holds plan.json, model/,
report.json, and work/ while the run is under way: what was found out before the first cut, and every block that was cut. A
kill loses at most one of these steps. The whole dense model is in memory.
"""

import copy
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.device import machine, peak_memory
from secateurs.base.errors import LayerError, PlanError
from secateurs.base.files import (
    claim,
    fingerprint_of,
    locked,
    resolved,
    unchanged,
    write_json,
    write_tensors,
    write_text,
)
from secateurs.base.precision import described
from secateurs.base.progress import Progress, silent, ticker
from secateurs.base.seed import seed_of
from secateurs.matrix.solvers import relative_error
from secateurs.matrix.stats import Stats
from secateurs.model import checkpoint, families
from secateurs.model.activations import InMemory
from secateurs.model.batches import Batch, batched, first_windows, window_length
from secateurs.model.layers import layers_of
from secateurs.model.parts import AllLoaded, blocks_of, caller
from secateurs.model.walk import Step, stream
from secateurs.prune.sensitivity import sensitivity
from secateurs.prune.tune_block import reconstruct
from secateurs.prune.tuning import Moving
from secateurs.quality import gates, texts
from secateurs.quality.evaluation import quality, texts_apart
from secateurs.shrink import columns, experts, losses, units, width
from secateurs.shrink.bridge import Block, bridge, through
from secateurs.shrink.latency import LatencyModel, Seconds, blank, measure
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.sizes import Sizes, consumers_of, sizes_of
from secateurs.shrink.units import Shape

# calibration tokens that are run back, and those on which blocks are left out
_SENSITIVITY = 4096
_DEPTH = 1024
# calibration tokens on which a kind is cut, to see how far its estimate is off
_TRUTH = 8192
# a shape is measured and chosen anew at most so often; it may take 1% more than was asked, and need not be nearer than 2%
_TRIES = 10
_OVER, _UNDER, _AIM = 1.01, 0.98, 0.995
# steps in which a block learns what the removed ones after it did; one that lost neurons or heads alone has nothing to learn that
# least squares did not find (docs/log.md)
_TUNING = 48
# one that is so near to the budget is timed again, in so many rounds
_NEAR, _ROUNDS = 0.06, 12


def shrink(
    plan: ShrinkPlan,
    out: str | Path,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Do what is left of a run: look, choose a shape, cut, measure. Returns the report; raises SecateursError.

    A missed gate is in the report's `gate`, and no error here.
    """
    return _Run(plan, Path(out).expanduser(), progress).complete()


class _Run:
    def __init__(self, plan: ShrinkPlan, out: Path, progress: Progress) -> None:
        self.plan = replace(plan, model=resolved(plan.model))
        self.out, self.progress = out, progress
        self.work = out / "work"
        self.model_folder = out / "model"

    def complete(self) -> dict[str, Any]:
        source = checkpoint.Checkpoint(self.plan.model)
        model = source.skeleton()
        config, family, cls = self._known(model)
        sizes = self._sizes(cls, model, family, config)
        self._check_units(family, config, sizes)
        if not (self.out / "plan.json").is_file():
            self._refuse_too_small(cls, config, family, sizes)
        claim(self.out, self.plan.as_dict())
        with locked(self.out):
            report_file = self.out / "report.json"
            if not report_file.is_file():
                write_json(report_file, self._made(source, config, family, cls))
            report: dict[str, Any] = json.loads(report_file.read_text())
        shutil.rmtree(self.work, ignore_errors=True)
        return report

    def _made(self, source: checkpoint.Checkpoint, config: Any, family: families.Family, cls: Any) -> dict[str, Any]:
        """The smaller model in model/, and the report on it."""
        began = time.perf_counter()
        model = _loaded(self.plan.model)
        text = self._calibration(source, model)
        windows = text.windows
        unchanged(
            self.out,
            {self.plan.model: source.fingerprint(), self.plan.calibration: fingerprint_of(windows)},
        )
        batches = batched(windows)
        sizes = self._sizes(cls, model, family, config)
        dense = sizes.dense
        lost, sensitive = self._look(model, family, windows, batches, sizes)
        del model
        lost = self._true(lost, family, windows, sizes, sensitive)
        shape, tried = self._choose(cls, config, family, sizes, lost)
        kept_layers = [i for i in range(dense.layers) if i not in lost.blocks[: dense.layers - shape.layers]]
        model, records = self._shaped(family, windows, shape, kept_layers, sensitive, self.work, "cutting")
        stated = units.stated(source.raw_config, config, family, shape, kept_layers)
        self._write(source, model, stated)
        report: dict[str, Any] = {
            "format": 1,
            "plan": self.plan.as_dict(),
            "machine": machine(),
            "compute": described(config.dtype),
            "dense": {**dataclasses.asdict(dense), "parameters": sizes.parameters(dense)},
            "left": {
                **dataclasses.asdict(shape),
                "parameters": sum(p.numel() for p in model.parameters()),
                "kept_layers": kept_layers,
            },
            "blocks": records,
            "estimated_loss": _loss(lost, dense, shape),
            "truth": lost.truth,
            "tried": tried,
            "calibration": text.facts(),
            "bytes": {
                "dense": source.nbytes,
                "left": sum(f.stat().st_size for f in self.model_folder.glob("*.safetensors")),
            },
            "warnings": [],
            "distance": None,
            "quality": None,
            "gate": [],
            "seconds": {"shrink": time.perf_counter() - began},
        }
        report["latency"] = self._latency(source, cls)
        self._evaluate(source, report, windows)
        report["peak_memory_bytes"] = peak_memory()
        return report

    # ------------------------------------------------------------------------------------------------ before a cut

    def _known(self, skeleton: Any) -> tuple[Any, families.Family, Any]:
        import transformers

        try:
            family = families.find(skeleton.config.model_type)
        except ValueError as error:
            raise PlanError(str(error)) from None
        return skeleton.config, family, getattr(transformers, skeleton.config.architectures[0])

    def _sizes(self, cls: Any, model: nn.Module, family: families.Family, config: Any) -> "Sizes":
        sizes = sizes_of(model, family, config)
        if "hidden" not in self.plan.units or not family.residual:
            return sizes
        from accelerate import init_empty_weights

        narrow = replace(sizes.dense, hidden=sizes.dense.hidden // 2)
        with init_empty_weights():
            raw = units.stated(config.to_dict(), config, family, narrow, range(narrow.layers))
            half = cls._from_config(type(config)(**raw))
        half.tie_weights()
        return replace(sizes, half=sizes_of(half, family, half.config))

    def _check_units(self, family: families.Family, config: Any, sizes: "Sizes") -> None:
        for kind in self.plan.units:
            refused = units.refuses(kind, family, config)
            if refused:
                raise PlanError(f"units {kind}: {refused}; leave it out of --units")
            if kind in ("mlp", "hidden") and sizes.dense.steps(kind) <= self.plan.multiple:
                what = "MLPs of {} neurons" if kind == "mlp" else "a residual width of {}"
                raise PlanError(
                    f"{what.format(sizes.dense.steps(kind))} cannot become a smaller multiple of {self.plan.multiple}; "
                    "lower --multiple"
                )

    def _refuse_too_small(self, cls: Any, config: Any, family: families.Family, sizes: "Sizes") -> None:
        """A budget that the smallest shape does not meet."""
        plan, bound = self.plan, self.plan.bound
        shape = min(self._shapes(sizes, config, family), key=sizes.parameters)
        if bound.timed:
            models = [self._blank(cls, config, family, s) for s in (sizes.dense, shape)]
            dense, least = measure(models, plan.prompt, plan.new, rounds=3)
            used = self._use(least, dense)
            if used <= _OVER:
                return
            took = f"takes about {used * bound.value:.3g}{' seconds' if bound.kind == 'seconds' else 'x'}"
        else:
            share = sizes.share(bound.kind, shape, plan.prompt)
            if share <= bound.value:
                return
            took = f"has {share:.3f}x the {'parameters' if bound.kind == 'params' else bound.kind}"
        raise PlanError(
            f"budget {plan.budget}: the smallest shape that {', '.join(plan.units)} can be cut to {took}; raise the budget or name "
            "more --units"
        )

    def _blank(self, cls: Any, config: Any, family: families.Family, shape: Shape) -> Any:
        """A model of that shape, to be timed."""
        raw = units.stated(config.to_dict(), config, family, shape, range(shape.layers))
        return blank(cls, type(config)(**raw), config.dtype)

    def _use(self, seconds: Seconds, dense: Seconds) -> float:
        """Of a time budget: 1 is all of it."""
        bound = self.plan.bound
        if bound.kind == "seconds":
            return (seconds.prefill + self.plan.new * seconds.decode) / bound.value
        ratio = seconds.over(dense)
        return max(ratio.prefill, ratio.decode) / bound.value

    def _calibration(self, source: checkpoint.Checkpoint, model: nn.Module) -> texts.Text:
        seqlen = window_length(self.plan.seqlen, model)
        return texts.load(self.plan.calibration, source.tokenizer(), self.plan.samples, seqlen, self.plan.seed)

    def _look(
        self, model: nn.Module, family: families.Family, windows: Tensor, batches: list[Batch], sizes: "Sizes"
    ) -> tuple[losses.Losses, dict[str, Tensor]]:
        """What units cost; kept in work/."""
        from safetensors.torch import load_file

        plan = self.plan
        file, tensors = self.work / "losses.json", self.work / "sensitivity.safetensors"
        kinds = [kind for kind in units.IN_BLOCKS if kind in plan.units]
        if not file.is_file():
            part = first_windows(batches, _SENSITIVITY)
            total = len(blocks_of(model)[0])
            tick = ticker(self.progress, "measuring sensitivity", len(part) * (2 * total + 1))
            sensitive, _ = sensitivity(model, part, AllLoaded(), InMemory(), plan.seed, tick)
            tick = ticker(self.progress, "what units cost", total * len(batches))
            found = losses.curves(model, batches, family, kinds, sensitive, plan.damping, tick)
            if "hidden" in plan.units:
                tick = ticker(self.progress, "what channels cost", len(windows))
                reading = width.readers(model, family, windows, sensitive, tick)
                gone = losses.most(sizes.dense.hidden)
                found["hidden"] = [[0.0, *width.removal(reading, gone, plan.damping)[1].tolist()]]
            order: list[int] = []
            after: list[float] = []
            if "layers" in plan.units:
                count, influence = sizes.most_blocks(plan.bound), plan.depth == "influence"
                tick = ticker(self.progress, "what blocks cost", losses.tries(total, count, influence))
                each = min(windows.shape[1], 512)
                order, after = losses.blocks(model, windows[: max(1, _DEPTH // each), :each], count, tick, influence)
            if plan.criterion == "taylor" and kinds:
                few = windows[: max(1, _SENSITIVITY // windows.shape[1])]
                tick = ticker(self.progress, "taking gradients", len(few))
                sensitive |= {
                    f"taylor {n}": t
                    for n, t in losses.taylor(model, few, consumers_of(model, family, kinds), tick).items()
                }
            write_tensors(tensors, sensitive or {"none": torch.zeros(1)})
            write_json(file, {"curves": found, "blocks": order, "after": after})
        lost = losses.Losses(**json.loads(file.read_text()))
        return lost, load_file(tensors)

    def _true(
        self, lost: losses.Losses, family: families.Family, windows: Tensor, sizes: "Sizes", sensitive: dict[str, Tensor]
    ) -> losses.Losses:  # fmt: skip
        """Every kind cut by a quarter and by a half, alone, and measured; where there is something to choose between."""
        dense, plan = sizes.dense, self.plan
        if len(plan.units) == 1:
            return lost
        file = self.work / "truth.json"
        truth: dict[str, list[list[float]]] = json.loads(file.read_text()) if file.is_file() else {}
        held_out = max(1, _DEPTH // windows.shape[1])
        # what is cut is fitted to other windows, unless there are no others
        fitting = windows[held_out : held_out + max(1, _TRUTH // windows.shape[1])]
        fitting = fitting if len(fitting) else windows
        todo = [kind for kind in lost.curves if kind not in truth]
        whole = losses.nll(_loaded(plan.model), windows[:held_out]) if todo else 0.0
        for kind in todo:
            steps, known = dense.steps(kind), len(lost.curves[kind][0]) - 1
            points = []
            for gone in sorted({min(known, max(1, steps // 4)), min(known, max(1, steps // 2))}):
                folder = self.work / f"{kind}-{gone}"
                shape = replace(dense, **{kind: steps - gone})
                label = f"checking {gone} of {steps} {kind}"
                model, _ = self._shaped(
                    family, fitting, shape, range(dense.layers), sensitive, folder, label, hurry=True
                )
                points.append([_loss(lost, dense, shape), max(0.0, losses.nll(model, windows[:held_out]) - whole)])
                shutil.rmtree(folder, ignore_errors=True)
            truth[kind] = points
            write_json(file, truth)
        return replace(lost, truth=truth)

    # ------------------------------------------------------------------------------------------------- which shape

    def _choose(
        self, cls: Any, config: Any, family: families.Family, sizes: "Sizes", lost: losses.Losses
    ) -> tuple[Shape, list[dict[str, Any]]]:
        """The shape with the least estimated loss that the budget allows, by measurement where it is one of time."""
        file = self.work / "shape.json"
        if file.is_file():
            data = json.loads(file.read_text())
            return Shape(**data["shape"]), data["tried"]
        shapes = self._shapes(sizes, config, family)

        def loss(shape: Shape) -> float:
            return _loss(lost, sizes.dense, shape)

        tried: list[dict[str, Any]] = []
        bound = self.plan.bound
        if bound.timed:
            shape, tried = self._within_time(cls, config, family, sizes.dense, shapes, loss)
        else:
            # _refuse_too_small() has seen to it that there is one
            fitting = [s for s in shapes if sizes.share(bound.kind, s, self.plan.prompt) <= bound.value]
            shape = min(fitting, key=loss)
        write_json(file, {"shape": dataclasses.asdict(shape), "tried": tried})
        return shape, tried

    def _shapes(self, sizes: "Sizes", config: Any, family: families.Family) -> list[Shape]:
        """All shapes that the units allow and that transformers loads. Raises PlanError if there is none."""
        chosen, dense, step = self.plan.units, sizes.dense, self.plan.multiple
        least = {kind: dense.steps(kind) - losses.most(dense.steps(kind)) for kind in units.COLUMNS if kind in chosen}
        fewest_experts = dense.experts - (sizes.most_experts if "experts" in chosen else 0)
        fewest = dense.layers - sizes.most_blocks(self.plan.bound) if "layers" in chosen else dense.layers
        wide = [dense.mlp, *(w for w in range(dense.mlp - 1, least.get("mlp", dense.mlp) - 1, -1) if w % step == 0)]
        deep = losses.most(dense.hidden) if "hidden" in chosen else 0
        hidden = [dense.hidden, *(w for w in range(dense.hidden - 1, dense.hidden - deep - 1, -1) if w % step == 0)]
        heads = range(dense.heads, least.get("heads", dense.heads) - 1, -1)
        queries = range(dense.queries, least.get("queries", dense.queries) - 1, -1)
        found = [
            Shape(d, w, h, q, e, n)
            for d in range(dense.layers, fewest - 1, -1)
            for w in wide
            for h in heads
            for q in queries
            for e in range(dense.experts, fewest_experts - 1, -1)
            for n in hidden
        ]
        # some classes want the width to be a multiple of the query heads
        kinds = {
            (s.heads, s.queries, s.hidden): replace(dense, heads=s.heads, queries=s.queries, hidden=s.hidden)
            for s in found
        }
        refused = {kind: units.not_loadable(config, family, shape) for kind, shape in kinds.items()}
        shapes = [s for s in found if s != dense and not refused[s.heads, s.queries, s.hidden]]
        if not shapes:
            reasons = [why for why in refused.values() if why]
            raise PlanError(
                f"{', '.join(chosen)} cannot be cut to anything that transformers loads: "
                f"{reasons[0] if reasons else 'nothing smaller is left'}"
            )
        return shapes

    def _within_time(
        self, cls: Any, config: Any, family: families.Family, dense: Shape,
        shapes: Sequence[Shape], loss: Callable[[Shape], float],
    ) -> tuple[Shape, list[dict[str, Any]]]:  # fmt: skip
        plan = self.plan

        def model_of(shape: Shape) -> Any:
            return self._blank(cls, config, family, shape)

        use = self._use
        tick = ticker(self.progress, "measuring latency", _TRIES + 1)
        probes = [
            replace(dense, layers=max(1, dense.layers // 2)),
            replace(dense, mlp=max(plan.multiple, dense.mlp // 2 // plan.multiple * plan.multiple)),
        ]
        for kind in (k for k in ("heads", "queries", "hidden") if k in plan.units):
            # transformers does not load every number of heads
            for n in range(max(1, dense.steps(kind) // 2), 0, -1):
                if not units.not_loadable(config, family, replace(dense, **{kind: n})):
                    probes.append(replace(dense, **{kind: n}))
                    break
        whole = model_of(dense)
        at_first, *seconds = measure([whole, *(model_of(p) for p in probes)], plan.prompt, plan.new, rounds=3)
        points = [(dense, Seconds(1.0, 1.0)), *((p, s.over(at_first)) for p, s in zip(probes, seconds, strict=True))]
        tick()
        if use(at_first, at_first) <= 1:
            raise PlanError(f"budget {plan.budget}: the dense model is within it already; lower it")
        best: Shape | None = None
        tried: list[dict[str, Any]] = []
        for _ in range(_TRIES):
            fitted = LatencyModel.fit(dense, points)
            if tried:
                fitted = fitted.through(*points[-1])
            # a shape that was timed is not tried again: the clock has said what it is
            known = [shape for shape, _ in points[1 + len(probes) :]]
            new = {s: use(fitted.at(s).times(at_first), at_first) for s in shapes if s not in known}
            fitting = [s for s, used in new.items() if used <= _AIM] or sorted(new, key=lambda s: new[s])[:1]
            shape = min(fitting, key=loss, default=best)
            if shape is None or (best is not None and loss(shape) >= loss(best)):
                break
            pair = [whole, model_of(shape)]
            for rounds in (3, _ROUNDS):
                base, now = measure(pair, plan.prompt, plan.new, rounds)
                ratio = now.over(base)
                used = use(ratio.times(at_first), at_first)
                if abs(used - 1) > _NEAR:
                    break
            points.append((shape, ratio))
            tried.append(
                {
                    "shape": dataclasses.asdict(shape),
                    "prefill": ratio.prefill,
                    "decode": ratio.decode,
                    "of_budget": used,
                }
            )
            tick()
            if used <= _OVER:
                best = shape
            if _UNDER <= used <= _OVER:
                break
        if best is None:
            raise PlanError(
                f"budget {plan.budget}: no shape that was tried was fast enough, the last at {tried[-1]['of_budget']:.3g} of it; "
                "other work on this machine may disturb the clock: rerun, or raise the budget"
            )
        return best, tried

    # ------------------------------------------------------------------------------------------------------- cutting

    def _shaped(
        self, family: families.Family, windows: Tensor, shape: Shape, kept_layers: Sequence[int], sensitive: dict[str, Tensor],
        work: Path, label: str, hurry: bool = False,
    ) -> tuple[Any, list[dict[str, Any]]]:  # fmt: skip
        """The dense model, from disk, cut to a shape; and what was cut. `work` holds the blocks that are done. hurry: if only the
        loss is asked for.
        """
        model = _loaded(self.plan.model)
        hidden = Shape.of(model.config, family).hidden
        records = self._cut(model, family, batched(windows), shape, kept_layers, dict(sensitive), work, label, hurry)
        if shape.hidden != hidden:
            self._narrow(model, family, windows, sensitive, kept_layers, hidden - shape.hidden)
        return model, records

    def _cut(
        self, model: nn.Module, family: families.Family, batches: list[Batch], shape: Shape, kept_layers: Sequence[int],
        sensitive: dict[str, Tensor], work: Path, label: str, hurry: bool,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Take blocks out, then cut every block on what the cut blocks before it give. In place; one file a block."""
        from safetensors.torch import load_file

        config: Any = model.config
        dense = Shape.of(config, family)
        names, _ = blocks_of(model)
        path = names[0].rpartition(".")[0]
        container: Any = model.get_submodule(path)
        parent: Any = model.get_submodule(path.rpartition(".")[0]) if "." in path else model
        kept = nn.ModuleList([container[i] for i in kept_layers])
        # in places of the dense model: families give their blocks masks and rotations by place
        dense_call = caller(model, batches)
        for index, block in enumerate(kept):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]
        # what came after each kept block and is gone: what it did may be made up for
        ends = [*kept_layers[1:], len(container)]
        gone = {
            was: [functools.partial(dense_call, i) for i in range(was + 1, end)]
            for was, end in zip(kept_layers, ends, strict=True)
        }
        bridged = self.plan.refit and any(gone.values()) and bool(family.mlp)
        setattr(parent, path.rpartition(".")[2], kept)
        config.num_hidden_layers = shape.layers
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept_layers]
        todo = {kind: dense.steps(kind) - shape.steps(kind) for kind in units.IN_BLOCKS}
        kinds = [kind for kind, count in todo.items() if count]
        records: list[dict[str, Any]] = []
        tick = ticker(self.progress, label, (2 * shape.layers - 1) * len(batches))
        for step in stream(model, batches if kinds or bridged else [], tick=tick):
            was = kept_layers[step.index]
            record: dict[str, Any] = {"block": f"{path}.{was}", "units": {}}
            file = work / f"block-{step.index:04d}.safetensors"
            if file.is_file():
                _restore(step.block, load_file(file))
                units.tell(step.block, shape)
                if todo["experts"]:
                    experts.resize(step.block, family)
                record = json.loads(file.with_suffix(".json").read_text())
                records.append(record)
                continue
            now = replace(dense, layers=shape.layers)
            takes_over: list[Block] = []
            if bridged and gone[was]:
                takes_over = [functools.partial(dense_call, was, block=copy.deepcopy(step.block)), *gone[was]]
            of_columns = [kind for kind in kinds if kind != "experts"]
            consumers = {u.consumer.name: u.consumer for u in (self._units(k, step, family, now) for k in of_columns)}
            stats = step.observe(list(consumers.values()), gram=True) if of_columns else {}
            if todo["experts"]:
                x_TH = experts.inputs(step, family)
                removed, cost = experts.removal(
                    step.block, family, x_TH, sensitive.get(f"{path}.{was}"), todo["experts"]
                )
                experts.cut(step.block, family, removed)
                record["units"]["experts"] = {"removed": sorted(removed), "loss": cost[-1]}
            for kind in of_columns:
                found = self._units(kind, step, family, now)
                name = found.consumer.name
                # what was found out has the dense model's names
                at_first = f"{path}.{was}.{name.removeprefix(step.name + '.')}"
                removed, kept_K, error = self._remove(
                    step.block, found, todo[kind], stats[name], sensitive, at_first, hurry
                )
                record["units"][kind] = {"removed": removed, "error": error}
                stats[name] = stats[name].reordered(kept_K)
                if f"taylor {at_first}" in sensitive:
                    sensitive[f"taylor {at_first}"] = sensitive[f"taylor {at_first}"][:, kept_K]
                now = replace(now, **{kind: shape.steps(kind)})
                units.tell(step.block, now)
            if takes_over:
                record["bridge"] = {"blocks": len(gone[was]), "left": self._bridge(step, family, gone[was])}
                record["reconstruction"] = self._reconstruct(step, takes_over)
            if kinds or bridged:
                write_json(file.with_suffix(".json"), record)
                write_tensors(file, {n: p.detach() for n, p in step.block.named_parameters()})
            records.append(record)
        return records

    def _bridge(self, step: Step, family: families.Family, gone: Sequence[Block]) -> float | None:
        """Let the block's last matrix do what it can of what the removed blocks did: the part that is left, or None."""
        assert family.mlp
        layers = {layer.name: layer for layer in layers_of(step.block, step.name, family.experts)}
        layer = layers.get(f"{step.name}.{family.mlp[1]}")
        if layer is None or layer.kind == "expert":
            return None
        try:
            return bridge(step, layer, gone, self.plan.damping)
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None

    def _reconstruct(self, step: Step, dense: Sequence[Block]) -> dict[str, Any]:
        """Tune the whole block to give what the dense block, and the removed ones after it, make of the same inputs."""

        def target(batch: int, part: slice) -> Tensor:
            with torch.no_grad():
                return through(dense, step.inputs(batch)[part], batch)

        with step.evaluating():
            found = reconstruct(
                [Moving.of(p) for p in step.block.parameters()],
                lambda batch, part: step.call(step.inputs(batch)[part], batch),
                target, step.windows, _TUNING, seed=seed_of(self.plan.seed, step.name),
            )  # fmt: skip
        return dataclasses.asdict(found)

    def _narrow(
        self, model: nn.Module, family: families.Family, windows: Tensor, sensitive: dict[str, Tensor],
        kept_layers: Sequence[int], count: int,
    ) -> None:  # fmt: skip
        """Take channels out of the residual stream, last of all."""
        plan = self.plan
        names, _ = blocks_of(model)
        path = names[0].rpartition(".")[0]
        # what was found out has the dense model's names
        now = {}
        for index, was in enumerate(kept_layers):
            old, new = f"{path}.{was}.", f"{path}.{index}."
            now.update({new + n.removeprefix(old): t for n, t in sensitive.items() if n.startswith(old)})
        for layer in [x for name in names for x in layers_of(model.get_submodule(name), name)]:
            if layer.name in now and len(now[layer.name]) != layer.shape[0]:
                # its rows were cut, and nobody noted which: all count alike
                now[layer.name] = now[layer.name].mean().expand(layer.shape[0])
        tick = ticker(self.progress, "cutting the residual width", len(windows))
        reading = width.readers(model, family, windows, now, tick)
        try:
            removed, _ = width.removal(reading, count, plan.damping)
            width.cut(model, family, reading, removed, plan.damping, plan.refit)
        except ValueError as error:
            raise LayerError(f"residual width: {error}") from None

    def _units(self, kind: str, step: Step, family: families.Family, now: Shape) -> units.Units:
        # the step's own layers hold the parameters from before the last cut
        return units.units_of(kind, step.name, layers_of(step.block, step.name, family.experts), family, now)

    def _remove(
        self, block: nn.Module, found: units.Units, steps: int, stats: Stats, sensitive: dict[str, Tensor], name: str,
        hurry: bool,
    ) -> tuple[list[int], Tensor, float]:  # fmt: skip
        """Cut units out of a block, in place: which, the consumer's columns that stay, and its relative error."""
        plan, layer = self.plan, found.consumer
        at_once = losses.at_once(found) if hurry else 1
        count = steps * (1 if found.parents_G is None else int(found.parents_G.max()) + 1)
        weight_OI = layer.read().float()
        taylor = sensitive.get(f"taylor {name}")
        taylor_G = None if taylor is None else taylor[:, found.groups_GC].sum(2).abs().mean(0)
        side = columns.Side(losses.weighted(found, sensitive.get(name)), stats, found.groups_GC, taylor_G)
        try:
            removed = columns.CRITERIA[plan.criterion][0]([side], count, plan.damping, found.parents_G, at_once)
            kept_K = columns.kept_columns(found.groups_GC, removed)
            new_OK = columns.refit(weight_OI, stats, kept_K, plan.damping) if plan.refit else weight_OI[:, kept_K]
        except ValueError as error:
            raise LayerError(f"{layer.name}: {error}") from None
        whole_OI = torch.zeros_like(weight_OI)
        whole_OI[:, kept_K] = new_OK
        units.cut(block, found, removed, new_OK)
        return sorted(removed.tolist()), kept_K, relative_error(weight_OI, whole_OI, stats)

    def _write(self, source: checkpoint.Checkpoint, model: Any, stated: dict[str, Any]) -> None:
        source.copy_small_files(self.model_folder, but=("config.json",))
        # its own is that of the dense model, which saving would find wrong
        model.config = type(model.config).from_dict(stated)
        model.save_pretrained(self.model_folder)
        write_json(self.model_folder / "config.json", stated)
        write_text(self.model_folder / "README.md", _card(self.plan))

    # ------------------------------------------------------------------------------------------------------ measuring

    def _latency(self, source: checkpoint.Checkpoint, cls: Any) -> dict[str, Any]:
        """Dense and cut, both from disk, in turn."""
        plan = self.plan
        models = [cls.from_pretrained(f, dtype="auto").eval() for f in (source.folder, self.model_folder)]
        dense, left = measure(models, plan.prompt, plan.new)
        ratio = left.over(dense)
        return {
            "prompt": plan.prompt,
            "new": plan.new,
            "dense": dataclasses.asdict(dense),
            "left": dataclasses.asdict(left),
            "ratio": dataclasses.asdict(ratio),
        }

    def _evaluate(self, source: checkpoint.Checkpoint, report: dict[str, Any], windows: Tensor) -> None:
        plan, began = self.plan, time.perf_counter()
        if not plan.eval_windows:
            return
        result = checkpoint.Checkpoint(self.model_folder)
        cache = self.work / "windows.json"
        measured = quality(
            source, result, plan.eval_text, plan.eval_windows, plan.eval_seqlen, plan.seed, self.progress, cache
        )
        if measured is None:
            report["warnings"].append("quality was not measured: the model predicts no next token")
            report["gate"] = gates.judge(plan.gate, None)
            return
        found, text = measured
        report["quality"], report["evaluation"] = found.as_dict(), text.facts()
        report["distance"], warnings = texts_apart(source, windows, text.windows, found, plan.seed)
        report["warnings"] += warnings
        report["gate"] = gates.judge(plan.gate, report["quality"])
        report["seconds"]["evaluate"] = time.perf_counter() - began


def _loss(lost: losses.Losses, dense: Shape, shape: Shape) -> float:
    """Estimated nats a token above the dense model."""
    gone = {kind: dense.steps(kind) - shape.steps(kind) for kind in units.COUNTED}
    return lost.of(gone, dense.layers - shape.layers)


def _loaded(folder: str) -> Any:
    """The dense model, whole. A checkpoint of its own: one knows what it has loaded."""
    source = checkpoint.Checkpoint(folder)
    model = source.skeleton()
    source.load_whole(model)
    return model


def _restore(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    """A block as it was cut before a kill."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        units.put(block.get_submodule(path) if path else block, leaf, tensor)


def _card(plan: ShrinkPlan) -> str:
    return "\n".join(
        [
            "---", "library_name: transformers", "tags: [pruning, secateurs]", "---", "", "# A smaller model", "",
            f"Units ({', '.join(plan.units)}) were removed from a dense model until {plan.budget} was met; by {plan.criterion}"
            f"{', with least squares on what is left' if plan.refit else ''}. It loads with `AutoModelForCausalLM.from_pretrained` "
            "and needs no code of secateurs.", "",
        ]
    )  # fmt: skip
