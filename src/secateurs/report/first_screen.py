"""The first screen of the page: the verdict in one sentence, a table with dense in its first row, and the points of the chart.

What is shown comes from decide.json; of a single run, from its report.json and bench.json. Numbers in text carry their file and
key (cited.py). Only positions in the chart are computed here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from secateurs.base.errors import PlanError
from secateurs.decide.beside_rivals import sentence, to_ship
from secateurs.decide.realize import Candidate
from secateurs.quality.compare import named
from secateurs.quality.gates import Gate
from secateurs.report.bits import Bits
from secateurs.report.cited import Cited

Point = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """What the chart shows as quality. path: of its estimate in a row or report. dense: the dense model's value. floor: the limit
    on the same scale, or None. gate: the floor as it was asked for."""

    title: str
    path: str
    dense: float
    floor: float | None = None
    gate: str = ""
    lower_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """A line of the table. words: what the name means. state: of charts.STATES, or '' for one without a point."""

    name: str
    words: str
    cells: tuple[Markup, ...]
    state: str = ""


@dataclass(frozen=True)
class Screen:
    """verdict: one sentence. good: whether something can be shipped; None where nothing was decided."""

    verdict: Markup
    good: bool | None
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str
    measure: Measure
    points: tuple[Point, ...]
    seconds: str


_NONE = Markup("&ndash;")
RIVAL = "dense in another engine"
_BITS = "; bits: of a weight in the quantized layers, with scales and positions"


def words_of(candidate: str) -> str:
    """What a candidate's name means: '2:4' -> '50% zeros: 2 kept of every 4'."""
    try:
        parsed = Candidate.parse(candidate)
    except PlanError:
        return ""
    if parsed.kind == "dense":
        return ""
    if parsed.kind == "bits":
        return f"zeros and bits chosen for each layer, {parsed.bits:g} bits a weight"
    if parsed.plain:
        return f"all weights kept, as {parsed.grid}"
    words = f"{' and '.join(parsed.units) or 'neurons, heads or blocks'} removed until {parsed.budget}"
    if parsed.kind == "mask":
        words = pattern_words(parsed.pattern, parsed.sparsity)
    return f"{words}, as {parsed.grid}" if parsed.grid else words


def pattern_words(pattern: str, sparsity: float) -> str:
    """A pattern and its sparsity in words."""
    zeros = f"{sparsity:.0%} zeros"
    if ":" in pattern:
        kept, _, of = pattern.partition(":")
        return f"{zeros}: {kept} kept of every {of}"
    return f"{zeros}, in {pattern} blocks" if "x" in pattern else f"{zeros}, unstructured"


def _measures(quality: dict[str, Any] | None) -> dict[str, Measure]:
    """What the chart can show, by the key of a report's quality; the first that was measured, where no floor says."""
    of, share = "a token", "tokens"
    if quality and not quality["ppl_dense"]:
        of = named(quality)["kl"].partition("nats ")[2]
        share = of.removeprefix("an ").removeprefix("a ") + "s"
    return {
        "ppl_ratio": Measure("perplexity (dense = 1)", "quality/ppl_ratio", 1.0),
        "cosine": Measure("cosine with dense embeddings", "quality/cosine", 1.0, lower_is_better=False),
        "kl": Measure(f"KL to dense (nats {of})", "quality/kl", 0.0),
        "agree": Measure(f"agreement with dense (share of {share})", "quality/agree", 1.0, lower_is_better=False),
        "neighbours": Measure(
            "same nearest neighbour (share of inputs)", "quality/neighbours", 1.0, lower_is_better=False
        ),
        "error": Measure("relative error of outputs", "quality/error", 0.0),
    }


def measure_of(gates: Sequence[str], found: dict[str, Any] | None) -> Measure:
    """The quality that the first floor asks about; without one the first of MEASURES that was measured, or perplexity.

    found: a row or report with measurements.
    """
    quality, compared = (found or {}).get("quality"), (found or {}).get("compared") or {}
    measures = _measures(quality)
    plain = next((m for name, m in measures.items() if (quality or {}).get(name)), measures["ppl_ratio"])
    if not gates:
        return plain
    gate = Gate.parse(gates[0])
    limit, text = gate.limit, gate.text
    if gate.metric == "ppl":
        if not gate.against_dense:
            if not quality or not quality["ppl_dense"]:
                return plain
            limit /= quality["ppl_dense"]["value"]
        return replace(measures["ppl_ratio"], floor=limit, gate=text)
    if gate.metric in measures:
        return replace(measures[gate.metric], floor=limit, gate=text)
    task = gate.metric
    if gate.against_dense:
        title = f"{task} accuracy less dense"
        return Measure(title, f"compared/{task}/difference", 0.0, limit, text, lower_is_better=False)
    if task not in compared:
        return plain
    dense = compared[task]["dense"]["value"]
    return Measure(f"{task} accuracy", f"compared/{task}/pruned", dense, limit, text, lower_is_better=False)


