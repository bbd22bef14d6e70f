"""Terminal output of prune, shrink, recover, pack and eval.

Everything is printed from reports; only totals are computed here.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from secateurs.matrix.grids import parse
from secateurs.prune.record import LayerRecord, Report
from secateurs.quality.compare import named
from secateurs.report import gone_experts
from secateurs.report.bits import Bits, trial_words
from secateurs.report.terminal import megabytes, new_table

# what a reader of bits should know where zeros were asked for
MORE = ", or more where leaving zeros out would be slower here"


def _place(name: str) -> tuple[str, str]:
    """Split a layer's name into block and path: ('model.layers.3', 'mlp.down_proj'). Expert numbers are dropped."""
    found = re.match(r"(.*?\.\d+)\.(.*)", name)
    block, rest = (found[1], found[2]) if found else ("", name)
    return block, ".".join(part for part in rest.split(".") if not part.isdigit()) or rest


def _cells(layers: Sequence[Any], cell: Any) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Column names and {block: {column: text}}, in the order of the model. A column has the last part of a path, or the whole
    path where two end alike."""
    places: dict[tuple[str, str], list[Any]] = {}
    for layer in layers:
        places.setdefault(_place(layer.name), []).append(layer)
    paths = list(dict.fromkeys(path for _, path in places))
    last = {path: path.rpartition(".")[2] for path in paths}
    short = {path: name if list(last.values()).count(name) == 1 else path for path, name in last.items()}
    rows: dict[str, dict[str, str]] = {}
    for (block, path), group in places.items():
        rows.setdefault(block, {})[short[path]] = cell(group)
    return [short[path] for path in paths], rows


def print_report(report: Report, console: Console, out: str) -> None:
    """Print a finished pruning run: layers, totals, tuning, quality, gates, warnings, time and files."""
    plan, totals, bits = report.plan, report.totals, Bits.of(report.as_dict())
    several = bits is not None and len(bits.grids) > 1

    def cell(group: list[LayerRecord]) -> str:
        pruned = [r for r in group if r.skipped is None]
        if not pruned:
            return "dense"
        zeros = 1 - sum(r.kept for r in pruned) / sum(r.numel for r in pruned)
        error = (sum((r.error or 0) ** 2 for r in pruned) / len(pruned)) ** 0.5
        if several:
            grids = dict.fromkeys(str(parse(r.grid).bits) if r.grid else "16" for r in pruned)
            return f"{'/'.join(grids)}b {zeros:.0%} {error:.3f}"
        return f"{zeros:.1%} {error:.3f}"

    columns, rows = _cells([r for r in report.layers if r.skipped_by != "kind"], cell)
    source = {
        "gram": "measured on calibration inputs",
        "norms": "estimated from input norms",
        "weights": "error of the weights",
    }
    kinds = {r.error_from for r in report.layers if r.error_from}
    meaning = "; ".join(source[k] for k in sorted(kinds))
    what = "Bits, zeros" if several else "Zeros"
    console.print(f"[bold]{what} and relative output error per layer[/] ({meaning})")
    table = new_table("block", *columns)
    for block, row in rows.items():
        table.add_row(block, *(row.get(column, "") for column in columns))
    console.print(table)
    console.print(_done(plan, totals, bits))
    if report.budget:
        asked, weights, rest, stored = (megabytes(report.budget[k]) for k in ("asked", "weights", "rest", "stored"))
        console.print(
            f"Budget {plan['budget']}: {asked} of the {weights} that all weights take. They come to {stored}, {rest} of it outside "
            "the pruned layers (embedding, head, norms)."
        )
    if report.trial:
        console.print(f"{trial_words(report.trial)}.")
    if report.shrunk:
        console.print(_shrunk(report.shrunk, report.quality))
    if report.reconstruction:
        ratios = [r["after"] / r["before"] for r in report.reconstruction if r["before"] > 0]
        better = [ratio for ratio in ratios if ratio < 1]
        console.print(
            f"Tuned {len(better)} of {len(ratios)} blocks: their held-out error fell to {sum(ratios) / max(1, len(ratios)):.1%} "
            "of its value before, on average."
        )
    if report.distillation:
        console.print(
            f"Tuned all blocks together for {report.distillation['steps']} steps: KL to the dense model on held-out calibration "
            f"windows was {report.distillation['before']:.4f} nats a token before and {report.distillation['after']:.4f} after."
        )
    _print_skips(report, console)
    notes = [r for r in report.layers if r.note]
    if notes:
        console.print(f"Note on {len(notes)} layers, first {notes[0].name}: {notes[0].note}.")
    if report.quality and report.evaluation:
        print_quality(report.quality, report.evaluation, console)
    if report.tasks:
        print_tasks(report.tasks, console)
    for gate in report.gate:
        console.print(
            f"[green]gate {gate['gate']} passed[/]" if gate["passed"] else f"[red]{escape(gate['missed'])}[/]"
        )
    for warning in report.warnings:
        console.print(f"[yellow]Warning:[/] {escape(warning)}.")
    if report.bytes and not report.packed and bits:
        console.print(
            f"{out}/model stores these integers as plain weights: {megabytes(report.bytes['pruned'])}, dense "
            f"{megabytes(report.bytes['dense'])}. `secateurs pack {out}` stores them in {bits.words}, about "
            f"{megabytes(report.bytes['stored'])} in all{MORE if bits.asked else ''}; `secateurs bench {out}` measures the gain."
        )
    elif report.bytes and not report.packed:
        console.print(
            f"The zeros are still stored as zeros: {megabytes(report.bytes['pruned'])} after, "
            f"{megabytes(report.bytes['dense'])} before, and dense kernels still multiply them. "
            f"`secateurs pack {out}` stores the model without them; `secateurs bench {out}` measures the gain."
        )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    console.print(f"Time: {spent}. Peak memory: {megabytes(report.peak_memory_bytes)}.")
    if report.compute:
        print_compute(report.compute, console)
    console.print(f"Results: {out}/model (a plain checkpoint), {out}/report.json, {out}/plan.json.", soft_wrap=True)


def print_compute(compute: dict[str, Any], console: Console) -> None:
    """Print the dtype in which matrices were multiplied, and why if it is not the stored one."""
    if compute["why"]:
        console.print(
            f"Weights are {compute['stored']}; matrices were multiplied in {compute['products']}: {compute['why']}."
        )
    else:
        console.print(f"Matrices were multiplied in {compute['products']}, the dtype of the weights.")


def _done(plan: dict[str, Any], totals: dict[str, Any], bits: Bits | None) -> str:
    """What was done to how many layers, in a sentence."""
    layers, zeros = _layers(totals["layers_pruned"]), f"({totals['zeros']:,} of {totals['weights']:,} weights)"
    how = f"{plan['method']}, scope {plan['scope']}, allocation {plan['allocation']}, effort {plan['effort']}."
    if bits is None:
        return f"Pruned {layers} to {totals['sparsity']:.2%} zeros {zeros}: {plan['pattern']}, {how}"
    if not bits.asked:
        return (
            f"Quantized {layers} to {bits.grid}: {bits.layers:.2f} bits a weight, {totals['sparsity']:.0%} of the integers are "
            f"zero {zeros}: {how}"
        )
    return (
        f"Pruned {layers} to {totals['sparsity']:.2%} zeros {zeros} and rounded what is left to {bits.grid}: {bits.layers:.2f} "
        f"bits a weight; {bits.rounded:,} survivors became zero by rounding: {plan['pattern']}, {how}"
    )


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _print_skips(report: Report, console: Console) -> None:
    for by, words in (
        ("plan", "left dense, as asked"),
        ("shape", "left dense: the pattern does not fit the shape"),
        ("kind", "left dense, not of a kind that is pruned"),
    ):
        found = [r for r in report.layers if r.skipped_by == by]
        reasons = list(dict.fromkeys(str(r.skipped) for r in found))
        if found:
            # embeddings and heads are no news
            colour = "default" if by == "kind" else "yellow"
            console.print(
                f"[{colour}]{_layers(len(found))} {words}[/] ({'; '.join(reasons[:3])}), first {found[0].name}."
            )


def print_quality(quality: dict[str, Any], evaluation: dict[str, Any], console: Console) -> None:
    """Print what was measured against the dense model, with intervals."""
    unit = quality.get("unit", "windows")
    inputs = f"{quality['windows']} {unit}"
    if unit == "windows":
        inputs += f" of {evaluation['seqlen']} tokens, not overlapping"
    console.print(f"[bold]Quality[/] on {escape(evaluation['source'])}: {inputs}; 95% intervals over {unit}")
    table = new_table("", "value", "interval", "n")
    for key, words in named(quality).items():
        if estimate := quality.get(key):
            interval = f"{estimate['low']:.4g} to {estimate['high']:.4g}"
            table.add_row(words, f"{estimate['value']:.4g}", interval, str(estimate["n"]))
    console.print(table)


def print_tasks(tasks: dict[str, Any], console: Console) -> None:
    """Print the scores of lm-eval's tasks, a column for each model."""
    console.print("[bold]Tasks[/] (lm-eval), value and standard error")
    table = new_table("task", "metric", *tasks)
    first = next(iter(tasks.values()))
    for task, metrics in first.items():
        for metric in (m for m in metrics if not m.endswith("_stderr") and m not in ("sample_len", "samples")):
            cells = []
            for results in tasks.values():
                error = results[task].get(f"{metric}_stderr")
                cells.append(f"{results[task][metric]:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
            table.add_row(task, metric, *cells)
    console.print(table)


def _shrunk(before: dict[str, Any], quality: dict[str, Any] | None) -> str:
    counts, ratio = before["parameters"], before["latency_ratio"]
    text = (
        f"Shrunk before pruning, to {before['budget']}: {counts['left']:,} of {counts['dense']:,} parameters"
        + (f"; a prompt takes {ratio['prefill']:.2f}x the time" if ratio else "")
        + (f", a token {ratio['decode']:.2f}x" if "decode" in ratio else "")
    )
    if before["quality"] and quality and quality.get("ppl"):
        steps = (before["quality"]["ppl_dense"], before["quality"]["ppl"], quality["ppl"])
        dense, shrunk, pruned = (format(step["value"], ".2f") for step in steps)
        text += f"; perplexity {dense} dense, {shrunk} shrunk, {pruned} shrunk and pruned"
    return text + "."


def print_shrunk(report: dict[str, Any], console: Console, folder: str) -> None:
    """Print the shape, size and speed of a smaller model beside the dense model's."""
    dense, left, latency = report["dense"], report["left"], report["latency"]
    table = new_table("", "dense", "left", "ratio")
    rows = [
        ("blocks", dense["layers"], left["layers"]),
        # a config states one where all MLPs are experts, too
        *(
            [("MLP neurons a block", dense["mlp"], left["mlp"])]
            if not dense["experts"] or dense["mlp"] != left["mlp"]
            else []
        ),
        ("KV heads a block", dense["heads"], left["heads"]),
        ("query heads of each", dense["queries"], left["queries"]),
        *([("experts a block", dense["experts"], left["experts"])] if dense["experts"] else []),
        *([("experts of a token", dense["active"], left["active"])] if dense.get("active") else []),
        ("residual width", dense["hidden"], left["hidden"]),
        ("parameters", dense["parameters"], left["parameters"]),
        ("bytes of weights", report["bytes"]["dense"], report["bytes"]["left"]),
    ]
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}x" if before else "")
    for stage, name in (("prefill", f"ms, prompt of {latency['prompt']}"), ("decode", "ms a token after it")):
        if stage not in latency["dense"]:
            continue
        before, after = latency["dense"][stage], latency["left"][stage]
        table.add_row(name, f"{before * 1e3:.1f}", f"{after * 1e3:.1f}", f"{after / before:.3f}x")
    console.print(table)
    plan = report["plan"]
    by = f", criterion {plan['criterion']}" if {*plan["units"]} - {"experts", "layers"} else ""
    console.print(f"Budget {plan['budget']}, units {', '.join(plan['units'])}{by}.")
    for sentence in gone_experts.sentences(report):
        console.print(f"{sentence}.")
    if report["quality"]:
        print_quality(report["quality"], report["evaluation"], console)
    _print_end(report, console, folder)


