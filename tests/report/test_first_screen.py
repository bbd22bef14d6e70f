"""Round axes, what a floor means on the chart, and what candidates are called in words."""

import pytest

from secateurs.report import charts
from secateurs.report.cited import Cited
from secateurs.report.first_screen import measure_of, of_decision, of_run, words_of

QUALITY = {"ppl_dense": {"value": 8.0, "low": 7.0, "high": 9.0, "n": 8}}
FOUND = {"quality": QUALITY, "compared": {"arc": {"dense": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 30}}}}


def test_axes_have_round_numbers():
    assert charts.round_axis([1.0, 1.15, 2.04]) == ([0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2], False)
    assert charts.round_axis([0.5, 1.0]) == ([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1], False)
    # nothing below zero where nothing is
    assert charts.round_axis([0.0, 0.4]) == ([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], False)
    assert charts.round_axis([-0.04, 0.0]) == ([-0.05, -0.04, -0.03, -0.02, -0.01, 0.0, 0.01], False)
    assert charts.round_axis([1.0]) == ([0.99, 0.995, 1.0, 1.005, 1.01], False)
    # over a factor of five: 1, 2, 5 of each decade
    assert charts.round_axis([1.0, 1.3, 24.0]) == ([1.0, 2.0, 5.0, 10.0, 20.0, 50.0], True)


@pytest.mark.parametrize(
    "values", [[1.0], [0.0], [0.9999, 1.0001], [3e-5, 4e-4, 1e-4], [1, 1e6], [-3.0, 5.0], [0.97, 1.0, 1.03]]
)
def test_an_axis_encloses_its_values_with_few_ticks(values):
    ticks, log = charts.round_axis(values)
    assert ticks[0] <= min(values)
    assert max(values) <= ticks[-1]
    assert 2 <= len(ticks) <= (22 if log else 9)
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("gate", "path", "dense", "floor", "lower"),
    [
        ("ppl<=+60%", "quality/ppl_ratio", 1.0, 1.6, True),
        # 12 over the dense model's 8
        ("ppl<=12", "quality/ppl_ratio", 1.0, 1.5, True),
        ("kl<=0.1", "quality/kl", 0.0, 0.1, True),
        ("agree>=0.9", "quality/agree", 1.0, 0.9, False),
        ("arc>=0.35", "compared/arc/pruned", 0.5, 0.35, False),
        ("arc>=dense-0.02", "compared/arc/difference", 0.0, -0.02, False),
    ],
)
def test_a_floor_is_drawn_on_the_scale_it_is_held_on(gate, path, dense, floor, lower):
    found = measure_of([gate, "kl<=5"], FOUND)
    assert (found.path, found.dense, found.lower_is_better, found.gate) == (path, dense, lower, gate)
    assert found.floor == pytest.approx(floor)


def test_without_a_floor_quality_is_perplexity():
    assert measure_of([], FOUND).floor is None
    # nothing was measured that an absolute floor could be held against
    assert measure_of(["ppl<=12"], None).floor is None
    assert measure_of(["arc>=0.35"], {"quality": QUALITY}).path == "quality/ppl_ratio"


def test_without_a_floor_what_was_measured_is_shown_and_named():
    one = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 20}
    none = {"windows": 20, "tokens": 20, "unit": "images", "ppl_dense": None}
    found = {name: measure_of([], {"quality": {**none, name: one}}) for name in ("cosine", "kl", "error")}
    assert [m.path for m in found.values()] == ["quality/cosine", "quality/kl", "quality/error"]
    assert found["kl"].title == "KL to dense (nats an input)"
    agree = measure_of(["agree>=0.9"], {"quality": {**none, "agree": one}})
    assert (agree.title, agree.floor) == ("agreement with dense (share of inputs)", 0.9)
    report = {"gate": [], "machine": {"processor": "p", "isa": "i", "threads": 1}, "plan": {"pattern": "2:4"},
        "totals": {"sparsity": 0.5}, "quality": {**none, "cosine": one}}  # fmt: skip
    screen = of_run("run", Cited("report.json", report), None)
    assert screen.columns[0] == "Cosine with dense embeddings"
    assert "erplexity" not in str(screen.verdict)
    assert "0.9" in str(screen.rows[1].cells[0])


def test_candidates_in_words():
    assert words_of("0.7") == "70% zeros, unstructured"
    assert words_of("1:4") == "75% zeros: 1 kept of every 4"
    assert words_of("2:4") == "50% zeros: 2 kept of every 4"
    assert words_of("16x16:0.5") == "50% zeros, in 16x16 blocks"
    assert words_of("shrink:mlp+heads:params=0.9x") == "mlp and heads removed until params=0.9x"
    assert words_of("what is this") == ""


def decided(**more):
    row = {
        "candidate": "0.5", "status": "dropped", "reason": "would not pay: no kernel", "quality": None, "gate": [], "passed": None,
        "measured": False, "seconds_ratio": {"value": 1.0, "low": 1.0, "high": 1.0}, "bytes_ratio": 0.7, "folder": None,
    }  # fmt: skip
    return {
        "rows": [row], "recommended": "dense", "estimated": False, "profile": "P", "machine": {"isa": "I"},
        "plan": {"prompt": 1, "new": 2, "gate": ["ppl<=+5%"]}, **more,
    }  # fmt: skip