def of_decision(decided: Cited, timed: dict[str, Cited]) -> Screen:
    """The screen of decide.json. timed: the timing.json of every measured candidate that has one."""
    decision = decided.data
    rows = decision["rows"]
    known = [i for i, r in enumerate(rows) if r["status"] == "measured"]
    # the dense model's own numbers are the same in every row: those beside the recommended one are shown
    best = next((i for i in known if rows[i]["candidate"] == decision["recommended"]), known[0] if known else None)
    gates = tuple(g["gate"] for g in rows[best]["gate"]) if best is not None else tuple(_gates(decision["plan"]))
    measure = measure_of(gates, rows[best] if best is not None else None)
    other = () if measure.path == "quality/ppl_ratio" else (measure.title,)
    where = Markup("estimated for {}, not measured").format(decided.show("profile"))
    if not decision["estimated"]:
        where = Markup("measured on {} ({})").format(decided.show("profile"), decided.show("machine/isa"))

    table = [_dense_of(decided, best, timed, measure if other else None)]
    points = []
    for i, rival in enumerate(decision.get("rivals", [])):
        table.append(_rival(decided, i, measure if other else None))
        if rival["quality"] and (found := _estimate(decided, f"rivals/{i}/{measure.path}")):
            points.append(_point(rival["name"], RIVAL, rival["seconds_ratio"], rival["bytes_ratio"], found))
    for i, row in enumerate(rows):
        state, verdict = _state(row, decision["recommended"])
        table.append(_candidate(decided, i, verdict, state, measure if other else None))
        if state and (found := _estimate(decided, f"rows/{i}/{measure.path}")):
            seconds = row["seconds_ratio"]
            points.append(_point(row["candidate"], state, seconds, row["bytes_ratio"], found))
    return Screen(
        _verdict(decided, where, gates),
        decision["recommended"] != "dense",
        ("Perplexity", *other, "Seconds", "Bytes", "Verdict"),
        tuple(table),
        "1x is the dense model, in seconds by the fastest way here to run it as it is. Seconds: of a request, a prompt of "
        f"{decision['plan']['prompt']} tokens and {decision['plan']['new']} new ones. Bytes: of the weight "
        f"files{_BITS if any(r.get('bits') for r in rows) else ''}. "
        "Brackets: 95% intervals of perplexity, 10th to 90th percentile of seconds.",
        measure,
        _with_dense(points, measure),
        "seconds of a request" + (", estimated" if decision["estimated"] else ""),
    )


def _gates(plan: dict[str, Any]) -> Sequence[str]:
    found: Sequence[str] = plan.get("gate") or plan.get("evaluation", {}).get("gates") or ()
    return found


def _verdict(decided: Cited, where: Markup, gates: Sequence[str]) -> Markup:
    decision = decided.data
    floors = ", ".join(gates)
    at = next((i for i, r in enumerate(decision["rows"]) if r["candidate"] == decision["recommended"]), None)
    if at is None:
        way = Markup()
        if (rival := to_ship(decision.get("rivals", []))) is not None:
            way = Markup(" {}").format(decided.show(f"rivals/{decision['rivals'].index(rival)}/words"))
        return Markup(
            "<strong>Ship the dense model{}</strong>: no candidate both holds the floor {} and saves time or bytes, {}."
        ).format(way, floors, where)
    row, path = decision["rows"][at], f"rows/{at}"
    time = Markup("a request takes {} the time").format(decided.show(f"{path}/seconds_ratio/value", "{:.2f}x"))
    if row["measured"]:
        time += Markup(" {}").format(decided.interval(f"{path}/seconds_ratio", "{:.2f}x"))
    price = Markup(" (floor {} holds)").format(floors)
    if row["quality"] and row["quality"]["ppl_ratio"]:
        ratio = f"{path}/quality/ppl_ratio"
        price = Markup(" for {} the perplexity (95% interval {} to {}; floor {} holds)").format(
            decided.show(f"{ratio}/value", "{:.3f}x"), decided.show(f"{ratio}/low", "{:.3f}x"),
            decided.show(f"{ratio}/high", "{:.3f}x"), floors,
        )  # fmt: skip
    words = words_of(row["candidate"])
    zeros = Markup(" {}").format(decided.show("zeros")) if decision.get("zeros") else ""
    if rivals := sentence(row, decision.get("rivals", [])):
        zeros = Markup(" {}{}").format(rivals, zeros)
    return Markup("<strong>Ship {}{}</strong>{}: {} and the weights {} the bytes{}, {}.{}").format(
        "dense " if _plain(row["candidate"]) else "", decided.show(f"{path}/candidate"), f" ({words})" if words else "", time,
        decided.show(f"{path}/bytes_ratio", "{:.2f}x"), price, where, zeros,
    )  # fmt: skip


