"""report.html: run directories as one file that needs no network, for whoever reviews the decision.

page.html is the template; charts.py the charts. Numbers are shown from the JSON files as they are, but for sums of bytes. Those of
decisions, quality, speed, errors and fleets carry the file and key that they are from (`data-from`), so that a test can hold the
page against them.
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
from secateurs.base.files import write_text
from secateurs.machine.profile import DeviceProfile
from secateurs.quality.settings import FLAGS
from secateurs.report import charts


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
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("secateurs.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    models = [model for run in found for model in run["models"]]
    specs = _charts(found, models)
    text = template.render(
        title=_title(found),
        runs=found,
        models=models,
        # a closing tag inside would end the script
        specs=json.dumps(specs).replace("</", "<\\/"),
        charts={name: spec["description"] for name, spec in specs.items()},
        script=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        machine=machine(),
        value=_value,
    )
    file = (out or Path(runs[0]) / "report.html").expanduser()
    write_text(file, text)
    return file


def _value(source: str, data: Any, path: str, form: str = "{:.4g}") -> Any:
    """A number of a JSON file, with the place it is from."""
    import markupsafe

    at = data
    for key in path.split("/"):
        at = at[int(key)] if isinstance(at, list) else at[key]
    shown = form.format(at) if isinstance(at, (int, float)) else str(at)
    return markupsafe.Markup('<span data-from="{}" data-key="{}" data-form="{}">{}</span>').format(
        source, path, form, shown
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror}; is this a run directory?") from None
    except ValueError as error:
        raise OutputError(f"{file} is not JSON ({error}); run the command that made it again") from None


def _maybe(file: Path) -> Any:
    return _json(file) if file.is_file() else None


def _read(folder: Path) -> dict[str, Any]:
    """One run directory: its decision, if it is one, and its models."""
    plan_file = folder / "plan.json"
    if not plan_file.is_file():
        raise OutputError(f"{folder} is no run directory: it has no plan.json")
    plan = _json(plan_file)
    if "candidates" not in plan:
        model = _model(folder, folder.name)
        return {
            "folder": str(folder), "plan": plan, "decision": None, "models": [model], "fleet": model["fleet"],
            "products": _products(DeviceProfile.at_hand(), [model]), "command": model["command"],
        }  # fmt: skip
    if not (folder / "decide.json").is_file():
        raise OutputError(
            f"{folder} is incomplete: the decision is not made yet; run the same `secateurs decide` again"
        )
    decision = _json(folder / "decide.json")
    models = [_model(folder / r["folder"], r["candidate"]) for r in decision["rows"] if r["status"] == "measured"]
    profile = DeviceProfile.read(folder / "profile.json") if (folder / "profile.json").is_file() else None
    return {
        "folder": str(folder), "plan": plan, "decision": decision, "models": models, "fleet": _maybe(folder / "fleet.json"),
        "products": _products(profile, models), "command": _command("decide", plan, folder),
    }  # fmt: skip


def _model(folder: Path, name: str) -> dict[str, Any]:
    """A pruned or smaller model: its report and whatever else was measured of it."""
    file = folder / "report.json"
    if not file.is_file():
        raise OutputError(
            f"{folder} is incomplete: it has no report.json; run the command that made it again, it goes on"
        )
    report = _json(file)
    if report.get("status", "complete") != "complete":
        raise OutputError(
            f"{folder} is incomplete: it is {report['status']}; run the command that made it again, it goes on"
        )
    plan = _json(folder / "plan.json")
    timed = next((f for f in (folder / "bench.json", folder / "timing.json") if f.is_file()), None)
    kind = "shrunk" if "left" in report else "recovered" if "training" in report else "pruned"
    return {
        "name": name, "folder": str(folder), "source": str(file), "report": report, "plan": plan,
        "bench": _json(timed) if timed else None, "bench_source": str(timed), "fleet": _maybe(folder / "fleet.json"),
        "kind": kind, "parts": _parts(report), "layers": _layers(report),
        "command": _command({"shrunk": "shrink", "recovered": "recover"}.get(kind, "prune"), plan, folder),
    }  # fmt: skip


def _parts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes of the weight files by what they hold: dense, then as shipped."""
    if "bytes" not in report:
        return []
    dense = report["bytes"]["dense"]
    rows = [{"model": "dense", "part": "dense weights", "nbytes": dense}]
    if "left" in report:
        return [*rows, {"model": "shipped", "part": "dense weights", "nbytes": report["bytes"]["left"]}]
    packed = report.get("packed")
    if not packed:
        return [
            *rows,
            {"model": "shipped", "part": "zeros and all, as a plain checkpoint", "nbytes": report["bytes"]["pruned"]},
        ]
    held = [r for r in packed["layers"] if r["format"] != "dense"]
    itemsize = [r["dense_nbytes"] // (r["shape"][0] * r["shape"][1]) for r in held]
    survivors = sum(r["survivors"] * size for r, size in zip(held, itemsize, strict=True))
    padding = sum(32 * size for size in itemsize)
    beside = sum(r["nbytes"] for r in held) - survivors - padding
    rest = report["bytes"]["packed"] - survivors - padding - beside
    parts = {
        "survivors": survivors, "positions (a bit a weight)": beside, "padding": padding, "left dense, headers": rest
    }  # fmt: skip
    return rows + [{"model": "shipped", "part": part, "nbytes": n} for part, n in parts.items()]


def _layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for number, r in enumerate(report.get("layers", [])):
        found = re.match(r"(?:.*?\.)?(\d+)\.(.*)", r["name"])
        size = r["shape"][0] * r["shape"][1]
        rows.append(
            {**r, "number": number, "block": int(found[1]) if found else 0, "kind": found[2] if found else r["name"],
             "zeros": 1 - r["kept"] / size}
        )  # fmt: skip
    return rows


def _products(profile: DeviceProfile | None, models: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Measured products of the shapes that the models have."""
    shapes = {tuple(r["shape"]) for m in models for r in m["layers"]}
    rows = [r for r in profile.rows if tuple(r["shape"]) in shapes] if profile else []
    return {"name": profile.name, "rows": rows} if profile and rows else None


# options that --no-… turns off
_ON_BY_DEFAULT = ("permute", "refit")


def _command(stage: str, plan: dict[str, Any], folder: Path) -> str:
    """The command that makes a run again."""
    words = ["secateurs", stage, plan["model"], "--out", str(folder)]
    flat = {("allow-foreign-profile" if name == "foreign" else name): value for name, value in plan.items()}
    for part, flags in FLAGS.items():
        flat |= {flags[name]: value for name, value in (flat.pop(part, None) or {}).items()}
    for name, value in flat.items():
        if name == "model" or value is None or value in ("", []):
            continue
        option = "--" + name.replace("_", "-")
        if value is False:
            words += [option.replace("--", "--no-", 1)] if name in _ON_BY_DEFAULT else []
            continue
        if name in ("units", "candidates"):
            words += [option, ",".join(value)]
        elif isinstance(value, list):
            words += [word for item in value for word in (option, str(item))]
        elif value is True:
            words += [option] if name not in _ON_BY_DEFAULT or name == "permute" else []
        else:
            words += [option, str(value)]
    return shlex.join(words)


def _title(runs: Sequence[dict[str, Any]]) -> str:
    models = dict.fromkeys(Path(run["plan"]["model"]).name for run in runs)
    return "What to ship: " + ", ".join(models)


def _charts(runs: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    specs: dict[str, Any] = {}
    many = len(runs) > 1
    for number, run in enumerate(runs):
        rows = [r for r in (run["decision"] or {}).get("rows", []) if r["status"] == "measured" and r["quality"]]
        if rows:
            specs[f"front-{number}"] = charts.front([_point(r) for r in rows])
        if run["fleet"]:
            sized = [r for r in run["fleet"]["variants"] if not r["why_not"]]
            specs[f"replicas-{number}"] = charts.replicas(
                [{k: r[k] for k in ("name", "replicas", "replicas_low", "replicas_high")} for r in sized]
            )
    names = [(Path(run["folder"]).name if many else "", m) for run in runs for m in run["models"]]
    # a dense model is timed beside each candidate: the first of a run stands for all in the picture
    rates: dict[tuple[str, str, int], dict[str, Any]] = {}
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for run_name, m in names:
        prefix = f"{run_name}: " if run_name else ""
        label, dense = prefix + m["name"], prefix + "dense"
        for number, v in enumerate((m["bench"] or {}).get("variants", [])):
            # what was timed besides, such as a compiled dense model, has its own name
            shown = dense if not number else label if v["name"] in ("packed", "shrunk") else f"{label}, {v['name']}"
            for b in v["batches"]:
                for stage in ("prefill", "decode"):
                    rate = {
                        "name": shown, "stage": stage, "batch": b["batch"], "value": b[stage]["tokens_per_second"],
                        "low": b[stage]["low"], "high": b[stage]["high"],
                    }  # fmt: skip
                    rates.setdefault((stage, shown, b["batch"]), rate)
        for order, part in enumerate(m["parts"]):
            shown = dense if part["model"] == "dense" else label
            bar = {"name": shown, "part": part["part"], "megabytes": part["nbytes"] / 1e6, "order": order}
            parts.setdefault((shown, part["part"]), bar)
    if rates:
        specs["speed"] = charts.speed(sorted(rates.values(), key=lambda r: (r["stage"], r["batch"])))
    if parts:
        specs["bytes"] = charts.nbytes(list(parts.values()))
    for number, m in enumerate(models):
        if m["layers"]:
            cells = [
                {"block": r["block"], "kind": r["kind"], "zeros": r["zeros"], "error": r["error"] or 0}
                for r in m["layers"]
            ]
            specs[f"zeros-{number}"] = charts.heat(cells, "zeros", "zeros", 1.0)
            specs[f"error-{number}"] = charts.heat(cells, "error", "output error")
    return specs


def _point(row: dict[str, Any]) -> dict[str, Any]:
    seconds, ppl = row["seconds_ratio"], row["quality"]["ppl_ratio"]
    return {
        "name": row["candidate"], "passed": "passed" if row["passed"] else "missed",
        **{f"seconds{'' if k == 'value' else '_' + k}": seconds[k] for k in ("value", "low", "high")},
        **{f"ppl{'' if k == 'value' else '_' + k}": ppl[k] for k in ("value", "low", "high")},
    }  # fmt: skip
