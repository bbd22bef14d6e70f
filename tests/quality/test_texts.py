import json
from pathlib import Path

import pytest
import tiny
import torch

from secateurs.base.errors import CalibrationError
from secateurs.quality import texts

TOKENIZER = tiny.tokenizer()


def decode(windows):
    return [TOKENIZER.decode(row) for row in windows]


def test_documents_are_shuffled_by_seed_joined_by_blank_lines_and_cut(tmp_path):
    from random import Random

    documents = [f"document {i} " * (i + 1) for i in range(9)]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents) + "\n")
    Random(3).shuffle(documents)
    whole = TOKENIZER("\n\n".join(documents)).input_ids
    got = texts.load(str(file), TOKENIZER, 5, 20, 3)
    assert got.windows.flatten().tolist() == whole[:100]
    assert got.facts() == {
        "source": "d.jsonl", "windows_asked": 5, "windows": 5, "seqlen": 20, "tokens": 100, "starts_with_bos": False,
        "sha256": got.facts()["sha256"],
    }  # fmt: skip


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path):
    # others that str.splitlines() knows may stand in a JSON string as they are
    documents = ["one\u2028two", "three\u0085four\u2029", "five"]
    file = tmp_path / "d.jsonl"
    file.write_text(
        "\r\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in documents) + "\n", encoding="utf-8"
    )
    found = decode(texts.load(f"{file}:text", TOKENIZER, 1, 24, None).windows)[0]
    assert "one\u2028two" in found


def test_fields_are_joined_and_missing_ones_named(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"prefix": "abc", "end": "def", "n": 3}))
    assert decode(texts.load(f"{file}:prefix+end", TOKENIZER, 1, 6, 0).windows) == ["abcdef"]
    with pytest.raises(
        CalibrationError, match=r"line 1 has no column 'text'; it has prefix, end, n: write d.jsonl:COLUMN"
    ):
        texts.load(str(file), TOKENIZER, 1, 4, 0)


def test_one_text_is_drawn_from_for_calibration_and_taken_in_order_for_evaluation(words):
    whole = TOKENIZER(words.read_text()).input_ids
    ordered = texts.load(str(words), TOKENIZER, 4, 50, None).windows
    assert ordered.flatten().tolist() == whole[:200]
    drawn = texts.load(str(words), TOKENIZER, 4, 50, 0).windows
    starts = {tuple(whole[i : i + 50]): i for i in range(0, len(whole) - 49, 50)}
    found = [starts[tuple(row)] for row in drawn.tolist()]
    assert len(set(found)) == 4
    assert max(found) > 1000
    assert torch.equal(drawn, texts.load(str(words), TOKENIZER, 4, 50, 0).windows)
    assert not torch.equal(drawn, texts.load(str(words), TOKENIZER, 4, 50, 1).windows)


def test_a_long_document_is_cut_after_tokenizing_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_CHARACTERS_PER_TOKEN", 1)
    file = tmp_path / "d.jsonl"
    text = "".join(chr(97 + i % 26) for i in range(5000))
    file.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "end"}))
    got = texts.load(str(file), TOKENIZER, 3, 100, None)
    assert decode(got.windows) == [text[:100], text[100:200], text[200:300]]
    assert texts.load(str(file), TOKENIZER, 99, 100, None).windows.shape == (50, 100)