def _print_end(report: dict[str, Any], console: Console, folder: str) -> None:
    for gate in report["gate"]:
        console.print(
            f"[green]gate {gate['gate']} passed[/]" if gate["passed"] else f"[red]{escape(gate['missed'])}[/]"
        )
    for warning in report["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}.")
    if report.get("compute"):
        print_compute(report["compute"], console)
    console.print(f"[bold]{folder}/model[/] loads with from_pretrained; [bold]{folder}/report.json[/] has the rest.")


def print_recovered(report: dict[str, Any], console: Console, folder: str) -> None:
    """Print the loss before and after training, and the share of the lost quality that came back."""
    plan, training = report["plan"], report["training"]
    console.print(
        f"{training['steps']} steps of {plan['batch']} windows on {escape(report['calibration']['source'])}, "
        f"{plan['train']} trained: "
        f"held-out loss {training['before']:.4f} before, {training['after']:.4f} after. All {report['zeros']:,} zeros (of "
        f"{report['of_weights']:,} weights) are still zero."
    )
    if report["quality_before"]:
        console.print("Before:")
        print_quality(report["quality_before"], report["evaluation"], console)
        console.print("After:")
    if report["quality"]:
        print_quality(report["quality"], report["evaluation"], console)
    if report["recovered"] is not None:
        console.print(f"Training removed [bold]{report['recovered']:.0%}[/] of the loss that pruning had added.")
    _print_end(report, console, folder)


