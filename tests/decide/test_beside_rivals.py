"""Candidates beside the dense model in other engines: which count as dense, which must be beaten, what is said; by hand."""

import json

import pytest
from decisions import SPEEDS, module, plan, stated_bench

from secateurs.decide import beside_rivals
from secateurs.decide.decide import decide
from secateurs.decide.realize import Candidate
from secateurs.decide.verdict import sentence
from secateurs.machine import llama_cpp


def variant(name, prefill, decode, nbytes=100, **more):
    stages = {stage: {"samples": [rate] * 3} for stage, rate in (("prefill", prefill), ("decode", decode))}
    return {"name": name, "how": "dense", "rival": False, "same_weights": False, "weights_bytes": nbytes, "engine": None,
            "folder": name, **stages, **more}  # fmt: skip


def timed():
    """A prompt of 10 tokens and 11 new ones, in seconds: dense 1 + 1, in llama.cpp 1 + 0.5, rounded 0.5 + 0.5, ours 1 + 0.2."""
    theirs = {"how": "llama.cpp", "rival": True, "engine": "llama.cpp 1.2"}
    return {
        "prompt": 10, "new": 11,
        "variants": [
            variant("llama.cpp, 16 bits", 10, 20, 104, same_weights=True, **theirs),
            variant("dense", 10, 10, 100, same_weights=True),
            variant("llama.cpp, 4 bits", 20, 20, 25, **theirs),
            variant("packed", 10, 50, 50),
        ],
    }  # fmt: skip


def test_what_each_takes_by_hand():
    same, rounded = beside_rivals.beside(timed())
    assert (same["words"], same["same_weights"]) == ("in llama.cpp at 16 bits", True)
    assert (rounded["words"], rounded["same_weights"], rounded["engine"]) == (
        "in llama.cpp at 4 bits",
        False,
        "llama.cpp 1.2",
    )
    # ours over theirs
    assert same["seconds"] == {name: pytest.approx(1.2 / 1.5) for name in ("value", "low", "high")}
    assert rounded["seconds"]["value"] == pytest.approx(1.2)
    assert (same["bytes"], rounded["bytes"]) == (pytest.approx(50 / 104), 2)
    # theirs over the fastest dense way's seconds, and the dense folder's bytes
    assert (same["seconds_ratio"]["value"], rounded["seconds_ratio"]["value"]) == (1, pytest.approx(1 / 1.5))
    assert (same["bytes_ratio"], rounded["bytes_ratio"]) == (1.04, 0.25)


def row(passed=True, reason=None):
    return {"candidate": "0.5", "status": "measured", "reason": reason, "rivals": beside_rivals.beside(timed())}


@pytest.fixture
def known(tmp_path):
    """A folder in which the rounded rival was measured before."""

    def write(passed):
        facts = {"llama.cpp, 4 bits": {"quality": {"kl": {"value": 0.1}}, "gate": [], "passed": passed}}
        (tmp_path / "rivals.json").write_text(json.dumps(facts))
        return tmp_path

    return write


def test_what_a_rival_that_holds_the_floor_does_better_is_not_shipped(known):
    ours, missed = row(), row(reason="gate missed")
    found = beside_rivals.of_rows([missed, ours], None, known(True), None)
    assert ours["reason"] == (
        "does not pay beside the dense model in llama.cpp at 4 bits, which holds the floor too: 1.20x its seconds and 2.00x its bytes"
    )
    assert missed["reason"] == "gate missed"
    assert beside_rivals.to_ship(found)["name"] == "llama.cpp, 4 bits"
    said = sentence(None, {}, [ours], "", found, "a machine", False)
    assert said.startswith("Ship the dense model in llama.cpp at 4 bits: no candidate both passes the floor and pays")
    assert (
        "It takes 0.67x the time of the fastest way to run it unrounded and 0.25x the bytes, and holds the floor."
        in said
    )


