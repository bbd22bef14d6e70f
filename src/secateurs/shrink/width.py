"""Removes channels of the residual stream, from the whole model at once.

A channel is a column of every matrix that reads the residual stream (after a norm), a row of every matrix that adds to it, an
element of every norm, and a column of the embeddings and of the head. Readers are refit by least squares on the kept channels.
What was added to a removed channel is lost, and so is what the head read there. A root-mean-square norm over fewer channels
divides by another mean, so its weights are multiplied by sqrt(H f / K), f being the share of the mean square in kept channels:
exact, but for eps, if the others were zero. The model is run whole, with hooks. H channels, K of them kept, V vocabulary, O
outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from secateurs.matrix.stats import Stats
from secateurs.model.blocks import blocks_of
from secateurs.model.families import Family
from secateurs.model.layers import Layer, layers_of
from secateurs.shrink import columns
from secateurs.shrink.passes import hooked
from secateurs.shrink.units import put

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


def readers(
    model: Any, family: Family, windows: Tensor, sensitivity: dict[str, Tensor], tick: Callable[[], None]
) -> list[Reader]:
    """A reader for every norm of the blocks, and last one for the final norm, which the head reads.

    windows: calibration text [N, S]. sensitivity: {layer: E[g^2] of its outputs}.
    """
    config: Any = model.config
    found = []
    for name in blocks_of(model)[0]:
        block = model.get_submodule(name)
        for norm, part, writer in family.residual:
            inside = [layer for layer in layers_of(block, name) if layer.name.startswith(f"{name}.{part}.")]
            reading = [layer for layer in inside if layer.name != f"{name}.{writer}"]
            found.append(Reader(block.get_submodule(norm), reading, Stats.zeros(config.hidden_size, True)))
    head = model.get_output_embeddings()
    last = Reader(_last_norm(model, family), [], Stats.zeros(config.hidden_size, True))
    found.append(last)
    curvature_V = torch.zeros(config.vocab_size)

    def at_head(_: Any, __: Any, logits: Tensor) -> None:
        chance_TV = logits.detach().float().flatten(0, -2).softmax(-1)
        curvature_V.add_((chance_TV * (1 - chance_TV)).sum(0))

    with hooked([*((r.norm, _adder(r.stats)) for r in found), (head, at_head)]), torch.no_grad():
        for ids in windows:
            model(input_ids=ids[None], use_cache=False)
            tick()
    for reader in found:
        reader.stats = reader.stats.finish()
        square_HH = torch.zeros(config.hidden_size, config.hidden_size)
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


def cut(model: Any, family: Family, found: Sequence[Reader], removed: Tensor, damping: float, refit: bool) -> None:
    """Remove channels from a model, in place. refit: least squares for the readers."""
    width = len(found[0].stats.sqnorm_I)
    stays = torch.ones(width, dtype=torch.bool)
    stays[removed] = False
    kept_K = stays.nonzero()[:, 0]
    for reader in found:
        for layer in reader.layers:
            weight_OI = layer.read().float()
            new_OK = columns.refit(weight_OI, reader.stats, kept_K, damping) if refit else weight_OI[:, kept_K]
            put(layer.module, "weight", new_OK.to(layer.parameter.dtype))
        put(reader.norm, "weight", _rescaled(reader, kept_K))
    for name in blocks_of(model)[0]:
        block = model.get_submodule(name)
        for _, _, path in family.residual:
            writer = block.get_submodule(path)
            for leaf, parameter in list(writer._parameters.items()):
                if parameter is not None:
                    put(writer, leaf, parameter.detach()[kept_K])
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


def _last_norm(model: Any, family: Family) -> Any:
    """The norm after the last block, an attribute of the module that holds the blocks."""
    return model.get_submodule(blocks_of(model)[0][0].rsplit(".", 2)[0]).norm


def _adder(stats: Stats) -> Callable[[Any, Any, Tensor], None]:
    return lambda _, __, out: stats.add_(out.detach().flatten(0, -2))
