"""Gates: what can be read, the bad end of the interval decides, and how many more samples would."""

import numpy as np
import pytest

from secateurs.base.estimate import Estimate, ratio_of, reach, score_of
from secateurs.quality import gates
from secateurs.quality.gates import Gate
from secateurs.quality.tasks import compare


def quality(**values):
    """Estimates without a spread, but for those given as (value, low, high)."""
    found = {"ppl_dense": 10.0, "ppl": 10.5, "kl": 0.1, "agree": 0.9, **values}
    found.setdefault("ppl_ratio", found["ppl"] / 10)
    spread = {name: v if isinstance(v, tuple) else (v, v, v) for name, v in found.items()}
    return {name: vars(Estimate(*v, 30)) for name, v in spread.items()}


def compared(difference, pruned=(0.4, 0.35, 0.45)):
    return {
        "sums": {
            "metric": "acc",
            "pruned": vars(Estimate(*pruned, 100)),
            "difference": vars(Estimate(*difference, 100)),
        }
    }


@pytest.mark.parametrize(
    ("gate", "holds", "misses"),
    [
        ("ppl<=+5%", {"ppl": 10.5}, {"ppl": 10.51}),
        ("ppl<=12.0", {"ppl": 12.0}, {"ppl": 12.1}),
        ("kl<=0.1", {"kl": 0.1}, {"kl": 0.11}),
        ("agree>=0.9", {"agree": 0.9}, {"agree": 0.89}),
        (" agree >= 0.9 ", {"agree": 0.95}, {"agree": 0.1}),
        ("kl<=0", {"kl": 0.0}, {"kl": 0.01}),
        ("agree>=90%", {"agree": 0.9}, {"agree": 0.89}),
        ("cosine>=0.98", {"cosine": 0.98}, {"cosine": 0.97}),
        ("neighbours>=85%", {"neighbours": 0.85}, {"neighbours": 0.84}),
        ("error<=0.1", {"error": 0.1}, {"error": 0.11}),
    ],
)
def test_gates_hold_and_miss(gate, holds, misses):
    good, bad = Gate.parse(gate).judge(quality(**holds), {}), Gate.parse(gate).judge(quality(**misses), {})
    assert (good["verdict"], good["passed"], good["missed"]) == ("passed", True, None)
    assert (bad["verdict"], bad["passed"]) == ("missed", False)


def test_a_missed_gate_says_by_how_much():
    missed = Gate.parse("ppl<=+5%").judge(quality(ppl=21.0), {})["missed"]
    assert missed == (
        "gate ppl<=+5% missed: ppl over the dense model's is 2.1 [2.1, 2.1] over 30 windows, the limit is 1.05, off by 1.05 (100.0%)"
    )


def test_a_gate_says_what_its_samples_are():
    found = {**quality(cosine=(0.95, 0.9, 0.97)), "unit": "images"}
    missed = Gate.parse("cosine>=0.93").judge(found, {})["missed"]
    assert "cosine is 0.95 [0.9, 0.97] over 30 images" in missed
    # 0.05 to the end, 0.02 to the limit
    assert "more images would settle it" in missed
    few = {"cosine": vars(Estimate(0.99, 0.99, 0.99, 7)), "unit": "recordings"}
    assert "fewer than 8 recordings cannot pass it" in Gate.parse("cosine>=0.93").judge(few, {})["missed"]


@pytest.mark.parametrize("gate", ["kl<=0.2", "agree>=0.85"])
def test_a_mean_that_holds_is_no_pass_while_its_interval_does_not(gate):
    found = quality(kl=(0.15, 0.08, 0.22), agree=(0.86, 0.84, 0.88))
    verdict = Gate.parse(gate).judge(found, {})
    assert (verdict["verdict"], verdict["passed"]) == ("undecided", False)
    # kl: 0.07 to the end, 0.05 to the limit; agree: 0.02 and 0.01; of 30 windows an end is reach(30) deviations away
    nearer = {"kl<=0.2": 5 / 7, "agree>=0.85": 1 / 2}[gate]
    total = 30 + verdict["more"]
    assert reach(total) <= nearer * reach(30) < reach(total - 1)
    assert f"about {verdict['more']} more windows would settle it if mean and spread stay" in verdict["missed"]