def test_the_parts_of_pydoc_never_meet():
    parts = [texts.load("pydoc", TOKENIZER, 10**6, 64, None, part) for part in ("calibration", "held-out")]
    assert len(parts[0].windows) > 2000
    assert len(parts[1].windows) > 1000
    # 128 bytes are about 32 tokens of a trained tokenizer
    whole = [part.windows.reshape(-1)[: len(part.windows) // 8 * 512].reshape(-1, 512) for part in parts]
    assert texts.overlap(*whole, length=128) == 0
    assert parts[0].source.startswith("pydoc (calibration part, Python 3.")


def test_overlap_is_the_share_of_windows_with_a_common_run():
    first = torch.arange(400).reshape(4, 100)
    second = torch.arange(1000, 1400).reshape(4, 100)
    assert texts.overlap(first, second) == 0
    second[1, 20:70] = first[2, 40:90]
    assert texts.overlap(first, second) == 0.25
    second[1, 69] += 1
    assert texts.overlap(first, second) == 0


def test_too_little_text_and_bad_files_are_said(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(CalibrationError, match=r"short.txt has 3 tokens, one window takes 10"):
        texts.load(str(short), TOKENIZER, 1, 10, 0)
    with pytest.raises(CalibrationError, match="no text file 'nowhere.txt'"):
        texts.load("nowhere.txt", TOKENIZER, 1, 10, 0)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        texts.load(str(tmp_path / "b.txt"), TOKENIZER, 1, 10, 0)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(CalibrationError, match="line 2 is not a JSON object"):
        texts.load(str(tmp_path / "b.jsonl"), TOKENIZER, 1, 1, 0)


def test_fewer_windows_than_asked_are_counted(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("x" * 95)
    got = texts.load(str(file), TOKENIZER, 64, 10, 0)
    assert (len(got.windows), got.asked) == (9, 64)


def test_windows_begin_as_the_tokenizer_begins_a_text(words):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    got = texts.load(str(words), tokenizer, 3, 20, None)
    assert got.bos
    assert got.windows[:, 0].tolist() == [256] * 3
    assert got.windows[:, 1:].flatten().tolist() == TOKENIZER(words.read_text()).input_ids[:57]


def test_hub_datasets_load_from_a_local_folder(tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i} "}) + "\n" for i in range(50)))
    got = texts.load(f"hub:{tmp_path}", TOKENIZER, 2, 16, None)
    assert decode(got.windows)[0].startswith("row 0 \n\nrow 1")
    with pytest.raises(CalibrationError, match="no column 'body'; it has text"):
        texts.load(f"hub:{tmp_path}:train:body", TOKENIZER, 2, 16, None)
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        texts.load(f"hub:{tmp_path}/none", TOKENIZER, 2, 16, None)


def test_a_model_s_own_samples_follow_its_distribution():
    model = tiny.make("llama")
    ticks = []
    got = texts.sample_from(model, TOKENIZER, 400, 3, 0, lambda: ticks.append(1))
    assert got.windows.shape == (400, 3)
    assert got.windows[:, 0].unique().tolist() == [256]
    assert len(ticks) == 2
    chance = model(input_ids=torch.tensor([[256]])).logits[0, 0].softmax(-1)
    seen = torch.bincount(got.windows[:, 1], minlength=len(chance)) / 400
    likely = int(chance.argmax())
    assert abs(float(seen[likely] - chance[likely])) < 4 * float(chance[likely] * (1 - chance[likely]) / 400) ** 0.5
    assert torch.equal(got.windows, texts.sample_from(model, TOKENIZER, 400, 3, 0, lambda: None).windows)


def test_texts_of_one_kind_overlap_and_others_do_not():
    random = torch.Generator().manual_seed(0)
    # two kinds of text: tokens 0..99 and 50..149, each as often as the others
    first, again, other = (torch.randint(low, low + 100, (40, 100), generator=random) for low in (0, 0, 50))
    alike, apart = texts.distance(first, again), texts.distance(first, other)
    # half of the tokens are common; what samples of one kind share is below 1
    assert apart.overlap == pytest.approx(0.5 * apart.within, abs=0.05)
    assert 0.8 < alike.within < 1
    assert alike.overlap == pytest.approx(alike.within, abs=0.05)
    assert alike.mismatch is None
    assert texts.distance(first, other + 40).mismatch is not None


def test_overlap_by_hand():
    # 64 tokens of 0 and 64 of 1 in turn: halves are all 0 and all 1, so even one text has nothing in common with itself
    text = torch.tensor([[0] * 64 + [1] * 64])
    assert texts.distance(text, text).within == 0.0
    mixed = torch.tensor([[0, 1] * 64])
    assert texts.distance(mixed, mixed).overlap == 1.0
    # a: half 0, half 1; b: half 0, half 2
    assert texts.distance(mixed, mixed * 2).overlap == pytest.approx(0.5)


def test_a_mismatch_says_both_numbers():
    words = texts.Distance(0.2, 0.7, 12.0, 34.5).mismatch
    assert words is not None
    assert "overlap by 20%" in words
    assert "overlaps by 70%; the dense model's perplexity is 12 and 34.5" in words
    assert texts.Distance(0.35, 0.7).mismatch is None


def test_text_is_of_one_kind_as_far_as_the_less_even_of_both_says():
    # halves of the one are alike, those of the other have nothing in common
    even, uneven = torch.tensor([[0, 1] * 64]), torch.tensor([[0] * 64 + [1] * 64])
    assert texts.distance(even, even).within == 1.0
    assert texts.distance(even, uneven).within == texts.distance(uneven, even).within == 0.0


def test_a_text_of_the_evaluation_that_no_part_of_the_calibration_is_like_is_named():
    random = torch.Generator().manual_seed(0)
    # three kinds: tokens 0..99, 100..199, 200..299
    a, b, c, again = (torch.randint(low, low + 100, (12, 100), generator=random) for low in (0, 100, 200, 0))
    calibration, evaluation = [("a.txt", a), ("b.txt", b)], [("more.txt", again), ("c.txt", c)]

    def warned(seen, held_out):
        return texts.unlike(seen, held_out, texts.distance(*(torch.cat([w for _, w in x]) for x in (seen, held_out))))

    (words,) = warned(calibration, evaluation)
    assert words.startswith("the evaluation's c.txt is like no calibration text: of these ")
    assert "overlap by 0%, where text of one kind overlaps by " in words
    # a mixture that holds the kind is no mismatch, however small its part
    assert warned([*[(f"{n}", b) for n in range(5)], ("a.txt", a)], [("more.txt", again)]) == []
    assert warned([("a.txt", a)], [("c.txt", c)])[0].startswith("calibration text is unlike evaluation text")


def test_windows_are_parted_as_they_were_mixed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 5000)
    where = f"{tmp_path}/a.txt@2; {tmp_path}/b.txt;{tmp_path}/c.txt@0.5"
    text = texts.load(where, TOKENIZER, 14, 10, None, bare=True)
    found = texts.parted(text.windows, text.facts())
    assert [(Path(name).stem, len(windows)) for name, windows in found] == [("a", 8), ("b", 4), ("c", 2)]
    assert [set(windows.flatten().tolist()) for _, windows in found] == [{TOKENIZER(c).input_ids[-1]} for c in "abc"]
    one = texts.load(f"{tmp_path}/a.txt", TOKENIZER, 3, 10, None)
    ((name, windows),) = texts.parted(one.windows, one.facts())
    assert (Path(name).name, torch.equal(windows, one.windows)) == ("a.txt", True)


def test_several_sources_share_the_windows_by_weight_and_lie_mixed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 5000)
    where = f"{tmp_path}/a.txt@2; {tmp_path}/b.txt;{tmp_path}/c.txt@0.5"
    got = texts.load(where, TOKENIZER, 7, 20, 0)
    letters = "".join(row[0] for row in decode(got.windows))
    assert {x: letters.count(x) for x in "abc"} == {"a": 4, "b": 2, "c": 1}
    # half of them hold something of all
    assert set(letters[:4]) == set("abc")
    assert got.facts()["source"] == "a.txt (4 windows); b.txt (2 windows); c.txt (1 windows)"
    assert (got.asked, got.windows.shape) == (7, (7, 20))
    # a source that is left with no window is not read
    assert len(texts.load(f"{where}; absent@0.001", TOKENIZER, 7, 20, 0).windows) == 7


def test_sources_and_weights_by_hand(tmp_path):
    assert texts.parts_of("pydoc") == [("pydoc", 1.0)]
    assert texts.parts_of("hub:me/set:train; d/*.txt@3") == [("hub:me/set:train", 1.0), ("d/*.txt", 3.0)]
    # 10/7, 20/7, 40/7: what is left goes to the second and the third
    assert texts.shares([1, 2, 4], 10) == [1, 3, 6]
    odd = tmp_path / "a;b@2"
    odd.write_text("text")
    assert texts.parts_of(str(odd)) == [(str(odd), 1.0)]
    for bad in ("a.txt@0", "a.txt; ", "@2"):
        with pytest.raises(CalibrationError, match="no source with a weight above 0"):
            texts.parts_of(bad)