def _plain(candidate: str) -> bool:
    try:
        return Candidate.parse(candidate).plain
    except PlanError:
        return False


def _state(row: dict[str, Any], recommended: str) -> tuple[str, Markup]:
    """A row's state for the chart, and its verdict in a few words."""
    reason = row["reason"] or ""
    if row["status"] != "measured":
        return "", Markup("not pruned: {}" if row["status"] == "dropped" else "failed: {}").format(_first_part(reason))
    if row["candidate"] == recommended:
        return "ship this", Markup("<strong>ship this</strong>")
    missed = [g for g in row["gate"] if not g["passed"]]
    if missed:
        state = "misses the floor" if any(g["verdict"] == "missed" for g in missed) else "undecided"
        words = "; ".join(
            f"misses {g['gate']}" if g["verdict"] == "missed" else f"{g['gate']} undecided" for g in missed
        )
        return state, Markup("{}").format(words)
    return "holds the floor", Markup("holds the floor{}").format(
        f", but {_first_part(reason)}" if reason else ", but is slower"
    )


def _first_part(reason: str) -> str:
    """A reason up to its first colon, semicolon or aside; the rest is in the section below."""
    found = min((reason.find(mark) for mark in (": ", "; ", ", which") if mark in reason), default=len(reason))
    return reason[:found]


def _estimate(cited: Cited, path: str) -> dict[str, Any] | None:
    """The estimate under a path, or None where it was not measured."""
    try:
        found: dict[str, Any] | None = cited.at(path)
    except (KeyError, TypeError):
        return None
    return found


def _dense_of(decided: Cited, best: int | None, timed: dict[str, Cited], other: Measure | None) -> Row:
    quality = nbytes = seconds = Markup()
    if best is not None:
        row, path = decided.data["rows"][best], f"rows/{best}"
        if _estimate(decided, f"{path}/quality/ppl_dense"):
            quality = Markup(" <span class=interval>{} itself</span>").format(
                decided.show(f"{path}/quality/ppl_dense/value")
            )
        nbytes = Markup(" <span class=interval>{}</span>").format(decided.show(f"{path}/bytes/dense", "{:,}"))
        if bench := timed.get(row["candidate"]):
            seconds = Markup(' <span class="interval loose">decodes {} tokens/s</span>').format(
                bench.show("variants/0/decode/tokens_per_second", "{:.1f}")
            )
    one = Markup("1x{}")
    cells = [one.format(quality), one.format(seconds), one.format(nbytes), Markup("the reference")]
    if other:
        cells.insert(1, Markup("{:g}").format(other.dense))
    return Row("dense", "the model as it is", tuple(cells), "dense")


def _rival(decided: Cited, i: int, other: Measure | None) -> Row:
    rival, path = decided.data["rivals"][i], f"rivals/{i}"
    quality, measured = _NONE, _NONE
    if rival["same_weights"]:
        quality, verdict = Markup("1x"), Markup("the same weights")
        measured = Markup("{:g}").format(other.dense) if other else _NONE
    else:
        verdict = Markup("holds the floor" if rival["passed"] else "misses the floor")
        if _estimate(decided, f"{path}/quality/ppl_ratio"):
            quality = decided.estimate(f"{path}/quality/ppl_ratio", "{:.3f}x")
        if other and _estimate(decided, f"{path}/{other.path}"):
            measured = decided.estimate(f"{path}/{other.path}")
    seconds = decided.estimate(f"{path}/seconds_ratio", "{:.2f}x")
    cells = [quality, *([measured] if other else []), seconds, decided.show(f"{path}/bytes_ratio", "{:.2f}x"), verdict]
    words = "the dense model under torch.compile" if rival["engine"] is None else rival["engine"]
    return Row(rival["name"], words, tuple(cells), RIVAL if rival["quality"] else "")


