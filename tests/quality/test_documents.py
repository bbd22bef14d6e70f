"""Every kind of text file gives the same documents; what is wrong with one is said with its file and line."""

import csv
import gzip
import io
import json
import sys

import pytest
import tiny

from secateurs.base.errors import CalibrationError
from secateurs.quality import documents, texts

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

DOCUMENTS = ['one, "two"\nthree', "Grüße aus Köln", "a\u2028b", ""]
SAID = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def as_json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


WRITE = {
    ".jsonl": as_json_lines,
    ".ndjson": as_json_lines,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": as_csv,
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet,
}


def zst(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def refused(source, match):
    with pytest.raises(CalibrationError, match=match):
        documents.read(str(source))


@pytest.mark.parametrize("ending", documents.ROWS)
def test_rows_are_the_same_documents_in_every_format(ending, tmp_path):
    file = tmp_path / f"rows{ending}"
    file.write_bytes(WRITE[ending]([{"id": str(i), "text": d, "more": "!"} for i, d in enumerate(DOCUMENTS)]))
    assert documents.read(str(file)) == (DOCUMENTS, file.name)
    assert documents.read(f"{file}:text+more") == ([d + "!" for d in DOCUMENTS], f"{file.name}:text+more")
    refused(f"{file}:body", rf"{file.name}.* has no column 'body'; it has id, text, more: write {file.name}:COLUMN")


@pytest.mark.parametrize("ending", [e for e in documents.ROWS if e not in (".csv", ".tsv")])
def test_conversations_are_read_from_messages(ending, tmp_path):
    file = tmp_path / f"rows{ending}"
    # the one has a key that the other lacks
    named = [{**SAID[0], "name": "Ada"}]
    file.write_bytes(WRITE[ending]([{"messages": SAID}, {"messages": named}]))
    found, name = documents.read(str(file))
    assert [chat.messages for chat in found] == [SAID, named]
    assert found[1].place == f"{file.name} {'line' if ending in ('.jsonl', '.ndjson') else 'row'} 2"
    assert documents.read(f"{file}:messages") == (found, f"{name}:messages")


def test_text_is_read_before_messages_where_a_row_has_both(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(as_json_lines([{"messages": SAID, "text": "plain"}]))
    assert documents.read(str(file))[0] == ["plain"]


@pytest.mark.parametrize("packed", [gzip.compress, zst, lambda d: gzip.compress(d[:9]) + gzip.compress(d[9:])])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
def test_compressed_files_are_read_as_what_they_hold(packed, ending, tmp_path):
    data = "Grüße\nzwei\n".encode() if ending == ".txt" else WRITE[ending]([{"text": d} for d in DOCUMENTS])
    plain = tmp_path / f"rows{ending}"
    plain.write_bytes(data)
    file = tmp_path / f"rows{ending}{'.zst' if packed is zst else '.gz'}"
    file.write_bytes(packed(data))
    assert documents.read(str(file))[0] == documents.read(str(plain))[0]


def test_bom_and_carriage_returns_are_no_part_of_a_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert documents.read(str(tmp_path / "t.txt"))[0] == ["one\ntwo\nthree\n"]
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbftext,n\r\n"one\r\ntwo",1\r\n')
    assert documents.read(str(tmp_path / "t.csv"))[0] == ["one\ntwo"]
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n\r\n{"text": "two"}')
    assert documents.read(str(tmp_path / "t.jsonl"))[0] == ["one\r\n", "two"]


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(as_json_lines([{"text": "2"}, {"text": "3"}])))
    (tmp_path / "in" / "a.txt").write_text("1")
    (tmp_path / "in" / "deep" / "c.csv").write_bytes(as_csv([{"text": "4"}]))
    # neither a picture nor what is hidden is text
    (tmp_path / "in" / "p.png").write_bytes(b"\xff")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "x.txt").write_text("no")
    assert documents.read(str(tmp_path / "in")) == (["1", "2", "3", "4"], f"{tmp_path / 'in'} (3 files)")
    assert documents.read(str(tmp_path / "in" / "*.jsonl*") + ":text")[0] == ["2", "3"]
    assert documents.read(str(tmp_path / "**" / "*.csv"))[0] == ["4"]
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", r"none holds no text file; those end in \.txt, \.jsonl, ")
    refused(tmp_path / "*.parquet", "no text file")


