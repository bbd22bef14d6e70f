"""The report's charts, as Vega-Lite specifications: data in, a dictionary out.

Colours are Okabe and Ito's, which the colour-blind tell apart, and shapes go with them; text takes the page's own colour, so that
charts follow its light or dark. Every chart stands beside a table of the same numbers.
"""

from collections.abc import Sequence
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
Spec = dict[str, Any]

_TEXT = "currentColor"
_GUIDE = {"labelColor": _TEXT, "titleColor": _TEXT, "domainColor": "#888", "tickColor": "#888", "gridColor": "#8883"}
CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "axis": {**_GUIDE, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
    "legend": {"labelColor": _TEXT, "titleColor": _TEXT, "labelFontSize": 12},
    "header": {"labelColor": _TEXT, "titleColor": _TEXT},
    "view": {"stroke": "#8884"},
    "range": {"category": list(PALETTE)},
}


def _chart(description: str, values: Sequence[dict[str, Any]], **parts: Any) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(values)},
        "config": CONFIG,
        **parts,
    }


def _height(rows: int, each: int) -> int:
    """Pixels. A height by steps makes Vega-Lite warn that it cannot fit as well."""
    return max(1, rows) * each


def _field(name: str, kind: str, title: str | None, **more: Any) -> Spec:
    return {"field": name, "type": kind, "title": title, **more}


def front(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, seconds, seconds_low, seconds_high, ppl, ppl_low, ppl_high (fractions over dense), passed."""
    x = _field("seconds", "quantitative", "seconds of a request, dense = 1", scale={"zero": False, "nice": True})
    y = _field("ppl", "quantitative", "perplexity, dense = 1", scale={"type": "log", "nice": True})
    # names stand beside their marks
    colour = _field("name", "nominal", None, legend=None)
    across = {"x": {**x, "field": "seconds_low"}, "x2": {"field": "seconds_high"}, "y": y, "color": colour}
    upright = {"x": x, "y": {**y, "field": "ppl_low"}, "y2": {"field": "ppl_high"}, "color": colour}
    point = {
        "x": x,
        "y": y,
        "color": colour,
        "shape": colour,
        "tooltip": [{"field": f} for f in ("name", "seconds", "ppl", "passed")],
    }
    return _chart(
        "Perplexity against seconds of a request, both over the dense model's, one mark a candidate, with 95% intervals of quality "
        "and the 10th to 90th percentile of times; down and left is better",
        rows,
        height=280,
        layer=[
            {"mark": "rule", "encoding": across},
            {"mark": "rule", "encoding": upright},
            {"mark": {"type": "point", "filled": True, "size": 110}, "encoding": point},
            {
                "mark": {"type": "text", "dy": -14, "color": _TEXT},
                "encoding": {"x": x, "y": y, "text": {"field": "name"}},
            },
        ],
    )


def speed(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, stage, batch, value, low, high (tokens a second)."""
    y = _field("label", "nominal", None, sort=None, axis={"labelLimit": 260})
    # names stand beside their marks
    colour = _field("name", "nominal", None, legend=None)
    low, value = (_field(name, "quantitative", "tokens a second", scale={"type": "log"}) for name in ("low", "value"))
    return _chart(
        "Tokens a second of each model, prefill and decoding, with the 10th to 90th percentile of its runs",
        [{**r, "label": f"{r['stage']}, {r['batch']} at once: {r['name']}"} for r in rows],
        height=_height(len(rows), 22),
        layer=[
            {"mark": "rule", "encoding": {"y": y, "x": low, "x2": {"field": "high"}, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "size": 80},
                "encoding": {"y": y, "x": value, "color": colour, "shape": colour},
            },
        ],
    )


def nbytes(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, part, megabytes."""
    return _chart(
        "Megabytes of each model's weight files by what they hold",
        rows,
        height=_height(len({r["name"] for r in rows}), 30),
        mark="bar",
        encoding={
            "y": _field("name", "nominal", None, sort=None, axis={"labelLimit": 260}),
            "x": _field("megabytes", "quantitative", "MB", stack="zero"),
            "color": _field("part", "nominal", None, legend={"orient": "top", "columns": 3}),
            "order": {"field": "order"},
            "tooltip": [{"field": f} for f in ("name", "part", "megabytes")],
        },
    )


def heat(rows: Sequence[dict[str, Any]], value: str, title: str, most: float | None = None) -> Spec:
    """rows: block, kind, and `value` of every layer. most: the scale's end; None for the highest there is."""
    blocks = {r["block"] for r in rows}
    scale = {"scheme": "cividis", "reverse": True, **({"domain": [0, most]} if most else {})}
    return _chart(
        f"{title} of every layer: blocks from left to right, kinds of layer from top to bottom; darker is more",
        rows,
        height=_height(len({r["kind"] for r in rows}), 20),
        mark={"type": "rect", "tooltip": True},
        encoding={
            "x": _field(
                "block", "ordinal", "block", axis={"labelOverlap": True, "labelAngle": 0 if len(blocks) < 50 else -90}
            ),
            "y": _field("kind", "nominal", None, sort=None, axis={"labelLimit": 200}),
            "color": _field(value, "quantitative", title, scale=scale, legend={"orient": "top"}),
        },
    )


def replicas(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, replicas, replicas_low, replicas_high."""
    y = _field("name", "nominal", None, sort=None, axis={"labelLimit": 260})
    x = _field("replicas", "quantitative", "replicas")
    low = {**x, "field": "replicas_low"}
    rule = {"type": "rule", "color": PALETTE[1], "strokeWidth": 2}
    return _chart(
        "Replicas that the traffic takes, with the interval of the speed measurement",
        rows,
        height=_height(len(rows), 30),
        layer=[
            {"mark": {"type": "bar", "color": PALETTE[0]}, "encoding": {"y": y, "x": x}},
            {"mark": rule, "encoding": {"y": y, "x": low, "x2": {"field": "replicas_high"}}},
        ],
    )
