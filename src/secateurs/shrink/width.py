"""Removes channels of the residual stream, from the whole model at once.

A channel is a column of every matrix that reads the residual stream (after a norm), a row of every matrix that adds to it, an
element of every norm, and a column of the embeddings and of the head. Readers are refit by least squares on the kept channels.
What was added to a removed channel is lost, and so is what the head read there. A root-mean-square norm over fewer channels
divides by another mean, so its weights are multiplied by sqrt(H f / K), f being the share of the mean square in kept channels:
exact, but for eps, if the others were zero. H channels, K of them kept, V vocabulary, O outputs.

Statistics come from one walk. OBS then needs those of all readers in every round, so of a model that is walked they lie on disk,
and a round reads and writes them all. The cut is another walk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateurs.base.files import write_tensors
from secateurs.base.processes import ALONE, Ranks
from secateurs.matrix.stats import Stats
from secateurs.model import walk
from secateurs.model.activations import Activations, InMemory, OnDisk, note_place, read_place
from secateurs.model.batches import Batch
from secateurs.model.blocks import AllLoaded, Loader, blocks_of, leave, pieces, whole
from secateurs.model.layers import EXPERTS, Layer, layers_of
from secateurs.shrink import columns
from secateurs.shrink.passes import hooked
from secateurs.shrink.units import No, put, resize

# channels that OBS removes before it computes costs again: at least so many, and so many of a wide model that it takes no more
# rounds than that
_AT_ONCE, _ROUNDS = 8, 128


@dataclass(frozen=True)
class Stream:
    """Who reads and who writes the residual stream.

    norms: (norm, the layers that are called with its outputs) of a block; writers: its layers that add to the stream; names are
    relative to the block. last: the path of the norm that the head reads.
    """

    norms: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    last: str


def stream_of(model: Any, names: Sequence[str], fused: Mapping[str, str], windows: Tensor) -> Stream:
    """The stream of a model that is in memory. names: of its blocks. Raises No if it is not such a one."""
    head = model.get_output_embeddings()
    if head is None:
        raise No("it has no head")
    width = head.weight.shape[1]
    norms = {
        path: module
        for path, module in model.named_modules()
        if [tuple(p.shape) for p in module._parameters.values() if p is not None] == [(width,)]
        and "weight" in module._parameters
    }
    made: dict[int, str] = {}
    called: dict[int, int] = {}
    # so that no other tensor takes their place
    kept: list[Tensor] = []

    def norm_hook(path: str) -> Callable[[Any, Any, Tensor], None]:
        def keep(_: Any, __: Any, out: Tensor) -> None:
            kept.append(out)
            made[out.data_ptr()] = path

        return keep

    def layer_hook(module: Any, args: Any, _: Any) -> None:
        if args:
            kept.append(args[0])
            called[id(module)] = args[0].data_ptr()

    layers = {name: layers_of(model.get_submodule(name), name, fused) for name in names}
    if any(layer.kind in EXPERTS for found in layers.values() for layer in found):
        raise No("its experts read the residual stream, and their columns are not cut")
    every = [(place, layer_hook) for found in layers.values() for layer in found for place in layer.places]
    with (
        hooked([*((module, norm_hook(path)) for path, module in norms.items()), *every, (head, layer_hook)]),
        torch.no_grad(),
    ):
        whole(model, {"input_ids": windows})
    last = made.get(called.get(id(head), 0))
    if last is None:
        raise No("its head does not read a norm with weights alone")
    streams = []
    for name in names:
        read: dict[str, list[str]] = {path: [] for path in norms if path.startswith(f"{name}.")}
        writers = []
        for layer in layers[name]:
            norm = made.get(called.get(id(layer.module), 0))
            if norm in read:
                read[norm].append(layer.name.removeprefix(f"{name}."))
            elif layer.shape[0] == width:
                writers.append(layer.name.removeprefix(f"{name}."))
        streams.append(
            Stream(
                tuple((path.removeprefix(f"{name}."), tuple(found)) for path, found in read.items()),
                tuple(writers),
                last,
            )
        )
    if len(set(streams)) > 1 or not all(found for _, found in streams[0].norms):
        raise No("its blocks do not read the residual stream through norms with weights alone")
    return streams[0]


def silence(model: Any, names: Sequence[str], stream: Stream, channels: Tensor) -> None:
    """Set what is written to some channels to zero, in place."""
    model.get_input_embeddings().weight.data[:, channels] = 0
    for name in names:
        for path in stream.writers:
            layer = _named(model, name, path)
            weight_OI = layer.read().clone()
            weight_OI[channels] = 0
            layer.write(weight_OI)
            bias = layer.module._parameters.get("bias")
            if bias is not None:
                bias.data[channels] = 0


def _named(model: Any, name: str, path: str) -> Layer:
    return next(y for y in layers_of(model.get_submodule(name), name) if y.name == f"{name}.{path}")


class Readers:
    """The norms of the blocks, in order, and last the final one, which the head reads; and what is known of each.

    norms: (path of a norm, paths of the layers that multiply its outputs). Of each there are the Stats of its outputs, and a square
    root of sum W' diag(E[g^2]) W over the layers, [H, H]: the cost of a removal depends on nothing else of them.
    """

    def __init__(self, names: Sequence[str], stream: Stream, folder: Path | None = None) -> None:
        """names: of the blocks. folder: where statistics are kept; None for in memory."""
        self.stream, self.folder = stream, folder
        self.norms = [
            (f"{name}.{norm}", tuple(f"{name}.{path}" for path in reading))
            for name in names
            for norm, reading in stream.norms
        ]
        self.norms.append((stream.last, ()))
        self._held: dict[int, tuple[Stats, Tensor]] = {}

    def of(self, name: str) -> list[int]:
        """The numbers of a block's norms."""
        return [i for i, (norm, _) in enumerate(self.norms) if norm.startswith(f"{name}.")]

    def put(self, number: int, stats: Stats, weight_HH: Tensor) -> None:
        if self.folder is None:
            self._held[number] = stats, weight_HH
            return
        assert stats.gram_II is not None
        tokens = torch.tensor(stats.tokens)
        write_tensors(self._file(number), {"tokens": tokens, "gram": stats.gram_II, "weight": weight_HH})

    def get(self, number: int) -> tuple[Stats, Tensor]:
        if self.folder is None:
            return self._held[number]
        found = load_file(self._file(number))
        return Stats(int(found["tokens"]), found["gram"].diagonal().clone(), found["gram"]), found["weight"]

    def _file(self, number: int) -> Path:
        assert self.folder
        return self.folder / f"{number:05d}.safetensors"


