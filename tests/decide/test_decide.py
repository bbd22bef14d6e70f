"""Decisions: what is dropped and why, the front, the recommendation, resuming; speeds are stated, pruning is real."""

import json
import math
import os
import shutil

import pytest
import tiny
import torch
from decisions import SPEEDS, module, plan, profile, stated_bench

from secateurs.base.errors import CalibrationError, CheckpointError, DeviceError, OutputError, PlanError
from secateurs.decide.decide import decide, front
from secateurs.decide.through_kernels import difference
from secateurs.machine.profile import DeviceProfile
from secateurs.quality import compare


@pytest.fixture
def stated(monkeypatch):
    runs = []
    monkeypatch.setattr(module, "bench", stated_bench(runs))
    return runs


def test_the_fastest_that_passes_is_recommended(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "shrink:params=0.9x"))
    result = decide(chosen, tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    # 10 prompt tokens at 100/s and 10 new ones at 10/s: 1.1 s; packed 0.1 + 10/15; shrunk 10/125 + 10/12
    assert rows["0.5"]["seconds_ratio"]["value"] == pytest.approx((0.1 + 10 / 15) / 1.1)
    assert rows["shrink:params=0.9x"]["reason"] is None
    assert rows["shrink:params=0.9x"]["seconds_ratio"]["value"] == pytest.approx((10 / 125 + 10 / 12) / 1.1)
    assert result["recommended"] == "0.5"
    assert result["sentence"].startswith("Ship 0.5: a request takes 0.70x the time")
    assert all(r["measured"] and r["passed"] for r in rows.values())
    assert rows["0.5"]["bytes_ratio"] == rows["0.5"]["bytes"]["packed"] / rows["0.5"]["bytes"]["dense"]


def test_nothing_is_measured_twice(tmp_path, llama, words, stated, monkeypatch):
    monkeypatch.setenv("SECATEURS_CACHE", str(tmp_path / "cache"))
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "2:4", "shrink:params=0.9x"))
    walked, stream = [], compare.stream

    def counted(model, batches, *rest, **more):
        # calibration text is looked at, too, but has another number of windows
        walked.append(len(batches))
        return stream(model, batches, *rest, **more)

    monkeypatch.setattr(compare, "stream", counted)
    first = decide(chosen, tmp_path / "run")
    assert len(stated) == 3
    # three candidates and the dense model once
    assert walked.count(chosen.evaluation.windows) == 4
    assert len({str(row["quality"]["ppl_dense"]) for row in first["rows"]}) == 1
    monkeypatch.setattr(module, "pack_run", None)
    assert decide(chosen, tmp_path / "run") == first
    assert len(stated) == 3


def test_what_was_found_of_another_model_is_not_used_again(tmp_path, llama, words, stated):
    source = tmp_path / "dense"
    shutil.copytree(llama, source)
    chosen = plan(source, words, tmp_path, candidates=("0.5",))
    decide(chosen, tmp_path / "run")
    os.utime(source / "config.json", (1, 1))
    with pytest.raises(OutputError, match=r"dense has changed since .*run was begun; delete"):
        decide(chosen, tmp_path / "run")


def test_a_kill_between_candidates_loses_nothing(tmp_path, llama, words, stated, monkeypatch):
    chosen = plan(llama, words, tmp_path)
    whole = decide(chosen, tmp_path / "whole")

    class KilledError(BaseException):
        pass

    def show(rows):
        if any(r["status"] == "measured" for r in rows):
            raise KilledError

    with pytest.raises(KilledError):
        decide(chosen, tmp_path / "run", show=show)
    assert not (tmp_path / "run" / "decide.json").exists()
    again = decide(chosen, tmp_path / "run")
    assert [r["quality"] for r in again["rows"]] == [r["quality"] for r in whole["rows"]]
    assert again["sentence"] == whole["sentence"]


