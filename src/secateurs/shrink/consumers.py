"""The layers of a live module that read removable channels: their inputs, the losses of removals, and their new weights.

Whatever the removal of a channel loses, it loses in the layers that read it. The Gram matrix of such a layer's unfolded inputs (and
of a constant 1, for the intercept) gives the cost of each removal and the least-squares weights of the kept columns. Until the end
of a run the module keeps its size: removed columns are zero.

O outputs, I inputs, G units of C columns, K columns kept, N examples, B batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import LayerError
from secateurs.base.progress import Progress
from secateurs.matrix.stats import Stats
from secateurs.model.blocks import Stop
from secateurs.shrink import columns
from secateurs.shrink.attention import opened
from secateurs.shrink.graph import Graph, Group, tensor_of
from secateurs.shrink.outputs import Objective
from secateurs.shrink.passes import asking, backward, forgetting
from secateurs.shrink.readers import Call, Reader, Watched
from secateurs.shrink.spread import Seen, Spread

# places of an image, chosen at random, that go into a consumer's Gram matrix
_PLACES = 256


@dataclass
class Consumer:
    """A layer that reads units. Lists have an entry for each convolution group.

    weight_OI: the dense layer's matrices. alive: the columns that are still there, on the CPU. scale_O: the root of E[g^2] of its
    outputs. norm: a batch norm that takes the intercept where the layer has no bias, in its running mean.
    """

    reader: Reader
    module: Any
    leaf: str
    weight_OI: list[Tensor]
    alive: list[Tensor]
    scale_O: list[Tensor]
    bias_O: Tensor | None
    norm: Any = None
    mean_O: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, reader: Reader) -> "Consumer":
        path, _, leaf = reader.weight.rpartition(".")
        weights = reader.matrices(getattr(model.get_submodule(path), leaf).detach().float().clone())
        alive = [torch.ones(w.shape[1], dtype=torch.bool) for w in weights]
        bias = tensor_of(model, reader.bias) if reader.bias else None
        bias_O = None if bias is None else bias.detach().float().clone()
        found = cls(
            reader, model.get_submodule(path), leaf, weights, alive, [w.new_ones(len(w)) for w in weights], bias_O
        )
        if bias_O is None and reader.weight in graph.norms:
            found.norm = model.get_submodule(graph.norms[reader.weight])
            found.mean_O = found.norm.running_mean.clone()
        return found

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now."""
        found: Tensor = getattr(self.module, self.leaf)
        return found

    @property
    def new_biases(self) -> int:
        """Parameters that an intercept adds: none where there is a bias or a batch norm to take it."""
        there = self.bias_O is not None or self.norm is not None or self.reader.bias is None
        return 0 if there else sum(len(w) for w in self.weight_OI)

    def kept(self, part: int) -> Tensor:
        """The columns of a convolution group that are still there, and last the constant's, where there is an intercept."""
        alive = self.alive[part]
        last = [len(alive)] if self.shifts else []
        return torch.cat([alive.nonzero()[:, 0], torch.tensor(last, dtype=torch.long)])

    @property
    def shifts(self) -> bool:
        """True if something can take an intercept."""
        return self.norm is not None or self.reader.bias is not None

    def with_intercept(self, part: int) -> Tensor:
        """The dense weights of a convolution group and a column of zeros, for the constant 1 among the inputs."""
        weight_OI = self.weight_OI[part]
        return torch.cat([weight_OI, weight_OI.new_zeros(len(weight_OI), 1)], 1)

    def shift(self, more_O: Tensor) -> None:
        """Add an intercept to the dense layer's outputs."""
        if self.mean_O is not None:
            self.norm.running_mean.copy_(self.mean_O - more_O)
        elif self.reader.bias is not None:
            bias_O = more_O if self.bias_O is None else self.bias_O + more_O
            setattr(self.module, self.reader.bias.rpartition(".")[2], nn.Parameter(bias_O.to(self.weight.dtype)))