def readers(
    model: Any,
    stream: Stream,
    batches: Sequence[Batch],
    sensitivity: dict[str, Tensor],
    tick: Callable[[], None],
    loader: Loader | None = None,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
) -> Readers:
    """The readers of a model's residual stream, from one walk over calibration text, which goes on after a kill.

    sensitivity: {layer: E[g^2] of its outputs}. folder: for their statistics and the walk's hidden states; None for in memory.
    tick: called for every block and batch. ranks: those that walk together, each with batches of its own; the folder has what all
    have found.
    """
    loader = loader or AllLoaded()
    names = blocks_of(model)[0]
    found = Readers(names, stream, folder)
    store: Activations = InMemory() if folder is None else OnDisk(folder / "activations", ranks)
    place = None if folder is None else folder / "place.json"
    start = ranks.tell(read_place(place))
    for step in walk.stream(model, batches, loader, store, start, "dense", keep_last=True, tick=tick, ranks=ranks):
        note_place(place, step.index, ranks)
        layers = {layer.name: layer for layer in step.layers}
        mine = {number: [layers[path] for path in found.norms[number][1]] for number in found.of(step.name)}
        stats = step.observe([reading[0] for reading in mine.values()], gram=True)
        for number, reading in mine.items():
            if not step.mine(reading[:1]):
                continue
            square_HH = torch.zeros(reading[0].shape[1], reading[0].shape[1])
            for layer in reading:
                weight_OI = layer.read().float()
                by_O = sensitivity.get(layer.name, torch.ones(len(weight_OI)))
                square_HH += weight_OI.T @ (weight_OI * by_O[:, None])
            found.put(number, stats[reading[0].name], _root(square_HH))
    loader.load_outside(model)
    head = model.get_output_embeddings()
    vocabulary, hidden = head.weight.shape
    # in fp64, so that it does not matter who adds in which order
    last, curvature_V = Stats.zeros(hidden, True), torch.zeros(vocabulary, dtype=torch.float64)

    def at_head(_: Any, __: Any, logits: Tensor) -> None:
        chance_TV = logits.detach().float().flatten(0, -2).softmax(-1)
        curvature_V.add_((chance_TV * (1 - chance_TV)).sum(0))

    with hooked([(model.get_submodule(stream.last), _adder(last)), (head, at_head)]), torch.no_grad():
        for i, batch in enumerate(batches):
            for at in pieces(model, batch):
                leave(model, loader, store.read(len(names), i)[:, at], batch, at)
    ranks.sum(curvature_V)
    last = last.summed(ranks, owner=0)
    if ranks.first:
        weight_VH = head.weight.detach().float()
        square_HH = weight_VH.T @ (weight_VH * (curvature_V / last.tokens).float()[:, None])
        found.put(len(found.norms) - 1, last, _root(square_HH))
    loader.release(model)
    # what others have found is read from the folder
    ranks.wait()
    return found


