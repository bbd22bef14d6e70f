"""tools/zoo.py: a dozen types that differ most are pruned exactly, and a planted error is seen."""

import dataclasses
import sys
from pathlib import Path

import pytest
import tiny
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(TOOLS))
    import zoo

    yield zoo
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def case(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    model = zoo.zoo_types.small("causal", "llama")
    zoo.zoo_types.save(model, folder / "dense", "causal", tiny.tokenizer())
    text = str(tiny.text(folder / "words"))
    return zoo.zoo_checks.case_of(model, folder / "dense", text, text, folder)


@pytest.mark.timeout(300)
def test_a_dozen_that_differ_most_are_pruned_exactly_or_refused(zoo, capsys):
    assert zoo.main(["--check"]) == 0
    said = capsys.readouterr().out
    assert f"{len(zoo.FEW)} types, 0 silent errors, 0 crashes" in said
    assert "no small model" not in said


@pytest.mark.parametrize(
    "name", ["saved", "streamed", "magnitude", "sparsegpt", "in memory", "2:4", "reordered", "packed"]
)
def test_every_check_holds_for_llama(zoo, case, name):
    if name == "packed":
        # its folder is what is packed
        zoo.zoo_checks.check("magnitude", case)
    assert zoo.zoo_checks.check(name, case)["result"] == "yes"


def spoiled(zoo, case, monkeypatch, change):
    """The case with a product whose saved models are changed."""
    load = type(case).load

    def changed(self, folder):
        model = load(self, folder)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(type(case), "load", changed)


def move(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.copy_(weight.roll(1, 0))


def restore(model):
    model.model.layers[0].self_attn.q_proj.weight[0] = 1.0


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("magnitude", move, "q_proj.weight in the saved folder is not what was masked by hand"),
        ("magnitude", restore, "q_proj has"),
        ("sparsegpt", restore, "q_proj has"),
        ("2:4", restore, "q_proj keeps more than two of four"),
        ("reordered", move, "reordered: output 0 is off"),
    ],
)
def test_a_planted_error_is_no_check_mark(zoo, case, monkeypatch, name, change, said):
    spoiled(zoo, case, monkeypatch, change)
    found = zoo.zoo_checks.check(name, case)
    assert found["result"] == "wrong"
    assert said in found["note"]


def test_mixtures_without_some_experts_are_held_against_never_choosing_them(zoo, tmp_path, monkeypatch):
    model = zoo.zoo_types.small("causal", "mixtral")
    zoo.zoo_types.save(model, tmp_path / "dense", "causal", tiny.tokenizer())
    text = str(tiny.text(tmp_path / "words"))
    case = zoo.zoo_checks.case_of(model, tmp_path / "dense", text, text, tmp_path)
    assert zoo.zoo_checks.check("experts", case) == {"result": "yes", "note": "3 of 4 experts"}
    # the router's rows of the experts that are left, in another order
    spoiled(
        zoo,
        case,
        monkeypatch,
        lambda left: left.model.layers[0].mlp.gate.weight.copy_(left.model.layers[0].mlp.gate.weight.flip(0)),
    )
    assert zoo.zoo_checks.check("experts", case)["result"] == "wrong"


def test_the_product_is_held_to_what_transformers_loads_where_that_is_another_model(zoo, case, monkeypatch):
    spoiled(zoo, case, monkeypatch, move)
    own = dataclasses.replace(case, runs={})
    found = zoo.zoo_checks.check("saved", own)
    assert found["result"] == "not here"
    assert (
        "transformers itself loads another model than it saved: loaded from its own folder: output 0" in found["note"]
    )
    assert not torch.equal(*(c.model.model.layers[0].self_attn.q_proj.weight for c in (own, case)))

    def fails(*_):
        raise TypeError("no such file")

    monkeypatch.setattr(type(case), "load", fails)
    found = zoo.zoo_checks.check("saved", own)
    assert found == {"result": "not here", "note": "transformers itself does not load what it saved: no such file"}