def _candidate(decided: Cited, i: int, verdict: Markup, state: str, other: Measure | None) -> Row:
    row, path = decided.data["rows"][i], f"rows/{i}"
    quality = _NONE
    if _estimate(decided, f"{path}/quality/ppl_ratio"):
        quality = decided.estimate(f"{path}/quality/ppl_ratio", "{:.3f}x")
    seconds = decided.estimate(f"{path}/seconds_ratio", "{:.2f}x")
    if not row["measured"]:
        seconds = Markup("{} <span class=interval>estimated</span>").format(
            decided.show(f"{path}/seconds_ratio/value", "{:.2f}x")
        )
    nbytes = decided.show(f"{path}/bytes_ratio", "{:.2f}x")
    kind = next((k for k in ("packed", "left") if k in row.get("bytes", {})), None)
    if row["status"] != "measured":
        nbytes += Markup(" <span class=interval>estimated</span>")
    elif kind and not decided.data["estimated"]:
        nbytes += Markup(" <span class=interval>{}</span>").format(decided.show(f"{path}/bytes/{kind}", "{:,}"))
    if row.get("bits"):
        nbytes += Markup(" <span class=interval>{} bits</span>").format(decided.show(f"{path}/bits", "{:.2f}"))
    cells = [quality, seconds, nbytes, verdict]
    if other:
        cells.insert(
            1, decided.estimate(f"{path}/{other.path}") if _estimate(decided, f"{path}/{other.path}") else _NONE
        )
    return Row(row["candidate"], words_of(row["candidate"]), tuple(cells), state)


def _point(
    name: str, state: str, seconds: dict[str, float] | None, nbytes: float | None, quality: dict[str, Any]
) -> Point:
    point = {
        "name": name,
        "state": state,
        "quality": quality["value"],
        "quality_low": quality["low"],
        "quality_high": quality["high"],
    }
    if seconds:
        point |= {"seconds": seconds["value"], "seconds_low": seconds["low"], "seconds_high": seconds["high"]}
    if nbytes:
        point |= {"bytes": nbytes, "bytes_low": nbytes, "bytes_high": nbytes}
    return point


def _with_dense(points: Sequence[Point], measure: Measure) -> tuple[Point, ...]:
    """The points after the dense model's own; none where nothing was measured."""
    one = {"value": 1.0, "low": 1.0, "high": 1.0}
    dense = {"value": measure.dense, "low": measure.dense, "high": measure.dense}
    return (_point("dense", "dense", one, 1.0, dense), *points) if points else ()


