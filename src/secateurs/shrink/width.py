"""Removes channels of the residual stream, from the whole model at once.

A channel is a column of every matrix that reads the residual stream (after a norm), a row of every matrix that adds to it, an
element of every norm, and a column of the embeddings and of the head. Readers are refit by least squares on the kept channels.
What was added to a removed channel is lost, and so is what the head read there. A root-mean-square norm over fewer channels
divides by another mean, so its weights are multiplied by sqrt(H f / K), f being the share of the mean square in kept channels:
exact, but for eps, if the others were zero. The model is run whole, with hooks. H channels, K of them kept, V vocabulary, O
outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from secateurs.matrix.stats import Stats
from secateurs.model.blocks import whole
from secateurs.model.layers import EXPERTS, Layer, layers_of
from secateurs.shrink import columns
from secateurs.shrink.passes import hooked
from secateurs.shrink.units import No, put, resize

# channels that OBS removes before it computes costs again
_AT_ONCE = 8


@dataclass
class Reader:
    """A norm and the layers that multiply its outputs.

    stats: of its outputs. weight_HH: a square root of sum W' diag(E[g^2]) W over the layers; the cost of a removal depends on
    nothing else of them.
    """

    norm: Any
    layers: list[Layer]
    stats: Stats
    weight_HH: Tensor | None = None


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


def readers(
    model: Any,
    names: Sequence[str],
    stream: Stream,
    windows: Tensor,
    sensitivity: dict[str, Tensor],
    tick: Callable[[], None],
) -> list[Reader]:
    """A reader for every norm of the blocks, and last one for the final norm, which the head reads.

    names: of the blocks. windows: calibration text [N, S]. sensitivity: {layer: E[g^2] of its outputs}.
    """
    head = model.get_output_embeddings()
    width, vocabulary = head.weight.shape[1], head.weight.shape[0]
    found = []
    for name in names:
        block = model.get_submodule(name)
        layers = {layer.name: layer for layer in layers_of(block, name)}
        for norm, reading in stream.norms:
            mine = [layers[f"{name}.{path}"] for path in reading]
            found.append(Reader(block.get_submodule(norm), mine, Stats.zeros(width, True)))
    last = Reader(model.get_submodule(stream.last), [], Stats.zeros(width, True))
    found.append(last)
    curvature_V = torch.zeros(vocabulary)

    def at_head(_: Any, __: Any, logits: Tensor) -> None:
        chance_TV = logits.detach().float().flatten(0, -2).softmax(-1)
        curvature_V.add_((chance_TV * (1 - chance_TV)).sum(0))

    with hooked([*((r.norm, _adder(r.stats)) for r in found), (head, at_head)]), torch.no_grad():
        for ids in windows:
            model(input_ids=ids[None], use_cache=False)
            tick()
    for reader in found:
        reader.stats = reader.stats.finish()
        square_HH = torch.zeros(width, width)
        for layer in reader.layers:
            weight_OI = layer.read().float()
            by_O = sensitivity.get(layer.name, torch.ones(len(weight_OI)))
            square_HH += weight_OI.T @ (weight_OI * by_O[:, None])
        if reader is last:
            weight_VH = head.weight.detach().float()
            square_HH = weight_VH.T @ (weight_VH * (curvature_V / last.stats.tokens)[:, None])
        reader.weight_HH = _root(square_HH)
    return found


def removal(found: Sequence[Reader], count: int, damping: float) -> tuple[Tensor, Tensor]:
    """The order in which to remove channels, and the loss after each in nats a token: half the weighted error of all readers."""
    width = len(found[0].stats.sqnorm_I)
    sides = []
    for reader in found:
        assert reader.weight_HH is not None
        scale = sqrt(1 / (2 * reader.stats.tokens))
        sides.append(columns.Side(reader.weight_HH * scale, reader.stats, torch.arange(width)[:, None]))
    return columns.removal(sides, count, damping, _AT_ONCE)


def cut(
    model: Any,
    names: Sequence[str],
    stream: Stream,
    found: Sequence[Reader],
    removed: Tensor,
    damping: float,
    refit: bool,
) -> None:
    """Remove channels from a model, in place. names: of its blocks. refit: least squares for the readers."""
    width = len(found[0].stats.sqnorm_I)
    stays = torch.ones(width, dtype=torch.bool)
    stays[removed] = False
    kept_K = stays.nonzero()[:, 0]
    for reader in found:
        for layer in reader.layers:
            weight_OI = layer.read().float()
            new_OK = columns.refit(weight_OI, reader.stats, kept_K, damping) if refit else weight_OI[:, kept_K]
            resize(layer, new_OK)
        put(reader.norm, "weight", _rescaled(reader, kept_K))
    for name in names:
        for path in stream.writers:
            layer = _named(model, name, path)
            resize(layer, layer.read()[kept_K])
            bias = layer.module._parameters.get("bias")
            if bias is not None:
                put(layer.module, "bias", bias.detach()[kept_K])
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    put(embeddings, "weight", embeddings.weight.detach()[:, kept_K])
    embeddings.embedding_dim = len(kept_K)
    put(head, "weight", head.weight.detach()[:, kept_K])
    if tied:
        head.weight = embeddings.weight


def _rescaled(reader: Reader, kept_K: Tensor) -> Tensor:
    """The norm's weights for the kept channels, times sqrt(H f / K)."""
    weight_H = reader.norm.weight.detach().float()
    # the mean square of each channel of x / rms(x); they add up to H
    square_H = reader.stats.sqnorm_I / weight_H.square().clamp(min=1e-12)
    share = float(square_H[kept_K].sum() / square_H.sum())
    found: Tensor = weight_H[kept_K] * sqrt(len(weight_H) * share / len(kept_K))
    return found.to(reader.norm.weight.dtype)


def _root(square_HH: Tensor) -> Tensor:
    """R with R' R = square_HH."""
    values_H, vectors_HH = torch.linalg.eigh(square_HH.double())
    root_HH: Tensor = (vectors_HH * values_H.clamp(min=0).sqrt()).T.float()
    return root_HH


def _adder(stats: Stats) -> Callable[[Any, Any, Tensor], None]:
    return lambda _, __, out: stats.add_(out.detach().flatten(0, -2))