def test_a_rival_that_misses_the_floor_stands_in_nobody_s_way(known):
    ours = row()
    found = beside_rivals.of_rows([ours], None, known(False), None)
    assert ours["reason"] is None
    # the fastest way to run the weights as they are
    assert beside_rivals.to_ship(found)["name"] == "llama.cpp, 16 bits"
    assert beside_rivals.sentence(ours, found) == (
        "It takes 0.80x the seconds and 0.48x the bytes of the dense model in llama.cpp at 16 bits, the fastest rival that holds the "
        "floor."
    )
    measured = {
        **ours,
        "quality": None,
        "seconds_ratio": {"value": 0.8, "low": 0.8, "high": 0.8},
        "bytes_ratio": 0.5,
        "gate": [],
    }
    said = sentence(measured, {"0.5": Candidate.parse("0.5")}, [measured], "", found, "a machine", False)
    assert said.startswith("Ship 0.5: a request takes 0.80x the time")
    assert said.endswith(beside_rivals.sentence(ours, found))
    # what pays by its bytes alone says so first
    as_slow = {**measured, "seconds_ratio": {"value": 1.04, "low": 1.02, "high": 1.06}}
    said = sentence(as_slow, {"0.5": Candidate.parse("0.5")}, [as_slow], "", found, "a machine", True)
    assert said.startswith(
        "Ship 0.5: the weights take 0.50x the bytes; a request is no faster, 1.04x the time (by estimate"
    )


def test_what_is_faster_by_noise_pays_only_by_its_bytes():
    def seconds(value, high=None):
        return {"value": value, "high": high or value}

    assert beside_rivals.pays(seconds(0.9), 3)
    assert not beside_rivals.pays(seconds(0.9, high=1.1), 1)
    assert not beside_rivals.pays(seconds(0.99), 1)
    assert beside_rivals.pays(seconds(1.04), 0.9)
    assert not beside_rivals.pays(seconds(1.1), 0.1)


def test_no_speedup_over_dense_is_claimed_where_an_engine_that_is_here_is_faster(tmp_path, llama, words, monkeypatch):
    monkeypatch.setattr(module, "bench", stated_bench([]))
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    monkeypatch.setitem(SPEEDS, "dense, torch.compile", (2.0, 1.0))
    result = decide(plan(llama, words, tmp_path, rivals=True, candidates=("0.5",)), tmp_path / "run")
    (ours,), (compiled,) = result["rows"], result["rivals"]
    # stated: 10 prompt tokens at 100/s; new ones at 10/s, at 15/s packed, at 20/s compiled
    assert compiled["words"] == "under torch.compile"
    assert ours["rivals"][0]["seconds"]["value"] == pytest.approx((0.1 + 10 / 15) / (0.1 + 10 / 20))
    assert ours["reason"].startswith("does not pay beside the dense model under torch.compile")
    assert (result["recommended"], ours["passed"]) == ("dense", True)
    assert result["sentence"].startswith("Ship the dense model under torch.compile: no candidate")
    assert any("pip install xllamacpp" in told for told in result["left_out"])
    assert not (tmp_path / "run" / "rivals").exists()


def test_a_slow_compiled_model_is_timed_beside_one_candidate_only(tmp_path, llama, words, monkeypatch):
    asked, was = [], stated_bench([])

    def bench(variants, *rest, **more):
        asked.append([v.how for v in variants])
        return was(variants, *rest, **more)

    monkeypatch.setattr(module, "bench", bench)
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    monkeypatch.setitem(SPEEDS, "dense, torch.compile", (0.5, 1.0))
    result = decide(plan(llama, words, tmp_path, rivals=True), tmp_path / "run")
    assert asked == [["dense", "compiled", "packed"], ["dense", "packed"]]
    slow = f"there it took {(0.1 + 10 / 5) / 1.1:.2f}x the seconds of dense"
    assert any(told.endswith(slow) for told in result["left_out"])


def test_what_was_not_timed_is_said(tmp_path, llama, words):
    given = plan(llama, words, tmp_path)
    assert "--no-rivals" in beside_rivals.lacks(given, False)[0]
    asked = plan(llama, words, tmp_path, rivals=True)
    assert beside_rivals.lacks(asked, False) == []
    assert beside_rivals.lacks(asked, True)[0].startswith("nothing was timed, so nothing is said of llama.cpp")