def removal(
    found: Readers, count: int, damping: float, folder: Path | None = None, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """The order in which to remove channels, and the loss after each in nats a token: half the weighted error of all readers.

    folder: where OBS keeps its matrices between rounds; None for in memory. ranks: those that share the readers.
    """

    def sides() -> Iterator[columns.Side]:
        for number in ranks.share(range(len(found.norms))):
            stats, weight_HH = found.get(number)
            scale = sqrt(1 / (2 * stats.tokens))
            yield columns.Side(weight_HH * scale, stats, torch.arange(len(weight_HH))[:, None])

    width = len(found.get(0)[0].sqnorm_I)
    return columns.removal(sides(), count, damping, max(_AT_ONCE, width // _ROUNDS), folder=folder, ranks=ranks)


class Cut:
    """Removes channels from a model, in place. refit: least squares for the readers."""

    def __init__(self, found: Readers, removed: Tensor, damping: float, refit: bool) -> None:
        self.found, self.damping, self.refit = found, damping, refit
        stays = torch.ones(len(found.get(0)[0].sqnorm_I), dtype=torch.bool)
        stays[removed] = False
        self.kept_K = stays.nonzero()[:, 0]

    def block(self, block: nn.Module, name: str) -> None:
        """Cut a block: its readers, its norms and what writes to the stream."""
        layers = {layer.name: layer for layer in layers_of(block, name)}
        for number in self.found.of(name):
            norm, reading = self.found.norms[number]
            stats, _ = self.found.get(number)
            for layer in (layers[path] for path in reading):
                weight_OI = layer.read().float()
                new_OK = weight_OI[:, self.kept_K]
                if self.refit:
                    new_OK = columns.refit(weight_OI, stats, self.kept_K, self.damping)
                resize(layer, new_OK)
            self._norm(block.get_submodule(norm.removeprefix(f"{name}.")), stats)
        for path in self.found.stream.writers:
            layer = layers[f"{name}.{path}"]
            resize(layer, layer.read()[self.kept_K])
            bias = layer.module._parameters.get("bias")
            if bias is not None:
                put(layer.module, "bias", bias.detach()[self.kept_K])

    def outside(self, model: Any) -> None:
        """Cut the last norm, the embeddings and the head."""
        stats, _ = self.found.get(len(self.found.norms) - 1)
        self._norm(model.get_submodule(self.found.stream.last), stats)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embeddings.weight
        put(embeddings, "weight", embeddings.weight.detach()[:, self.kept_K])
        embeddings.embedding_dim = len(self.kept_K)
        put(head, "weight", head.weight.detach()[:, self.kept_K])
        if tied:
            head.weight = embeddings.weight

    def _norm(self, norm: Any, stats: Stats) -> None:
        weight_H = norm.weight.detach()
        put(norm, "weight", rescaled(weight_H.float(), stats, self.kept_K).to(weight_H.dtype))


def cut(model: Any, found: Readers, removed: Tensor, damping: float, refit: bool) -> None:
    """Remove channels from a model whose weights are all there, in place."""
    cutting = Cut(found, removed, damping, refit)
    for name in blocks_of(model)[0]:
        cutting.block(model.get_submodule(name), name)
    cutting.outside(model)


def rescaled(weight_H: Tensor, stats: Stats, kept_K: Tensor) -> Tensor:
    """A norm's weights for the kept channels, times sqrt(H f / K). stats: of its outputs."""
    # the mean square of each channel of x / rms(x); they add up to H
    square_H = stats.sqnorm_I / weight_H.square().clamp(min=1e-12)
    share = float(square_H[kept_K].sum() / square_H.sum())
    return weight_H[kept_K] * sqrt(len(weight_H) * share / len(kept_K))


def _root(square_HH: Tensor) -> Tensor:
    """R with R' R = square_HH."""
    values_H, vectors_HH = torch.linalg.eigh(square_HH.double())
    root_HH: Tensor = (vectors_HH * values_H.clamp(min=0).sqrt()).T.float()
    return root_HH


def _adder(stats: Stats) -> Callable[[Any, Any, Tensor], None]:
    return lambda _, __, out: stats.add_(out.detach().flatten(0, -2))
