"""A source of text -> documents. Reads files, folders and globs of them, hub datasets, and the prose inside Python.

    pydoc                       the English prose that ships inside Python (pydoc_data.topics); no download
    FILE.txt                    one text; so is a file of any other name that is not below
    FILE.jsonl[:COLUMN]         a document a line; .ndjson too, and .json, which may be one list of rows
    FILE.csv[:COLUMN]           a document a row, columns by the names of the first line; .tsv with tabs between
    FILE.parquet[:COLUMN]       a document a row
    FOLDER[:COLUMN]             all files below it with one of these endings; 'GLOB[:COLUMN]', e.g. 'data/*.jsonl'
    hub:NAME[,CONFIG][:SPLIT[:COLUMN]]   a dataset that `datasets` loads (extra 'hub'); a local folder is a NAME too

Files may end in .gz or .zst. COLUMN is a name, or several joined: prompt+answer. Without it a row's `text` is read, or else its
`messages`: a conversation. A row that holds neither is refused, with its file and line.
"""

import csv
import glob
import gzip
import io
import json
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs.base.errors import CalibrationError

# every third topic is held out, so that both parts cover the whole alphabet
_HELD_OUT = 3
# bytes that are read at once: what was read before a damaged place is told
_PIECE = 1 << 16
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with a role and a content. place: the file and line that it is from."""

    messages: list[dict[str, Any]]
    place: str


Document = str | Chat
Rows = Iterator[tuple[str, dict[str, Any]]]
"""(where it is in its file, the row)"""


def read(source: str, part: str = "calibration") -> tuple[list[Document], str]:
    """The documents of a source, all of one kind, and its name for reports. part: of pydoc, 'calibration' or 'held-out'.

    Raises CalibrationError for what cannot be read.
    """
    if source == "pydoc":
        return list(_pydoc(part)), f"pydoc ({part} part, Python {platform.python_version()})"
    if source.startswith("hub:"):
        return _alike(_hub(source[4:])), source
    files, path, columns = _files(source), source, ""
    if not files and ":" in source:
        path, _, columns = source.rpartition(":")
        files = _files(path)
    if not files:
        raise CalibrationError(
            f"no text file '{path}'; write pydoc, self, FILE.txt, FILE.jsonl[:COLUMN], FILE.csv or FILE.parquet[:COLUMN], a folder "
            "or a glob of these, or hub:NAME"
        )
    name = files[0].name if files[0] == Path(path).expanduser() else f"{path} ({len(files)} files)"
    return _alike(d for file in files for d in _of_file(file, columns)), f"{name}:{columns}" if columns else name


def _alike(found: Iterator[tuple[str, Document]]) -> list[Document]:
    documents: list[Document] = []
    for place, document in found:
        if documents and type(document) is not type(documents[0]):
            kinds = ["a conversation" if isinstance(d, Chat) else "text" for d in (document, documents[0])]
            raise CalibrationError(
                f"{place} is {kinds[0]} and the rows before it are {kinds[1]}; give one kind at a time"
            )
        documents.append(document)
    return documents


# ------------------------------------------------------------------------------------------------------------- files


def _files(text: str) -> list[Path]:
    """The files that a path means: itself, those below it, or those of a glob; in the order of their names."""
    path = Path(text).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        known = (".txt", *ROWS)
        below = (
            f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
        )
        found = sorted(f for f in below if _kind(f) in known)
        if not found:
            raise CalibrationError(
                f"{path} holds no text file; those end in {', '.join(known)}, and .gz or .zst after it"
            )
        return found
    return sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())


def _kind(file: Path) -> str:
    """The ending that says how a file is read, without that of its compression."""
    return Path(file.stem if file.suffix in _COMPRESSED else file.name).suffix.lower()


def _of_file(file: Path, columns: str) -> Iterator[tuple[str, Document]]:
    rows = ROWS.get(_kind(file))
    if rows is None:
        if columns:
            raise CalibrationError(f"{file} is read as one text, which has no column '{columns}'")
        yield str(file), _text(file)
        return
    asked = columns.split("+") if columns else []
    for place, row in rows(file, asked):
        where = f"{file.name} {place}"
        yield where, _document(row, _columns(row, asked, where, file.name), where)


def _columns(names: Iterable[str], asked: list[str], where: str, source: str) -> list[str]:
    """Which of a row's columns are read: those asked for, else its text, else its messages. Raises CalibrationError."""
    names = list(names)
    wanted = asked or ["messages" if "text" not in names and "messages" in names else "text"]
    for name in wanted:
        if name not in names:
            raise CalibrationError(
                f"{where} has no column '{name}'; it has {', '.join(names)}: write {source}:COLUMN or {source}:COLUMN+COLUMN"
            )
    return wanted


