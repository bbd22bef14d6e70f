"""tools/small_lm.py: what is held out is not trained on, a run that was ended continues as if it had not been, and the folder loads."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def small_lm():
    sys.path.insert(0, str(TOOLS))
    import small_lm

    yield small_lm
    sys.path.remove(str(TOOLS))


@pytest.fixture
def plan(small_lm):
    return small_lm.Plan(
        vocabulary=280, width=16, blocks=1, heads=2, kv_heads=1, mlp=32, window=8, batch=4, epochs=0.5, seconds=1e9,
        warmup=2, every=2, fast=False,
    )  # fmt: skip


@pytest.fixture
def ids():
    """Enough for 16 steps an epoch."""
    return torch.randint(280, (8 * 4 * 17,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data(tmp_path):
    """A folder with the files that the tool reads, a document each but for C4's 41."""
    folder = tmp_path / "data"
    folder.mkdir()

    def lines(name, *rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines(
        "c4_sample.jsonl",
        *({"prefix": f"Document number {i} tells of", "gold_completion": f" {i * i} sheep."} for i in range(41)),
    )
    lines("lambada_openai_test.jsonl", {"text": "He went to the door"})
    lines("gsm8k_test.jsonl", {"question": "How many are two?", "answer": "2"})
    for name in ("raw_arc_easy.jsonl", "raw_piqa.jsonl"):
        lines(name, {"query": f"Question of {name}", "choices": ["wrong", "right"], "gold": 1})
    for name in ("tinyshakespeare.txt", "tinystories_30KB.txt"):
        (folder / name).write_text(f"First lines of {name}.\n\nSecond lines.\n")
    return folder


def test_every_20th_document_of_c4_is_held_out_and_the_rest_is_trained_on(small_lm, data):
    train, held_out = small_lm.documents(data)
    text, held_out_text = small_lm.texts(train, held_out, 0)
    assert held_out_text.split("\n\n") == [f"Document number {i} tells of {i * i} sheep." for i in (0, 20, 40)]
    for i in range(41):
        assert (f"Document number {i} tells of {i * i} sheep." in text) == (i not in (0, 20, 40))
    for other in (
        "door",
        "two?\n2",
        "raw_arc_easy.jsonl right",
        "raw_piqa.jsonl right",
        "tinyshakespeare.txt.\n\nSecond",
    ):
        assert other in text
    assert "wrong" not in text


def test_a_held_out_document_that_is_trained_on_too_is_refused(small_lm):
    with pytest.raises(SystemExit, match="1 held-out documents are in the training text; the first begins 'twice'"):
        small_lm.texts({"a": ["once", "more than twice"]}, ["never", "twice"], 0)


def test_windows_share_one_token_by_hand(small_lm):
    assert small_lm.windows_of(torch.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_an_epoch_sees_a_window_once_and_another_epoch_other_windows(small_lm, plan, ids):
    ids = torch.arange(len(ids))
    steps = small_lm.steps_of(ids, plan)
    assert steps == 16
    epochs = [torch.cat([small_lm.batch_of(ids, plan, e * steps + s) for s in range(steps)]) for e in (0, 1)]
    for seen in epochs:
        assert seen.shape == (16 * 4, 9)
        assert len(seen[:, 0].unique()) == len(seen)
    assert not torch.equal(*epochs)


def test_the_learning_rate_by_hand(small_lm, plan):
    plan = dataclasses.replace(plan, rate=2.0, warmup=4)
    assert small_lm.rate_of(plan, 0, 0.0) == pytest.approx(0.5)
    assert small_lm.rate_of(plan, 9, 0.0) == pytest.approx(2.0)
    # a third of the way: (1 + cos 60 degrees) / 2 = 3/4
    assert small_lm.rate_of(plan, 9, 1 / 3) == pytest.approx(2 * (0.01 + 0.99 * 0.75))
    assert small_lm.rate_of(plan, 9, 1.0) == pytest.approx(0.02)


def test_a_run_that_was_ended_continues_as_if_it_had_not_been(small_lm, plan, ids, tmp_path, monkeypatch):
    undisturbed = small_lm.train(plan, ids, ids[:50], tmp_path / "a.pt")
    assert undisturbed["step"] == 8
    batch_of = small_lm.batch_of

    def ends(ids, plan, step):
        if step == 5:
            raise KeyboardInterrupt
        return batch_of(ids, plan, step)

    monkeypatch.setattr(small_lm, "batch_of", ends)
    with pytest.raises(KeyboardInterrupt):
        small_lm.train(plan, ids, ids[:50], tmp_path / "b.pt")
    asked = []
    monkeypatch.setattr(small_lm, "batch_of", lambda ids, plan, step: asked.append(step) or batch_of(ids, plan, step))
    continued = small_lm.train(plan, ids, ids[:50], tmp_path / "b.pt")
    assert asked == [4, 5, 6, 7]
    assert continued["losses"] == undisturbed["losses"]
    assert list(continued["losses"]) == [2, 4, 6, 8]
    assert_close(continued["model"], undisturbed["model"], rtol=0, atol=0)
    assert_close(continued["best"], undisturbed["best"], rtol=0, atol=0)
    with pytest.raises(SystemExit, match="of another plan"):
        small_lm.train(dataclasses.replace(plan, rate=1.0), ids, ids[:50], tmp_path / "b.pt")


def test_the_seconds_before_a_kill_count_and_the_clock_ends_a_run(small_lm, plan, ids, tmp_path):
    plan = dataclasses.replace(plan, seconds=7.5, every=100)
    # asked once before the first step, then once a step: a second each; the evaluation at the end asks once more
    state = small_lm.train(plan, ids, ids[:50], tmp_path / "a.pt", iter(range(100)).__next__)
    assert (state["step"], state["seconds"]) == (7, 9)
    again = small_lm.train(plan, ids, ids[:50], tmp_path / "a.pt", iter(range(100)).__next__)
    assert (again["step"], again["seconds"]) == (7, 9)
    more = dataclasses.replace(plan, seconds=11.0)
    later = small_lm.train(more, ids, ids[:50], tmp_path / "a.pt", iter(range(100)).__next__)
    assert (later["step"], later["plan"]) == (8, dataclasses.asdict(more))


def test_the_weights_that_are_kept_have_the_least_held_out_loss(small_lm, plan, ids, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, 1.0, 2.0]), []

    def evaluate(model, windows):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(small_lm, "evaluate", evaluate)
    state = small_lm.train(plan, ids, ids[:50], tmp_path / "a.pt")
    assert_close(state["best"], seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1]["model.norm.weight"], seen[3]["model.norm.weight"])


