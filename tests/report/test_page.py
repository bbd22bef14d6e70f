"""The report in a real browser: no error, no request, and every number equal to the file it names."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from decisions import module, plan, stated_bench
from plans import asked
from visit import Visit, needs_browser

from secateurs.base.errors import OutputError
from secateurs.decide.decide import decide
from secateurs.report import page


@needs_browser
def test_a_browser_shows_it_without_a_network(run):
    file = page.write([run])
    visit = Visit(file)
    assert visit.errors == []
    assert visit.requests == [file.as_uri()]
    assert "Ship 0." in visit.text
    names = {f"chart-{n}" for n in ("seconds-0", "replicas-0", "speed-decode", "speed-prefill", "bytes", "error-0")}
    assert names <= set(visit.charts)
    # every layer has the same share, which a map of one colour would not show
    assert "chart-zeros-0" not in visit.charts
    assert "about the same share in each" in visit.text
    assert all(chart["label"] and chart["paths"] for chart in visit.charts.values())
    assert visit.first_stop == "To the decision"


@needs_browser
def test_numbers_on_the_page_are_those_of_the_files(run):
    visit = Visit(page.write([run]))
    assert len(visit.numbers) > 100
    sources = {}
    for source, key, form, shown in visit.numbers:
        at = sources.setdefault(source, json.loads(Path(source).read_text()))
        for part in key.split("/"):
            at = at[int(part)] if isinstance(at, list) else at[part]
        assert form.format(at) == shown, (source, key)
    assert {s.rsplit("/", 1)[1] for s in sources} == {"decide.json", "report.json", "timing.json", "fleet.json"}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_colour_scheme(run, scheme):
    visit = Visit(page.write([run]), width=390, color_scheme=scheme)
    assert visit.overflow <= 0
    # text in charts has the colour of the page's own
    assert visit.ink[0] == visit.ink[1]
    light = sum(int(c) for c in visit.ink[0].removeprefix("rgb(").removesuffix(")").split(",")) > 382
    assert light == (scheme == "dark")


def test_it_is_small_and_quickly_made(run):
    began = time.perf_counter()
    file = page.write([run])
    # a limit that only a fault exceeds; what it takes is in docs/log.md
    assert time.perf_counter() - began < 60
    assert file.stat().st_size < 5_000_000
    text = file.read_text()
    assert "src=" not in text.split("<script>")[0]


@needs_browser
def test_two_runs_stand_side_by_side(run, tmp_path):
    visit = Visit(page.write([run, run / "candidates" / "0.5"], tmp_path / "both.html"))
    assert visit.errors == []
    assert str(run) in visit.text
    assert "One run, no decision: 0.5 has" in visit.text


def test_incomplete_runs_are_refused(run, tmp_path):
    with pytest.raises(OutputError, match=r"no run directory: it has no plan\.json"):
        page.write([tmp_path / "none"])
    (run / "decide.json").unlink()
    with pytest.raises(OutputError, match="is incomplete: the decision is not made yet"):
        page.write([run])
    inside = run / "candidates" / "0.5"
    report = json.loads((inside / "report.json").read_text())
    (inside / "report.json").write_text(json.dumps({**report, "status": "pruned"}))
    with pytest.raises(OutputError, match="is incomplete: it is pruned"):
        page.write([inside])
    (inside / "report.json").unlink()
    with pytest.raises(OutputError, match=r"is incomplete: it has no report\.json"):
        page.write([inside])


@pytest.fixture(scope="module")
def integers(tmp_path_factory, llama, words):
    """A decision between dense integers and zeros with bits."""
    folder = tmp_path_factory.mktemp("integers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "bench", stated_bench([]))
        decide(plan(llama, words, folder, candidates=("0.5+int8",), integers=True), folder / "run")
    return folder / "run"


@needs_browser
def test_integers_have_a_page_whose_numbers_are_those_of_the_files(integers):
    visit = Visit(page.write([integers]), details=True)
    assert visit.errors == []
    text = " ".join(visit.text.split())
    assert "Ship dense int4 (all weights kept, as int4/64)" in text
    assert "Zeros do not pay here." in text
    assert "There are no scales" not in text
    assert "layers quantized, their weights as int4/64 in" in text
    for source, key, form, shown in visit.numbers:
        at = json.loads(Path(source).read_text())
        for part in key.split("/"):
            at = at[int(part)] if isinstance(at, list) else at[part]
        assert form.format(at) == shown, (source, key)
    keys = {key for _, key, _, _ in visit.numbers}
    assert {"zeros", "rows/0/bits", "rows/2/beside/best_dense/seconds", "rows/0/through/few/kl", "totals/bits"} <= keys


def test_what_a_model_is_called_cannot_break_the_page(run):
    decision = json.loads((run / "decide.json").read_text())
    decision["rows"][0]["reason"] = "</script><script>alert(1)</script>"
    decision["rows"][0]["candidate"] = "</script><b>"
    (run / "decide.json").write_text(json.dumps(decision))
    text = page.write([run]).read_text()
    assert "<script>alert(1)" not in text
    assert "</script><b>" not in text


@needs_browser
def test_a_recovered_model_has_a_page_too(run, words, tmp_path):
    from secateurs.train import RecoverPlan, recover

    chosen = asked(RecoverPlan,
        str(run / "candidates" / "0.5"), calibration=str(words), samples=8, seqlen=32, steps=2, batch=2, eval_text=str(words), eval_windows=8,
        eval_seqlen=32,
    )  # fmt: skip
    report = recover(chosen, tmp_path / "recovered")
    visit = Visit(page.write([tmp_path / "recovered"]))
    assert visit.errors == []
    assert f"All {report['zeros']:,} zeros of {report['of_weights']:,} weights are still zero" in visit.text


def test_commands_on_the_page_make_the_same_run(run):
    plan_of = json.loads((run / "plan.json").read_text())
    words_of = page._command(
        "decide", {**plan_of, "evaluation": {**plan_of["evaluation"], "tasks_limit": 0}, "profile": None}, run
    ).split()
    assert words_of[:2] == ["secateurs", "decide"]
    assert "--tasks-limit" in words_of
    assert "--profile" not in words_of
    shrink = page._command(
        "shrink",
        {"model": "m", "budget": "params=0.9x", "units": ["mlp", "heads"], "refit": False},
        run,
    )
    assert "--units mlp,heads --no-refit" in shrink
    # a plan whose choices of text are parts of their own
    parts = {
        "calibration": {"source": "a.txt", "samples": 4, "seqlen": 32, "seed": 1},
        "evaluation": {
            "text": "b.txt",
            "windows": 8,
            "seqlen": 16,
            "tasks": ["arc"],
            "tasks_path": None,
            "tasks_limit": 5,
            "gates": ["ppl<=+5%"],
        },
    }
    same = {
        "calibration": "a.txt", "samples": 4, "seqlen": 32, "seed": 1, "eval_text": "b.txt", "eval_windows": 8, "eval_seqlen": 16,
        "tasks": ["arc"], "tasks_path": None, "tasks_limit": 5, "gate": ["ppl<=+5%"],
    }  # fmt: skip
    assert page.flat({"model": "m", **parts}) == {"model": "m", **same}
    assert "--calibration a.txt --samples 4" in page._command("prune", {"model": "m", **parts}, run)


def test_bytes_of_a_packed_file_by_what_they_hold():
    # 8 x 64 in bf16: 256 survivors, 32 zeros behind them, two panels of masks; and a layer that stayed dense
    layers = [
        {"format": "bitmask", "shape": [8, 64], "dense_nbytes": 1024, "survivors": 256, "nbytes": 640},
        {"format": "dense", "shape": [8, 64], "dense_nbytes": 1024, "survivors": 512, "nbytes": 1024},
    ]
    found = page._parts({"bytes": {"dense": 4000, "packed": 2000}, "packed": {"layers": layers}})
    parts = {part["part"]: part["nbytes"] for part in found if part["model"] == "shipped"}
    assert parts == {"kept weights": 512, "positions (a bit a weight)": 64, "padding": 64, "rest, dense": 1360}
    # 4 bits in groups of 32: 256 bytes of all integers or 130 of 256 survivors, 64 behind them, 2 x 2 x 8 of scales
    on = {"shape": [8, 64], "dense_nbytes": 1024, "grid": "int4/32"}
    integers = [
        {**on, "format": "dense", "survivors": 512, "length": 320, "nbytes": 352},
        {**on, "format": "bitmask", "survivors": 256, "length": 194, "nbytes": 290},
    ]
    held = page._parts({"bytes": {"dense": 4000, "packed": 2000}, "packed": {"layers": integers}})
    assert {part["part"]: part["nbytes"] for part in held[1:]} == {
        "kept weights": 386, "positions (a bit a weight)": 64, "scales": 64, "padding": 128, "rest, dense": 1358,
    }  # fmt: skip
    screen = SimpleNamespace(seconds="", points=[])
    model = {"name": "0.5", "timed": None, "parts": found, "layers": []}
    chart = page._charts(
        [{"folder": "run", "screen": screen, "decision": None, "fleet": None, "models": [model]}], [model]
    )["bytes"]
    bars = {(bar["name"], bar["part"]): bar["megabytes"] for bar in chart["data"]["values"]}
    assert bars["dense", "dense weights"] == 0.004
    assert bars["0.5", "kept weights"] == 0.000512
