"""The page's charts, as Vega-Lite specifications: data in, a dictionary out.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and no chart needs them: shapes, names or lightness say
the same. Text takes the page's own colour, so that charts follow its light or dark scheme. A table of the same numbers stands
beside every chart.
"""

import math
from collections.abc import Sequence
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
# states of a point in the chart of candidates: shape and colour
STATES = {
    "dense": ("diamond", "#777777"),
    "dense in another engine": ("triangle-down", "#CC79A7"),
    "ship this": ("circle", "#009E73"),
    "holds the floor": ("square", "#0072B2"),
    "undecided": ("triangle-up", "#B8860B"),
    "misses the floor": ("cross", "#D55E00"),
    "this run": ("circle", "#0072B2"),
}
# fills on which black text can be read
LIGHT = ("#56B4E9", "#E69F00", "#F0E442", "#CC79A7", "#B5B5B5", "#7FD3B5")
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
    "title": {"color": _TEXT, "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
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


def _ticks(values: list[float]) -> Spec:
    """An axis with these ticks, each name under its tick and clear of the other axis."""
    return {"values": values, "format": ",~f", "labelFlush": False, "labelPadding": 5, "labelSeparation": 4}


def round_axis(values: Sequence[float]) -> tuple[list[float], bool]:
    """Ticks on round numbers that enclose all values, and whether they stand on a logarithmic scale (over a factor of 5).

    The first and last tick are the ends of the axis. Steps are 1, 2 or 5 times a power of ten.
    """
    low, high = min(values), max(values)
    if low > 0 and high > 5 * low:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [float(f"{m}e{e}") for e in exponents for m in (1, 2, 5)]
        first = max(i for i, m in enumerate(marks) if m <= low)
        last = min(i for i, m in enumerate(marks) if m >= high)
        return marks[first : last + 1], True
    span = (high - low) or abs(high) / 10 or 1.0
    # room for marks and names at the ends
    low, high = (max(0.0, low - span / 10) if low >= 0 else low - span / 10), high + span / 10
    steps = (float(f"{m}e{e}") for e in range(-12, 13) for m in (1, 2, 5))
    step = next(s for s in steps if (high - low) / s <= 7)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)], False


def tradeoff(
    points: Sequence[dict[str, Any]], across: str, across_title: str, quality_title: str, lower_is_better: bool,
    floor: float | None, gate: str,
) -> Spec:  # fmt: skip
    """Quality against cost, dense included. points: name, state, quality and `across` ('seconds' or 'bytes', dense = 1), each
    with _low and _high. floor: drawn as a line named after its gate.

    The data sets 'labels' and 'leaders' are empty: page.js fills them with names that do not overlap, once it knows the width.
    """
    ends = ("", "_low", "_high")
    across_ticks, across_log = round_axis([p[across + end] for p in points for end in ends])
    heights = [p["quality" + end] for p in points for end in ends] + ([] if floor is None else [floor])
    quality_ticks, quality_log = round_axis(heights)

    def axis(name: str, title: str, ticks: list[float], log: bool) -> Spec:
        scale: Spec = {"domain": [ticks[0], ticks[-1]], "nice": False}
        # a logarithmic scale has no zero, and Vega-Lite warns of one that is asked for or not
        scale |= {"type": "log"} if log else {"type": "linear", "zero": False}
        return _field(
            name,
            "quantitative",
            title,
            scale=scale,
            axis=_ticks(ticks),
        )

    def pixels(name: str) -> Spec:
        return _field(name, "quantitative", None, scale=None, axis=None)

    x = axis(across, f"{across_title} (dense = 1)", across_ticks, across_log)
    y = axis("quality", quality_title, quality_ticks, quality_log)
    present = [s for s in STATES if any(p["state"] == s for p in points)]
    legend = {"orient": "top", "columns": 2, "symbolSize": 90}
    colour = _field(
        "state", "nominal", None, scale={"domain": present, "range": [STATES[s][1] for s in present]}, legend=legend
    )
    shape = {**colour, "scale": {"domain": present, "range": [STATES[s][0] for s in present]}}
    tooltip = [{"field": f} for f in ("name", "state", across, "quality")]
    wide = {"x": {**x, "field": f"{across}_low"}, "x2": {"field": f"{across}_high"}, "y": y}
    high = {"x": x, "y": {**y, "field": "quality_low"}, "y2": {"field": "quality_high"}}
    layers: list[Spec] = [
        {"mark": "rule", "encoding": {**wide, "color": colour}},
        {"mark": "rule", "encoding": {**high, "color": colour}},
        {
            "data": {"name": "leaders", "values": []},
            "mark": {"type": "rule", "color": "#888"},
            "encoding": {"x": pixels("x"), "x2": {"field": "x2"}, "y": pixels("y"), "y2": {"field": "y2"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 130, "opacity": 1},
            "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": tooltip},
        },
        {
            "data": {"name": "labels", "values": []},
            "mark": {"type": "text", "align": "left", "baseline": "middle", "fontSize": 12, "color": _TEXT},
            "encoding": {"x": pixels("x"), "y": pixels("y"), "text": {"field": "text"}},
        },
    ]
    if floor is not None:
        line = {"type": "rule", "strokeDash": [7, 4], "strokeWidth": 1.5, "color": _TEXT}
        layers.insert(
            0, {"data": {"name": "floor", "values": [{"quality": floor}]}, "mark": line, "encoding": {"y": y}}
        )
    arrow, side, more = ("↙", "down", "lower") if lower_is_better else ("↖", "up", "higher")
    less = "less time" if across == "seconds" else "fewer bytes"
    return _chart(
        f"{quality_title} against {across_title}, one mark a candidate beside the dense model, with intervals; "
        f"{side} and left is better" + (f"; the line is the floor {gate}" if gate else ""),
        [],
        data={"name": "points", "values": list(points)},
        height=300,
        title=f"{arrow} better: {less}, {more} {quality_title.partition(' (')[0]}",
        usermeta={"across": across, "floor": floor, "gate": f"floor {gate}"},
        layer=layers,
    )