def test_a_name_with_a_colon_spaces_and_umlauts_is_a_name(tmp_path):
    file = tmp_path / "übung 1:2 [x].jsonl"
    file.write_bytes(as_json_lines([{"text": "a", "b": "c"}]))
    assert documents.read(str(file))[0] == ["a"]
    assert documents.read(f"{file}:b")[0] == ["c"]


@pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl", ".jsonl.gz"])
def test_latin_1_is_refused_with_the_place_of_its_byte(ending, tmp_path):
    file = tmp_path / f"t{ending}"
    packed = gzip.compress if ending.endswith("gz") else bytes
    file.write_bytes(packed(b'{"text": "a"}\n{"text": "Gr\xfc\xdfe"}\n'))
    refused(file, rf"t{ending} cannot be read as UTF-8: byte 0xfc at 26, in line 2; if it is Latin-1")
    # a mark at the beginning is counted
    file.write_bytes(packed(b"\xef\xbb\xbfGr\xfc\xdfe"))
    refused(file, "byte 0xfc at 5, in line 1")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, "null"), (3, "a number"), (True, "true or false"), (["a"], "a list"), ({"a": 1}, "an object")],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_a_row_without_text_is_refused_by_line(ending, value, kind, tmp_path):
    file = tmp_path / f"t{ending}"
    # a column of a parquet file has one type
    first = value if ending == ".parquet" and value is not None else "good"
    file.write_bytes(WRITE[ending]([{"text": first}, {"text": value}]))
    row = 1 if first is value else 2
    refused(file, rf"t{ending} {'line' if ending == '.jsonl' else 'row'} {row}: 'text' is {kind}; it must be text")


def test_what_is_no_row_is_refused_by_line(tmp_path):
    bad = {
        '{"text": "a"}\n[1]\n': "line 2 is not a JSON object: it is a list",
        '{"text": "a"}\n\n{"text": "b"\n': "line 3 is not a JSON object: Expecting",
        '{"text": "\\ud83d"}\n': "line 1: character 0 is half of a surrogate pair",
        '{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n': r"line 2 is a conversation and the rows before it are text",
        '{"messages": [{"from": "human", "value": "b"}]}\n': "line 1: 'messages' is a list; it must be text, or a list of messages",
        '{"messages": []}\n': "line 1: 'messages' is a list",
        "[" * 100000 + "\n": "line 1 is not a JSON object",
    }
    for text, match in bad.items():
        (tmp_path / "t.jsonl").write_text(text)
        refused(tmp_path / "t.jsonl", f"t.jsonl {match}")
    bad = {
        "text,b\na,b,c\n": r"line 2 has more cells than the 2 names in the first line",
        'text,b\n"a\nb",c\nd\n': "line 4 has fewer cells than the 2 names",
        'text\n"a"b\n': "line 2 cannot be read",
        'text\n"a\n': "line 2 cannot be read: unexpected end",
    }
    for text, match in bad.items():
        (tmp_path / "t.csv").write_text(text)
        refused(tmp_path / "t.csv", f"t.csv {match}")
    (tmp_path / "t.json").write_text('[{"text": "a"}, 3]')
    refused(tmp_path / "t.json", "row 2 is not a JSON object: it is a number")
    (tmp_path / "t.txt").write_text("a")
    refused(f"{tmp_path / 't.txt'}:text", r"t\.txt is read as one text, which has no column 'text'")


@pytest.mark.parametrize("packed", [gzip.compress, zst])
def test_a_file_that_is_cut_off_is_refused_with_its_last_line(packed, tmp_path):
    from random import Random

    noise = "".join(Random(0).choices("abcdefgh", k=600_000))
    rows = as_json_lines([{"text": noise[i : i + 100]} for i in range(0, len(noise), 100)])
    file = tmp_path / f"t.jsonl{'.zst' if packed is zst else '.gz'}"
    data = packed(rows)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CalibrationError, match=r"t\.jsonl\.\w+ cannot be read after line (\d+): ") as refusal:
        documents.read(str(file))
    # a zstd file is read in blocks of 128 KB
    assert int(str(refusal.value).split("line ")[1].split(":")[0]) > 500
    file.write_bytes(b"no such thing")
    refused(file, "cannot be read after line 0")
    (tmp_path / "t.parquet").write_bytes(as_parquet([{"text": "a"}])[:-20])
    refused(tmp_path / "t.parquet", r"t\.parquet cannot be read as parquet")


