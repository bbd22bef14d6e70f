"""The layers of a live module that read removable channels: their inputs, the losses of removals, and their new weights.

Whatever the removal of a channel loses, it loses in the layers that read it. The Gram matrix of such a layer's unfolded inputs (and
of a constant 1, for the intercept) gives the cost of each removal and the least-squares weights of the kept columns. Until the end
of a run the module keeps its size: removed columns are zero.

O outputs, I inputs, G units of C columns, K columns kept, N examples, B batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError, PlanError
from secateurs.base.progress import Progress
from secateurs.matrix.stats import Stats
from secateurs.model.blocks import Stop
from secateurs.shrink import columns
from secateurs.shrink.graph import Graph, Group, Slot, unfolded
from secateurs.shrink.passes import asking, hooked

Inputs = tuple[Tensor, ...]

# places of an image, chosen at random, that go into a consumer's Gram matrix
_PLACES = 256


@dataclass
class Consumer:
    """A layer that reads units. Lists have an entry for each convolution group.

    rows: its outputs. weight_OI: the dense layer's weights. alive: the columns that are still there, on the CPU. scale_O: the
    root of E[g^2] of its outputs. norm: a batch norm that takes the intercept where the layer has no bias, in its running mean.
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

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, slot: Slot) -> "Consumer":
        module: Any = model.get_submodule(slot.module)
        weight_OI = module.weight.detach().float().flatten(1)
        rows = list(torch.arange(len(weight_OI)).chunk(slot.groups))
        weights = [weight_OI[r] for r in rows]
        alive = [torch.ones(w.shape[1], dtype=torch.bool) for w in weights]
        scale_O = [w.new_ones(len(w)) for w in weights]
        bias_O = None if module.bias is None else module.bias.detach().float().clone()
        found = cls(slot, module, rows, weights, alive, scale_O, bias_O)
        if bias_O is None and slot.module in graph.norms:
            found.norm = model.get_submodule(graph.norms[slot.module])
            found.mean_O = found.norm.running_mean.clone()
        return found

    @property
    def new_biases(self) -> int:
        """Parameters that an intercept adds: none where there is a bias or a batch norm to take it."""
        return len(self.module.weight) if self.bias_O is None and self.norm is None else 0

    def kept(self, part: int) -> Tensor:
        """The columns of a convolution group that are still there, and last the constant's."""
        alive = self.alive[part]
        return torch.cat([alive.nonzero()[:, 0], torch.tensor([len(alive)])])

    def with_intercept(self, part: int) -> Tensor:
        """The dense weights of a convolution group and a column of zeros, for the constant 1 among the inputs."""
        weight_OI = self.weight_OI[part]
        return torch.cat([weight_OI, weight_OI.new_zeros(len(weight_OI), 1)], 1)

    def shift(self, more_O: Tensor) -> None:
        """Add an intercept to the dense layer's outputs."""
        if self.mean_O is not None:
            self.norm.running_mean.copy_(self.mean_O - more_O)
            return
        bias_O = more_O if self.bias_O is None else self.bias_O + more_O
        self.module.bias = nn.Parameter(bias_O.to(self.module.weight.dtype))


