"""Images and recordings in a folder -> what a model's own processor makes of them, a dict of tensors a file.

A file that cannot be read is left out, with the reason; what a model reads is decided in kinds.py.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.base.errors import CalibrationError, said
from secateurs.base.progress import quiet
from secateurs.model.batches import Batch
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import trusted
from secateurs.quality.kinds import Kind

ENDINGS: dict[str, tuple[str, ...]] = {
    "images": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    "audio": (".wav",),
}
"""The files that are read, by what a model reads."""

# every third file is held out where calibration and evaluation come from one folder
_HELD_OUT = 3
# the longest recording that is read, in seconds
_SECONDS = 30


def files_of(source: str, reads: str) -> list[Path]:
    """The images or recordings of a folder and those below it, by name, or one file; none for other sources."""
    path = Path(source).expanduser()
    if path.is_file():
        found = [path]
    else:
        below = sorted(path.rglob("*")) if path.is_dir() else []
        found = [f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    return [f for f in found if f.suffix.lower() in ENDINGS[reads] and f.is_file()]


def part_of(files: Sequence[Path], part: str) -> list[Path]:
    """The files of one part: 'calibration' and 'held-out' share none; 'all'."""
    if part == "all":
        return list(files)
    return [f for i, f in enumerate(files) if (i % _HELD_OUT == 0) == (part == "held-out")]


def rows(
    files: Sequence[Path], count: int, seed: int, make: Callable[[Path], Batch], tick: Callable[[], None]
) -> tuple[list[Batch], list[str]]:
    """What `make` gives for up to `count` files, drawn by seed, and a sentence for each that cannot be read."""
    drawn = list(files)
    Random(seed).shuffle(drawn)
    found: list[Batch] = []
    unread: list[str] = []
    for file in drawn:
        if len(found) == count:
            break
        try:
            found.append(make(file))
            tick()
        except CalibrationError:
            raise
        # decoders raise whatever they like for a damaged file
        except Exception as error:
            unread.append(f"{file.name} cannot be read: {said(error)}")
    return found, unread


def maker(kind: Kind, reads: str, source: Checkpoint, config: Any) -> Callable[[Path], Batch]:
    """A function from a file to what the model is called with. Raises CalibrationError where the folder has no processor for it."""
    name = "AutoProcessor" if kind.prompted else "AutoImageProcessor" if reads == "images" else "AutoFeatureExtractor"
    processor = _processor(name, source)

    def make(file: Path) -> Batch:
        if reads == "audio":
            rate = int(processor.sampling_rate)
            found = processor([samples(file, rate)], sampling_rate=rate, return_tensors="pt")
        elif kind.prompted:
            found = _prompted(processor, image(file, config), text_beside(file), kind, source)
        else:
            found = processor(images=[image(file, config)], return_tensors="pt")
        row = {
            key: value.to(config.dtype) if value.is_floating_point() else value
            for key, value in found.items()
            if key in kind.accepts and isinstance(value, Tensor)
        }
        if not row:
            raise CalibrationError(
                f"the processor of {source.given}, {type(processor).__name__}, makes {' and '.join(found)} of {reads}, and "
                f"{kind.name} takes nothing of that name; put the processor of this model in its folder"
            )
        return row

    return make


def _processor(name: str, source: Checkpoint) -> Any:
    import transformers

    try:
        # without torchvision transformers says so in many lines, and takes its processor that needs none
        with quiet():
            return getattr(transformers, name).from_pretrained(source.folder, trust_remote_code=trusted())
    except Exception as error:
        raise CalibrationError(
            f"{source.given} has no processor that loads (preprocessor_config.json), so nothing can be made of files for it: "
            f"{said(error)}"
        ) from None


def image(file: Path, config: Any) -> Any:
    """A decoded image, in grey where the model has one channel, else in RGB."""
    from PIL import Image

    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    with Image.open(file) as opened:
        return opened.convert("L" if channels == 1 else "RGB")


def samples(file: Path, rate: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The samples of a WAV file between -1 and 1: one channel, the mean of those that it has; at `rate` a second; 30 s at most."""
    from math import gcd

    from scipy.io import wavfile
    from scipy.signal import resample_poly

    own, data = wavfile.read(file)
    data = data[: own * _SECONDS]
    if not len(data):
        raise ValueError("it holds no samples")
    if data.dtype == np.uint8:
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        data = data.astype(np.float32) / -float(np.iinfo(data.dtype).min)
    if data.ndim > 1:
        data = data.mean(1)
    if own != rate:
        common = gcd(own, rate)
        data = resample_poly(data, rate // common, own // common)
    return np.asarray(data, dtype=np.float32)


def text_beside(file: Path) -> str | None:
    """The text in NAME.txt beside NAME.png or NAME.wav, or None."""
    beside = file.with_suffix(".txt")
    return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None


def prompt_of(kind: Kind) -> str:
    """The text that goes with an image without one of its own: a question, or what a model that compares them is given."""
    return "Describe this image." if kind.predicts == "next token" else "a photo"


def _prompted(processor: Any, picture: Any, text: str | None, kind: Kind, source: Checkpoint) -> Any:
    """An image with its text: by the chat template where there is one, else after the processor's token for an image."""
    words = text or prompt_of(kind)
    try:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": words}]
            return processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        token = getattr(processor, "image_token", None)
        return processor(images=[picture], text=[f"{token}{words}" if token else words], return_tensors="pt")
    except Exception as error:
        raise CalibrationError(
            f"the processor of {source.given} takes no image with a text: {said(error)}; calibrate on text"
        ) from None


def greedy(model: Any, row: Batch, start: int, most: int) -> Tensor:
    """What an encoder-decoder writes for one input, the likeliest token each time: [1, S], its start token first.

    It ends before its end-of-text token, or after `most` tokens.
    """
    from transformers.modeling_outputs import BaseModelOutput

    ends = model.config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    ids = torch.tensor([[start]])
    given: dict[str, Any] = dict(row)
    with torch.no_grad():
        while ids.shape[1] < most:
            out = model(**given, decoder_input_ids=ids, use_cache=False)
            given = {**row, "encoder_outputs": BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)}
            token = int(out.logits[0, -1].argmax())
            if token in ends and ids.shape[1] > 1:
                break
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return ids