def test_a_mean_that_misses_is_undecided_while_its_good_end_holds():
    verdict = Gate.parse("kl<=0.1").judge(quality(kl=(0.12, 0.08, 0.2)), {})
    # 0.04 to the good end, 0.02 to the limit
    assert verdict["verdict"] == "undecided"
    assert reach(30 + verdict["more"]) <= reach(30) / 2 < reach(29 + verdict["more"])


def test_perplexities_are_compared_as_logarithms():
    # ends at 1.2 e^-0.2 and 1.2 e^0.2, the limit at 1.2 e^0.1
    ratio = (1.2, 1.2 * np.exp(-0.2), 1.2 * np.exp(0.2))
    verdict = Gate("ppl<=+32.6%", "ppl", 1.2 * np.exp(0.1), True).judge(quality(ppl_ratio=ratio), {})
    assert reach(30 + verdict["more"]) <= reach(30) / 2 * 1.0001
    assert reach(30) / 2 < reach(29 + verdict["more"])


def test_a_mean_at_the_limit_is_settled_by_nothing():
    verdict = Gate.parse("kl<=0.1").judge(quality(kl=(0.1, 0.08, 0.2)), {})
    assert verdict["more"] is None
    assert "no number of samples" in verdict["missed"]


def test_more_samples_settle_what_was_said_that_they_would():
    draw = np.random.default_rng(0)
    few = score_of((draw.random(200) < 0.42).astype(float), 0.0, 1.0)
    gate = Gate.parse("sums>=0.36")
    verdict = gate.judge(None, {"sums": {"pruned": vars(few)}})
    assert verdict["verdict"] == "undecided"
    # the same answers over and over: the mean stays, the interval narrows
    scores = np.repeat(
        [1.0, 0.0], [round(few.value * (200 + verdict["more"])), round((1 - few.value) * (200 + verdict["more"]))]
    )
    low = score_of(scores, 0.0, 1.0).low
    assert low == pytest.approx(0.36, abs=0.005)


def test_the_windows_that_were_asked_for_settle_it_about_half_of_the_time():
    """Ten windows whose mean is half a deviation from the limit, and then as many more as the gate asked for."""
    random, gate, settled = np.random.default_rng(0), Gate.parse("kl<=0.5"), []
    for _ in range(200):
        few = random.normal(0.45, 0.1, 10)
        found = gate.judge({"kl": vars(ratio_of(few, np.ones(10)))}, {})
        if found["verdict"] == "undecided" and found["more"] < 500:
            all_of_them = np.append(few, random.normal(0.45, 0.1, found["more"]))
            settled.append(gate.judge({"kl": vars(ratio_of(all_of_them, np.ones(len(all_of_them))))}, {})["passed"])
    assert len(settled) > 100
    assert 0.4 < np.mean(settled) < 0.8


@pytest.mark.parametrize(("n", "more"), [(1, 7), (7, 1)])
def test_few_windows_decide_nothing(n, more):
    verdict = Gate.parse("kl<=0.2").judge({"kl": vars(Estimate(0.1, 0.1, 0.1, n))}, {})
    assert (verdict["verdict"], verdict["more"]) == ("undecided", more)
    assert "fewer than 8 windows cannot pass it" in verdict["missed"]


def test_one_window_misses_nothing():
    verdict = Gate.parse("kl<=0.2").judge({"kl": vars(Estimate(0.3, 0.3, 0.3, 1))}, {})
    assert (verdict["verdict"], verdict["more"]) == ("undecided", 7)
    assert "one of them shows no spread" in verdict["missed"]


