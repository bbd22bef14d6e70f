"""Any traceable module to one with fewer channels, under a budget: a live module of the same class, for convolutions above all.

Units come from graph.py. Every consumer of a unit is refit by least squares, with an intercept, on what the module cut so far
gives it, towards what the dense layer makes of the same inputs; the intercept goes into the consumer's bias. How many units each
group loses follows from loss curves in nats an example: half the OBS error of the consumers' outputs, rows weighted by E[g^2].
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError, PlanError
from secateurs.base.progress import Progress, silent
from secateurs.matrix.solvers import DAMPING
from secateurs.matrix.stats import Stats
from secateurs.model.parts import device_of
from secateurs.shrink import columns, graph
from secateurs.shrink.budget import Budget
from secateurs.shrink.graph import Group, Slot
from secateurs.shrink.trace import trace

Inputs = tuple[Tensor, ...]

BUDGETS = ("params", "flops", "latency")
# places of an image that a consumer's Gram matrix takes in, at random
_PLACES = 256
# groups that OBS removes before it takes costs again, as a fraction of all
_AT_ONCE = 1 / 192
# tokens a column, or least squares and losses mean nothing: with fewer tokens than columns every removal looks free
_TOKENS = 2
# a time budget: shapes that are measured, and how near is near enough
_TRIES = 6
_OVER, _UNDER = 1.01, 0.98


def shrink_module(
    model: nn.Module,
    batches: Sequence[Inputs],
    budget: str,
    criterion: str = "obs",
    refit: bool = True,
    multiple: int = 8,
    damping: float = DAMPING,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of a module with fewer channels, and what was done: (smaller, report). The given one stays as it is.

    batches: calibration inputs, positional arguments; the first one's first example is what is traced and timed. budget:
    'params=0.7x', 'flops=0.5x' (of convolutions and linear layers) or 'latency=0.8x', measured here at batch 1. criterion: a row of
    columns.CRITERIA. multiple: widths that are left are multiples of this. Raises PlanError if the module cannot be traced, has no
    unit, or cannot become so small; LayerError if a Gram matrix does not factor.
    """
    if criterion not in columns.CRITERIA:
        raise PlanError(f"unknown criterion '{criterion}'; write {', '.join(columns.CRITERIA)}")
    if not batches:
        raise PlanError("no calibration inputs were given")
    bound = Budget.parse(budget, BUDGETS)
    device = device_of(model)
    batches = [tuple(x.to(device) for x in batch) for batch in batches]
    model = copy.deepcopy(model).eval()
    job = _Job(model, batches, bound, multiple, damping, seed, progress)
    report = job.run(criterion, refit)
    return model, report


@dataclass
class _Consumer:
    """A slot of columns: what the dense layer is, and which columns are still there, for each convolution group. norm: a batch
    norm that takes the intercept where there is no bias, by its running mean.
    """

    slot: Slot
    module: Any
    rows: list[Tensor]
    weight_OI: list[Tensor]
    alive: list[Tensor]
    scale_O: list[Tensor]
    bias_O: Tensor | None
    norm: Any = None
    mean_O: Tensor | None = None

    def shift(self, more_O: Tensor) -> None:
        """Add to the dense layer's outputs what least squares wants added."""
        if self.mean_O is not None:
            self.norm.running_mean.copy_(self.mean_O - more_O)
            return
        bias_O = more_O if self.bias_O is None else self.bias_O + more_O
        self.module.bias = nn.Parameter(bias_O.to(self.module.weight.dtype))


class _EnoughError(Exception):
    """Stops a forward pass."""