def print_packed(result: dict[str, Any], out: str, console: Console) -> None:
    """Print what pack() or unpack() wrote."""
    if "totals" not in result:
        console.print(f"[green]{out}[/] is a plain checkpoint again: {megabytes(result['folder_nbytes'])}.")
        return
    totals = result["totals"]
    ratio = totals["packed_layers_nbytes"] / max(1, totals["packed_layers_dense_nbytes"])
    console.print(
        f"[green]{out}[/]: {_layers(totals['layers_packed'])} packed, {megabytes(totals['packed_layers_nbytes'])} instead of "
        f"{megabytes(totals['packed_layers_dense_nbytes'])} ({ratio:.3f}x); whole folder {megabytes(totals['folder_nbytes'])} "
        f"instead of {megabytes(totals['source_folder_nbytes'])}."
    )
    slower = [r for r in result["layers"] if r["slower"]]
    if slower:
        console.print(
            f"[yellow]Slower: {_layers(len(slower))}[/] {'takes' if len(slower) == 1 else 'take'} longer for one token than with "
            "their zeros, first "
            f"{slower[0]['name']}: {escape(slower[0]['reason'])}. --optimize speed stores those."
        )
    larger = [r for r in result["layers"] if r["least_nbytes"] < r["nbytes"]]
    if larger:
        saved = totals["nbytes"] - totals["least_nbytes"]
        console.print(
            f"{_layers(len(larger))} keep zeros that would take less left out, and be slower for one token: --optimize size saves "
            f"{megabytes(saved)} more."
        )
    dense = [r for r in result["layers"] if r["format"] == "dense" and not r["grid"]]
    if dense:
        reasons = list(dict.fromkeys(r["reason"] for r in dense))
        console.print(f"[yellow]Dense: {_layers(len(dense))}[/], first {dense[0]['name']}: {escape(reasons[0])}.")
    if result["left_out"]:
        console.print(f"Not packed: {_layers(len(result['left_out']))}, first {escape(result['left_out'][0])}.")
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")
    if totals["negative_zeros"] * 100 > sum(r["shape"][0] * r["shape"][1] for r in result["layers"]):
        console.print(
            f"[yellow]{totals['negative_zeros']} zeros are negative[/] (weight * mask makes such zeros) and are stored as weights: "
            "unpacking then gives every bit back. --merge-zeros drops them."
        )
    console.print("To load it: `import secateurs`, then from_pretrained.")