def test_statistics_of_other_inputs_are_noticed(zoo, case, monkeypatch):
    """As a walk that gave a block other inputs than the whole model does."""
    import secateurs as sc

    prune = sc.prune

    def wrong(model, plan, calibration=None):
        return prune(model, plan, calibration=[{k: v.flip(1) for k, v in b.items()} for b in calibration])

    monkeypatch.setattr(sc, "prune", wrong)
    found = zoo.zoo_checks.check("in memory", case)
    assert found["result"] == "wrong"
    assert "is that of hooks on the whole model" in found["note"]


def test_a_crash_and_a_hang_of_one_type_are_results(zoo, monkeypatch):
    def dies(*_):
        import os

        os._exit(7)

    monkeypatch.setattr(zoo, "tried", dies)
    assert zoo.apart("causal", "llama", (), 30)["refused"] == "its process died with exit code 7"

    def hangs(*_):
        import time

        time.sleep(60)

    monkeypatch.setattr(zoo, "tried", hangs)
    assert zoo.apart("causal", "llama", (), 0.2)["refused"] == "it took more than 0 seconds"


def test_a_silent_error_ends_with_1_and_is_on_the_page(zoo, monkeypatch, capsys):
    found = {
        "class": "X",
        "seconds": 1.0,
        "parameters": 1,
        "checks": {"magnitude": {"result": "wrong", "note": "off by 2"}},
    }
    monkeypatch.setattr(zoo, "apart", lambda *_: found)
    assert zoo.main(["--check", "--types", "llama"]) == 1
    assert "causal llama, magnitude: off by 2" in capsys.readouterr().out
    from zoo_page import page

    said = page({"causal llama": found}, "5", "today", 3)
    assert "2 of 3 types have not been tried yet" in said
    assert "**WRONG** 1" in said
    assert "1. off by 2" in said
    assert "| **all** | 1 | 0 (0%) | 0 | 0 | 1 |" in said


def test_a_silent_error_in_any_column_is_counted(zoo):
    from zoo_page import page

    good = {name: {"result": "yes", "note": ""} for name in zoo.zoo_checks.CHECKS}
    found = {"class": "X", "seconds": 1.0, "checks": {**good, "in memory": {"result": "wrong", "note": "96%"}}}
    assert "| **all** | 1 | 1 (100%) | 0 | 0 | 1 |" in page({"causal llama": found}, "5", "today", 1)


def test_results_are_kept_for_each_version_of_transformers_and_forgotten_with_other_code(zoo, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(zoo, "RESULTS", tmp_path / "zoo.json")
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "models.md")
    monkeypatch.setattr(zoo, "apart", lambda kind, name, *_: asked.append(name) or {"refused": "no", "seconds": 0.0})
    counts = []
    for made_of in [
        ("5.23.0", "a"),
        ("5.24.0", "a"),
        ("5.23.0", "a"),
        ("5.24.0", "a"),
        ("5.23.0", "b"),
        ("5.24.0", "a"),
    ]:
        monkeypatch.setattr(zoo, "made_of", lambda made_of=made_of: made_of)
        zoo.main(["--kinds", "causal", "--types", "llama"])
        counts.append(len(asked))
        assert f"transformers {made_of[0]} lists" in (tmp_path / "models.md").read_text().replace("\n", " ")
    assert counts == [1, 2, 2, 2, 3, 3]


def test_types_that_a_version_does_not_have_are_left_out_by_name(zoo, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "FEW", (("causal", "llama"), ("causal", "of_tomorrow"), ("vision", "llama")))
    monkeypatch.setattr(zoo, "apart", lambda *_: {"refused": "no", "seconds": 0.0})
    monkeypatch.setattr(zoo, "made_of", lambda: ("5.9.1", "a"))
    zoo.main(["--check"])
    said = capsys.readouterr().out
    assert "vision llama is left out: transformers 5.9.1 lists no such type" in said
    assert "causal of_tomorrow is left out" in said
    assert "\n1 types, " in said
    zoo.main(["--check", "--types", "lama"])
    assert "lama is left out: transformers 5.9.1 lists no such type" in capsys.readouterr().out
