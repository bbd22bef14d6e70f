"""Made-up inputs that a model of any kind can be called with: token windows, images, audio, and text with an image in it.

B sequences, S positions.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.model.batches import Batch

# words are drawn from these, which are no special tokens
_WORDS = (3, 200)
_LENGTHS = (16, 11)


def inputs(model: Any) -> list[Batch]:
    """Batches that a model of any kind can be called with: two lengths, and where it reads text, one with padding.

    Several are tried; raises ValueError with the first reason if the model runs on none of them.
    """
    reason = ""
    for made in _candidates(model):
        try:
            batches = made()
            for batch in batches:
                _run(model, batch)
            return batches
        # a model may raise anything for inputs that are not to its liking
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            reason = reason or f"{type(error).__name__}: {lines[0]}"
    raise ValueError(f"{type(model).__name__} runs on no made-up input ({reason})")


def _run(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = model(**batch, **uncached(model))
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
    for x in values:
        if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()):
            raise ValueError("it gives NaN")


def uncached(model: nn.Module) -> dict[str, bool]:
    """use_cache=False, for a model that has a cache."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _candidates(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    config, name = model.config, getattr(model, "main_input_name", "input_ids")
    if name == "pixel_values":
        yield lambda: [{name: _image(config, 2)}, {name: _image(config, 1)}]
    elif name == "pixel_values_videos" or name == "pixel_values":
        pass
    elif name == "input_features":
        yield lambda: _audio(model, name)
    elif name == "input_values":
        yield lambda: [{name: _normal(2, 4000)}, {name: _normal(1, 3000)}]
    yield lambda: _text(model)


def _text(model: Any) -> list[Batch]:
    found = [_with_decoder(model, {"input_ids": ids}, ids) for ids in map(words, _LENGTHS)]
    padded = torch.ones_like(found[0]["input_ids"])
    padded[1, :5] = 0
    return [found[0], {**found[0], "attention_mask": padded}, found[1]]


def words(length: int, windows: int = 2) -> Tensor:
    """Token windows [B, S]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(*_WORDS, (windows, length), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def _audio(model: Any, name: str) -> list[Batch]:
    config = model.config
    bins, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 64)
    return [_with_decoder(model, {name: _normal(2, bins, frames)}, ids) for ids in map(words, _LENGTHS)]


def _with_decoder(model: Any, batch: Batch, ids: Tensor) -> Batch:
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


def _image(config: Any, count: int) -> Tensor:
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or 32
    high, wide = (side, side) if isinstance(side, int) else side
    return _normal(count, int(getattr(vision, "num_channels", None) or 3), int(high), int(wide))
