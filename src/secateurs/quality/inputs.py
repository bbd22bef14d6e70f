"""A source of calibration or evaluation -> what a model is called with, one batch of one row for each input.

Text is cut into windows (texts.py): as it is for causal language models, between the tokenizer's special tokens for others. An
encoder-decoder's encoder reads a window and its decoder the text that follows. Images and recordings are files of a folder
(media.py). S positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError
from secateurs.base.files import write_tensors
from secateurs.base.progress import Progress, no_bars, silent, ticker
from secateurs.model.batches import Batch, batched, window_length
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.source import trusted
from secateurs.quality import documents, media, texts
from secateurs.quality.kinds import NUMBERS, Kind, kind_of
from secateurs.quality.settings import Calibration

# tokens of a window where nobody says, of a model that is no causal language model
_TOKENS = 512
# inputs that are run together, and their numbers
_ROWS_PER_BATCH, _NUMBERS_PER_BATCH = 32, 1 << 22
# tokens that a decoder writes for a file without a text of its own
_WRITTEN = 64
# what the inputs are called in reports
UNITS = {"text": "windows", "images": "images", "audio": "recordings"}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a model. rows: what it is called with, each with one window, image or recording. asked: how many were wanted.

    reads: 'text', 'images' or 'audio'. facts: as reports show them. unread: a sentence for each file that was left out. given: the
    tokens are text of the source, so that their perplexity says something.
    """

    rows: list[Batch]
    asked: int
    reads: str
    facts: dict[str, Any]
    unread: list[str] = field(default_factory=list)
    given: bool = True

    @property
    def unit(self) -> str:
        return UNITS[self.reads]

    @property
    def windows(self) -> Tensor | None:
        """Token windows [N, S] where the inputs are nothing else; None for other inputs."""
        plain = all(set(row) == {"input_ids"} for row in self.rows)
        return torch.cat([row["input_ids"] for row in self.rows]) if plain else None

    def batches(self, alone: bool = False, parts: int = 1) -> list[Batch]:
        """The inputs in order, those of equal shapes run together. alone: each by itself. parts: at least so many."""
        windows = self.windows
        if windows is not None and not alone:
            return batched(windows, parts)
        found: list[list[Batch]] = []
        each = max(1, min(_ROWS_PER_BATCH, len(self.rows) // parts))
        for row in self.rows:
            last = found[-1] if found else []
            most = min(each, _NUMBERS_PER_BATCH // sum(x.numel() for x in row.values()))
            if last and not alone and len(last) < most and _shapes(last[0]) == _shapes(row):
                last.append(row)
            else:
                found.append([row])
        return [{name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in found]

    def warnings(self, what: str) -> list[str]:
        """Sentences on inputs that are missing. what: 'calibration' or 'evaluation'."""
        found = []
        if len(self.rows) < self.asked:
            has = f"has {len(self.rows)} {self.unit}"
            if self.reads == "text":
                has = f"has text for {len(self.rows)} windows of {self.facts['seqlen']} tokens"
            found.append(f"{what}: {self.facts['source']} {has}, {self.asked} were asked for")
        if self.unread:
            one = len(self.unread) == 1
            left = "1 file was left out" if one else f"{len(self.unread)} files were left out, first"
            found.append(f"{what}: of {self.facts['source']} {left}{': ' if one else ' '}{self.unread[0]}")
        return found

    def write(self, file: Path) -> None:
        """Store the rows; read_rows() reads them back."""
        windows = self.windows
        tensors = {f"{i:05d} {name}": value for i, row in enumerate(self.rows) for name, value in row.items()}
        write_tensors(file, tensors if windows is None else {"windows": windows})


def read_rows(file: Path) -> list[Batch]:
    """What Inputs.write() stored."""
    from safetensors.torch import load_file

    found = load_file(file)
    if "windows" in found:
        return rows_of(found["windows"])
    rows: dict[str, Batch] = {}
    for key in sorted(found):
        number, _, name = key.partition(" ")
        rows.setdefault(number, {})[name] = found[key]
    return [_ordered(row) for row in rows.values()]


def rows_of(windows: Tensor) -> list[Batch]:
    """Token windows [N, S] as rows."""
    return [{"input_ids": ids[None]} for ids in windows]


def _ordered(row: Batch) -> Batch:
    # the first entry says how many windows a batch has
    first = [name for name in ("input_ids", "pixel_values", "input_features", "input_values") if name in row]
    return {name: row[name] for name in [*first, *(name for name in row if name not in first)]}


def _shapes(row: Batch) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in row.items()]


# ------------------------------------------------------------------------------------------------------------- choosing


def check(kind: Kind, source: str, flag: str) -> str:
    """What of kind.reads a source holds. Raises CalibrationError if the model reads nothing of the kind."""
    if not kind.reads:
        raise CalibrationError(f"{kind.name} reads recordings together with text, and nothing here makes such inputs")
    reads = next((what for what in kind.reads if what != "text" and media.files_of(source, what)), None)
    if reads is not None:
        return reads
    if "text" in kind.reads:
        other = next((what for what in media.ENDINGS if media.files_of(source, what)), None)
        if other and not _has_text(source):
            raise CalibrationError(f"{kind.name} reads text, and {source} holds {other}: give {flag} some text")
        return "text"
    wanted = kind.reads[0]
    what = "recordings" if wanted == "audio" else wanted
    endings = ", ".join(media.ENDINGS[wanted])
    place = Path(source).expanduser()
    if place.is_dir():
        raise CalibrationError(f"{kind.name} reads {what}, and {source} holds none; their names end in {endings}")
    holds = "is no such file or folder" if _is_place(source) and not place.exists() else "is text"
    raise CalibrationError(
        f"{kind.name} reads {what}, and {source} {holds}: give {flag} a folder of {what} (their names end in {endings})"
    )


def numbers_of(kind: Kind, source: str, reads: str) -> tuple[str, ...]:
    """The numbers that a comparison on this source gives. There is no perplexity of what a model or this program wrote itself."""
    given = reads == "text" or (kind.pairs and _texts_beside(media.files_of(source, reads)))
    return tuple(name for name in NUMBERS[kind.predicts] if given or name != "ppl")


def _texts_beside(files: Sequence[Path]) -> bool:
    """True if all files have a text beside them, False if none. Raises CalibrationError for a part of them."""
    beside = [media.text_beside(file) is not None for file in files]
    if any(beside) and not all(beside):
        raise CalibrationError(
            f"{files[beside.index(False)]} has no text in a .txt file of its name, and others have; give all of them one or none"
        )
    return any(beside)


def _is_place(source: str) -> bool:
    return source not in ("pydoc", "self") and not source.startswith("hub:")


def _has_text(source: str) -> bool:
    try:
        return bool(documents.read(source)[0])
    except CalibrationError:
        return False


def read(
    asked: Calibration,
    source: Checkpoint,
    model: nn.Module,
    progress: Progress = silent,
    kind: Kind | None = None,
) -> Inputs:
    """The calibration inputs of a run. model: a skeleton of `source`. Raises CalibrationError."""
    kind = kind or kind_of(source)
    reads = check(kind, asked.source, "--calibration")
    if reads == "text" and kind.causal:
        return of_text(texts.read(asked, source, model, asked.count, progress))
    if reads == "text":
        if asked.source == "self":
            raise CalibrationError(f"{kind.name} writes no text of its own: give --calibration some text")
        length = _length(asked.seqlen, source, model, "--seqlen")
        return _around(asked.source, source, model, kind, asked.count, length, asked.seed, "calibration")
    return _of_files(
        asked.source, source, model, kind, reads, asked.count, asked.seed, "calibration", progress, asked.seqlen
    )


def load(
    text: str,
    count: int,
    seqlen: int | None,
    source: Checkpoint,
    model: Any,
    kind: Kind,
    part: str,
    progress: Progress = silent,
) -> Inputs:
    """Evaluation inputs of a model that is no causal language model, or of files. part: of a folder's files, as media.part_of()."""
    reads = check(kind, text, "--eval-text")
    if reads == "text":
        length = _length(seqlen, source, model, "--eval-seqlen")
        return _around(text, source, model, kind, count, length, None, "held-out")
    return _of_files(text, source, model, kind, reads, count, 0, part, progress, seqlen)


# ----------------------------------------------------------------------------------------------------------------- text


def of_text(text: texts.Text) -> Inputs:
    """Windows of a causal language model."""
    return Inputs(rows_of(text.windows), text.asked, "text", text.facts())


def _length(asked: int | None, source: Checkpoint, model: Any, flag: str) -> int:
    """Tokens of a window: as asked, else 512 or what the positions, the tokenizer or sentence-transformers' own settings allow."""
    sentences = source.sentences.length if source.sentences else None
    most = [_TOKENS, source.tokenizer().model_max_length, sentences]
    return window_length(asked, model, min(m for m in most if m), flag)


def _around(
    text: str, source: Checkpoint, model: Any, kind: Kind, count: int, length: int, seed: int | None, part: str
) -> Inputs:
    """Windows between the tokenizer's special tokens; with a decoder, windows of twice the length, half for each side."""
    tokenizer = source.tokenizer()
    before, after = special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if body < 2:
        raise CalibrationError(
            f"windows of {length} tokens leave {body} beside the tokenizer's special ones; give more tokens a window"
        )
    found = texts.load(text, tokenizer, count, body * (2 if kind.pairs else 1), seed, part, bare=True)

    def wrapped(ids: Tensor) -> Tensor:
        return torch.tensor([[*before, *ids.tolist(), *after]])

    rows: list[Batch] = []
    for ids in found.windows:
        row = {"input_ids": wrapped(ids[:body])}
        if kind.pairs:
            row["decoder_input_ids"] = shifted(wrapped(ids[body:]), start_of(model.config))
        rows.append(row)
    facts = found.facts() | {
        "seqlen": length,
        "tokens": sum(x.numel() for row in rows for x in row.values()),
        "starts_with_bos": bool(before),
        "special_tokens": tokenizer.convert_ids_to_tokens([*before, *after]),
    }
    if kind.pairs:
        facts["decoder"] = f"the {body} tokens that follow the encoder's window, shifted right"
    return Inputs(rows, count, "text", facts)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return [], []


def shifted(ids: Tensor, start: int) -> Tensor:
    """What a decoder reads when it is to write these ids [1, S]: the start token, and all of them but the last."""
    if int(ids[0, 0]) == start:
        ids = ids[:, 1:]
    return torch.cat([torch.tensor([[start]]), ids[:, :-1]], 1)


def start_of(config: Any) -> int:
    """The token that a decoder starts with. Raises CalibrationError if the config names none."""
    decoder = getattr(config, "decoder", None)
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for place in (config, decoder):
            found = getattr(place, name, None)
            if isinstance(found, int):
                return found
    raise CalibrationError(
        "config.json names no decoder_start_token_id, so the decoder cannot be given anything to read"
    )


# ---------------------------------------------------------------------------------------------------------------- files


def _of_files(
    text: str,
    source: Checkpoint,
    model: Any,
    kind: Kind,
    reads: str,
    count: int,
    seed: int,
    part: str,
    progress: Progress,
    seqlen: int | None,
) -> Inputs:
    there = media.files_of(text, reads)
    files = media.part_of(there, part)
    if not files:
        raise CalibrationError(
            f"{text} holds {len(there)} {UNITS[reads]}, and its {part} part none: every third file is held out; give more"
        )
    make = media.maker(kind, reads, source, model.config)
    write, how = _decoder(kind, source, model, files, seqlen)
    tick = ticker(progress, f"reading {UNITS[reads]}", min(count, len(files)))
    rows, unread = media.rows(files, count, seed, lambda file: write(file, make(file)), tick)
    if not rows:
        raise CalibrationError(f"none of {len(unread)} {UNITS[reads]} of {text} can be read; first {unread[0]}")
    digest = hashlib.sha256()
    for row in rows:
        for name in sorted(row):
            digest.update(row[name].contiguous().float().numpy().tobytes())
    facts: dict[str, Any] = {
        "source": f"{text} ({'all of' if part == 'all' else f'{part} part,'} {len(files)} {UNITS[reads]})",
        f"{UNITS[reads]}_asked": count,
        UNITS[reads]: len(rows),
        "left_out": len(unread),
        "sha256": digest.hexdigest(),
    }
    if how:
        facts["decoder"] = how
    if kind.prompted:
        facts["text"] = "what lies beside each file" if _texts_beside(files) else media.prompt_of(kind)
    given = "ppl" in numbers_of(kind, text, reads)
    return Inputs([_ordered(row) for row in rows], count, reads, facts, unread, given)


def _decoder(
    kind: Kind, source: Checkpoint, model: Any, files: Sequence[Path], seqlen: int | None
) -> tuple[Callable[[Path, Batch], Batch], str | None]:
    """A function that gives the decoder of an encoder-decoder something to read, and a sentence on what that is."""
    if not kind.pairs:
        return lambda file, row: row, None
    start, most = start_of(model.config), seqlen or _WRITTEN
    if _texts_beside(files):
        tokenizer = source.tokenizer()

        def read_text(file: Path, row: Batch) -> Batch:
            ids = torch.tensor([tokenizer(media.text_beside(file)).input_ids[:most]])
            return {**row, "decoder_input_ids": shifted(ids, start)}

        return read_text, "the text beside each file, shifted right"
    with no_bars():
        whole: Any = type(model).from_pretrained(source.folder, dtype="auto", trust_remote_code=trusted()).eval()

    def write_text(file: Path, row: Batch) -> Batch:
        return {**row, "decoder_input_ids": media.greedy(whole, row, start, most)}

    return write_text, "what the dense model itself writes for each file, the likeliest token each time"
