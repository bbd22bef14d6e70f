"""report.html: run directories as one file that needs no network, for whoever reviews the decision.

page.html is the template, page.css and page.js its style and script; first_screen.py makes the verdict, charts.py the charts.
Numbers are shown as the JSON files have them; only bytes are summed. Those of decisions, quality, speed, errors and fleets carry
the file and key that they come from (cited.py), so that a test can compare the page with the files.
"""

import json
import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateurs.base.device import machine
from secateurs.base.errors import OutputError
from secateurs.base.files import inside, write_text
from secateurs.machine.profile import DeviceProfile
from secateurs.quality.compare import named
from secateurs.quality.settings import FLAGS
from secateurs.report import charts, gone_experts
from secateurs.report.bits import Bits, trial_words
from secateurs.report.cited import Cited
from secateurs.report.first_screen import of_decision, of_run


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Make the page of run directories of decide, prune, shrink or recover. Raises OutputError for one that is incomplete."""
    try:
        import vl_convert
    except ImportError:
        raise OutputError(
            "the page's charts need the library vl-convert-python; pip install 'secateurs[report]'"
        ) from None
    import jinja2

    found = []
    for run in runs:
        try:
            found.append(_read(Path(run).expanduser()))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise OutputError(
                f"{run} holds a file that is not as secateurs writes it ({error!r}); run its command again"
            ) from None
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_part("page.html"))
    models = [model for run in found for model in run["models"]]
    specs = _charts(found, models)
    text = template.render(
        title=_title(found),
        runs=found,
        models=models,
        named=named,
        trial_words=trial_words,
        engines=_engines(models),
        # a closing tag inside would end the script
        specs=json.dumps(specs).replace("</", "<\\/"),
        charts={name: spec["description"] for name, spec in specs.items()},
        style=_part("page.css"),
        script=_part("page.js"),
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        machine=machine(),
    )
    file = (out or Path(runs[0]) / "report.html").expanduser()
    write_text(file, text)
    return file


def _part(name: str) -> str:
    """A file beside this module."""
    return files("secateurs.report").joinpath(name).read_text(encoding="utf-8")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror}; is this a run directory?") from None
    except ValueError as error:
        raise OutputError(f"{file} is not JSON ({error}); run the command that made it again") from None


def _cited(file: Path) -> Cited:
    return Cited(str(file), _json(file))


def _cited_or_none(file: Path) -> Cited | None:
    return _cited(file) if file.is_file() else None


def _read(folder: Path) -> dict[str, Any]:
    """Read a run directory: its decision, if it has one, and its models. Raises OutputError if it is incomplete."""
    plan_file = folder / "plan.json"
    if not plan_file.is_file():
        raise OutputError(f"{folder} is no run directory: it has no plan.json")
    plan = _json(plan_file)
    if "candidates" not in plan:
        model = _model(folder, folder.resolve().name)
        return {
            "folder": str(folder), "plan": plan, "decision": None, "models": [model], "fleet": model["fleet"],
            "screen": of_run(model["name"], model["reported"], model["timed"]),
            "products": _products(DeviceProfile.at_hand(), [model]), "command": model["command"],
        }  # fmt: skip
    if not (folder / "decide.json").is_file():
        raise OutputError(
            f"{folder} is incomplete: the decision is not made yet; run the same `secateurs decide` again"
        )
    decided = _cited(folder / "decide.json")
    decision = decided.data
    models = [
        _model(inside(folder, r["folder"], folder / "decide.json"), r["candidate"])
        for r in decision["rows"]
        if r["status"] == "measured"
    ]
    profile = DeviceProfile.read(folder / "profile.json") if (folder / "profile.json").is_file() else None
    return {
        "folder": str(folder), "plan": plan, "decision": decision, "decided": decided, "models": models,
        "fleet": _cited_or_none(folder / "fleet.json"),
        "screen": of_decision(decided, {m["name"]: m["timed"] for m in models if m["timed"]}),
        "products": _products(profile, models), "command": _command("decide", plan, folder),
    }  # fmt: skip


def _model(folder: Path, name: str) -> dict[str, Any]:
    """A pruned, smaller or recovered model: its report, and what was timed."""
    file = folder / "report.json"
    if not file.is_file():
        raise OutputError(
            f"{folder} is incomplete: it has no report.json; run the command that made it again, it goes on"
        )
    reported = _cited(file)
    report = reported.data
    if report.get("status", "complete") != "complete":
        raise OutputError(
            f"{folder} is incomplete: it is {report['status']}; run the command that made it again, it goes on"
        )
    plan = _json(folder / "plan.json")
    timed = next((f for f in (folder / "bench.json", folder / "timing.json") if f.is_file()), None)
    kind = "shrunk" if "left" in report else "recovered" if "training" in report else "pruned"
    return {
        "name": name, "folder": str(folder), "report": report, "reported": reported, "plan": flat(plan),
        "timed": _cited(timed) if timed else None, "fleet": _cited_or_none(folder / "fleet.json"),
        "kind": kind, "bits": Bits.of(report), "parts": _parts(report), "layers": _layers(report),
        "left_dense": _left_dense(report), "experts": gone_experts.gone(report), "of_experts": gone_experts.sentences(report),
        "command": _command({"shrunk": "shrink", "recovered": "recover"}.get(kind, "prune"), plan, folder),
    }  # fmt: skip


def _parts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes of the weight files by what they hold: of the dense model, then of the one that is shipped."""
    if not report.get("bytes"):
        return []
    dense = report["bytes"]["dense"]
    rows = [{"model": "dense", "part": "dense weights", "nbytes": dense}]
    if "left" in report:
        return [*rows, {"model": "shipped", "part": "dense weights", "nbytes": report["bytes"]["left"]}]
    packed = report.get("packed")
    if not packed:
        return [
            *rows,
            {"model": "shipped", "part": "weights, zeros included", "nbytes": report["bytes"]["pruned"]},
        ]
    # of a run that an older version packed, layers have no grid
    held = [r for r in packed["layers"] if r["format"] != "dense" or r.get("grid")]
    parts = {"kept weights": 0, "positions (a bit a weight)": 0, "scales": 0, "padding": 0}
    for r in held:
        rows_of, inputs = r["shape"]
        size = r["dense_nbytes"] // (rows_of * inputs)
        positions = 32 * -(-rows_of // 4) * -(-inputs // 64) if r["format"] == "bitmask" else 0
        padding = 64 if r.get("grid") else 32 * size
        kept = r["length"] - padding if r.get("grid") else r["survivors"] * size
        parts["kept weights"] += kept
        parts["positions (a bit a weight)"] += positions
        parts["padding"] += padding
        parts["scales"] += r["nbytes"] - kept - positions - padding
    parts["rest, dense"] = report["bytes"]["packed"] - sum(parts.values())
    return rows + [{"model": "shipped", "part": part, "nbytes": n} for part, n in parts.items() if n]


def _layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of layers, each with its place in the report, its block, its path within the block and its share of zeros."""
    rows = []
    for number, r in enumerate(report.get("layers", [])):
        if r["skipped_by"] == "kind":
            # it is among what is left dense
            continue
        found = re.match(r"(?:.*?\.)?(\d+)\.(.*)", r["name"])
        size = r["shape"][0] * r["shape"][1]
        rows.append(
            {**r, "number": number, "block": int(found[1]) if found else 0, "kind": found[2] if found else r["name"],
             "zeros": 1 - r["kept"] / size}
        )  # fmt: skip
    return rows


def _left_dense(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Layers that were not pruned or not packed, grouped by reason: {"what", "why", "names"}."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in report.get("layers", []):
        if r["skipped"]:
            found.setdefault(("not pruned", r["skipped"]), []).append(r["name"])
    for r in (report.get("packed") or {}).get("layers", []):
        if r["format"] == "dense" and not r.get("grid"):
            # reasons differ in a layer's own sparsity; the first of each kind stands for all
            kind = re.sub(r"\d+(\.\d+)?%", "%", r["reason"])
            found.setdefault(("stored densely", kind), []).append(r["name"])
    first = {r["name"]: r["reason"] for r in (report.get("packed") or {}).get("layers", [])}
    return [
        {"what": what, "why": first[names[0]] if what == "stored densely" else why, "names": names}
        for (what, why), names in found.items()
    ]


def _products(profile: DeviceProfile | None, models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The profile's rows for shapes that the models have; None without any."""
    shapes = {tuple(r["shape"]) for m in models for r in m["layers"]}
    rows = [r for r in profile.rows if tuple(r["shape"]) in shapes] if profile else []
    return {"name": profile.name, "rows": rows} if profile and rows else None


# options that --no-… turns off
_ON_BY_DEFAULT = ("permute", "refit", "integers")


def flat(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as {option: value}; calibration and evaluation by their flags."""
    options: dict[str, Any] = {}
    for name, value in plan.items():
        if name in FLAGS and isinstance(value, dict):
            options |= {FLAGS[name][key].replace("-", "_"): item for key, item in value.items()}
        else:
            options["allow_foreign_profile" if name == "foreign" else name] = value
    return options


def _command(stage: str, plan: dict[str, Any], folder: Path) -> str:
    """The command that makes a run again."""
    words = ["secateurs", stage, plan["model"], "--out", str(folder)]
    for name, value in flat(plan).items():
        if name == "model" or value is None or value in ("", []):
            continue
        option = "--" + name.replace("_", "-")
        if value is False:
            words += [option.replace("--", "--no-", 1)] if name in _ON_BY_DEFAULT else []
        elif value is True:
            words += [option]
        elif name in ("units", "candidates"):
            words += [option, ",".join(value)]
        elif isinstance(value, list):
            words += [word for item in value for word in (option, str(item))]
        else:
            words += [option, str(value)]
    return shlex.join(words)


def _engines(models: Sequence[dict[str, Any]]) -> list[str]:
    """Versions and build flags of the engines that models were timed in, beside our own."""
    timed = [m["timed"].data for m in models if m["timed"]]
    return list(dict.fromkeys(v["engine"] for data in timed for v in data["variants"] if v.get("engine")))


def _title(runs: Sequence[dict[str, Any]]) -> str:
    models = dict.fromkeys(Path(run["plan"]["model"]).name for run in runs)
    return ("What to ship: " if any(run["decision"] for run in runs) else "Result: ") + ", ".join(models)


def _charts(runs: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    for number, run in enumerate(runs):
        screen = run["screen"]
        for across, title in (("seconds", screen.seconds), ("bytes", "bytes of weights")):
            points = [p for p in screen.points if across in p]
            # the dense model alone is no comparison
            if len(points) > 1:
                m = screen.measure
                specs[f"{across}-{number}"] = charts.tradeoff(
                    points, across, title, m.title, m.lower_is_better, m.floor, m.gate
                )
        if run["fleet"]:
            sized = [r for r in run["fleet"].data["variants"] if not r["why_not"]]
            specs[f"replicas-{number}"] = charts.replicas(
                [{k: r[k] for k in ("name", "replicas", "replicas_low", "replicas_high")} for r in sized]
            )
    many = len(runs) > 1
    names = [(Path(run["folder"]).name if many else "", m) for run in runs for m in run["models"]]
    for stage in ("decode", "prefill"):
        if rates := _rates(names, stage):
            specs[f"speed-{stage}"] = charts.speed(rates, {"decode": "decoding", "prefill": "prompts"}[stage])
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for run_name, m in names:
        prefix = f"{run_name}: " if run_name else ""
        for order, part in enumerate(m["parts"]):
            shown = prefix + ("dense" if part["model"] == "dense" else m["name"])
            bar = {"name": shown, "part": part["part"], "megabytes": part["nbytes"] / 1e6, "order": order}
            parts.setdefault((shown, part["part"]), bar)
    if parts:
        specs["bytes"] = charts.nbytes(list(parts.values()))
    for number, m in enumerate(models):
        if not m["layers"]:
            continue
        cells = [
            {"block": r["block"], "kind": r["kind"], "zeros": r["zeros"], "error": r["error"] or 0} for r in m["layers"]
        ]
        shares = [r["zeros"] for r in m["layers"]]
        # one colour everywhere says nothing
        if max(shares) - min(shares) > 0.005:
            specs[f"zeros-{number}"] = charts.heat(cells, "zeros", "share of zeros", 1.0)
        specs[f"error-{number}"] = charts.heat(cells, "error", "output error")
    return specs


def _rates(names: Sequence[tuple[str, dict[str, Any]]], stage: str) -> list[dict[str, Any]]:
    """Tokens a second of one stage, by model and batch. Dense models are timed beside each candidate: the first stands for all."""
    rates: dict[tuple[str, int], dict[str, Any]] = {}
    for run_name, m in names:
        prefix = f"{run_name}: " if run_name else ""
        for v in m["timed"].data["variants"] if m["timed"] else []:
            # the last one is the model itself
            shown = prefix + (m["name"] if v is m["timed"].data["variants"][-1] else v["name"])
            for b in v["batches"]:
                rate = b[stage]
                row = {
                    "name": shown,
                    "batch": b["batch"],
                    "value": rate["tokens_per_second"],
                    "low": rate["low"],
                    "high": rate["high"],
                }
                rates.setdefault((shown, b["batch"]), row)
    return sorted(rates.values(), key=lambda r: (not r["name"].startswith("dense"), r["batch"]))
