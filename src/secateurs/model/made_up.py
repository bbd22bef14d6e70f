"""Made-up inputs that a model of any kind can be called with: token windows, images, audio, and text with an image in it.

B sequences, S positions.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import said
from secateurs.model.batches import Batch, placed

# words are drawn from these, which are no special tokens
_WORDS = (3, 200)
_LENGTHS = (16, 11)
# what configs call the channels of audio features
_BINS = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim")


def inputs(model: Any, kind: str | None = None) -> list[Batch]:
    """Batches that a model of any kind can be called with: two lengths, and where it reads text, one with padding.

    kind: a row of KINDS; None for the first that the model runs on. Raises ValueError with the reason if it runs on none.
    """
    reasons = []
    for name in (kind,) if kind else KINDS:
        for make in KINDS[name](model):
            try:
                batches = [{n: placed(x, _device(model)) for n, x in batch.items()} for batch in make()]
                for batch in batches:
                    _run(model, batch)
                return batches
            # a model may raise anything for inputs that are not to its liking
            except Exception as error:
                reasons.append(f"{type(error).__name__}: {said(error)}")
    reason = reasons[0] if reasons else f"it takes no {kind or 'input that is known'}"
    raise ValueError(f"{type(model).__name__} runs on no made-up input ({reason})")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _run(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = model(**batch, **uncached(model))
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
    for x in values:
        if isinstance(x, Tensor) and x.is_floating_point() and bool(x.isnan().any()):
            raise ValueError("it gives NaN")


def uncached(model: nn.Module) -> dict[str, bool]:
    """use_cache=False, for a model that has a cache."""
    return {"use_cache": False} if "use_cache" in _takes(model) else {}


def _takes(model: nn.Module) -> set[str]:
    return set(inspect.signature(type(model).forward).parameters)


# ------------------------------------------------------------------------------------------------------------------- text


def words(length: int, windows: int = 2) -> Tensor:
    """Token windows [B, S]."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(*_WORDS, (windows, length), generator=generator)


def _text(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    if "input_ids" in _takes(model):
        yield lambda: _with_padding([_with_decoder(model, {"input_ids": ids}, ids) for ids in map(words, _LENGTHS)])


def _with_padding(found: list[Batch]) -> list[Batch]:
    padded = torch.ones_like(found[0]["input_ids"])
    padded[1, :5] = 0
    return [found[0], {**found[0], "attention_mask": padded}, found[1]]


def _with_decoder(model: Any, batch: Batch, ids: Tensor) -> Batch:
    wanted = model.config.is_encoder_decoder or "decoder_input_ids" in _takes(model)
    return {**batch, "decoder_input_ids": ids} if wanted else batch


# ----------------------------------------------------------------------------------------------------------------- images


def _images(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    if "pixel_values" in _takes(model) and "input_ids" not in _takes(model):
        yield lambda: [_with_decoder(model, {"pixel_values": _image(model.config, n)}, words(n + 8, n)) for n in (2, 1)]


def _image(config: Any, count: int) -> Tensor:
    """[B, C, H, W], or with an axis of frames before C where the model is one of video."""
    vision = _vision(config)
    side = getattr(vision, "image_size", None) or 32
    high, wide = (side, side) if isinstance(side, int) else side
    frames = getattr(vision, "num_frames", None)
    axes = (frames,) if isinstance(frames, int) and frames > 1 else ()
    return _normal(count, *axes, int(getattr(vision, "num_channels", None) or 3), int(high), int(wide))


def _vision(config: Any) -> Any:
    names = ("vision_config", "backbone_config", "encoder")
    return next((part for name in names if (part := getattr(config, name, None)) is not None), config)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def _images_and_text(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    """Images beside a text, and images in a text at the places that special tokens keep for them."""
    if not {"input_ids", "pixel_values"} <= _takes(model):
        return
    yield lambda: [_in_text(model, _pictures(model), length) for length in _LENGTHS]
    if "image_sizes" in _takes(model):
        sizes = torch.tensor([_image(model.config, 1).shape[-2:]])
        yield lambda: [_in_text(model, {**_pictures(model), "image_sizes": sizes}, length) for length in _LENGTHS]
    yield lambda: [{"input_ids": words(n), "pixel_values": _image(model.config, 2)} for n in _LENGTHS]


def _pictures(model: Any) -> Batch:
    """One image as the model takes it: pixels, or rows of patches with the grid that they come from."""
    takes = _takes(model)
    if "image_grid_thw" not in takes:
        image = _image(model.config, 1)
        # some take a list of images for each text
        return {"pixel_values": image[:, None] if "pixel_attention_mask" in takes else image}
    vision = _vision(model.config)
    side = int(vision.patch_size)
    channels = int(getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3)
    depth = int(getattr(vision, "temporal_patch_size", None) or 1)
    return {"pixel_values": _normal(16, channels * depth * side**2), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _in_text(model: Any, pictures: Batch, length: int) -> Batch:
    """A text with as many image tokens in its middle as the image has features."""
    with torch.no_grad():
        found = model.get_image_features(**pictures)
    features = getattr(found, "pooler_output", found)
    while isinstance(features, list | tuple):
        features = torch.cat([x.reshape(-1, x.shape[-1]) for x in features])
    config = model.config
    token = next(
        getattr(config, n) for n in ("image_token_id", "image_token_index") if getattr(config, n, None) is not None
    )
    count = features.reshape(-1, features.shape[-1]).shape[0]
    text = words(length, 1)
    middle = torch.full((1, count), int(token))
    ids = torch.cat([text[:, : length // 2], middle, text[:, length // 2 :]], 1)
    more = {"token_type_ids", "mm_token_type_ids"} & _takes(model)
    return {"input_ids": ids, **pictures, **{name: (ids == token).long() for name in sorted(more)}}


# ------------------------------------------------------------------------------------------------------------------ audio


def _waves(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    if "input_values" in _takes(model):
        yield lambda: [_with_decoder(model, {"input_values": _normal(n, 4000)}, words(n + 8, n)) for n in (2, 1)]


def _features(model: Any) -> Iterator[Callable[[], list[Batch]]]:
    """Audio features [B, channels, frames] or [B, frames, channels]."""
    config = model.config
    parts = [config, *(getattr(config, name, None) for name in ("encoder_config", "audio_config", "encoder"))]
    bins = [b for part in parts for name in _BINS if isinstance(b := getattr(part, name, None), int)]
    positions = getattr(config, "max_source_positions", None) or getattr(config, "max_length", None) or 64
    for name in ("input_features", "input_values"):
        if name in _takes(model) and "input_ids" not in _takes(model):
            for channels, frames, across in product([*bins, 80, 128], (2 * positions, positions), (True, False)):
                shape = (channels, frames) if across else (frames, channels)
                yield lambda name=name, shape=shape: _spoken(model, name, shape)  # type: ignore[misc]


def _spoken(model: Any, name: str, shape: Sequence[int]) -> list[Batch]:
    return [_with_decoder(model, {name: _normal(2, *shape)}, ids) for ids in map(words, _LENGTHS)]


# kinds of inputs, in the order in which they are tried: a name, and ways to make them
KINDS: dict[str, Callable[[Any], Iterator[Callable[[], list[Batch]]]]] = {
    "text": _text,
    "images": _images,
    "waves": _waves,
    "features": _features,
    "images and text": _images_and_text,
}
