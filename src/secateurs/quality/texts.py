"""Text -> token windows [N, S]. Reads files, hub datasets, the prose inside Python, or the model itself.

N windows, S positions. A source is written as one string:
    pydoc                       the English prose that ships inside Python (pydoc_data.topics); no download
    FILE.txt                    one text; windows drawn from all over it
    FILE.jsonl[:FIELD[+FIELD]]  one document a line; fields joined; 'text' by default
    hub:NAME[,CONFIG][:SPLIT[:FIELD]]   a dataset that `datasets` loads (extra 'hub'); a local folder is a NAME too
    self                        the model's own samples from its beginning-of-text token
"""

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError
from secateurs.base.precision import widened
from secateurs.base.progress import Progress, silent, ticker
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import trusted
from secateurs.quality.settings import Calibration

# a token is 3 to 5 characters of English; so many are tokenized for each token wanted, and twice as many if that is too few
_CHARACTERS_PER_TOKEN = 8
# texts of different kinds overlap by less than this share of what text of one kind does (docs/calibration.md)
ALIKE = 0.5
# every third topic is held out, so that both parts cover the whole alphabet
_HELD_OUT = 3


@dataclass(frozen=True)
class Text:
    """Token windows and their source. asked: how many windows were wanted. bos: whether each begins with a special token."""

    source: str
    windows: Tensor
    asked: int
    bos: bool

    def facts(self) -> dict[str, Any]:
        n, positions = self.windows.shape
        digest = hashlib.sha256(self.windows.to(torch.int64).numpy().tobytes()).hexdigest()
        return {
            "source": self.source,
            "windows_asked": self.asked,
            "windows": n,
            "seqlen": positions,
            "tokens": n * positions,
            "starts_with_bos": self.bos,
            "sha256": digest,
        }


def load(source: str, tokenizer: Any, windows: int, seqlen: int, seed: int | None, part: str = "calibration") -> Text:
    """Up to `windows` windows of `seqlen` tokens, fewer where the text ends (Text.asked tells).

    seed: documents are shuffled by random.Random(seed) and joined by blank lines (of a single text, windows are drawn at
    random); None takes the text in order. part: 'calibration' or 'held-out', parts of one source that share no text; only
    'pydoc' is split, other sources are used whole. If the tokenizer begins a text with a special token, every
    window begins with it.
    Raises CalibrationError if not one window is found.
    """
    documents, name = _documents(source, part)
    draw = seed is not None and len(documents) == 1
    if seed is not None and not draw:
        Random(seed).shuffle(documents)
    start = _start_token(tokenizer)
    body = seqlen - len(start)
    ids = _tokenize("\n\n".join(documents), tokenizer, None if draw else windows * body)
    found = len(ids) // body
    if found == 0:
        raise CalibrationError(
            f"{name} has {len(ids)} tokens, one window takes {body}; give more text or a smaller --seqlen"
        )
    rows = torch.tensor(ids[: found * body]).reshape(found, body)
    if draw:
        rows = rows[Random(seed).sample(range(found), min(windows, found))]
    rows = rows[:windows]
    prefix = torch.tensor(start, dtype=rows.dtype).expand(len(rows), len(start))
    return Text(name, torch.cat([prefix, rows], 1), windows, bool(start))


def read(asked: Calibration, source: Checkpoint, model: nn.Module, windows: int, progress: Progress = silent) -> Text:
    """The calibration text of a run, `windows` windows of it. model: a skeleton of `source`. Raises CalibrationError."""
    seqlen = asked.length(model)
    if asked.source != "self":
        return load(asked.source, source.tokenizer(), windows, seqlen, asked.seed)
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(source.folder, dtype="auto", trust_remote_code=trusted())
    tick = ticker(progress, "sampling", seqlen - 1)
    return sample_from(whole, source.tokenizer(), windows, seqlen, asked.seed, tick)


def sample_from(model: Any, tokenizer: Any, windows: int, seqlen: int, seed: int, tick: Callable[[], None]) -> Text:
    """Windows that the model itself writes, at temperature 1, from its beginning-of-text token.

    Liu et al. 2023, data-free, arXiv 2305.17888. One tick a token.
    """
    config = model.config
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.eos_token_id
    if isinstance(first, list):
        first = first[0]
    if first is None:
        raise CalibrationError("the tokenizer has no beginning-of-text token to sample from; give a text file")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((windows, 1), first)
    cache = None
    with torch.no_grad(), widened():
        for _ in range(seqlen - 1):
            out = model(input_ids=ids[:, -1:] if cache else ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            chance = out.logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chance, 1, generator=generator)], 1)
            tick()
    return Text("self: sampled from the model", ids, windows, True)


def overlap(calibration: Tensor, evaluation: Tensor, length: int = 50) -> float:
    """The fraction of evaluation windows [N, S] that share a run of `length` tokens with calibration windows."""
    if min(calibration.shape[1], evaluation.shape[1]) < length:
        return 0.0
    known = np.unique(_runs(calibration, length))
    hits = np.isin(_runs(evaluation, length), known).any(1)
    return float(hits.mean())