def test_few_windows_say_how_many_their_spread_asks_for():
    # 0.09 to the end, 0.01 to the limit
    verdict = Gate.parse("kl<=0.2").judge({"kl": vars(Estimate(0.19, 0.12, 0.28, 7))}, {})
    assert verdict["verdict"] == "undecided"
    assert reach(7 + verdict["more"]) <= reach(7) / 9 < reach(6 + verdict["more"])
    assert f"fewer than 8 windows cannot pass it; about {verdict['more']} more windows would" in verdict["missed"]
    # questions: 0.2 to the end, 0.05 to the limit: 10 * 4^2
    few = {"sums": {"pruned": vars(Estimate(0.4, 0.2, 0.6, 10))}}
    assert Gate.parse("sums>=0.35").judge(None, few)["more"] == 150


def test_equal_answers_are_not_certain():
    ones = {"sums": {"metric": "acc", "scores": [1.0] * 100}}
    found = compare(ones, ones)["sums"]
    # 1 - 0.025^(1 / 100): as many in a hundred may be wrong and not be seen
    assert (found["pruned"]["low"], found["pruned"]["high"]) == (pytest.approx(0.9638, abs=0.001), 1.0)
    assert found["difference"]["high"] == pytest.approx(0.0362, abs=0.001)
    assert found["difference"]["low"] == pytest.approx(-0.0362, abs=0.001)
    assert Gate.parse("sums>=dense-0.02").judge(None, {"sums": found})["verdict"] == "undecided"


def test_tasks_pass_on_the_low_end_of_the_paired_difference():
    assert Gate.parse("sums>=dense-0.02").judge(None, compared((0.0, -0.015, 0.015)))["passed"]
    assert Gate.parse("sums>=dense-0.02").judge(None, compared((0.0, -0.03, 0.03)))["verdict"] == "undecided"
    assert Gate.parse("sums>=dense-0.02").judge(None, compared((-0.2, -0.3, -0.1)))["verdict"] == "missed"
    assert Gate.parse("sums>=0.35").judge(None, compared((0, 0, 0)))["passed"]
    assert "was not measured" in Gate.parse("sums>=0.35").judge(None, {})["missed"]


def test_questions_are_paired():
    scores = np.array([1.0, 0.0] * 50)
    result = {"sums": {"metric": "acc", "scores": list(scores)}}
    same = compare(result, result)["sums"]
    # no answer differs, however many are wrong
    assert same["difference"]["low"] == pytest.approx(-0.0362, abs=0.001)
    # Clopper and Pearson's interval of 50 of 100
    assert same["dense"]["low"] == pytest.approx(0.398, abs=0.004)
    assert same["dense"]["high"] == pytest.approx(0.602, abs=0.004)


@pytest.mark.parametrize(
    "text",
    ["ppl", "ppl>=3", "agree<=0.5", "ppl<=5%", "kl<=+5%", "ppl<=+5", "bleu<=1", "ppl<=-1", "ppl<=nan", "sums>=2", "agree>=dense-0.1",
     "sums>=+0.1", "sums>=30%", "cosine<=0.9", "error>=0.1", "error<=+5%", "agree>=+5%", "agree>=101%", "cosine>=98%",
     "neighbours>=dense-0.1"],
)  # fmt: skip
def test_unreadable_gates_are_refused(text):
    with pytest.raises(ValueError, match="cannot read gate"):
        Gate.parse(text)


def test_a_gate_on_a_task_that_is_not_run_is_refused():
    gates.check(["sums>=0.5"], ["sums"])
    with pytest.raises(
        ValueError, match=r"asks about sums, which is none of ppl, .*, error and no task that is run: arc"
    ):
        gates.check(["sums>=0.5"], ["arc"])


def test_a_difference_is_what_the_pruned_model_gained():
    dense, pruned = ({"sums": {"metric": "acc", "scores": scores * 10}} for scores in ([1, 1, 0, 0], [1, 0, 0, 0]))
    found = compare(dense, pruned)["sums"]
    assert [found[name]["value"] for name in ("dense", "pruned", "difference")] == [0.5, 0.25, -0.25]
    assert found["difference"]["low"] < -0.25 < found["difference"]["high"] < 0