def test_where_nothing_pays_the_dense_model_is_shipped():
    screen = of_decision(Cited("decide.json", decided()), {})
    assert screen.verdict.striptags() == (
        "Ship the dense model: no candidate both holds the floor ppl<=+5% and saves time or bytes, measured on P (I)."
    )
    assert screen.good is False
    assert [row.name for row in screen.rows] == ["dense", "0.5"]
    assert screen.rows[1].cells[-1] == "not pruned: would not pay"
    # no chart of the dense model alone
    assert screen.points == ()


def test_an_estimate_is_called_one():
    screen = of_decision(
        Cited("decide.json", decided(estimated=True, plan={"prompt": 1, "new": 2, "evaluation": {"gates": ["kl<=1"]}})),
        {},
    )
    assert "estimated for P, not measured" in screen.verdict.striptags()
    assert "floor kl<=1" in screen.verdict.striptags()
    assert screen.seconds == "seconds of a request, estimated"
    assert screen.columns[1] == "KL to dense (nats a token)"


def seconds(value):
    return {"value": value, "low": value, "high": value}


def rivals():
    one = {"value": 1.02, "low": 1.01, "high": 1.03, "n": 8}
    same = {"name": "llama.cpp, 16 bits", "words": "in llama.cpp at 16 bits", "engine": "llama.cpp 1.2, built with AVX2",
            "same_weights": True, "seconds_ratio": seconds(1.0), "bytes_ratio": 1.0, "quality": None, "passed": True}  # fmt: skip
    rounded = {
        **same,
        "name": "llama.cpp, 4 bits",
        "words": "in llama.cpp at 4 bits",
        "same_weights": False,
        "bytes_ratio": 0.3,
    }
    return [same, {**rounded, "seconds_ratio": seconds(0.6), "quality": {"ppl_ratio": one}}]


def test_the_dense_model_in_another_engine_is_a_row_and_may_be_what_is_shipped():
    screen = of_decision(Cited("decide.json", decided(rivals=rivals())), {})
    assert screen.verdict.striptags().startswith("Ship the dense model in llama.cpp at 4 bits: no candidate")
    assert [row.name for row in screen.rows] == ["dense", "llama.cpp, 16 bits", "llama.cpp, 4 bits", "0.5"]
    assert screen.rows[2].words == "llama.cpp 1.2, built with AVX2"
    assert [str(cell.striptags()).split(" ")[0] for cell in screen.rows[2].cells] == [
        "1.020x",
        "0.60x",
        "0.30x",
        "holds",
    ]
    assert str(screen.rows[1].cells[0]) == "1x"
    # the one that has a perplexity of its own is a point, beside dense
    assert [(p["name"], p["state"]) for p in screen.points[1:]] == [("llama.cpp, 4 bits", "dense in another engine")]
    missed = rivals()
    missed[1]["passed"] = False
    screen = of_decision(Cited("decide.json", decided(rivals=missed)), {})
    assert screen.verdict.striptags().startswith("Ship the dense model in llama.cpp at 16 bits: no candidate")


def timed(*variants):
    rows = [
        {"name": name, "how": how, "same_weights": same, **{stage: {"tokens_per_second": 10 * speed, "speedup": speed}
         for stage in ("decode", "prefill")}} for name, how, same, speed in variants
    ]  # fmt: skip
    return Cited("bench.json", {"variants": rows})


def said_of_run(*variants):
    report = {"gate": [], "machine": {"processor": "p", "isa": "i", "threads": 1}, "plan": {"pattern": "2:4"},
        "totals": {"sparsity": 0.5}, "quality": None}  # fmt: skip
    screen = of_run("run", Cited("report.json", report), timed(*variants))
    return screen.verdict.striptags(), screen.rows[0].words


def test_a_run_is_held_against_the_fastest_way_to_run_dense_and_says_what_fewer_bits_do_in_llama_cpp():
    ours = ("packed", "packed", False, 0.9)
    said, words = said_of_run(
        ("llama.cpp, 16 bits", "llama.cpp", True, 1.0), ("dense", "dense", True, 0.5),
        ("llama.cpp, 8 bits", "llama.cpp", False, 1.6), ("llama.cpp, 4 bits", "llama.cpp", False, 2.5), ours,
    )  # fmt: skip
    assert (
        "decoding at 0.90x the speed, prompts at 0.90x the speed of the dense model at its fastest here (llama.cpp, 16 bits), rounded it "
        "decodes at 1.60x in llama.cpp, 8 bits, 2.50x in llama.cpp, 4 bits (quality not measured)"
    ) in said
    assert words == "the model as it is: llama.cpp, 16 bits"
    said, words = said_of_run(("dense", "dense", True, 1.0), ours)
    assert "at its fastest here (dense), not compared with llama.cpp, measured on p" in said
    assert words == "the model as it is"