@dataclass(frozen=True)
class Distance:
    """How unlike calibration and evaluation text are.

    overlap: of their token frequencies p and q, sum_v min(p_v, q_v), 1 if they are equal. within: the same between two halves of
    one text, the smaller of both texts' values, which is what text of one kind gives at this length. ppl_*: the dense model's
    perplexity on each text, or None where it was not measured.
    """

    overlap: float
    within: float
    ppl_calibration: float | None = None
    ppl_evaluation: float | None = None

    @property
    def mismatch(self) -> str | None:
        """The sentence to warn with, or None."""
        if self.overlap >= ALIKE * self.within:
            return None
        ppl = ""
        if self.ppl_calibration is not None and self.ppl_evaluation is not None:
            ppl = f"; the dense model's perplexity is {self.ppl_calibration:.4g} and {self.ppl_evaluation:.4g}"
        return (
            f"calibration text is unlike evaluation text: their token frequencies overlap by {self.overlap:.0%}, where text of one "
            f"kind overlaps by {self.within:.0%}{ppl}; calibrate on text like what the model will see"
        )


def distance(calibration: Tensor, evaluation: Tensor) -> Distance:
    """The distance of two texts, given as windows [N, S]. Both are cut to the same length, since shorter texts overlap less."""
    n = min(calibration.numel(), evaluation.numel())
    a, b = (_halved(windows.flatten()[:n]) for windows in (calibration, evaluation))
    return Distance(_common(a[0], b[1]), min(_common(*a), _common(*b)))


def _halved(tokens: Tensor, piece: int = 64) -> tuple[Tensor, Tensor]:
    """Two halves of a text, its pieces dealt in turn, so that both have something of every document."""
    pieces = torch.split(tokens, piece)
    return torch.cat(list(pieces[::2])), torch.cat(list(pieces[1::2]) or [tokens[:0]])


def _common(a: Tensor, b: Tensor) -> float:
    size = int(max(a.max(), b.max() if len(b) else 0)) + 1
    p, q = (torch.bincount(t, minlength=size).double() / max(1, len(t)) for t in (a, b))
    return float(torch.minimum(p, q).sum())


def _runs(windows: Tensor, length: int) -> "np.ndarray[Any, np.dtype[np.uint64]]":
    # a polynomial hash modulo 2^64; a false alarm in 10^6 x 10^6 runs has odds of about 1 in 10^7
    ids = windows.numpy().astype(np.uint64) + np.uint64(1)
    positions = ids.shape[1] - length + 1
    out = np.zeros((len(ids), positions), dtype=np.uint64)
    for offset in range(length):
        out = out * np.uint64(0x9E3779B97F4A7C15) + ids[:, offset : offset + positions]
    return out


def _documents(source: str, part: str) -> tuple[list[str], str]:
    if source == "pydoc":
        return _pydoc(part), f"pydoc ({part} part, Python {platform.python_version()})"
    if source.startswith("hub:"):
        return _hub(source[4:]), source
    path, fields = source, "text"
    if not Path(path).expanduser().is_file() and ":" in source:
        path, fields = source.rsplit(":", 1)
    file = Path(path).expanduser()
    if not file.is_file():
        raise CalibrationError(f"no text file '{path}'; write pydoc, self, FILE.txt, FILE.jsonl[:FIELD] or hub:NAME")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{file} cannot be read as UTF-8 text: {error}") from None
    name = file.name if fields == "text" else f"{file.name}:{fields}"
    return ([text], name) if file.suffix != ".jsonl" else (_json_lines(file, text, fields), name)


def _pydoc(part: str) -> list[str]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    held = {name for i, name in enumerate(names) if i % _HELD_OUT == 0}
    if part == "calibration":
        return [topics[name] for name in names if name not in held]
    # topics quote each other: a paragraph of the calibration part is left out of the held-out part
    seen = {_plain(p) for name in names if name not in held for p in topics[name].split("\n\n")}
    kept = ("\n\n".join(p for p in topics[name].split("\n\n") if _plain(p) not in seen) for name in sorted(held))
    return [text for text in kept if text]


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _json_lines(file: Path, text: str, fields: str) -> list[str]:
    documents = []
    # only these: splitlines() also ends a line at U+2028 and the like, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            documents.append("".join(str(row[field]) for field in fields.split("+")))
        except KeyError as missing:
            have = ", ".join(k for k, v in row.items() if isinstance(v, str))
            raise CalibrationError(
                f"{file.name} line {number} has no field {missing}; its text fields are {have}: write "
                f"{file.name}:FIELD or {file.name}:FIELD+FIELD"
            ) from None
        except (ValueError, TypeError) as error:
            raise CalibrationError(f"{file.name} line {number} is not a JSON object: {error}") from None
    return documents


def _hub(text: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError("hub: needs the library datasets; pip install 'secateurs[hub]'") from None
    name, _, rest = text.partition(":")
    split, _, field = rest.partition(":")
    path, _, config = name.partition(",")
    try:
        rows = load_dataset(path, config or None, split=split or "train")
    except Exception as error:
        raise CalibrationError(f"hub:{text} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    field = field or "text"
    if field not in rows.column_names:
        raise CalibrationError(f"hub:{text} has no column '{field}'; it has {', '.join(rows.column_names)}")
    return [str(value) for value in rows[field]]


def _start_token(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    ids = tokenizer("a").input_ids
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _tokenize(text: str, tokenizer: Any, wanted: int | None) -> list[int]:
    size = len(text) if wanted is None else wanted * _CHARACTERS_PER_TOKEN
    while True:
        ids: list[int] = tokenizer(text[:size], add_special_tokens=False, verbose=False).input_ids
        # the last tokens of a cut text may differ from those of the whole
        if size >= len(text) or wanted is None or len(ids) > wanted + 16:
            return ids
        size *= 2
