"""Text -> token windows [N, S], and how unlike two texts are. N windows, S positions.

A source is written as one string: what documents.py reads, or `self`, the model's own samples from its beginning-of-text token; or
several of the former with their weights: 'code.jsonl@2; stories.txt'.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError
from secateurs.base.precision import widened
from secateurs.base.progress import Progress, no_bars, silent, ticker
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import trusted
from secateurs.quality import chats, documents
from secateurs.quality.settings import Calibration

# a token is 3 to 5 characters of English; so many are tokenized for each token wanted, and twice as many if that is too few
_CHARACTERS_PER_TOKEN = 8
# texts of different kinds overlap by less than this share of what text of one kind does (docs/calibration.md)
ALIKE = 0.5


@dataclass(frozen=True)
class Text:
    """Token windows and their source. asked: how many windows were wanted. bos: whether each begins with a special token.

    answers: of conversations, which tokens the assistant wrote [N, S], where that was asked for. parts: of several texts, the name
    of each and its windows, which lie as _spread() says.
    """

    source: str
    windows: Tensor
    asked: int
    bos: bool
    answers: Tensor | None = None
    parts: tuple[tuple[str, int], ...] = ()

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
            **({} if self.answers is None else {"answer_tokens": int(self.answers.sum())}),
            **({"parts": [list(part) for part in self.parts]} if self.parts else {}),
        }


def load(
    source: str,
    tokenizer: Any,
    windows: int,
    seqlen: int,
    seed: int | None,
    part: str = "calibration",
    answers: bool = False,
    bare: bool = False,
) -> Text:
    """Up to `windows` windows of `seqlen` tokens, fewer where the text ends (Text.asked tells).

    seed: documents are shuffled by random.Random(seed) and joined by blank lines (of a single text, windows are drawn at
    random); None takes the text in order. Conversations are written by the model's chat template and follow each other as they
    are. part: 'calibration' or 'held-out', parts of one source that share no text; only 'pydoc' is split, other sources are used
    whole. If the tokenizer begins a text with a special token, every window begins with it; bare: none
    does. answers: find which tokens an assistant wrote. source: of several the windows are shared by weight, and lie mixed.
    Raises CalibrationError if not one window is found, or if there are no conversations to find answers in.
    """
    sources = parts_of(source)
    if len(sources) > 1:
        counts = shares([weight for _, weight in sources], windows)
        chosen = [(name, count) for (name, _), count in zip(sources, counts, strict=True) if count]
        return _mixed([load(name, tokenizer, n, seqlen, seed, part, answers, bare) for name, n in chosen], windows)
    source = sources[0][0]
    found, name = documents.read(source, part)
    draw = seed is not None and len(found) == 1
    if seed is not None and not draw:
        Random(seed).shuffle(found)
    start = [] if bare else _start_token(tokenizer)
    body = seqlen - len(start)
    wanted = None if draw else windows * body
    talks = [d for d in found if isinstance(d, documents.Chat)]
    if answers and not talks:
        raise CalibrationError(f"{name} holds no conversations, so there are no answers to tell from the rest")
    if talks:
        ids, marks = chats.tokens(talks, tokenizer, wanted, answers)
    else:
        ids, marks = _tokenize("\n\n".join(map(str, found)), tokenizer, wanted), None
    count = len(ids) // body
    if count == 0:
        raise CalibrationError(
            f"{name} has {len(ids)} tokens, one window takes {body}; give more text or a smaller --seqlen"
        )
    order = Random(seed).sample(range(count), min(windows, count)) if draw else range(min(windows, count))

    def cut(values: list[int], first: list[int]) -> Tensor:
        rows = torch.tensor(values[: count * body]).reshape(count, body)[list(order)]
        return torch.cat([torch.tensor(first, dtype=rows.dtype).expand(len(rows), len(start)), rows], 1)

    asked_answers = None if marks is None else cut(marks, [0] * len(start)).bool()
    return Text(name, cut(ids, start), windows, bool(start), asked_answers)


def parts_of(source: str) -> list[tuple[str, float]]:
    """The sources that one string names, and their weights. Raises CalibrationError for a weight that is none."""
    if Path(source).expanduser().exists():
        return [(source, 1.0)]
    found = []
    for part in source.split(";"):
        name, at, weight = part.strip().rpartition("@")
        if not at or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", weight):
            name, weight = part.strip(), "1"
        if not name or not float(weight) > 0:
            raise CalibrationError(
                f"'{part.strip()}' of '{source}' is no source with a weight above 0, e.g. code.jsonl@2"
            )
        found.append((name, float(weight)))
    return found


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to weights, which add up to the total; what is left goes to the largest remainders."""
    exact = [total * w / sum(weights) for w in weights]
    found = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[: total - sum(found)]:
        found[i] += 1
    return found


def _mixed(texts: Sequence[Text], asked: int) -> Text:
    """The windows of several texts in one, each text's spread over all of it, so that a part holds something of all."""
    order = _spread([len(text.windows) for text in texts])

    def mixed(rows: Sequence[Tensor]) -> Tensor:
        return torch.stack([rows[n][i] for n, i in order])

    marks = [text.answers for text in texts if text.answers is not None]
    answers = mixed(marks) if len(marks) == len(texts) else None
    name = "; ".join(f"{text.source} ({len(text.windows)} windows)" for text in texts)
    parts = tuple((text.source, len(text.windows)) for text in texts)
    return Text(name, mixed([text.windows for text in texts]), asked, texts[0].bos, answers, parts)


def _spread(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The order in which windows of several texts lie: (which text, which of its windows)."""
    return [
        (n, i) for _, n, i in sorted(((i + 0.5) / count, n, i) for n, count in enumerate(counts) for i in range(count))
    ]


def parted(windows: Tensor, facts: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The texts that windows [N, S] are of, each with its name. facts: as Text.facts() gives them."""
    parts = facts.get("parts") or [[facts["source"], len(windows)]]
    of = torch.tensor([n for n, _ in _spread([count for _, count in parts])])
    return [(name, windows[of == n]) for n, (name, _) in enumerate(parts)]


def read(
    asked: Calibration,
    source: Checkpoint,
    model: nn.Module,
    windows: int,
    progress: Progress = silent,
    answers: bool = False,
) -> Text:
    """The calibration text of a run, `windows` windows of it. model: a skeleton of `source`. answers: as for load().

    Raises CalibrationError.
    """
    seqlen = asked.length(model)
    if asked.source != "self":
        return load(asked.source, source.tokenizer(), windows, seqlen, asked.seed, answers=answers)
    if answers:
        raise CalibrationError(
            "a model's own samples are no conversations, so there are no answers to tell from the rest"
        )
    from transformers import AutoModelForCausalLM

    with no_bars():
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


def unlike(
    calibration: Sequence[tuple[str, Tensor]], evaluation: Sequence[tuple[str, Tensor]], whole: Distance
) -> list[str]:
    """Sentences on the texts of an evaluation that are like none of the calibration's. whole: the distance of all from all."""
    if len(calibration) == len(evaluation) == 1:
        return [whole.mismatch] if whole.mismatch else []
    found = []
    for name, windows in evaluation:
        near, apart = max(
            ((other, distance(seen, windows)) for other, seen in calibration),
            key=lambda pair: pair[1].overlap / max(pair[1].within, 1e-9),
        )
        if apart.mismatch:
            found.append(
                f"the evaluation's {name} is like no calibration text: of these {near} is nearest, whose token frequencies overlap "
                f"by {apart.overlap:.0%}, where text of one kind overlaps by {apart.within:.0%}; add such text to --calibration"
            )
    return found


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