def _document(row: dict[str, Any], names: list[str], where: str) -> Document:
    """The text of these columns, or the conversation of this one. Raises CalibrationError for what is neither."""
    if len(names) == 1 and _is_chat(row[names[0]]):
        # rows of a table have all keys, and null for those that a message lacks
        messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in row[names[0]]]
        return Chat(messages, where)
    for name in names:
        if not isinstance(row[name], str):
            raise CalibrationError(
                f"{where}: '{name}' is {_kind_of(row[name])}; it must be text, or a list of messages with a role and a content each"
            )
    text = "".join(row[name] for name in names)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: character {error.start} is half of a surrogate pair, which is no text"
        ) from None
    return text


def _kind_of(value: Any) -> str:
    return _KINDS.get(type(value), "text")


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


# ---------------------------------------------------------------------------------------------------- bytes and characters


def _zst(file: Path) -> io.BufferedIOBase:
    try:
        import pyarrow
    except ImportError:
        raise CalibrationError(f"{file}: .zst needs the library pyarrow; pip install 'secateurs[hub]'") from None
    return pyarrow.input_stream(str(file), compression="zstd")  # type: ignore[no-any-return]


def _bare(file: Path) -> io.BufferedIOBase:
    return file.open("rb")


_COMPRESSED: dict[str, Callable[[Path], io.BufferedIOBase]] = {".gz": gzip.GzipFile, ".zst": _zst}


def _text(file: Path) -> str:
    """The characters of a file in UTF-8, a mark of that at its beginning left out, lines ended by a newline alone."""
    opened = _COMPRESSED.get(file.suffix, _bare)
    pieces: list[bytes] = []
    try:
        with opened(file) as handle:
            # read1, not read: it gives what is there before it says that the file is cut off
            while piece := handle.read1(_PIECE):
                pieces.append(piece)
    except (EOFError, OSError, zlib.error) as error:
        lines = sum(piece.count(b"\n") for piece in pieces)
        raise CalibrationError(
            f"{file} cannot be read after line {lines}: {str(error) or type(error).__name__}"
        ) from None
    data = b"".join(pieces)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # counted without the mark
        at = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, at) + 1
        raise CalibrationError(
            f"{file} cannot be read as UTF-8: byte {data[at]:#04x} at {at}, in line {line}; if it is Latin-1, "
            "convert it: iconv -f latin1 -t utf8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


# ------------------------------------------------------------------------------------------------------------------ rows


def _json_lines(file: Path, columns: list[str]) -> Rows:
    return _lines(file, _text(file))


def _lines(file: Path, text: str) -> Rows:
    # only these: splitlines() also ends a line at U+2028 and the like, which JSON strings may hold
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _object(line, f"{file.name} line {number}")


def _json(file: Path, columns: list[str]) -> Rows:
    text = _text(file)
    if not text.lstrip().startswith("["):
        yield from _lines(file, text)
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise CalibrationError(f"{file.name} is not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"row {number}", _checked(row, f"{file.name} row {number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        return _checked(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not a JSON object: {error}") from None


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is not a JSON object: it is {_kind_of(row)}")
    return row


def _csv(file: Path, columns: list[str], delimiter: str = ",") -> Rows:
    # the longest cell that csv reads is 128 KB otherwise; the limit is the process's
    before = csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        names = reader.fieldnames or []
        line = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():
                cells = "more" if None in row else "fewer"
                raise CalibrationError(
                    f"{file.name} line {line} has {cells} cells than the {len(names)} names in the first line"
                )
            yield f"line {line}", row
            line = reader.line_num + 1
    except csv.Error as error:
        raise CalibrationError(f"{file.name} line {line} cannot be read: {error}") from None
    finally:
        csv.field_size_limit(before)


def _tsv(file: Path, columns: list[str]) -> Rows:
    return _csv(file, columns, "\t")


def _parquet(file: Path, columns: list[str]) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CalibrationError(f"{file}: parquet needs the library pyarrow; pip install 'secateurs[hub]'") from None
    try:
        table = parquet.ParquetFile(file)
        # other columns may hold images
        wanted = _columns(table.schema_arrow.names, columns, file.name, file.name)
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from None


ROWS: dict[str, Callable[[Path, list[str]], Rows]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet,
}  # fmt: skip
"""How a file is read whose name ends so. Any other file is one text."""


# ------------------------------------------------------------------------------------------------------- other sources


def _hub(text: str) -> Iterator[tuple[str, Document]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError("hub: needs the library datasets; pip install 'secateurs[hub]'") from None
    name, _, rest = text.partition(":")
    split, _, columns = rest.partition(":")
    path, _, config = name.partition(",")
    try:
        rows = load_dataset(path, config or None, split=split or "train")
    except Exception as error:
        raise CalibrationError(f"hub:{text} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    wanted = _columns(
        rows.column_names, columns.split("+") if columns else [], f"hub:{text}", f"hub:{name}:{split or 'train'}"
    )
    # other columns may hold images
    for number, row in enumerate(rows.select_columns(wanted), 1):
        where = f"hub:{text} row {number}"
        yield where, _document(row, wanted, where)


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
