"""Counts the parameters, bytes and multiplications of a model of any shape."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateurs.model.batches import embeddings_of
from secateurs.model.blocks import blocks_of
from secateurs.model.layers import Layer
from secateurs.model.walk import Step
from secateurs.shrink import losses
from secateurs.shrink.budget import Budget
from secateurs.shrink.cuts import Cuts
from secateurs.shrink.mixture import Mixture
from secateurs.shrink.units import COLUMNS, Shape


@dataclass(frozen=True)
class Sizes:
    """What the parts of a model count, from which the counts of other shapes follow.

    Parameters: outside (of the blocks); of each neuron, KV head (key_value, without its query heads), query head and expert
    (`router` of them in the router); rest, all else in a block; other, what is more or less in the blocks that are not alike, of
    `outside`. attended: multiplications of a query head, times the prompt squared. head: of the output matrix. mixtures: the
    blocks that have experts. half: the sizes at half the residual width.
    """

    outside: int
    dense: Shape
    neuron: int
    key_value: int
    query: int
    rest: int
    attended: int
    head: int
    expert: int
    router: int
    mixtures: int
    most_experts: int
    other: int = 0
    half: "Sizes | None" = None

    def parameters(self, shape: Shape) -> int:
        """Parameters of a shape: exact for the dense residual width, interpolated for others."""
        if self.half and shape.hidden != self.dense.hidden:
            return self._between(shape, lambda sizes, there: sizes.parameters(there))
        return self.outside + shape.layers * self._plain(shape) + self._mixtures(shape) * shape.experts * self.expert

    def block(self, shape: Shape) -> int:
        """Parameters of a block, one with experts if there are any, of the dense residual width."""
        return self._plain(shape) + shape.experts * self.expert

    def _mixtures(self, shape: Shape) -> int:
        # blocks go only where all are alike
        return min(self.mixtures, shape.layers)

    def _between(self, shape: Shape, count: Callable[["Sizes", Shape], int]) -> int:
        """A count for another residual width: on the line through those of the whole width and of half of it."""
        assert self.half
        whole, half = (count(s, replace(shape, hidden=s.dense.hidden)) for s in (self, self.half))
        share = (shape.hidden - self.half.dense.hidden) / (self.dense.hidden - self.half.dense.hidden)
        return round(half + share * (whole - half))

    def _plain(self, shape: Shape) -> int:
        return self.rest + shape.mlp * self.neuron + shape.heads * (self.key_value + shape.queries * self.query)

    def multiplications(self, shape: Shape, prompt: int) -> int:
        """Multiplications for a prompt.

        Those of all weights of the blocks (of experts, the active ones) with every token, of queries with keys, of attention
        weights with values, and of the head with one token.
        """
        if self.half and shape.hidden != self.dense.hidden:
            return self._between(shape, lambda sizes, there: sizes.multiplications(there, prompt))
        attention = shape.heads * shape.queries * self.attended * prompt**2
        active = min(shape.active, shape.experts) * (self.expert - self.router) + shape.experts * self.router
        blocks = self.other + shape.layers * self._plain(shape) + self._mixtures(shape) * active
        return blocks * prompt + shape.layers * attention + self.head

    def share(self, kind: str, shape: Shape, prompt: int) -> float:
        """Of the dense model's 'params', 'bytes' (weights have one dtype) or 'flops'."""
        if kind == "flops":
            return self.multiplications(shape, prompt) / self.multiplications(self.dense, prompt)
        return self.parameters(shape) / self.parameters(self.dense)

    def most_blocks(self, bound: Budget) -> int:
        """How many blocks a budget can ask to remove; a few more than parameters say, because time is not proportional."""
        if bound.kind == "seconds":
            return self.dense.layers // 2
        whole = self.parameters(self.dense)
        each = (whole - self.outside) / self.dense.layers
        return min(self.dense.layers - 1, max(1, int((1 - bound.value) * whole / each) + 3))


def sizes_of(model: Any, cuts: Cuts, kinds: Collection[str]) -> Sizes:
    """The sizes of a model of which units of some kinds may go."""
    dense = cuts.shape
    names, _ = blocks_of(model)
    # where some blocks have no experts, what they have instead counts as outside
    name = [*cuts.mixtures, *names][0]
    block = model.get_submodule(name)

    def each(kind: str) -> int:
        if kind not in kinds or cuts.refuses(kind):
            return 0
        return cuts.units(kind, block, name, dense).parameters_each

    neuron, query = each("mlp"), each("queries")
    key_value = max(0, each("heads") - dense.queries * query)
    whole = sum(p.numel() for p in block.parameters())
    expert = router_row = most_experts = 0
    if dense.experts:
        most_experts = losses.most_experts(cuts)
    if "experts" in kinds and not cuts.refuses("experts"):
        found = Mixture(block, cuts.fused)
        own = [*found.router.parameters(), *found.experts.parameters()]
        expert = sum(p.numel() // dense.experts for p in own if len(p) == dense.experts)
        router_row = sum(p.numel() // dense.experts for p in found.router.parameters())
    rest = whole - dense.mlp * neuron - dense.heads * (key_value + dense.queries * query) - dense.experts * expert
    experts = dense.experts * expert
    inside = (whole - experts) * dense.layers + experts * len(cuts.mixtures)
    outside = sum(p.numel() for p in model.parameters()) - inside
    other = sum(p.numel() for n in names for p in model.get_submodule(n).parameters()) - inside
    head = model.get_output_embeddings()
    count = (embeddings_of(model) if head is None else head.weight).numel()
    return Sizes(
        outside, dense, neuron, key_value, query, rest, 2 * cuts.head, count, expert, router_row,
        len(cuts.mixtures), most_experts, other,
    )  # fmt: skip


def consumers_of(step: Step, cuts: Cuts, kinds: Sequence[str]) -> list[Layer]:
    """The layers of a block that lose columns when units of these kinds are removed."""
    of_columns = [kind for kind in kinds if kind in COLUMNS]
    found = [cuts.units(kind, step.block, step.name, cuts.shape).consumer for kind in of_columns]
    return list({layer.name: layer for layer in found}.values())