def test_without_the_library_its_name_is_said(tmp_path, monkeypatch):
    for ending in (".parquet", ".txt.zst"):
        (tmp_path / f"t{ending}").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source in (f"{tmp_path}/t.parquet", f"{tmp_path}/t.txt.zst", "hub:owner/name"):
        refused(source, r"needs the library (pyarrow|datasets); pip install 'secateurs\[hub\]'")


def test_a_dataset_of_the_hub_is_read_as_a_file_is(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "train.jsonl").write_bytes(as_json_lines([{"messages": SAID, "n": 1}, {"messages": SAID[:1], "n": 2}]))
    found, name = documents.read(f"hub:{tmp_path}")
    assert [chat.messages for chat in found] == [SAID, SAID[:1]]
    assert name == f"hub:{tmp_path}"
    refused(f"hub:{tmp_path}:train:n", r"row 1: 'n' is a number; it must be text")
    refused(f"hub:{tmp_path}:train:body", r"has no column 'body'; it has messages, n: write hub:.*:train:COLUMN")


# ------------------------------------------------------------------------------------------------------- conversations

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<eos>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<eos>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# as reasoning models do: what an earlier answer thought is left out
FORGETS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] if loop.last else m['content'][-1:]) + '<eos>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TALKS = [
    [*SAID, {"role": "user", "content": "Grüße"}, {"role": "assistant", "content": "Grüße auch"}],
    [{"role": "system", "content": "Be brief."}, *SAID],
]


def speaker(template):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def talks(tmp_path):
    file = tmp_path / "talks.jsonl"
    file.write_bytes(as_json_lines([{"messages": t} for t in TALKS]))
    return file


def test_conversations_follow_each_other_as_the_template_writes_them(talks):
    tokenizer = speaker(CHATML)
    wanted = [i for talk in TALKS for i in tokenizer.apply_chat_template(talk, return_dict=False)]
    found = texts.load(str(talks), tokenizer, 1, len(wanted), None)
    assert found.windows.tolist() == [wanted]
    assert found.answers is None
    assert "answer_tokens" not in found.facts()


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_are_what_the_assistant_wrote_and_the_end_of_its_turn(template, talks):
    tokenizer = speaker(template)
    found = texts.load(str(talks), tokenizer, 1, 125, None, answers=True)
    said = tokenizer.decode(found.windows[0][found.answers[0]])
    assert said == "4<eos>\nGrüße auch<eos>\n4<eos>\n"
    # bytes of the text, and one token for each <eos>
    assert int(found.answers.sum()) == found.facts()["answer_tokens"] == len("4\nGrüße auch\n4\n".encode()) + 3


def test_windows_of_answers_are_cut_where_those_of_tokens_are(talks):
    from tokenizers.processors import TemplateProcessing

    tokenizer = speaker(CHATML)
    whole = texts.load(str(talks), tokenizer, 1, 125, None, answers=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    cut = texts.load(str(talks), tokenizer, 9, 11, None, answers=True)
    assert cut.windows[:, 0].tolist() == [256] * len(cut.windows)
    assert not cut.answers[:, 0].any()
    assert cut.windows[:, 1:].flatten().tolist() == whole.windows[0, : len(cut.windows) * 10].tolist()
    assert cut.answers[:, 1:].flatten().tolist() == whole.answers[0, : len(cut.windows) * 10].tolist()


def test_conversations_that_the_template_cannot_write_are_refused(talks, words):
    with pytest.raises(
        CalibrationError, match=r"talks\.jsonl line 1 is a conversation, and the model's tokenizer has no chat template"
    ):
        texts.load(str(talks), tiny.tokenizer(), 1, 10, None)
    picky = speaker("{{ raise_exception('roles must alternate') if messages[0]['role'] == 'system' }}" + CHATML)
    with pytest.raises(
        CalibrationError, match=r"talks\.jsonl line 2: the model's chat template refuses .*: roles must alternate"
    ):
        texts.load(str(talks), picky, 1, 125, None)
    with pytest.raises(
        CalibrationError, match=r"talks\.jsonl line 1: .* writes message 2 in another way when more messages follow"
    ):
        texts.load(str(talks), speaker(FORGETS), 1, 50, None, answers=True)
    assert texts.load(str(talks), speaker(FORGETS), 1, 50, None).windows.shape == (1, 50)
    with pytest.raises(CalibrationError, match=r"text-0\.txt holds no conversations"):
        texts.load(str(words), speaker(CHATML), 1, 50, None, answers=True)
