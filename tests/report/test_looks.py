"""What a reader sees: nothing is cut, dense comes first, names in charts can be read, at every width and in print."""

import functools
import json
import re

import pytest
from crowd import CROWD
from visit import CHARTS, Visit, needs_browser, outside, overlapping

from secateurs.report import page

# 920: the narrowest at which tables are tables
WIDTHS = (1280, 920, 390)


def specs(file):
    return json.loads(
        re.search(r'<script id="specs" type="application/json">(.*?)</script>', file.read_text(), re.DOTALL)[1]
    )


# of the first screen: where its parts are, and what is left of its text without the numbers that name their source
FIRST = """() => {
    const bare = e => { const c = e.cloneNode(true); c.querySelectorAll('[data-from]').forEach(x => x.remove()); return c.textContent; };
    const cells = [...document.querySelectorAll('table.candidates td')].filter(c => c.dataset.label !== 'Verdict');
    return {
        bottoms: ['.verdict', 'table.candidates', '.either'].map(q => document.querySelector(q).getBoundingClientRect().bottom),
        verdict: document.querySelector('.verdict').innerText, bare: bare(document.querySelector('.verdict')),
        cells: cells.map(c => bare(c).trim().replace(/\\s+/g, ' ')),
        rows: [...document.querySelectorAll('table.candidates tbody tr')].map(r => r.innerText),
        states: [...document.querySelectorAll('table.candidates td[data-label=Verdict]')].map(c => c.innerText),
    };
}"""
# what small screens show beside a cell, the head of its column, and whether it is shown
LABELS = """() => [...document.querySelectorAll('table:not(.narrow)')].flatMap(t => {
    const names = [...t.tHead.rows[0].cells].map(c => c.textContent);
    return [...t.querySelectorAll('tbody td')].filter(c => c.textContent.trim()).map(c => {
        const shown = getComputedStyle(c, '::before');
        return [shown.content, names[c.cellIndex], shown.display];
    });
})"""


def look(tab):
    """All that tests ask of a page: its first screen, labels of cells, and the charts, then with the switch at bytes."""
    found = {"first": tab.evaluate(FIRST), "labels": tab.evaluate(LABELS), "seconds": tab.evaluate(CHARTS)}
    tab.focus(".switch input[value=seconds]")
    tab.keyboard.press("ArrowRight")
    return {**found, "bytes": tab.evaluate(CHARTS)}


@pytest.fixture(scope="module")
def seen(crowded):
    """seen(width): the page of a decision between many candidates, each width once."""
    file = page.write([crowded])
    return functools.cache(lambda width: Visit(file, width=width, height=800, details=True, do=look))


def chart_of(charts, name):
    return next(c for c in charts if c["name"] == name)


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_and_no_texts_collide(seen, width):
    visit = seen(width)
    assert visit.errors == []
    assert visit.overflow <= 0
    assert visit.cut == []
    # the walk found something to look at
    assert len(visit.cells) > 100
    charts = [*visit.did["seconds"], chart_of(visit.did["bytes"], "chart-bytes-0")]
    assert len(charts) >= 6
    for chart in charts:
        assert overlapping(chart) == [], chart["name"]
        assert outside(chart) == [], chart["name"]


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_every_point_has_its_name_and_no_mark_is_covered(seen, width):
    names = ["dense", *(row[0] for row in CROWD)]
    for across in ("seconds", "bytes"):
        chart = chart_of(seen(width).did[across], f"chart-{across}-0")
        assert sorted(t for t, *_ in chart["labels"]) == sorted(["floor ppl<=+60%", *names])
        assert len(chart["marks"]) == len(names)
        for text, left, top, right, bottom in chart["labels"]:
            for _, a, b, c, d in chart["marks"]:
                assert min(right, c) - max(left, a) < 1 or min(bottom, d) - max(top, b) < 1, text


@needs_browser
def test_the_first_screen_decides(seen):
    first = seen(1280).did["first"]
    assert max(first["bottoms"]) <= 800
    # what, gain, price with its interval, machine: in one sentence
    for part in ("Ship 0.5 (50% zeros", "0.66x the time [0.65x, 0.71x]", "0.65x the bytes", "1.180x the perplexity", "1.150x to 1.210x",
                 "floor ppl<=+60% holds", "measured on stated"):  # fmt: skip
        assert part in first["verdict"]
    assert first["verdict"].count(". ") == 0
    assert first["verdict"].endswith(".")
    # no number but those of the files, the interval's meaning, and what the candidate and the floor are called
    assert set(re.findall(r"\d+", first["bare"])) == {"50", "95", "60"}
    assert {c for c in first["cells"] if re.search(r"\d", c)} == {"1x itself", "1x decodes tokens/s", "1x"}


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_dense_is_the_first_row_and_every_state_is_a_word(seen, width):
    first = seen(width).did["first"]
    names = [row.split()[0] for row in first["rows"]]
    assert names == ["dense", *(row[0] for row in CROWD), "0.95"]
    assert first["states"] == [
        "the reference", "ship this", "holds the floor, but is slower", "misses ppl<=+60%", "ppl<=+60% undecided", "ppl<=+60% undecided",
        "misses ppl<=+60%", "misses ppl<=+60%", "not pruned: would not pay",
    ]  # fmt: skip