def of_run(name: str, reported: Cited, timed: Cited | None) -> Screen:
    """The screen of one run of prune, shrink or recover: itself beside the dense model. timed: its bench.json, if any."""
    report = reported.data
    gates = [g["gate"] for g in report.get("gate", [])]
    measure = measure_of(gates, report)
    missed = [g for g in report.get("gate", []) if not g["passed"]]
    state = "this run"
    if gates:
        state = "holds the floor" if not missed else "misses the floor"
        if missed and all(g["verdict"] == "undecided" for g in missed):
            state = "undecided"
    columns, dense, ours, said = ["Perplexity"], [Markup("1x")], [_NONE], []
    if _estimate(reported, "quality/ppl_ratio"):
        path = "quality/ppl_ratio"
        dense[0] += Markup(" <span class=interval>{} itself</span>").format(reported.show("quality/ppl_dense/value"))
        ours[0] = reported.estimate(path, "{:.3f}x")
        said.append(
            Markup("{} the dense model's perplexity (95% interval {} to {})").format(
                reported.show(f"{path}/value", "{:.3f}x"), reported.show(f"{path}/low", "{:.3f}x"),
                reported.show(f"{path}/high", "{:.3f}x"),
            )
        )  # fmt: skip
    elif found := _estimate(reported, measure.path):
        columns[0] = measure.title[0].upper() + measure.title[1:]
        dense[0] = Markup("{:g}").format(measure.dense)
        ours[0] = reported.estimate(measure.path)
        said.append(
            Markup("{} of {} (95% interval {} to {})").format(
                measure.title, *(reported.show(f"{measure.path}/{end}") for end in ("value", "low", "high"))
            )
        )
    else:
        said.append(Markup("quality not measured"))
    seconds, way = None, "the model as it is"
    if timed:
        way += f": {timed.data['variants'][0]['name']}" * (timed.data["variants"][0]["name"] != "dense")
        last = len(timed.data["variants"]) - 1
        for stage, title, words in (
            ("decode", "Decoding, tokens/s", "decoding"),
            ("prefill", "Prompt, tokens/s", "prompts"),
        ):
            columns.append(title)
            for cells, at in ((dense, 0), (ours, last)):
                path = f"variants/{at}/{stage}"
                rate = timed.show(f"{path}/tokens_per_second", "{:.1f}")
                cells.append(
                    Markup("{} <span class=interval>{}</span>").format(rate, timed.show(f"{path}/speedup", "{:.2f}x"))
                )
            said.append(
                Markup("{} at {} the speed").format(words, timed.show(f"variants/{last}/{stage}/speedup", "{:.2f}x"))
            )
        said[-1] += Markup(" of the dense model at its fastest here ({})").format(timed.show("variants/0/name"))
        said.append(_beside_rounded(timed))
        found = timed.data["variants"][last]["decode"]
        ends = [1 / found.get(k, found["speedup"]) for k in ("speedup", "speedup_high", "speedup_low")]
        seconds = dict(zip(("value", "low", "high"), ends, strict=True))
    elif "latency" in report:
        for stage, title, words in (
            ("decode", "Seconds a token", "a token"),
            ("prefill", "Seconds of a prompt", "a prompt"),
        ):
            if stage not in report["latency"]["ratio"]:
                continue
            columns.append(title)
            dense.append(reported.show(f"latency/dense/{stage}", "{:.3g}"))
            ours.append(reported.show(f"latency/left/{stage}", "{:.3g}"))
            said.append(Markup("{} in {} the time").format(words, reported.show(f"latency/ratio/{stage}", "{:.2f}x")))
        rates = report["latency"]["ratio"]
        ratio = rates.get("decode", rates.get("prefill"))
        seconds = None if ratio is None else {"value": ratio, "low": ratio, "high": ratio}
    nbytes = report.get("bytes") or {}
    kind = next((k for k in ("packed", "left", "pruned") if k in nbytes), None)
    if kind:
        columns.append("Bytes")
        dense.append(reported.show("bytes/dense", "{:,}"))
        ours.append(reported.show(f"bytes/{kind}", "{:,}"))
        said.append(
            Markup("weights in {} of {} bytes{}").format(
                reported.show(f"bytes/{kind}", "{:,}"), reported.show("bytes/dense", "{:,}"),
                " (still stored in full: not packed)" if kind == "pruned" else "",
            )
        )  # fmt: skip
    if gates:
        columns.append("Verdict")
        dense.append(Markup("the reference"))
        ours.append(Markup("{}").format("; ".join(f"{g['gate']} {g['verdict']}" for g in report["gate"])))
    said.append(
        Markup("measured on {} ({}, {} threads)").format(
            *(reported.show(f"machine/{key}", "{}") for key in ("processor", "isa", "threads"))
        )
    )
    floors = Markup("; it {}").format(f"{state}: {', '.join(gates)}") if gates else Markup("; no floor was set")
    points = []
    if quality := _estimate(reported, measure.path):
        ratio = nbytes[kind] / nbytes["dense"] if kind and kind != "pruned" else None
        points = [_point(name, state, seconds, ratio, quality)] if seconds or ratio else []
    return Screen(
        Markup("<strong>One run, no decision</strong>: {} has {}{}.").format(name, Markup(", ").join(said), floors),
        None,
        tuple(columns),
        (Row("dense", way, tuple(dense), "dense"), Row(name, _run_words(report), tuple(ours), state)),
        "1x is the dense model. Bytes: of the weight files. Brackets: 95% intervals.",
        measure,
        _with_dense(points, measure),
        "seconds a token",
    )


def _beside_rounded(timed: Cited) -> Markup:
    """How the dense model decodes in llama.cpp with fewer bits, which the fastest way to run it as it is leaves out."""
    rivals = [(i, v) for i, v in enumerate(timed.data["variants"]) if v.get("how") == "llama.cpp"]
    if not rivals:
        return Markup("not compared with llama.cpp")
    found = [timed.show(f"variants/{i}/decode/speedup", "{:.2f}x") for i, v in rivals if not v["same_weights"]]
    names = [timed.show(f"variants/{i}/name") for i, v in rivals if not v["same_weights"]]
    if not found:
        return Markup("not compared with llama.cpp at fewer bits")
    told = Markup(", ").join(Markup("{} in {}").format(*pair) for pair in zip(found, names, strict=True))
    return Markup("rounded it decodes at {} (quality not measured)").format(told)


def _run_words(report: dict[str, Any]) -> str:
    """What was done to the model of a single run."""
    if "left" in report:
        return f"shrunk to {report['plan']['budget']}"
    if "training" in report:
        return "trained after pruning; zeros stay"
    bits, zeros = Bits.of(report), pattern_words(report["plan"]["pattern"], report["totals"]["sparsity"])
    if bits is None:
        return zeros
    return f"{f'{zeros}, as ' if bits.asked else ''}{bits.grid}: {bits.words}"
