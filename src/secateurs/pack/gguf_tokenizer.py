"""The tokenizer of a folder in GGUF's terms, from tokenizer.json; one that llama.cpp would run otherwise is refused."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.base.errors import CheckpointError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
# how text is split before merging, step by step -> llama.cpp's name of it (tokenizer.ggml.pre)
SPLITS = {
    ("byte level",): "gpt-2",
    ("digits", "byte level"): "smollm",
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
    (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}
_SPACE = "▁"


@dataclass(frozen=True)
class Tokenizer:
    """model: 'gpt2' (bytes as characters, split as `pre` says) or 'llama' (pieces with scores). kinds: gguf.TokenType by name."""

    folder: Path
    model: str
    pre: str
    tokens: list[str]
    kinds: list[str]
    scores: list[float] | None
    add_space: bool | None
    warnings: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        import gguf

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types([gguf.TokenType[kind] for kind in self.kinds])
        if self.add_space is not None:
            writer.add_add_space_prefix(self.add_space)
        # ids of special tokens, whether they are added, the chat template
        special = gguf.SpecialVocab(self.folder, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        # llama.cpp adds one to pieces unless told otherwise
        special.add_special_token.setdefault("bos", False)
        special.add_to_gguf(writer, quiet=True)


def read(folder: Path, vocabulary: int) -> Tokenizer:
    """vocabulary: rows of the embedding; those without a token are filled up. Raises CheckpointError."""
    file = folder / "tokenizer.json"
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model = data["model"]
        words: dict[str, int] = model["vocab"] if model["type"] == "BPE" else {}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder} has no tokenizer.json that can be read; save its tokenizer there: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from None
    if model["type"] != "BPE" or not model.get("merges"):
        what = "BPE without merges" if model["type"] == "BPE" else model["type"]
        raise CheckpointError(f"{file} is a tokenizer of type {what}; BPE alone goes to GGUF here")
    pieces = bool(model.get("byte_fallback"))
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], ["UNUSED"] * vocabulary
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    for token, i in {**words, **{entry["content"]: i for i, entry in added.items()}}.items():
        if i >= vocabulary:
            raise CheckpointError(f"{file} has the token {i}, and the embedding {vocabulary} rows")
        tokens[i], kinds[i] = token, "NORMAL"
        if i in added:
            kinds[i] = "CONTROL" if added[i].get("special") else "USER_DEFINED"
            tokens[i] = added[i]["content"].replace(_SPACE, " ") if pieces and kinds[i] == "USER_DEFINED" else token
        elif pieces and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            kinds[i] = "BYTE"
    if not pieces:
        return Tokenizer(folder, "gpt2", _pre(file, data), tokens, kinds, None, None)
    if model.get("unk_token") in words:
        kinds[words[model["unk_token"]]] = "UNKNOWN"
    # the merge that comes first is made first: its rank is the score of the piece that it makes
    scores = [0.0] * vocabulary
    for rank, merge in reversed(list(enumerate(model["merges"]))):
        made = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        scores[words[made]] = -float(rank)
    return Tokenizer(folder, "llama", "default", tokens, kinds, scores, _adds_space(file, data))


def _pre(file: Path, data: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text."""
    steps: list[str] = []
    for part in _parts(data.get("pre_tokenizer"), "pretokenizers"):
        kind = part["type"]
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps += ["byte level"] if part.get("use_regex", True) else []
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append("digits")
        elif kind == "Split" and "Regex" in part["pattern"] and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(part["pattern"]["Regex"])
        else:
            steps.append(kind)
    normal = [part["type"] for part in _parts(data.get("normalizer"), "normalizers")]
    found = SPLITS.get(tuple(steps))
    if found is None or normal not in ([], ["NFC"]):
        raise CheckpointError(
            f"{file} splits text in a way ({', '.join(normal + steps) or 'none'}) that is none of those of llama.cpp known here: "
            f"{', '.join(SPLITS.values())}"
        )
    return found


def _adds_space(file: Path, data: dict[str, Any]) -> bool:
    """Whether a space is put before the text. Raises CheckpointError for another way to make pieces of it."""
    adds, spaces = False, False
    for part in _parts(data.get("normalizer"), "normalizers") + _parts(data.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            adds = True
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == _SPACE:
            spaces = True
        elif part["type"] == "Metaspace" and part.get("replacement", _SPACE) == _SPACE and not part.get("split"):
            adds, spaces = part.get("prepend_scheme", "always") != "never", True
        else:
            raise CheckpointError(f"{file} has a {part['type']}, which llama.cpp's pieces do not")
    if not spaces:
        raise CheckpointError(f"{file} does not write spaces as {_SPACE}, as llama.cpp's pieces do")
    return adds


def _parts(step: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    if step is None:
        return []
    parts: list[dict[str, Any]] = step[members] if step["type"] == "Sequence" else [step]
    return parts