@needs_browser
def test_the_dense_point_and_the_floor_stand_where_their_numbers_are(seen, crowded):
    chart = chart_of(seen(1280).did["seconds"], "chart-seconds-0")
    middle = [(t, (left + right) / 2, (top + bottom) / 2) for t, left, top, right, bottom in chart["texts"]]
    corner = min(y for t, x, y in middle if t == "0.8")
    # ticks of the upright axis stand above its lower end, those of the other below it
    up = {t: y for t, x, y in middle if y <= corner}
    along = {t: x for t, x, y in middle if y > corner}
    ((_, top, _, bottom),) = chart["dashed"]
    assert (top + bottom) / 2 == pytest.approx(up["1.6"], abs=2)
    marks = [((a + c) / 2, (b + d) / 2) for _, a, b, c, d in chart["marks"]]
    assert marks[0] == (pytest.approx(along["1"], abs=2), pytest.approx(up["1"], abs=2))
    assert "↙ better: less time, lower perplexity" in up
    for across in ("seconds", "bytes"):
        spec = specs(crowded / "report.html")[f"{across}-0"]
        dense = spec["data"]["values"][0]
        assert (dense["name"], dense["state"], dense[across], dense["quality"]) == ("dense", "dense", 1, 1)
        assert spec["layer"][0]["data"]["values"] == [{"quality": 1.6}]


@needs_browser
def test_small_screens_say_which_column_a_cell_is_of(seen):
    found = seen(390).did["labels"]
    assert len(found) > 100
    assert [(shown, name) for shown, name, _ in found if shown != f'"{name}"'] == []
    # the words of a verdict need no name
    assert {name for _, name, display in found if display == "none"} == {"Verdict"}


@needs_browser
def test_print_shows_all_of_it_in_black_on_white(seen, crowded):
    screen = seen(1280)
    # the width of A4 within its margins
    paper = Visit(crowded / "report.html", width=680, media="print", color_scheme="dark")
    assert paper.cells == screen.cells
    assert paper.cut == []
    assert paper.overflow <= 0
    assert {"chart-seconds-0", "chart-bytes-0"} <= set(paper.charts)
    assert set(paper.charts) == {c["name"] for c in [*screen.did["seconds"], *screen.did["bytes"]]}
    assert paper.ink == ["rgb(0, 0, 0)", "rgb(0, 0, 0)"]
    for chart in paper.charts.values():
        assert overlapping(chart) == [], chart["name"]
        assert chart["box"][0] >= 0
        assert chart["box"][2] <= 680


@needs_browser
def test_points_are_told_apart_without_colour(seen):
    marks = chart_of(seen(1280).did["seconds"], "chart-seconds-0")["marks"]
    shapes = [shape for shape, *_ in marks]
    state = {"passed": "held", "missed": "missed", "undecided": "undecided"}
    states = ["dense", "ship this", *(state[row[1]] for row in CROWD[1:])]
    # one shape a state, one state a shape
    assert len(set(zip(shapes, states, strict=True))) == len(set(shapes)) == len(set(states)) == 5


@needs_browser
def test_the_switch_works_from_the_keyboard(seen):
    names = [{c["name"] for c in seen(1280).did[across]} for across in ("seconds", "bytes")]
    assert names[0] - names[1] == {"chart-seconds-0"}
    assert names[1] - names[0] == {"chart-bytes-0"}


@needs_browser
def test_names_keep_apart_when_the_window_changes_its_size(seen, crowded):
    def resize(tab):
        found = []
        # one pixel more, and the chart stands beside the table, half as wide
        for width in (1241, 920, 390):
            tab.set_viewport_size({"width": width, "height": 800})
            tab.wait_for_timeout(800)
            found += [c for c in tab.evaluate(CHARTS) if c["name"] == "chart-seconds-0"]
        return found

    for chart in Visit(crowded / "report.html", width=1240, do=resize).did:
        assert overlapping(chart) == []
        assert outside(chart) == []


@needs_browser
@pytest.mark.parametrize(("candidate", "width"), [("0.5", 1280), ("shrink-params=0.9x", 390)])
def test_a_single_run_stands_beside_dense(run, candidate, width):
    folder = run / "candidates" / candidate
    visit = Visit(
        page.write([folder]), width=width, do=lambda tab: tab.locator("table.candidates tbody tr").all_inner_texts()
    )
    assert visit.errors == []
    assert visit.cut == []
    assert [row.split()[0] for row in visit.did] == ["dense", candidate]
    assert f"One run, no decision: {candidate} has " in visit.text
    assert "agree>=0 passed" in visit.text
    points = specs(folder / "report.html")["seconds-0"]["data"]["values"]
    assert [p["name"] for p in points] == ["dense", candidate]
    for chart in visit.charts.values():
        assert overlapping(chart) == [], chart["name"]


def test_every_section_says_what_it_means(crowded):
    text = page.write([crowded]).read_text()
    sections = re.findall(r'<section id="(\w+)">\s*<h2>[^<]+</h2>\s*(<p>[^<]+</p>)?', text)
    assert [name for name, _ in sections] == ["why", "quality", "speed", "bytes", "layers", "left", "fleet", "again"]
    for name, sentence in sections:
        assert len(sentence.split()) >= 10, name
        assert sentence.endswith(".</p>"), name