class Consumers:
    """All consumers of a traced module, {weight: consumer} in `by_name`, and the calibration inputs that the module is run on."""

    def __init__(
        self, model: nn.Module, graph: Graph, objective: Objective, damping: float, seed: int, progress: Progress
    ) -> None:
        self.model, self.graph, self.objective, self.batches = model, graph, objective, objective.batches
        self.damping, self.seed, self.progress = damping, seed, progress
        self.seen: dict[str, Seen] = {}
        self.by_name = {
            name: Consumer.of(model, graph, graph.readers[name]) for g in graph.groups for name in g.readers
        }

    # ----------------------------------------------------------------------------------------- runs of the module

    def observe(self, names: Sequence[str], label: str | None = None) -> dict[str, list[Stats]]:
        """Sums over the unfolded inputs of consumers and a constant 1, for each convolution group; shrunk if they saw too little.

        label: a stage of the progress display; without one, each pass ends when the last of these consumers is reached.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sums: dict[str, list[Stats]] = {}
        spreads: dict[str, list[Spread]] = {}
        waiting: dict[str, int] = {}

        def add(name: str, call: Call) -> None:
            if name not in names:
                return
            for i, part in enumerate(call.unfolded(self.by_name[name].reader, _PLACES, generator)):
                with_one = torch.cat([part, part.new_ones(*part.shape[:2], 1)], 2)
                if len(sums.setdefault(name, [])) <= i:
                    sums[name].append(Stats.zeros(with_one.shape[-1], True, part.device))
                    spreads.setdefault(name, []).append(Spread())
                sums[name][i].add_(with_one)
                spreads[name][i].add_(part)
            waiting[name] -= 1
            if not label and not any(waiting.values()):
                # the rest of the pass is not needed
                raise Stop

        with torch.no_grad(), self._watched(add):
            for i, batch in enumerate(self.batches):
                waiting.update({name: self.by_name[name].reader.calls for name in names})
                with suppress(Stop), forgetting(self.model):
                    self.model(*batch)
                if label:
                    self.progress(label, i + 1, len(self.batches))
        found = {name: [s.finish() for s in parts] for name, parts in sums.items()}
        for name, parts in found.items():
            for stats, spread in zip(parts, spreads[name], strict=True):
                assert stats.gram_II is not None
                self.seen[name] = spread.shrink(stats.gram_II, stats.tokens)
        return found

    @contextmanager
    def _watched(self, watch: Callable[[str, Call], None]) -> Iterator[None]:
        """Calls watch(weight's name, call) for each call of a consumer."""
        names = {id(consumer.weight): name for name, consumer in self.by_name.items()}
        seen = Watched(lambda call, weight: watch(names[id(weight)], call) if id(weight) in names else None)
        with opened(self.model), seen:
            yield

    def weigh(self) -> None:
        """Set every consumer's scale_O: the root of E[g^2] of its outputs, a mean over examples and places; 0 where the loss has no
        gradient.
        """
        sums: dict[str, list[Any]] = {}

        def take(name: str, gradient: Tensor) -> None:
            square_O = self.by_name[name].reader.rows(gradient.float().square())
            total = sums.setdefault(name, [square_O.new_zeros(len(square_O)), 0])
            total[0] += square_O.sum(1)
            total[1] += square_O.shape[1]

        def watch(name: str, call: Call) -> None:
            out = call.out[0] if call.kind == "recurrent" else call.out
            if out.requires_grad:
                out.register_hook(lambda gradient: take(name, gradient))

        with self._watched(watch):
            for _ in self._backward("measuring sensitivity"):
                pass
        for name, consumer in self.by_name.items():
            if name not in sums:
                consumer.scale_O = [torch.zeros_like(scale_O) for scale_O in consumer.scale_O]
                continue
            total, count = sums[name]
            # the gates of a recurrent layer count as the state that they make
            rows = sum(len(w) for w in consumer.weight_OI)
            scale_O = (total / count).sqrt().repeat(rows // len(total))
            consumer.scale_O = list(scale_O.split([len(w) for w in consumer.weight_OI]))

    def reached(self, name: str) -> bool:
        """True if the loss has a gradient by a consumer's outputs."""
        return any(bool(scale_O.any()) for scale_O in self.by_name[name].scale_O)

    def taylor(self) -> dict[str, list[Tensor]]:
        """{consumer: W dL/dW summed over rows, for each of its columns, of every batch: a list of B tensors [I]}."""
        found: dict[str, list[Tensor]] = {}
        for _ in self._backward("taking gradients"):
            for name, consumer in self.by_name.items():
                gradient = consumer.weight.grad
                if gradient is not None:
                    product = consumer.reader.matrices((consumer.weight * gradient).detach().float())
                    found.setdefault(name, []).append(torch.cat([rows.sum(0) for rows in product]))
        return found

    def _backward(self, label: str) -> Iterator[None]:
        """Run every batch forward and back, by the loss of Objective.summed()."""
        generator = torch.Generator().manual_seed(self.seed)
        with asking(self.model, [p for p in self.model.parameters() if p.is_floating_point()]):
            for i in range(len(self.batches)):
                self.model.zero_grad(set_to_none=True)
                with torch.enable_grad(), forgetting(self.model):
                    backward(self.model, [self.objective.summed(self.model, i, generator)])
                yield
                self.progress(label, i + 1, len(self.batches))
            self.model.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------- choosing units, cutting

    def sides(self, group: Group, stats: dict[str, list[Stats]]) -> tuple[list[columns.Side], list[int]]:
        """The consumers of a group as they are now, without the columns that are gone; and their places in one example."""
        sides, places = [], []
        for name in group.readers:
            consumer = self.by_name[name]
            for i, groups_GC in enumerate(self.graph.columns(self.model, group, consumer.reader)):
                seen, alive, index = stats[name][i], consumer.alive[i], consumer.kept(i)
                renumbered = torch.full((len(alive) + 1,), -1, dtype=torch.long)
                renumbered[index] = torch.arange(len(index))
                weight_OI = consumer.with_intercept(i)
                now_OI = weight_OI if bool(alive.all()) else self._refit(name, weight_OI, seen, index)
                now_OI = now_OI if now_OI.shape[1] == len(index) else now_OI[:, index]
                scored_OI = now_OI * consumer.scale_O[i][:, None]
                sides.append(columns.Side(scored_OI, seen.reordered(index), renumbered[groups_GC]))
                places.append(self.graph.positions[name])
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
        stats = self.observe(group.readers)
        sides, places = self.sides(group, stats)
        most = len(group.units) - count
        if criterion == "obs":
            gone, _ = self.removal(sides, places, most, 1)
        else:
            if taylor:
                sides = self._with_taylor(group, sides, taylor)
            gone = columns.CRITERIA[criterion][0](sides, most, self.damping, None, 1)
        error = whole = 0.0
        for name in group.readers:
            consumer = self.by_name[name]
            new, more = [], []
            for i, groups_GC in enumerate(self.graph.columns(self.model, group, consumer.reader)):
                consumer.alive[i][groups_GC[gone].flatten()] = False
                seen, kept_K = stats[name][i], consumer.kept(i)
                weight_OI = consumer.with_intercept(i)
                new_OK = self._refit(name, weight_OI, seen, kept_K) if refit else weight_OI[:, kept_K]
                whole_OI = torch.zeros_like(weight_OI)
                # as it will be written
                whole_OI[:, kept_K] = new_OK.to(consumer.weight.dtype).float()
                delta_OI = whole_OI - weight_OI
                assert seen.gram_II is not None
                error += float(((delta_OI @ seen.gram_II) * delta_OI).sum())
                whole += float(((weight_OI @ seen.gram_II) * weight_OI).sum())
                new.append(whole_OI[:, :-1])
                more.append(whole_OI[:, -1])
            consumer.weight.data.copy_(consumer.reader.weight_of(new, consumer.weight))
            if refit:
                consumer.shift(torch.cat(more))
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
        for name in group.readers:
            reader, products_BI = self.by_name[name].reader, torch.stack(taylor[name])
            width = products_BI.shape[1] // reader.groups
            for part, groups_GC in enumerate(self.graph.columns(self.model, group, reader)):
                mine = products_BI[:, part * width : (part + 1) * width]
                taylor_G = mine[:, groups_GC].sum(2).abs().mean(0)
                side = sides[i]
                found.append(columns.Side(side.weight_OI, side.stats, side.groups_GC, taylor_G))
                i += 1
        return found