def test_unigrams_by_hand(small_lm):
    # counts 2, 1, 0 and one more each: 3/6, 2/6, 1/6
    found = small_lm.unigram_loss(torch.tensor([0, 0, 1]), torch.tensor([0, 2]))
    assert found == pytest.approx((math.log(2) + math.log(6)) / 2)


def test_the_folder_loads_and_its_recipe_says_what_it_is(small_lm, plan, data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    folder = small_lm.fetch(plan, data)
    assert folder.name == "model"
    assert sorted(f.name for f in folder.parent.iterdir()) == ["held_out.txt", "model", "recipe.json", "train.txt"]
    recipe = json.loads((folder.parent / "recipe.json").read_text())
    assert recipe["plan"] == dataclasses.asdict(plan)
    assert recipe["documents"]["c4_sample.jsonl"] == 38

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert recipe["parameters"] == sum(p.numel() for p in model.parameters())
    text = (folder.parent / "held_out.txt").read_bytes().decode()
    ids = tokenizer(text).input_ids
    assert (len(ids), tokenizer.decode(ids), len(tokenizer)) == (recipe["tokens"]["held_out"], text, 280)
    loss = small_lm.evaluate(model.float(), small_lm.windows_of(torch.tensor(ids), plan.window))
    assert recipe["held_out_loss"] == loss
    assert recipe["held_out_bits_per_byte"] == pytest.approx(loss / math.log(2) * len(ids) / len(text.encode()))
    # a finished model is not trained again
    monkeypatch.setattr(small_lm, "train", None)
    assert small_lm.fetch(plan, data) == folder


def test_without_the_text_it_says_so(small_lm, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="absent is absent"):
        small_lm.fetch(plan, tmp_path / "absent")