def print_exported(result: dict[str, Any], console: Console) -> None:
    """Print what export() wrote."""
    kinds = Counter(layer["stored"] for layer in result["layers"])
    held = ", ".join(f"{_layers(n)} as {kind}" for kind, n in kinds.items()) or "weights as they were"
    console.print(f"[green]{result['place']}[/] ({result['to']}): {held}; {megabytes(result['nbytes'])}.")
    if result["left"]:
        console.print(
            f"[yellow]Not quantized there: {_layers(len(result['left']))}[/], first {escape(result['left'][0])}."
        )
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")


def print_rescued(result: dict[str, Any], console: Console) -> None:
    """Print what rescue() read."""
    layers = result["layers"]
    grids = Counter(layer["grid"] for layer in layers if layer["grid"])
    numel = sum(math.prod(layer["shape"]) for layer in layers)
    zeros = sum(math.prod(layer["shape"]) * layer["sparsity"] for layer in layers)
    held = f": {_layers(len(layers))}, {zeros / numel:.1%} zeros" if numel else ""
    console.print(
        f"[green]{result['place']}[/] (from {', '.join(result['formats'])}){held}; {megabytes(result['nbytes'])}."
    )
    for grid, count in grids.items():
        console.print(f"{_layers(count)} on the grid {grid}, which `secateurs pack` stores as integers.")
    for why, count in Counter(layer["off_grid"] for layer in layers if layer["off_grid"]).items():
        console.print(f"{_layers(count)} without a grid: {escape(why)}.")
    for warning in result["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]")