class Consumers:
    """All consumers of a traced module, {name: consumer} in `by_name`, and the calibration inputs that the module is run on."""

    def __init__(
        self, model: nn.Module, graph: Graph, batches: Sequence[Inputs], damping: float, seed: int, progress: Progress
    ) -> None:
        self.model, self.graph, self.batches = model, graph, batches
        self.damping, self.seed, self.progress = damping, seed, progress
        self.by_name = {s.module: Consumer.of(model, graph, s) for g in graph.groups for s in graph.consumers(g)}

    # ----------------------------------------------------------------------------------------- runs of the module

    def observe(self, names: Sequence[str], label: str | None = None) -> dict[str, list[Stats]]:
        """Sums over the unfolded inputs of consumers and a constant 1, for each convolution group.

        label: a stage of the progress display; without one, each pass ends when the last of these consumers is reached.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sums: dict[str, list[Stats]] = {}

        def add(name: str, x: Tensor) -> None:
            parts = unfolded(self.by_name[name].module, x.float())
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
                # the rest of the pass is not needed
                raise Stop

        waiting: set[str] = set()
        hooks = [
            self.by_name[name].module.register_forward_pre_hook(lambda _, x, name=name: add(name, x[0])) for name in names
        ]  # fmt: skip
        try:
            with torch.no_grad():
                for i, batch in enumerate(self.batches):
                    waiting.update(names)
                    with suppress(Stop):
                        self.model(*batch)
                    if label:
                        self.progress(label, i + 1, len(self.batches))
        finally:
            for hook in hooks:
                hook.remove()
        return {name: [s.finish() for s in found] for name, found in sums.items()}

    def weigh(self) -> None:
        """Set every consumer's scale_O: the root of E[g^2] of its outputs, a mean over examples and places."""
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

        with hooked([(c.module, watch(name)) for name, c in self.by_name.items()]):
            for _ in self._backward("measuring sensitivity"):
                pass
        for name, (total, count) in sums.items():
            consumer = self.by_name[name]
            consumer.scale_O = [(total / count)[rows].sqrt() for rows in consumer.rows]

    def taylor(self) -> dict[str, list[Tensor]]:
        """{consumer: W dL/dW summed over rows, for each of its columns, of every batch: a list of B tensors [I]}."""
        found: dict[str, list[Tensor]] = {}
        for _ in self._backward("taking gradients"):
            for name, consumer in self.by_name.items():
                product = (consumer.module.weight * consumer.module.weight.grad).detach().float().flatten(1)
                found.setdefault(name, []).append(torch.cat([product[rows].sum(0) for rows in consumer.rows]))
        return found

    def _backward(self, label: str) -> Iterator[None]:
        """Run every batch forward and back. The loss, summed over examples: -log of a sampled class where outputs are
        [N, classes], else the outputs times Gaussian noise, over their root mean square.
        """
        generator = torch.Generator().manual_seed(self.seed)
        with asking(self.model, [p for p in self.model.parameters() if p.is_floating_point()]):
            for i, batch in enumerate(self.batches):
                self.model.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    out = self.model(*batch)
                    if not isinstance(out, Tensor):
                        raise PlanError(f"{type(self.model).__name__} gives a {type(out).__name__}, not a tensor")
                    _sampled_loss(out, generator).backward()  # type: ignore[no-untyped-call]
                yield
                self.progress(label, i + 1, len(self.batches))
            self.model.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------- choosing units, cutting

    def sides(self, group: Group, stats: dict[str, list[Stats]]) -> tuple[list[columns.Side], list[int]]:
        """The consumers of a group as they are now, without the columns that are gone; and their places in one example."""
        sides, places = [], []
        for slot in self.graph.consumers(group):
            consumer = self.by_name[slot.module]
            for i, groups_GC in enumerate(self.graph.columns(self.model, group, slot)):
                seen, alive, index = stats[slot.module][i], consumer.alive[i], consumer.kept(i)
                renumbered = torch.full((len(alive) + 1,), -1, dtype=torch.long)
                renumbered[index] = torch.arange(len(index))
                weight_OI = consumer.with_intercept(i)
                now_OI = weight_OI if bool(alive.all()) else self._refit(slot.module, weight_OI, seen, index)
                scored_OI = now_OI * consumer.scale_O[i][:, None]
                sides.append(columns.Side(scored_OI, seen.reordered(index), renumbered[groups_GC]))
                places.append(self.graph.positions[slot.module])
        return sides, places

    def removal(
        self, sides: Sequence[columns.Side], places: Sequence[int], count: int, at_once: int
    ) -> tuple[Tensor, Tensor]:
        """The order in which OBS removes units, and the loss after each: nats an example."""
        # errors are means over the inputs seen; an example has `places` of them
        scaled = [
            columns.Side(s.weight_OI * (n / (2 * s.stats.tokens)) ** 0.5, s.stats, s.groups_GC)
            for s, n in zip(sides, places, strict=True)
        ]
        try:
            return columns.removal(scaled, count, self.damping, at_once)
        except ValueError as error:
            raise LayerError(str(error)) from None

    def cut(
        self, group: Group, count: int, criterion: str, refit: bool, taylor: dict[str, list[Tensor]]
    ) -> tuple[Tensor, float]:
        """Choose the units of a group that go, until `count` are left, and set their columns to zero in all consumers.

        refit: give what stays its least-squares weights, and an intercept. taylor: what taylor() found, or {}. Returns the places
        of the removed units in group.units, and the relative error of the consumers' outputs.
        """
        slots = self.graph.consumers(group)
        stats = self.observe([slot.module for slot in slots])
        sides, places = self.sides(group, stats)
        most = len(group.units) - count
        if criterion == "obs":
            gone, _ = self.removal(sides, places, most, 1)
        else:
            if taylor:
                sides = self._with_taylor(group, sides, taylor)
            gone = columns.CRITERIA[criterion][0](sides, most, self.damping, None, 1)
        error = whole = 0.0
        for slot in slots:
            consumer = self.by_name[slot.module]
            more_O = consumer.weight_OI[0].new_zeros(len(consumer.module.weight))
            new = torch.zeros_like(consumer.module.weight, dtype=torch.float32).flatten(1)
            for i, groups_GC in enumerate(self.graph.columns(self.model, group, slot)):
                consumer.alive[i][groups_GC[gone].flatten()] = False
                rows, seen, kept_K = consumer.rows[i], stats[slot.module][i], consumer.kept(i)
                weight_OI = consumer.with_intercept(i)
                new_OK = self._refit(slot.module, weight_OI, seen, kept_K) if refit else weight_OI[:, kept_K]
                whole_OI = torch.zeros_like(weight_OI)
                # as it will be written
                whole_OI[:, kept_K] = new_OK.to(consumer.module.weight.dtype).float()
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

    def _refit(self, name: str, weight_OI: Tensor, stats: Stats, kept_K: Tensor) -> Tensor:
        try:
            return columns.refit(weight_OI, stats, kept_K, self.damping)
        except ValueError as error:
            raise LayerError(f"{name}: {error}") from None

    def _with_taylor(
        self, group: Group, sides: list[columns.Side], taylor: dict[str, list[Tensor]]
    ) -> list[columns.Side]:
        """The sides with their Taylor scores."""
        found, i = [], 0
        for slot in self.graph.consumers(group):
            products_BI = torch.stack(taylor[slot.module])
            width = products_BI.shape[1] // slot.groups
            for part, groups_GC in enumerate(self.graph.columns(self.model, group, slot)):
                mine = products_BI[:, part * width : (part + 1) * width]
                taylor_G = mine[:, groups_GC].sum(2).abs().mean(0)
                side = sides[i]
                found.append(columns.Side(side.weight_OI, side.stats, side.groups_GC, taylor_G))
                i += 1
        return found


def _sampled_loss(out: Tensor, generator: torch.Generator) -> Tensor:
    if out.dim() == 2 and out.shape[1] > 1:
        chance = out.detach().float().softmax(1)
        # drawn on the CPU, where the generator is
        label_N = torch.multinomial(chance.cpu(), 1, generator=generator).to(out.device)
        return -out.float().log_softmax(1).gather(1, label_N).sum()
    noise = torch.randn(out.shape, generator=generator).to(out.device)
    return (out.float() * noise).sum() / out.detach().float().square().mean().sqrt().clamp(min=1e-12)
