"""Shares that are tried on the model: the nearest to the dense one is found, and nothing stays of the trial."""

import importlib

import pytest
import tiny
import torch

import secateurs as sc
from secateurs.model.batches import batched
from secateurs.model.checkpoint import Checkpoint
from secateurs.prune.allocation import Option, Share
from secateurs.prune.assign import _alike
from secateurs.prune.block import Guide
from secateurs.prune.trial import Trial, nearest_to_dense
from secateurs.report.bits import trial_words

COARSE, FINE, HALF = (Share("unstructured", zeros, grid) for zeros, grid in ((0.0, "int2"), (0.0, "int8"), (0.5, None)))


def batches():
    torch.manual_seed(0)
    return batched(torch.randint(0, 250, (4, 16)))


def silent(stage, done, total):
    pass


def layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_nearest_is_found_with_and_without_logits_and_the_model_is_as_it_was(kind):
    model = tiny.make(kind).eval()
    plan = sc.Plan(budget="bits=3", effort="balanced")
    candidates = [dict.fromkeys(layers(model), share) for share in (COARSE, FINE, HALF)]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert nearest_to_dense(model, None, batches(), plan, Guide(), candidates, silent).chosen == 1
    assert nearest_to_dense(model, None, batches(), plan, Guide(), candidates[::-1], silent).chosen == 1
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_folder_is_walked_as_a_model_in_memory_is(tmp_path):
    source = Checkpoint(tiny.save(tmp_path / "dense", "llama"))
    model = source.skeleton()
    candidates = [dict.fromkeys(layers(model), share) for share in (COARSE, FINE)]
    seen = []
    found = nearest_to_dense(
        model, source, batches(), sc.Plan(budget="bits=3"), Guide(), candidates, lambda *place: seen.append(place),
        tmp_path / "trial",
    )  # fmt: skip
    assert found.chosen == 1
    assert not (tmp_path / "trial").exists()
    # the bar reaches its end, and not beyond
    assert seen[-1][1] == seen[-1][2]
    assert len({total for _, _, total in seen}) == 1


def test_one_candidate_is_not_tried(monkeypatch):
    monkeypatch.setattr(importlib.import_module("secateurs.prune.trial"), "dense_ends", None)
    model = tiny.make("llama")
    plan = sc.Plan(budget="bits=3")
    assert (
        nearest_to_dense(model, None, batches(), plan, Guide(), [dict.fromkeys(layers(model), FINE)], silent) == Trial()
    )


def test_the_share_for_all_is_the_best_that_all_could_have_and_pay():
    a = [Option(COARSE, 2.0, 5.0), Option(FINE, 8.0, 1.0), Option(HALF, 6.0, 3.0)]
    b = [Option(COARSE, 2.0, 5.0), Option(FINE, 8.0, 1.0)]
    assert list(_alike({"a": a, "b": b}, 16.0)) == [{"a": FINE, "b": FINE}]
    # what one layer cannot have is no share for all, though it would fit
    assert list(_alike({"a": a, "b": b}, 15.9)) == [{"a": COARSE, "b": COARSE}]
    assert list(_alike({"a": a, "b": b}, 3.9)) == []


def test_a_budget_takes_the_shares_that_the_trial_found_better(monkeypatch):
    live, tried = importlib.import_module("secateurs.prune.live"), []

    def second(model, loader, batches, plan, guide, candidates, progress):
        tried.extend(candidates)
        return Trial(1, {"tried": len(candidates)})

    monkeypatch.setattr(live, "nearest_to_dense", second)
    model = tiny.make("llama")
    report = sc.prune(
        model, sc.Plan(budget="bits=4.6", effort="fast", group="32"), calibration=torch.randint(0, 250, (8, 16))
    )
    assert len({*tried[1].values()}) == 1
    assert {r.grid for r in report.pruned} == {next(iter(tried[1].values())).grid}
    assert report.trial == {"tried": 2}


@pytest.mark.parametrize(("kind", "unit"), [("llama", "nats a token"), ("bert", "squared distance")])
def test_what_was_tried_is_told_with_its_distance_of_a_token(kind, unit):
    model = tiny.make(kind).eval()
    model = model.bert if kind == "bert" else model
    mixed = {name: (HALF if i else COARSE) for i, name in enumerate(layers(model))}
    candidates = [
        mixed,
        dict.fromkeys(layers(model), HALF),
        dict.fromkeys(layers(model), Share("unstructured", 0.0, None)),
    ]
    facts = nearest_to_dense(model, None, batches(), sc.Plan(budget="bits=3"), Guide(), candidates, silent).facts
    assert (facts["unit"], facts["tokens"]) == (unit, 4 * 16)
    assert [row["share"] for row in facts["candidates"]] == [None, "50% zeros", "as it is"]
    assert [row["taken"] for row in facts["candidates"]] == [False, False, True]
    # half of the tokens are as far on average, not half as far
    apart = [row["apart"] for row in facts["candidates"]]
    assert apart[2] == pytest.approx(0, abs=1e-6)
    assert min(apart[:2]) > 0.01
    twice = [b for b in batches() for _ in range(2)]
    again = nearest_to_dense(model, None, twice, sc.Plan(budget="bits=3"), Guide(), candidates, silent).facts
    assert again["candidates"][1]["apart"] == pytest.approx(apart[1], rel=1e-5)


def test_what_was_tried_is_said_in_words():
    rows = [{"share": None, "apart": 0.25, "taken": False}, {"share": "int2/64", "apart": 0.2, "taken": True}]
    facts = {"unit": "nats a token", "tokens": 8192, "candidates": rows}
    assert trial_words(facts) == (
        "Tried on the model before tuning, on 8,192 calibration tokens: shares by layer: KL 0.25 nats a token; int2/64 for all "
        "layers: KL 0.2 nats a token; so all layers are int2/64"
    )
    rows[0]["taken"], rows[1]["taken"] = True, False
    assert trial_words(facts).endswith("so each layer has its own share")