class _Job:
    def __init__(
        self, model: nn.Module, batches: Sequence[Inputs], bound: Budget, multiple: int, damping: float, seed: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.model, self.batches, self.bound, self.multiple = model, batches, bound, multiple
        self.damping, self.seed, self.progress = damping, seed, progress
        self.example = tuple(x[:1] for x in batches[0])
        self.graph = trace(model, self.example)
        self.dense_counts = {g.name: len(g.units) for g in self.graph.groups}
        if not self.graph.groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.graph.fixed.items()) or "it has no such layers"
            raise PlanError(f"{type(model).__name__} has no channels that can go: {why}")
        self.steps = {g.name: self._steps(len(g.units)) for g in self.graph.groups}
        self.kept_whole = dict(self.graph.fixed)
        self.consumers = {s.module: self._consumer(s) for g in self.graph.groups for s in self.graph.consumers(g)}
        self.macs = self.graph.macs(model)
        self.cost = self.graph.parameters(model) if bound.kind == "params" else self.macs
        # what the budget counts; a time budget goes by multiplications
        self.whole = self.cost.at(self.dense_counts)
        if bound.kind == "params":
            # intercepts that become biases
            new = [c for c in self.consumers.values() if c.bias_O is None and c.norm is None]
            self.cost.rest += sum(len(c.module.weight) for c in new)
        self._refuse_too_small()

    def run(self, criterion: str, refit: bool) -> dict[str, Any]:
        began = time.perf_counter()
        dense = copy.deepcopy(self.model)
        for name, found in self._gradients().items():
            consumer = self.consumers[name]
            consumer.scale_O = [found[rows].sqrt() for rows in consumer.rows]
        curves = self._curves()
        self._refuse_too_small()
        counts, tried = self._choose(curves, dense)
        records, removed = [], []
        taylor = self._taylor() if criterion == "taylor" else {}
        todo = [g for g in self.graph.groups if counts[g.name] < len(g.units)]
        for done, group in enumerate(todo):
            gone, error = self._cut(group, counts[group.name], criterion, refit, taylor)
            removed += group.units[gone.numpy()].tolist()
            records.append({
                "group": group.name, "before": len(group.units), "after": counts[group.name],
                "removed": sorted(gone.tolist()), "error": error,
            })  # fmt: skip
            self.progress("cutting", done + 1, len(todo))
        graph.cut(self.model, self.graph, removed)
        with torch.no_grad():
            self.model(*self.example)
        return {
            "budget": self.bound.text,
            "groups": records,
            "kept_whole": self.kept_whole,
            "parameters": {kind: sum(p.numel() for p in m.parameters()) for kind, m in (("dense", dense), ("left", self.model))},
            "macs": {"dense": self.macs.at(self.dense_counts), "left": self.macs.at(counts)},
            "estimated_loss": sum(curves[name][self.dense_counts[name] - count] for name, count in counts.items()),
            "tried": tried,
            "latency": dict(zip(("dense", "left", "ratio"), measure(dense, self.model, self.example), strict=True)),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------- what there is

    def _steps(self, units: int) -> list[int]:
        """Widths that a group may have, falling, its own first."""
        return [units, *(n for n in range(units - 1, 0, -1) if n % self.multiple == 0)]

    def _size(self, counts: dict[str, int]) -> float:
        """Of the dense module's, in what the budget counts."""
        return self.cost.at(counts) / self.whole

    def _refuse_too_small(self) -> None:
        least = self._size({name: steps[-1] for name, steps in self.steps.items()})
        if not self.bound.timed and least > self.bound.value:
            fixed = "".join(f"; {name} stays whole: {why}" for name, why in self.kept_whole.items())
            raise PlanError(
                f"budget {self.bound.text}: with widths that are multiples of {self.multiple} the smallest shape is {least:.3f}x"
                f"{fixed}; raise the budget or lower the multiple"
            )

    def _consumer(self, slot: Slot) -> _Consumer:
        module: Any = self.model.get_submodule(slot.module)
        weight_OI = module.weight.detach().float().flatten(1)
        rows = list(torch.arange(len(weight_OI)).chunk(slot.groups))
        weights = [weight_OI[r] for r in rows]
        # which ones is noted on the CPU, what they weigh is where the module is
        alive = [torch.ones(w.shape[1], dtype=torch.bool) for w in weights]
        scale_O = [w.new_ones(len(w)) for w in weights]
        bias_O = None if module.bias is None else module.bias.detach().float().clone()
        found = _Consumer(slot, module, rows, weights, alive, scale_O, bias_O)
        if bias_O is None and slot.module in self.graph.norms:
            found.norm = self.model.get_submodule(self.graph.norms[slot.module])
            found.mean_O = found.norm.running_mean.clone()
        return found

    def _observe(self, names: Sequence[str], label: str | None = None) -> dict[str, list[Stats]]:
        """Sums over the unfolded inputs of consumers and a constant 1, for each convolution group."""
        generator = torch.Generator().manual_seed(self.seed)
        sums: dict[str, list[Stats]] = {}

        def add(name: str, x: Tensor) -> None:
            parts = graph.unfolded(self.consumers[name].module, x.float())
            places = parts[0].shape[1]
            if places > _PLACES:
                chosen = torch.randperm(places, generator=generator)[:_PLACES]
                parts = [part[:, chosen] for part in parts]
            for i, part in enumerate(parts):
                with_one = torch.cat([part, part.new_ones(*part.shape[:2], 1)], 2)
                if len(sums.setdefault(name, [])) <= i:
                    sums[name].append(Stats.zeros(with_one.shape[-1], True, x.device))
                sums[name][i].add_(with_one)
            waiting.discard(name)
            if not waiting and not label:
                # what comes after them is of no use
                raise _EnoughError

        waiting: set[str] = set()
        hooks = [
            self.consumers[name].module.register_forward_pre_hook(lambda _, x, name=name: add(name, x[0])) for name in names
        ]  # fmt: skip
        try:
            with torch.no_grad():
                for i, batch in enumerate(self.batches):
                    waiting.update(names)
                    with suppress(_EnoughError):
                        self.model(*batch)
                    if label:
                        self.progress(label, i + 1, len(self.batches))
        finally:
            for hook in hooks:
                hook.remove()
        return {name: [s.finish() for s in found] for name, found in sums.items()}

    def _backward(self, label: str) -> Iterator[None]:
        """Run every batch forward and back: the gradient of -log of a sampled class where outputs are [N, classes], else of a
        Gaussian with the outputs' mean square; summed over examples.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for i, batch in enumerate(self.batches):
            self.model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                out = self.model(*batch)
                if not isinstance(out, Tensor):
                    raise PlanError(f"{type(self.model).__name__} gives a {type(out).__name__}, not a tensor")
                if out.dim() == 2 and out.shape[1] > 1:
                    chance = out.detach().float().softmax(1)
                    # drawn on the CPU, whose generator it is
                    label_N = torch.multinomial(chance.cpu(), 1, generator=generator).to(out.device)
                    loss = -out.float().log_softmax(1).gather(1, label_N).sum()
                else:
                    noise = torch.randn(out.shape, generator=generator).to(out.device)
                    loss = (out.float() * noise).sum() / out.detach().float().square().mean().sqrt().clamp(min=1e-12)
                loss.backward()  # type: ignore[no-untyped-call]
            yield
            self.progress(label, i + 1, len(self.batches))
        self.model.zero_grad(set_to_none=True)

    def _gradients(self) -> dict[str, Tensor]:
        """E[g^2] of every consumer's outputs, a mean over examples and places, [O]."""
        sums: dict[str, list[Any]] = {}

        def take(name: str, gradient: Tensor) -> None:
            square_O = gradient.float().square().transpose(0, 1).flatten(1)
            total = sums.setdefault(name, [square_O.new_zeros(len(square_O)), 0])
            total[0] += square_O.sum(1)
            total[1] += square_O.shape[1]

        def watch(name: str) -> Callable[..., None]:
            def after(_: Any, __: Any, out: Tensor) -> None:
                if out.requires_grad:
                    out.register_hook(lambda gradient: take(name, gradient))  # type: ignore[no-untyped-call]

            return after

        with _hooked([(c.module, watch(name)) for name, c in self.consumers.items()]), _asking(self.model):
            for _ in self._backward("measuring sensitivity"):
                pass
        return {name: total / count for name, (total, count) in sums.items()}

    def _taylor(self) -> dict[str, list[Tensor]]:
        """Mean over batches of |W dL/dW| summed over rows, for the columns of every consumer: kept apart by batch, [B, I]."""
        found: dict[str, list[Tensor]] = {}
        with _asking(self.model):
            for _ in self._backward("taking gradients"):
                for name, consumer in self.consumers.items():
                    product = (consumer.module.weight * consumer.module.weight.grad).detach().float().flatten(1)
                    found.setdefault(name, []).append(torch.cat([product[rows].sum(0) for rows in consumer.rows]))
        return found

    # ---------------------------------------------------------------------------------------------- how many of which

    def _curves(self) -> dict[str, list[float]]:
        """{group: loss with so many units gone}, nats an example."""
        stats = self._observe(list(self.consumers), "what channels cost")
        found = {}
        for done, group in enumerate(self.graph.groups):
            sides, places = self._sides(group, stats)
            thin = min(sides, key=lambda side: side.stats.tokens / side.weight_OI.shape[1])
            tokens, width = thin.stats.tokens, thin.weight_OI.shape[1] - 1
            if tokens < _TOKENS * width:
                self.steps[group.name] = self.steps[group.name][:1]
                self.kept_whole[group.name] = (
                    f"a layer that reads it saw {tokens} inputs of {width} numbers; give {_TOKENS * width} or more"
                )
            most = len(group.units) - self.steps[group.name][-1]
            curve = [0.0] * (most + 1)
            if most:
                at_once = max(1, round(len(group.units) * _AT_ONCE))
                # sides of other places weigh as many
                _, losses = self._removal(sides, places, most, at_once)
                curve[1:] = losses.tolist()
            found[group.name] = curve
            self.progress("what channels cost", done + 1, len(self.graph.groups))
        return found

    def _removal(self, sides: list[columns.Side], places: list[int], count: int, at_once: int) -> tuple[Tensor, Tensor]:
        scaled = [
            columns.Side(s.weight_OI * (n / (2 * s.stats.tokens)) ** 0.5, s.stats, s.groups_GC)
            for s, n in zip(sides, places, strict=True)
        ]
        try:
            return columns.removal(scaled, count, self.damping, at_once)
        except ValueError as error:
            raise LayerError(str(error)) from None

    def _sides(self, group: Group, stats: dict[str, list[Stats]]) -> tuple[list[columns.Side], list[int]]:
        """What every consumer of a group is now, columns that went before left out; and the places of an example."""
        sides, places = [], []
        for slot in self.graph.consumers(group):
            consumer = self.consumers[slot.module]
            parts = self.graph.columns(self.model, group, slot)
            for i, groups_GC in enumerate(parts):
                seen, alive = stats[slot.module][i], consumer.alive[i]
                index = torch.cat([alive.nonzero()[:, 0], torch.tensor([len(alive)])])
                renumbered = torch.full((len(alive) + 1,), -1, dtype=torch.long)
                renumbered[index] = torch.arange(len(index))
                weight_OI = _with_intercept(consumer.weight_OI[i])
                now_OI = weight_OI if bool(alive.all()) else self._refit(slot.module, weight_OI, seen, index)
                scored_OI = now_OI * consumer.scale_O[i][:, None]
                sides.append(columns.Side(scored_OI, seen.reordered(index), renumbered[groups_GC]))
                places.append(self.graph.positions[slot.module])
        return sides, places

    def _refit(self, name: str, weight_OI: Tensor, stats: Stats, kept_K: Tensor) -> Tensor:
        try:
            return columns.refit(weight_OI, stats, kept_K, self.damping)
        except ValueError as error:
            raise LayerError(f"{name}: {error}") from None

    def _choose(self, curves: dict[str, list[float]], dense: nn.Module) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Widths with the least estimated loss that the budget allows; by measurement where it is one of time."""
        if not self.bound.timed:
            return self._fitting(curves, self.bound.value), []
        tried: list[dict[str, Any]] = []
        best: tuple[float, dict[str, int]] | None = None
        aim = low = self._size({name: steps[-1] for name, steps in self.steps.items()})
        for number in range(_TRIES):
            # first the smallest there is: if that is too slow, nothing will do
            counts = self._fitting(curves, aim)
            _, _, ratio = measure(dense, self._blank(dense, counts), self.example)
            used = ratio / self.bound.value
            tried.append({"counts": counts, "ratio": ratio})
            self.progress("measuring latency", number + 1, _TRIES)
            if used <= _OVER:
                size = self._size(counts)
                if best is None or size > best[0]:
                    best = (size, counts)
            if number == 0 and used > _OVER:
                raise PlanError(
                    f"budget {self.bound.text}: the smallest shape takes {ratio:.3g}x the dense module's time; raise the budget"
                )
            if number and _UNDER <= used <= _OVER:
                break
            aim = self._next(tried, low)
        assert best is not None
        return best[1], tried

    def _next(self, tried: list[dict[str, Any]], low: float) -> float:
        """The size at which a straight line through the nearest sizes around it meets the budget."""
        points = sorted([(1.0, 1.0), *((t["ratio"], self._size(t["counts"])) for t in tried)])
        under = [p for p in points if p[0] <= self.bound.value]
        over = [p for p in points if p[0] > self.bound.value]
        a, b = (under[-1] if under else points[0]), (over[0] if over else points[-1])
        share = (self.bound.value - a[0]) / (b[0] - a[0]) if b[0] > a[0] else 0.5
        return max(low, a[1] + share * (b[1] - a[1]))

    def _fitting(self, curves: dict[str, list[float]], size: float) -> dict[str, int]:
        """Take the step that costs the least loss for what it saves, until nothing more than `size` is left."""
        counts = dict(self.dense_counts)
        now = self._size(counts)
        while now > size + 1e-12:
            best: tuple[float, str, int] | None = None
            for name, steps in self.steps.items():
                spent = curves[name][self.dense_counts[name] - counts[name]]
                options = [n for n in steps if n < counts[name]]
                for count, saved in zip(options, self.cost.saved(counts, name, options), strict=True):
                    if saved > 0:
                        slope = (curves[name][self.dense_counts[name] - count] - spent) / saved
                        if best is None or slope < best[0]:
                            best = (slope, name, count)
            if best is None:
                break
            counts[best[1]] = best[2]
            now = self._size(counts)
        return counts

    def _blank(self, dense: nn.Module, counts: dict[str, int]) -> nn.Module:
        """The module with those widths, whichever units."""
        out = copy.deepcopy(dense)
        removed = [u for g in self.graph.groups for u in g.units[counts[g.name] :].tolist()]
        graph.cut(out, self.graph, removed)
        return out

    # -------------------------------------------------------------------------------------------------------- cutting

    def _cut(
        self, group: Group, count: int, criterion: str, refit: bool, taylor: dict[str, list[Tensor]]
    ) -> tuple[Tensor, float]:
        """Choose a group's units and make its consumers do without. Their places in group.units, and the relative error."""
        slots = self.graph.consumers(group)
        stats = self._observe([slot.module for slot in slots])
        sides, places = self._sides(group, stats)
        most = len(group.units) - count
        if criterion == "obs":
            gone, _ = self._removal(sides, places, most, 1)
        else:
            if taylor:
                sides = self._with_taylor(group, sides, taylor)
            gone = columns.CRITERIA[criterion][0](sides, most, self.damping, None, 1)
        error = whole = 0.0
        for slot in slots:
            consumer = self.consumers[slot.module]
            more_O = consumer.weight_OI[0].new_zeros(len(consumer.module.weight))
            new = torch.zeros_like(consumer.module.weight, dtype=torch.float32).flatten(1)
            for i, groups_GC in enumerate(self.graph.columns(self.model, group, slot)):
                consumer.alive[i][groups_GC[gone].flatten()] = False
                rows, seen = consumer.rows[i], stats[slot.module][i]
                kept_K = torch.cat([consumer.alive[i].nonzero()[:, 0], torch.tensor([len(consumer.alive[i])])])
                weight_OI = _with_intercept(consumer.weight_OI[i])
                new_OK = self._refit(slot.module, weight_OI, seen, kept_K) if refit else weight_OI[:, kept_K]
                whole_OI = torch.zeros_like(weight_OI)
                whole_OI[:, kept_K] = new_OK
                delta_OI = whole_OI - weight_OI
                assert seen.gram_II is not None
                error += float(((delta_OI @ seen.gram_II) * delta_OI).sum())
                whole += float(((weight_OI @ seen.gram_II) * weight_OI).sum())
                new[rows] = whole_OI[:, :-1]
                more_O[rows] = whole_OI[:, -1]
            parameter = consumer.module.weight
            parameter.data.copy_(new.reshape(parameter.shape))
            if refit:
                consumer.shift(more_O)
        return gone, (error / whole) ** 0.5 if whole else 0.0

    def _with_taylor(
        self, group: Group, sides: list[columns.Side], taylor: dict[str, list[Tensor]]
    ) -> list[columns.Side]:
        found, i = [], 0
        for slot in self.graph.consumers(group):
            products = torch.stack(taylor[slot.module])
            width = products.shape[1] // slot.groups
            for part, groups_GC in enumerate(self.graph.columns(self.model, group, slot)):
                mine = products[:, part * width : (part + 1) * width]
                taylor_G = mine[:, groups_GC].sum(2).abs().mean(0)
                side = sides[i]
                found.append(columns.Side(side.weight_OI, side.stats, side.groups_GC, taylor_G))
                i += 1
        return found


def measure(dense: nn.Module, left: nn.Module, example: Inputs, rounds: int = 15) -> tuple[float, float, float]:
    """Seconds of two modules on one example, in turn after two rounds that warm up; medians, and the median ratio."""
    samples: list[tuple[float, float]] = []
    cuda = any(x.is_cuda for x in example)
    with torch.no_grad():
        for number in range(rounds + 2):
            pair = []
            for module in (dense, left):
                begin = time.perf_counter()
                module(*example)
                if cuda:
                    torch.cuda.synchronize()
                pair.append(time.perf_counter() - begin)
            if number >= 2:
                samples.append((pair[0], pair[1]))
    return median(a for a, _ in samples), median(b for _, b in samples), median(b / a for a, b in samples)


def _with_intercept(weight_OI: Tensor) -> Tensor:
    """A column more, for the constant 1 among the inputs."""
    return torch.cat([weight_OI, weight_OI.new_zeros(len(weight_OI), 1)], 1)


@contextmanager
def _hooked(found: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    hooks = [module.register_forward_hook(hook) for module, hook in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _asking(model: nn.Module) -> Iterator[None]:
    """All floating-point parameters ask for gradients."""
    asked = {p: p.requires_grad for p in model.parameters()}
    for p in asked:
        p.requires_grad_(p.is_floating_point())
    try:
        yield
    finally:
        for p, flag in asked.items():
            p.requires_grad_(flag)
            p.grad = None