def speed(rows: Sequence[dict[str, Any]], stage: str) -> Spec:
    """rows: name, batch, value, low, high (tokens a second of one stage)."""
    batches = len({r["batch"] for r in rows}) > 1
    y = _field("label", "nominal", None, sort=None, axis={"labelLimit": 190})
    # names stand beside their marks
    colour = _field("name", "nominal", None, legend=None)
    ticks, _ = round_axis([0.0, *(r["high"] for r in rows)])
    scale = {"domain": [0, ticks[-1]], "nice": False}
    low, value = (
        _field(name, "quantitative", "tokens a second", scale=scale, axis=_ticks(ticks)) for name in ("low", "value")
    )
    return _chart(
        f"Tokens a second of each model, {stage}, with the 10th to 90th percentile of its runs; right is better",
        [{**r, "label": f"{r['name']}, {r['batch']} at once" if batches else r["name"]} for r in rows],
        height=_height(len(rows), 24),
        title=f"{stage}: more is better",
        layer=[
            {"mark": "rule", "encoding": {"y": y, "x": low, "x2": {"field": "high"}, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {"y": y, "x": value, "color": colour},
            },
        ],
    )


def nbytes(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, part, megabytes, order."""
    totals: dict[str, float] = {}
    placed = []
    for r in rows:
        start = totals.get(r["name"], 0.0)
        totals[r["name"]] = start + r["megabytes"]
        placed.append({**r, "start": start, "end": totals[r["name"]]})
    ticks, _ = round_axis([0.0, max(totals.values())])
    scale = {"domain": [0, ticks[-1]], "nice": False}
    # a part's name stands in its bar where there is room for it at the width of a phone
    placed = [{**r, "label": r["part"] if r["megabytes"] > 0.025 * len(r["part"]) * ticks[-1] else ""} for r in placed]
    y = _field("name", "nominal", None, sort=None, axis={"labelLimit": 190})
    parts = list(dict.fromkeys(r["part"] for r in placed))
    colour = _field(
        "part", "nominal", None, sort=None, legend={"orient": "top", "columns": 1, "labelLimit": 170},
        scale={"domain": parts, "range": [LIGHT[i % len(LIGHT)] for i in range(len(parts))]},
    )  # fmt: skip
    return _chart(
        "Megabytes of each model's weight files by what they hold; shorter is better",
        placed,
        height=_height(len(totals), 34),
        layer=[
            {
                "mark": {"type": "bar", "stroke": "#333", "strokeWidth": 0.7},
                "encoding": {
                    "y": y, "color": colour, "x2": {"field": "end"},
                    "x": _field("start", "quantitative", "MB", scale=scale, axis=_ticks(ticks)),
                    "tooltip": [{"field": f} for f in ("name", "part", "megabytes")],
                },
            },
            {
                "transform": [{"calculate": "(datum.start + datum.end) / 2", "as": "middle"}],
                "mark": {"type": "text", "color": "#000", "fontSize": 11},
                "encoding": {"y": y, "x": _field("middle", "quantitative", "MB", scale=scale), "text": {"field": "label"}},
            },
        ],
    )  # fmt: skip


def heat(rows: Sequence[dict[str, Any]], value: str, title: str, most: float | None = None) -> Spec:
    """rows: block, kind, and `value` of every layer. most: the scale's end; None for the highest there is."""
    blocks = {r["block"] for r in rows}
    scale = {"scheme": "cividis", "reverse": True, **({"domain": [0, most]} if most else {})}
    return _chart(
        f"{title} of every layer: blocks from left to right, kinds of layer from top to bottom; darker is more",
        rows,
        height=_height(len({r["kind"] for r in rows}), 20),
        title=f"{title}: darker is more",
        mark={"type": "rect", "tooltip": True},
        encoding={
            "x": _field(
                "block",
                "ordinal",
                "block",
                axis={"labelOverlap": True, "labelSeparation": 6, "labelAngle": 0 if len(blocks) < 50 else -90},
            ),
            "y": _field("kind", "nominal", None, sort=None, axis={"labelLimit": 200}),
            "color": _field(value, "quantitative", None, scale=scale, legend={"orient": "top"}),
        },
    )


def replicas(rows: Sequence[dict[str, Any]]) -> Spec:
    """rows: name, replicas, replicas_low, replicas_high."""
    y = _field("name", "nominal", None, sort=None, axis={"labelLimit": 190})
    x = _field("replicas", "quantitative", "replicas, fewer is better")
    low = {**x, "field": "replicas_low"}
    rule = {"type": "rule", "color": PALETTE[1], "strokeWidth": 2}
    return _chart(
        "Replicas that the traffic takes, with the interval of the speed measurement; fewer is better",
        rows,
        height=_height(len(rows), 30),
        layer=[
            {"mark": {"type": "bar", "color": PALETTE[0]}, "encoding": {"y": y, "x": x}},
            {"mark": rule, "encoding": {"y": y, "x": low, "x2": {"field": "replicas_high"}}},
        ],
    )