def test_more_of_what_misses_the_floor_is_not_tried(tmp_path, llama, words, stated):
    result = decide(plan(llama, words, tmp_path, candidates=("0.9", "0.5", "0.7"), gate=("kl<=0",)), tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    assert rows["0.5"]["status"] == "measured"
    assert rows["0.5"]["reason"].startswith("gate kl<=0 missed")
    for text in ("0.7", "0.9"):
        assert rows[text]["status"] == "dropped"
        assert "0.5 removes less and already fails" in rows[text]["reason"]
    assert result["recommended"] == "dense"
    assert "Ship the dense model" in result["sentence"]


def test_what_cannot_pay_is_dropped_before_it_is_pruned(tmp_path, llama, words, stated):
    slow = profile(tmp_path / "slow.json", speedup=1.0)
    result = decide(plan(llama, words, tmp_path, profile=slow), tmp_path / "run")
    assert [r["status"] for r in result["rows"]] == ["dropped"] * 2
    assert all("would not pay" in r["reason"] for r in result["rows"])
    assert not (tmp_path / "run" / "candidates").exists()
    assert stated == []


def test_a_budget_drops_by_estimate_and_by_measurement(tmp_path, llama, words, stated, monkeypatch):
    tight = decide(plan(llama, words, tmp_path, budget="bytes=0.3x"), tmp_path / "a")
    assert all("by estimate, it takes 0.7" in r["reason"] for r in tight["rows"])
    # by estimate 0.79x of the time: 62% of the parameters are in layers that take 0.66x; measured (0.1 + 10 / 12) / 1.1
    monkeypatch.setitem(SPEEDS, "packed", (1.2, 1.0))
    close = decide(plan(llama, words, tmp_path, budget="seconds=0.8x"), tmp_path / "b")
    assert all(r["status"] == "measured" for r in close["rows"])
    assert all("it takes 0.85x the seconds, and the budget is 0.8x" in r["reason"] for r in close["rows"])
    assert close["recommended"] == "dense"


def test_a_candidate_that_fails_leaves_the_others(tmp_path, llama, words, stated):
    result = decide(plan(llama, words, tmp_path, candidates=("0.5", "shrink:params=0.01x")), tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    assert rows["shrink:params=0.01x"]["status"] == "failed"
    assert "budget" in rows["shrink:params=0.01x"]["reason"]
    assert result["recommended"] == "0.5"


def test_a_candidate_that_fails_where_others_miss_the_floor_is_no_fault(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "shrink:params=0.01x"), gate=(" kl<=0 ",))
    result = decide(chosen, tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    assert rows["0.5"]["reason"].startswith("gate kl<=0 missed")
    assert rows["shrink:params=0.01x"]["status"] == "failed"
    assert result["recommended"] == "dense"


def test_units_that_nobody_named_are_those_that_the_model_has(tmp_path, words, stated):
    source = tiny.save(tmp_path / "dense", "gpt2")
    chosen = plan(source, words, tmp_path, candidates=("shrink:params=0.95x",))
    (row,) = decide(chosen, tmp_path / "run")["rows"]
    assert row["status"] == "measured"
    made = json.loads((tmp_path / "run" / row["folder"] / "plan.json").read_text())
    assert made["units"] == ["mlp", "layers"]


def test_a_time_that_this_clock_would_keep_is_not_another_machine_s(tmp_path, llama, words, stated):
    foreign = profile(tmp_path / "foreign.json", here=False)
    chosen = plan(llama, words, tmp_path, profile=foreign, foreign=True, candidates=("0.5", "shrink:latency=0.8x"))
    rows = {r["candidate"]: r for r in decide(chosen, tmp_path / "run")["rows"]}
    assert rows["shrink:latency=0.8x"]["status"] == "dropped"
    assert "can only be measured on the machine itself" in rows["shrink:latency=0.8x"]["reason"]
    assert rows["0.5"]["status"] == "measured"


def test_a_budget_in_seconds_is_not_dropped_by_a_fraction(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("shrink:seconds=0.5",), budget="seconds=0.4x")
    row = module._Decision(chosen, tmp_path / "run", lambda *a: None, lambda rows: None)
    row.here, row.estimated, row.dtype, row.share = DeviceProfile.read(tmp_path / "profile.json"), False, "fp32", 0.6
    assert row._estimate(chosen.parsed[0])["status"] == "estimated"


def test_estimated_seconds_by_hand(tmp_path, llama, words):
    chosen = plan(llama, words, tmp_path, candidates=("0.5", "shrink:params=0.5x"), prompt=1000, new=11)
    row = module._Decision(chosen, tmp_path / "run", lambda *a: None, lambda rows: None)
    row.here, row.estimated, row.share = DeviceProfile.read(tmp_path / "profile.json"), False, 0.6
    found = {}
    for row.dtype in ("fp32", "bf16"):
        found[row.dtype] = [row._estimate(candidate)["seconds_ratio"]["value"] for candidate in chosen.parsed]
    # 1e11 products and 1e10 bytes a second, two products and 4 or 2 bytes a weight: 20 ns for the prompt, then 4.4 or 2.2 ns
    for dtype, tokens in (("fp32", 4.4), ("bf16", 2.2)):
        # packed layers are as fast for prompts and 1.6 times as fast for tokens; they are 60% of the model
        packed = (20 + tokens / 1.6) / (20 + tokens)
        assert found[dtype] == pytest.approx([1 - 0.6 * (1 - packed), 0.5])


def test_a_fault_of_every_candidate_is_no_decision(tmp_path, llama, words, stated):
    with pytest.raises(CalibrationError, match="no text file 'nowhere.txt'"):
        decide(plan(llama, words, tmp_path, calibration="nowhere.txt"), tmp_path / "run")
    assert not (tmp_path / "run" / "decide.json").exists()
    with pytest.raises(CalibrationError, match="no task 'sums'"):
        decide(
            plan(llama, words, tmp_path, gate=("sums>=0.5",), tasks=("sums",), tasks_path=str(tmp_path)),
            tmp_path / "again",
        )
    assert not (tmp_path / "again").exists()


def test_a_request_that_the_model_cannot_hold_is_refused_before_a_folder_is_made(tmp_path, llama, words, stated):
    with pytest.raises(
        PlanError, match="a request of 120 tokens and 9 new ones was asked for, the model has 128 positions"
    ):
        decide(plan(llama, words, tmp_path, prompt=120, new=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_times_are_of_this_plan_and_of_this_machine(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("0.5",), profile=None)
    kept = tmp_path / "run" / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.DeviceProfile, "at_hand", classmethod(lambda cls: cls.read(tmp_path / "profile.json")))
        decide(chosen, tmp_path / "run")
    # bench.json is the user's: other prompts in it change nothing
    timing = tmp_path / "run" / "candidates" / "0.5" / "timing.json"
    found = json.loads(timing.read_text())
    timing.with_name("bench.json").write_text(json.dumps({**found, "prompt": 99}))
    decide(chosen, tmp_path / "run")
    timing.write_text(json.dumps({**found, "prompt": 99}))
    with pytest.raises(PlanError, match="was not measured by this plan"):
        decide(chosen, tmp_path / "run")
    profile(kept, here=False)
    with pytest.raises(DeviceError, match="was begun on stated, this is another machine"):
        decide(chosen, tmp_path / "run")


def test_what_is_slower_does_not_pay_by_its_bytes(tmp_path, llama, words, stated, monkeypatch):
    monkeypatch.setitem(SPEEDS, "packed", (0.8, 0.8))
    slow = decide(plan(llama, words, tmp_path, candidates=("0.5",)), tmp_path / "a")
    assert "takes 1.25x the seconds" in slow["rows"][0]["reason"]
    wanted = decide(plan(llama, words, tmp_path, candidates=("0.5",), budget="bytes=0.9x"), tmp_path / "b")
    assert wanted["recommended"] == "0.5"


def test_a_foreign_profile_is_refused_or_only_estimates(tmp_path, llama, words, stated):
    foreign = profile(tmp_path / "foreign.json", here=False)
    with pytest.raises(DeviceError, match=r"is of stated, this machine is .* --allow-foreign-profile"):
        decide(plan(llama, words, tmp_path, profile=foreign), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    result = decide(plan(llama, words, tmp_path, profile=foreign, foreign=True), tmp_path / "run")
    assert stated == []
    assert result["estimated"]
    assert not any(r["measured"] for r in result["rows"])
    assert "by estimate for stated" in result["sentence"]


def test_published_hardware_decides_by_estimates(tmp_path, llama, words, stated):
    result = decide(plan(llama, words, tmp_path, profile="a100", candidates=("0.5", "2:4")), tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    assert rows["0.5"]["status"] == "dropped"
    assert result["recommended"] == "2:4"


def test_a_gain_that_may_be_none_is_no_gain():
    def faster(value, high):
        return module._Decision._faster({"value": value, "low": value - 0.1, "high": high})

    assert faster(0.9, 0.99)
    assert not faster(0.9, 1.01)
    # less than noise
    assert not faster(0.96, 0.97)


@pytest.mark.parametrize(("repeats", "reason"), [
    (5, None), (3, "does not pay: 0.80x the seconds and 0.98x the bytes; 3 runs cannot tell faster from slower, give --repeats 5"),
])  # fmt: skip
def test_few_runs_do_not_tell_faster_from_slower(tmp_path, llama, words, repeats, reason):
    """The slowest of three runs is below the median in one of eight measurements."""
    decision = module._Decision(
        plan(llama, words, tmp_path, repeats=repeats), tmp_path, lambda *a: None, lambda rows: None
    )
    decision.estimated = False
    row = {
        "passed": True,
        "reason": None,
        "bytes_ratio": 0.98,
        "seconds_ratio": {"value": 0.8, "low": 0.7, "high": 0.9},
    }
    decision._judge(row)
    assert row["reason"] == reason


def test_the_front_keeps_what_no_other_beats():
    def row(name, seconds, ppl, status="measured"):
        return {
            "candidate": name,
            "status": status,
            "seconds_ratio": {"value": seconds},
            "quality": {"ppl_ratio": {"value": ppl}},
        }

    rows = [row("a", 0.7, 1.1), row("b", 0.6, 1.2), row("c", 0.65, 1.3), row("d", 0.5, 1.0, "dropped")]
    assert [r["candidate"] for r in front(rows)] == ["b", "a"]


@pytest.mark.parametrize(
    ("more", "words_"),
    [
        ({"gate": ()}, "a decision needs a floor"),
        ({"gate": ("ppl",)}, "cannot read gate"),
        ({"gate": ("sums>=0.5",)}, "no task that is run"),
        ({"gate": ("agre>=0.9",), "candidates": ("shrink:params=0.9x",)}, "no task that is run"),
        ({"candidates": ()}, "no candidates"),
        ({"candidates": ("many",)}, "cannot read candidate 'many'"),
        ({"budget": "seconds=2"}, "cannot read budget"),
        ({"effort": "heroic"}, "unknown effort"),
        ({"new": 1}, "at least 1, 2 and 1"),
    ],
)
def test_bad_plans_are_refused(tmp_path, llama, words, more, words_):
    with pytest.raises(PlanError, match=words_):
        plan(llama, words, tmp_path, **more)


def test_nothing_is_made_for_a_model_that_is_not_there(tmp_path, llama, words):
    with pytest.raises(CheckpointError):
        decide(plan(tmp_path / "none", words, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        decide(plan(llama, words, tmp_path), tmp_path / "mine")


def test_decide_json_is_plain(tmp_path, llama, words, stated):
    result = decide(plan(llama, words, tmp_path, candidates=("0.5",)), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "decide.json").read_text()) == json.loads(json.dumps(result))


def test_dense_integers_are_candidates_whatever_was_named(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("0.5+int8", "0.5+int4"), integers=True)
    result = decide(chosen, tmp_path / "run")
    rows = {r["candidate"]: r for r in result["rows"]}
    assert list(rows) == ["int8", "int4", "0.5+int8", "0.5+int4"]
    # groups are as wide as the layers' 32 inputs, of down_proj 64: 8 bits and a scale of 16 for each
    shapes = [(64, 32), (64, 32), (32, 64), (32, 32), (16, 32), (16, 32), (32, 32)]
    scales = sum(16 * o for o, _ in shapes)
    weights = sum(o * i for o, i in shapes)
    assert rows["int8"]["bits"] == pytest.approx(8 + scales / weights)
    assert rows["int4"]["bits"] == pytest.approx(4 + scales / weights)
    assert rows["0.5+int4"]["status"] == "dropped"
    assert rows["0.5+int4"]["reason"].startswith("would not pay beside int4: at 50% zeros int4 without them is 0.80x")
    # all are stated to be as fast, and zeros take fewer bytes than int8 but not than int4
    assert rows["0.5+int8"]["reason"].startswith(
        "does not pay beside dense int4, which holds the floor too: 1.00x its seconds"
    )
    assert result["recommended"] == "int4"
    assert result["sentence"].startswith("Ship dense int4: a request takes 0.70x the time")
    assert "Zeros do not pay here." in result["sentence"]
    assert json.loads((tmp_path / "run" / "decide.json").read_text())["zeros"] == result["zeros"]


def test_left_out_integers_are_said(tmp_path, llama, words, stated):
    said = decide(plan(llama, words, tmp_path, candidates=("0.5",)), tmp_path / "run")["left_out"]
    assert (
        said[0] == "dense int8 and int4 were left out, as asked (--no-integers): whether zeros beat them is not known"
    )


def test_a_smaller_model_on_a_grid_is_held_against_the_dense_one(tmp_path, llama, words, stated):
    chosen = plan(llama, words, tmp_path, candidates=("shrink:params=0.9x", "shrink:params=0.9x+int8"))
    result = decide(chosen, tmp_path / "run")
    smaller, quantized = result["rows"]
    assert quantized["status"] == "measured"
    assert quantized["quality"]["ppl_dense"] == smaller["quality"]["ppl_dense"]
    assert quantized["bytes"]["dense"] == smaller["bytes"]["dense"]
    assert quantized["bytes_ratio"] < smaller["bytes_ratio"]
    # made once
    assert len(list((tmp_path / "run" / "candidates").iterdir())) == 2
    # the dense model is timed beside it, not the smaller one
    timed = json.loads((tmp_path / "run" / quantized["folder"] / "timing.json").read_text())
    assert [v["folder"] for v in timed["variants"]] == [
        str(llama),
        str(tmp_path / "run" / quantized["folder"] / "packed"),
    ]
    assert decide(chosen, tmp_path / "run") == result


def test_quality_through_the_kernels_is_that_of_the_packed_model(tmp_path, llama, words, stated):
    (row,) = decide(plan(llama, words, tmp_path, candidates=("int4",)), tmp_path / "run")["rows"]
    told = row["through"]
    assert (told["windows"], told["tokens"]) == (4, 32)
    assert all("_int4_" in name and name.endswith("stream") for name in told["few"]["kernels"])
    assert all("_int4_" in name and name.endswith("tile") for name in told["many"]["kernels"])
    # inputs in 8 bits move predictions a little, and no more than that
    assert told["few"]["kl"] == pytest.approx(told["plain"]["kl"], rel=0.5)
    assert told["few"]["kl"] != told["plain"]["kl"]


def test_differences_of_predictions_by_hand():
    # two tokens of which the second is predicted: 1/2 and 1/2 by the dense model, 3/4 and 1/4 by ours; the second one comes
    dense, ours = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [9.0, 9.0]]).log()
    found = difference([dense], [ours], [torch.tensor([0, 1])])
    assert found["kl"] == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert found["ppl_ratio"] == pytest.approx(2.0)
