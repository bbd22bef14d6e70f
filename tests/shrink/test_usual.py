"""What goes where nobody said what may: of neurons, heads and layers those that the model can lose."""

import json

import pytest
import tiny
from plans import asked

from secateurs.base.errors import PlanError
from secateurs.shrink.cuts import Cuts
from secateurs.shrink.plan import ShrinkPlan
from secateurs.shrink.run import shrink

HEADS = "this gpt_neox's config cannot state fewer heads of the same width"


def plan(source, words, **options):
    small = {"samples": 4, "seqlen": 24, "prompt": 16, "new": 4, "eval_windows": 0, "multiple": 4}
    return asked(ShrinkPlan, str(source), "params=0.9x", calibration=str(words), **small, **options)


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("neox"), "gpt_neox")


def test_heads_that_a_config_cannot_state_stay_and_it_is_said(neox, words, tmp_path):
    told = []
    report = shrink(plan(neox, words), tmp_path / "run", say=told.append)
    assert report["left"]["parameters"] <= 0.9 * report["dense"]["parameters"]
    assert report["left"]["heads"] == report["dense"]["heads"]
    assert told[0] == report["warnings"][0] == f"units heads stay: {HEADS}"
    # what was chosen is part of the run's plan, which the same command finds again
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["units"] == ["mlp", "layers"]
    assert shrink(plan(neox, words), tmp_path / "run") == report


def test_units_that_were_named_are_refused_and_not_left_out(neox, words, tmp_path):
    for named in (("mlp", "heads", "layers"), ("heads",)):
        with pytest.raises(PlanError, match=f"^units heads: {HEADS}; leave it out of --units$"):
            shrink(plan(neox, words, units=named), tmp_path / "run")


def test_naming_the_usual_units_of_a_model_that_has_them_all_is_the_same_run(llama, words, tmp_path):
    report = shrink(plan(llama, words), tmp_path / "run")
    assert not any("stay" in sentence for sentence in report["warnings"])
    assert shrink(plan(llama, words, units=("mlp", "heads", "layers")), tmp_path / "run") == report


def test_a_model_that_can_lose_none_of_them_is_refused_with_all_reasons(neox, words, tmp_path, monkeypatch):
    kinds = ("mlp", "heads", "layers", "experts", "hidden")
    monkeypatch.setattr(Cuts, "refuses", lambda self, kind: f"no {kind} here" if kind in kinds else None)
    with pytest.raises(PlanError) as found:
        shrink(plan(neox, words), tmp_path / "run")
    assert str(found.value) == (
        "nothing of mlp, heads, layers can go: mlp: no mlp here; heads: no heads here; layers: no layers here; --units can name queries"
    )
    assert not (tmp_path / "run").exists()
