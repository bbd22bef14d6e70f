"""The model card of a pruned folder: README.md with what a reader on a hub needs to know."""

from secateurs.prune.record import Report
from secateurs.quality.compare import named


def model_card(report: Report, loader: str = "AutoModelForCausalLM") -> str:
    """Markdown with front matter. Everything in it is in report.json, too. loader: the class that loads the folder."""
    plan, totals = report.plan, report.totals
    grids = sorted({r.grid for r in report.layers if r.grid and r.skipped is None})
    asked = bool(totals["sparsity"] and (plan["sparsity"] or plan["budget"]))
    done = " and ".join(word for word, so in (("pruned", asked or not grids), ("quantized", grids)) if so)
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [{'pruning, sparsity, ' if asked or not grids else ''}{'quantization, ' if grids else ''}secateurs]",
        f"base_model: {plan['model']}"
        if "/" in plan["model"] and not plan["model"].startswith(("/", ".", "~"))
        else "",
        "---",
        "",
        f"# A {done} model",
        "",
        f"Made by secateurs {report.machine['versions']['secateurs']} from a dense model, {done} in one shot.",
        "",
        "| | |",
        "|---|---|",
        f"| pattern | {plan['pattern']} |",
        f"| method | {plan['method']}, scope {plan['scope']} |",
        f"| zeros in pruned layers | {totals['sparsity']:.2%} of {totals['weights']:,} weights |",
        f"| layers pruned, left dense | {totals['layers_pruned']}, "
        f"{sum(totals[f'layers_skipped_by_{by}'] for by in ('plan', 'shape', 'kind'))} |",
    ]
    if grids:
        lines.append(f"| grids | {', '.join(grids)}: {totals['bits']:.2f} bits a weight as packed |")
    if report.reconstruction or report.distillation:
        lines.append(
            f"| survivors tuned on calibration text | {plan['reconstruct']} steps a block against the dense block, "
            f"{plan['distill']} of the whole against the dense model's predictions |"
        )
    if report.calibration:
        tokens = report.calibration.get("tokens")
        lines.append(f"| calibration | {report.calibration['source']}{f', {tokens:,} tokens' if tokens else ''} |")
    if report.quality and report.evaluation:
        q, unit = report.quality, report.quality.get("unit", "windows")
        kind, of = ("text", f" of {report.evaluation['seqlen']} tokens") if unit == "windows" else ("inputs", "")
        lines.append(f"| evaluation {kind} | {report.evaluation['source']}, {q['windows']} {unit}{of} |")
        shown = (key for key in named(q) if key != "ppl_ratio" and q.get(key))
        lines += [f"| {named(q)[key]} | {_interval(q[key])} |" for key in shown]
    lines += [
        "",
        "The integers are stored as plain weights: this folder is as large as the dense one and no faster. "
        "`secateurs pack` stores integers and scales."
        if grids
        else "The zeros are stored as zeros: this folder is as large as the dense one and a dense kernel runs it no faster. "
        "`secateurs pack` stores it without them.",
        f"It loads with `{loader}.from_pretrained` and needs no code of secateurs.",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
