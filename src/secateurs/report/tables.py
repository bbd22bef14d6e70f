"""What a person reads in the terminal: tables made from reports. No numbers are computed here but totals."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateurs.matrix.lab import Iterative, Magnitude
from secateurs.matrix.patterns import PATTERNS
from secateurs.matrix.solvers import EXTRAS, SOLVERS
from secateurs.model.families import FAMILIES
from secateurs.model.inspect import ModelFacts
from secateurs.prune.allocation import ALLOCATIONS
from secateurs.prune.effort import EFFORTS, Effort
from secateurs.prune.record import LayerRecord, Report


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return table


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _place(name: str) -> tuple[str, str]:
    """('model.layers.3', 'mlp.down_proj'); experts of one parameter share a place."""
    found = re.match(r"(.*?\.\d+)\.(.*)", name)
    block, rest = (found[1], found[2]) if found else ("", name)
    return block, ".".join(part for part in rest.split(".") if not part.isdigit()) or rest


def _cells(layers: Sequence[Any], cell: Any) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Column names, and {block: {column: text}}, in order of appearance. Names are as short as they are unambiguous."""
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
    """The whole of a finished run."""
    plan, totals = report.plan, report.totals

    def cell(group: list[LayerRecord]) -> str:
        pruned = [r for r in group if r.skipped is None]
        if not pruned:
            return "dense"
        zeros = 1 - sum(r.kept for r in pruned) / sum(r.numel for r in pruned)
        error = (sum((r.error or 0) ** 2 for r in pruned) / len(pruned)) ** 0.5
        return f"{zeros:.1%} {error:.3f}"

    columns, rows = _cells(report.layers, cell)
    source = {"gram": "measured on calibration inputs", "norms": "from input norms", "weights": "of the weights"}
    kinds = {r.error_from for r in report.layers if r.error_from}
    meaning = "; ".join(source[k] for k in sorted(kinds))
    console.print(f"[bold]Zeros and relative output error per layer[/] ({meaning})")
    table = _table("block", *columns)
    for block, row in rows.items():
        table.add_row(block, *(row.get(column, "") for column in columns))
    console.print(table)
    console.print(
        f"Pruned {totals['layers_pruned']} layers to {totals['sparsity']:.2%} zeros ({totals['zeros']:,} of "
        f"{totals['weights']:,} weights): {plan['pattern']}, {plan['method']}, scope {plan['scope']}, "
        f"allocation {plan['allocation']}, effort {plan['effort']}."
    )
    if report.shrunk:
        console.print(_shrunk(report.shrunk, report.quality))
    if report.reconstruction:
        ratios = [r["after"] / r["before"] for r in report.reconstruction if r["before"] > 0]
        better = [ratio for ratio in ratios if ratio < 1]
        console.print(
            f"Tuned {len(better)} of {len(ratios)} blocks: their held-out error fell to {sum(ratios) / max(1, len(ratios)):.1%} "
            "of what it was, on average; the table's errors are from before."
        )
    if report.distillation:
        console.print(
            f"Tuned all blocks together for {report.distillation['steps']} steps: KL to the dense model on held-out calibration "
            f"windows {report.distillation['before']:.4f}, then {report.distillation['after']:.4f} nats a token."
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
    if report.bytes and not report.packed:
        console.print(
            f"The zeros are still stored as zeros: {megabytes(report.bytes['pruned'])} after against "
            f"{megabytes(report.bytes['dense'])} before, and a dense kernel multiplies them like any other number. "
            f"`secateurs pack {out}` stores the model without them, `secateurs bench {out}` measures what that is worth."
        )
    spent = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    console.print(f"Time: {spent}. Peak memory: {megabytes(report.peak_memory_bytes)}.")
    if report.compute:
        print_compute(report.compute, console)
    console.print(f"Results: {out}/model (a plain checkpoint), {out}/report.json, {out}/plan.json.", soft_wrap=True)


def print_compute(compute: dict[str, Any], console: Console) -> None:
    """In which dtype matrices were multiplied, said once."""
    if compute["why"]:
        console.print(
            f"Weights are {compute['stored']}; products were formed in {compute['products']}: {compute['why']}."
        )
    else:
        console.print(f"Products were formed in {compute['products']}, as weights are stored.")


def _print_skips(report: Report, console: Console) -> None:
    for by, words in (("plan", "left dense as asked"), ("shape", "left dense: cannot take the pattern")):
        found = [r for r in report.layers if r.skipped_by == by]
        reasons = list(dict.fromkeys(str(r.skipped) for r in found))
        if found:
            console.print(f"[yellow]{len(found)} layers {words}[/] ({'; '.join(reasons[:3])}), first {found[0].name}.")


def print_quality(quality: dict[str, Any], evaluation: dict[str, Any], console: Console) -> None:
    console.print(
        f"[bold]Quality[/] on {evaluation['source']}: {quality['windows']} windows of {evaluation['seqlen']} tokens, "
        f"stride {evaluation['seqlen']}, 95% intervals over windows"
    )
    table = _table("", "value", "interval", "n")
    rows = (
        ("perplexity, dense", "ppl_dense"),
        ("perplexity, pruned", "ppl"),
        ("perplexity, pruned / dense", "ppl_ratio"),
        ("KL to dense, nats a token", "kl"),
        ("same top token as dense", "agree"),
    )
    for words, key in rows:
        if estimate := quality[key]:
            interval = f"{estimate['low']:.4g} to {estimate['high']:.4g}"
            table.add_row(words, f"{estimate['value']:.4g}", interval, str(estimate["n"]))
    console.print(table)


def print_tasks(tasks: dict[str, Any], console: Console) -> None:
    console.print("[bold]Tasks[/] (lm-eval), value and standard error")
    table = _table("task", "metric", *tasks)
    first = next(iter(tasks.values()))
    for task, metrics in first.items():
        for metric in (m for m in metrics if not m.endswith("_stderr") and m not in ("sample_len", "samples")):
            cells = []
            for results in tasks.values():
                error = results[task].get(f"{metric}_stderr")
                cells.append(f"{results[task][metric]:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
            table.add_row(task, metric, *cells)
    console.print(table)


def print_facts(facts: ModelFacts, console: Console) -> None:
    console.print(f"[bold]{escape(facts.folder)}[/]")
    table = _table("layer", "shape", "zeros", "N:M that hold", "stored as", "bytes")
    for layer in facts.layers:
        rows, columns = layer.shape
        table.add_row(
            layer.name,
            f"{rows}x{columns}",
            f"{layer.sparsity:.2%}",
            " ".join(layer.holds) or "-",
            f"dense {layer.dtype}",
            f"{layer.nbytes:,}",
        )
    console.print(table)
    weights = sum(r * c for r, c in (layer.shape for layer in facts.layers))
    zeros = sum(layer.zeros for layer in facts.layers)
    console.print(
        f"{len(facts.layers)} prunable layers, {zeros:,} of {weights:,} weights are zero ({zeros / max(1, weights):.2%}). "
        f"Files: {megabytes(facts.file_bytes)}, of which {megabytes(facts.other_bytes)} are embeddings, norms, biases and "
        "headers. Zeros are stored as zeros and save nothing; `secateurs pack` stores a model without them."
    )


def _shrunk(before: dict[str, Any], quality: dict[str, Any] | None) -> str:
    counts, ratio = before["parameters"], before["latency_ratio"]
    text = (
        f"Shrunk before that to {before['budget']}: {counts['left']:,} of {counts['dense']:,} parameters, prompt in "
        f"{ratio['prefill']:.2f}x and token in {ratio['decode']:.2f}x the time"
    )
    if before["quality"] and quality:
        steps = (before["quality"]["ppl_dense"], before["quality"]["ppl"], quality["ppl"])
        text += f"; perplexity {' to '.join(format(step['value'], '.2f') for step in steps)} by both"
    return text + "."


def print_shrunk(report: dict[str, Any], console: Console, folder: str) -> None:
    """What `secateurs shrink` left, beside the dense model."""
    dense, left, latency = report["dense"], report["left"], report["latency"]
    table = _table("", "dense", "left", "ratio")
    rows = [
        ("blocks", dense["layers"], left["layers"]),
        ("MLP neurons a block", dense["mlp"], left["mlp"]),
        ("KV heads a block", dense["heads"], left["heads"]),
        ("query heads of each", dense["queries"], left["queries"]),
        *([("experts a block", dense["experts"], left["experts"])] if dense["experts"] else []),
        ("residual width", dense["hidden"], left["hidden"]),
        ("parameters", dense["parameters"], left["parameters"]),
        ("bytes of weights", report["bytes"]["dense"], report["bytes"]["left"]),
    ]
    for name, before, after in rows:
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.3f}x" if before else "")
    for stage, name in (("prefill", f"ms, prompt of {latency['prompt']}"), ("decode", "ms a token after it")):
        before, after = latency["dense"][stage], latency["left"][stage]
        table.add_row(name, f"{before * 1e3:.1f}", f"{after * 1e3:.1f}", f"{after / before:.3f}x")
    console.print(table)
    plan = report["plan"]
    console.print(f"Budget {plan['budget']}, units {', '.join(plan['units'])}, criterion {plan['criterion']}.")
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
    """What `secateurs recover` won back."""
    plan, training = report["plan"], report["training"]
    console.print(
        f"{training['steps']} steps of {plan['batch']} windows on {escape(report['calibration']['source'])}, {plan['train']} trained: "
        f"held-out loss {training['before']:.4f} before, {training['after']:.4f} after. All {report['zeros']:,} zeros of "
        f"{report['of_weights']:,} weights are zeros still."
    )
    if report["quality_before"]:
        console.print("Before:")
        print_quality(report["quality_before"], report["evaluation"], console)
        console.print("After:")
    if report["quality"]:
        print_quality(report["quality"], report["evaluation"], console)
    if report["recovered"] is not None:
        console.print(f"[bold]{report['recovered']:.0%}[/] of the loss that pruning added is gone.")
    _print_end(report, console, folder)


# rows of the table of efforts: what they say of an effort and of the same for N:M
_EFFORT: dict[str, Callable[[Effort, bool], str]] = {
    "method": lambda e, fixed: e.method,
    "zeros shared out": lambda e, fixed: "by N:M" if fixed else e.allocation,
    "sensitivity, tokens": lambda e, fixed: "0" if fixed else str(e.sensitivity),
    "inputs reordered": lambda e, fixed: "yes" if fixed and e.permute else "no",
    "block tuning, steps": lambda e, fixed: str(e.fixed_reconstruct if fixed else e.reconstruct),
    "whole model, steps": lambda e, fixed: str(e.distill),
    "time, SparseGPT 1x": lambda e, fixed: e.fixed_cost if fixed else e.cost,
    "memory": lambda e, fixed: e.memory,
}


def print_methods(console: Console) -> None:
    methods = _table("method", "needs", "scope", "what it does")
    for solver in SOLVERS.values():
        methods.add_row(solver.name, solver.needs, solver.scope, solver.about)
    for name, (_, about) in EXTRAS.items():
        methods.add_row(f"METHOD+{name}", "gram", "its own", f"METHOD, then {about}")
    patterns = _table("pattern", "which weights may stay")
    for name, about in PATTERNS.items():
        patterns.add_row(name, about)
    allocations = _table("allocation", "how zeros are shared out")
    for allocation in ALLOCATIONS.values():
        allocations.add_row(allocation.name, allocation.about)
    kinds = [(e, fixed) for e in EFFORTS.values() for fixed in (False, True)]
    efforts = _table("", *(f"{e.name}, N:M" if fixed else e.name for e, fixed in kinds))
    for what, of in _EFFORT.items():
        efforts.add_row(what, *(of(e, fixed) for e, fixed in kinds))
    families = _table("family", "config.model_type", "blocks")
    for family in FAMILIES.values():
        blocks = f"{family.blocks}.*" + (" with fused experts" if family.experts else "")
        families.add_row(family.name, " ".join(family.types), blocks)
    titled = {
        "Efforts (--effort); times are SmolLM2-135M's with 64 windows, of best with 384": efforts,
        "Methods (--method)": methods,
        "Patterns (--pattern)": patterns,
        "Allocations (--allocation)": allocations,
        "Families": families,
    }
    for title, table in titled.items():
        console.print(f"[bold]{title}[/]")
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "left", False
        console.print(table)
        if table is efforts:
            for e in EFFORTS.values():
                console.print(f"{e.name}: {e.about}", markup=False)


def methods_as_dict() -> dict[str, Any]:
    return {
        "efforts": {e.name: dataclasses.asdict(e) for e in EFFORTS.values()},
        "methods": {s.name: {"needs": s.needs, "scope": s.scope, "about": s.about} for s in SOLVERS.values()},
        "patterns": PATTERNS,
        "allocations": {a.name: a.about for a in ALLOCATIONS.values()},
        "families": {f.name: {"types": f.types, "blocks": f.blocks} for f in FAMILIES.values()},
    }


def print_magnitude(rows: Sequence[Magnitude], console: Console) -> None:
    console.print("[bold]Magnitude pruning of the textbook's layer, relative output error[/]")
    table = _table("pattern", "sparsity", "error", "zeros", "textbook's threshold", "zeros", "textbook prints")
    for r in rows:
        threshold = ("-", "-") if r.threshold_error is None else (f"{r.threshold_error:.4f}", str(r.threshold_zeros))
        printed = "-" if r.textbook is None else f"{r.textbook:.4f}"
        table.add_row(r.pattern, f"{r.sparsity:.0%}", f"{r.error:.4f}", str(r.zeros), *threshold, printed)
    console.print(table)
    console.print(
        "The textbook keeps |w| > sort(|w|)[k]. That threshold is the (k+1)-th smallest magnitude and is not kept itself, so "
        "one weight too many goes; at 50% it is enough to move the fourth decimal. Secateurs counts instead of comparing.",
        markup=False,
    )


def print_iterative(rows: Sequence[Iterative], console: Console) -> None:
    console.print("[bold]One-shot against iterative magnitude pruning at 75%, relative output error[/]")
    table = _table("inputs", "way", "on the inputs refit saw", "held out")
    table.columns[1].justify = "left"
    for r in rows:
        table.add_row(r.inputs, r.way, f"{r.calibration:.4f}", f"{r.held_out:.4f}")
    console.print(table)
    for inputs in dict.fromkeys(r.inputs for r in rows):
        best = min((r for r in rows if r.inputs == inputs), key=lambda r: r.held_out)
        console.print(f"{inputs}: [bold]{best.way}[/] wins on held-out inputs ({best.held_out:.4f}).")
    console.print(
        "Why: with isotropic inputs no weight can stand in for another, so magnitude is already the right order and refit "
        "only learns the noise of its sample: better on the inputs it saw, worse on others, the more rounds the worse. With "
        "correlated inputs survivors take over from the removed, which is most of the gain, and rounds help on top, "
        "because each round ranks weights that have already made up for the last."
    )


def print_packed(result: dict[str, Any], out: str, console: Console) -> None:
    """What pack() or unpack() made."""
    if "totals" not in result:
        console.print(f"[green]{out}[/] is a plain checkpoint again: {megabytes(result['folder_nbytes'])}.")
        return
    totals = result["totals"]
    ratio = totals["packed_layers_nbytes"] / max(1, totals["packed_layers_dense_nbytes"])
    console.print(
        f"[green]{out}[/]: {totals['layers_packed']} layers packed, {megabytes(totals['packed_layers_nbytes'])} instead of "
        f"{megabytes(totals['packed_layers_dense_nbytes'])} ({ratio:.3f}x); whole folder {megabytes(totals['folder_nbytes'])} "
        f"instead of {megabytes(totals['source_folder_nbytes'])}."
    )
    dense = [r for r in result["layers"] if r["format"] == "dense"]
    if dense:
        reasons = list(dict.fromkeys(r["reason"] for r in dense))
        console.print(f"[yellow]{len(dense)} layers stay dense[/], first {dense[0]['name']}: {escape(reasons[0])}.")
    if result["left_out"]:
        console.print(f"Not looked at: {escape(result['left_out'][0])} ({len(result['left_out'])} in all).")
    if totals["negative_zeros"] * 100 > sum(r["shape"][0] * r["shape"][1] for r in result["layers"]):
        console.print(
            f"[yellow]{totals['negative_zeros']} zeros are negative[/] and were kept as weights, bit for bit; weight * mask "
            "leaves such. --merge-zeros stores none of them."
        )
    console.print("It loads after `import secateurs`, with from_pretrained.")


def print_profile(profile: Any, file: str, console: Console) -> None:
    """The roofs of a machine and the table of cells."""
    here, gpu = profile.machine, profile.accelerator
    sizes = ", ".join(f"{name} {size >> 10} KiB" for name, size in here["caches"].items())
    console.print(f"[bold]{here['processor']}[/], {here['cores']} cores, {here['threads']} threads; {sizes}")
    flops = ", ".join(f"{dtype} {rate / 1e9:.0f} Gflop/s" for dtype, rate in profile.flops_per_second.items())
    isa = next(iter(here["kernels"])).split("_")[2]
    console.print(f"Reads {profile.bytes_per_second / 1e9:.1f} GB/s from memory; {flops}; kernels: {isa}")
    if gpu["device"]:
        console.print(f"GPU: {gpu['device']}, capability {gpu['compute_capability']}; 2:4: {gpu['why_not'] or 'yes'}")
    else:
        console.print(f"GPU: none ({gpu['why_not']})")
    for shape, dtype in dict.fromkeys((tuple(r["shape"]), r["dtype"]) for r in profile.rows):
        console.print(f"[bold]{shape[0]}x{shape[1]}, {dtype}[/]")
        table = _table("zeros", "pattern", "tokens", "kernel", "ms", "best dense", "ms", "bytes", "worth")
        for row in profile.rows:
            if (tuple(row["shape"]), row["dtype"]) != (shape, dtype):
                continue
            table.add_row(
                f"{row['sparsity']:.0%}", row["pattern"], str(row["tokens"]),
                _short(row["kernel"], dtype, isa), f"{row['seconds'] * 1e3:.2f}",
                _short(row["dense"], dtype, isa), f"{row['dense_seconds'] * 1e3:.2f}",
                f"{row['nbytes'] / row['dense_nbytes']:.2f}x",
                "no gain" if "needs" in row["verdict"] else row["verdict"],
            )  # fmt: skip
        console.print(table)
    for verdict in dict.fromkeys(r["verdict"] for r in profile.rows if "needs" in r["verdict"]):
        rows = [r for r in profile.rows if r["verdict"] == verdict]
        console.print(f"{rows[0]['sparsity']:.0%} {rows[0]['pattern']} stored densely: {escape(verdict)}.")
    console.print(f"Saved to {file}.", soft_wrap=True)


def _short(kernel: str, dtype: str, isa: str) -> str:
    """bitmask_bf16_avx512_stream -> bitmask_stream: the table's heading has the rest."""
    return kernel.replace(f"_{dtype}_{isa}_", "_")


def print_bench(result: dict[str, Any], console: Console) -> None:
    """Tokens per second of every variant at every batch."""
    console.print(
        f"Prompts of {result['prompt']} tokens, {result['new']} new ones, {result['repeats']} runs in turn, "
        f"{result['machine']['threads']} threads; median, and 10th to 90th percentile, of all prompts together"
    )
    table = _table("", "prompts", "prefill tokens/s", "", "decode tokens/s", "", "peak memory", "weights")
    for row in result["variants"]:
        sizes = [megabytes(row["peak_memory_bytes"]), megabytes(row["weights_bytes"])]
        for number, measured in enumerate(row["batches"]):
            cells = []
            for stage in ("prefill", "decode"):
                found = measured[stage]
                cells += [
                    f"{found['tokens_per_second']:.1f} [{found['low']:.1f}, {found['high']:.1f}]",
                    f"{found['speedup']:.2f}x",
                ]
            name = "" if number else escape(row["name"])
            table.add_row(name, str(measured["batch"]), *cells, *(["", ""] if number else sizes))
    console.print(table)
    for sentence in result.get("left_out", []):
        console.print(f"[yellow]Warning:[/] {escape(sentence)}.")


def decision_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Candidates as they stand; estimates are in brackets."""
    table = _table("candidate", "perplexity", "floor", "prefill", "decode", "request", "bytes", "state")
    for row in rows:
        quality = row["quality"]
        numbers = [
            f"{row['prefill']:.2f}x",
            f"{row['decode']:.2f}x",
            f"{row['seconds_ratio']['value']:.2f}x s",
            f"{row['bytes_ratio']:.2f}x",
        ]
        if not row["measured"]:
            numbers = [f"({number})" for number in numbers]
        floor = "" if row["passed"] is None else "[green]passed[/]" if row["passed"] else "[red]missed[/]"
        table.add_row(
            row["candidate"],
            f"{quality['ppl_ratio']['value'] - 1:+.1%}" if quality else "",
            floor,
            *numbers,
            row["status"],
        )
    return table


def print_decision(result: dict[str, Any], console: Console, folder: str) -> None:
    """The table, why each one is out, the front, and the sentence."""
    console.print(decision_table(result["rows"]))
    for row in result["rows"]:
        if row["reason"]:
            console.print(f"{row['candidate']}: {escape(row['reason'])}.", highlight=False)
        for warning in row["warnings"]:
            console.print(f"[yellow]Warning[/] ({row['candidate']}): {escape(warning)}.")
    if result["front"]:
        console.print(f"No other is both faster and better than: {', '.join(result['front'])}.")
    print_compute(result["compute"], console)
    console.print(f"[bold]{escape(result['sentence'])}[/]")
    console.print(f"[bold]{folder}/decide.json[/] has the rest; `secateurs report {folder}` makes a page of it.")


def print_worth(rows: Sequence[Any], name: str, sources: dict[str, str], console: Console) -> None:
    """Nominal and realizable fractions, those that need least first."""
    console.print(
        f"[bold]{escape(name)}[/]"
        + (": published figures, not measured" if sources else ", measured")
        + "; nominal, then realizable"
    )
    table = _table("candidate", "nominal FLOPs", "bytes", "real FLOPs", "bytes", "prefill s", "decode s", "by")
    for w in rows:
        numbers = (w.nominal_flops, w.nominal_bytes, w.flops, w.nbytes, w.prefill, w.decode)
        table.add_row(w.candidate, *(f"{n:.2f}x" for n in numbers), w.kernel)
    console.print(table)
    for w in rows:
        if w.why:
            console.print(f"{w.candidate}: {escape(w.why)}.", highlight=False)
    for figure, source in sources.items():
        console.print(f"[dim]{figure}: {escape(source)}.[/]")


def print_fleet(result: dict[str, Any], console: Console) -> None:
    """Replicas, what they see, what they cost, what is saved."""
    service, requests = result["service"], result["requests"]
    money = service["currency"]
    console.print(
        f"{service['rate']:g} requests/s, peak {service['peak']:g}; prompts of {requests['prompt_mean']:.0f} tokens, answers of "
        f"{requests['output_mean']:.0f}, on average; {service['percentile']:g}% within {service['first_seconds']:g} s to the first "
        f"token and {service['pace_seconds']:g} s a token; {service['headroom']:.0%} free at the peak; "
        f"{service['price']:g} {money} a node-hour; {requests['simulated']:,} requests simulated"
    )
    table = _table("", "replicas", "load", "first token s", "s a token", f"{money}/M tokens", f"saved {money} a year")
    for row in result["variants"]:
        if row["why_not"]:
            table.add_row(escape(row["name"]), "none")
            continue
        saved = ""
        if "saved_a_year" in row:
            saved = f"{row['saved_a_year']:,.0f} [{row['saved_a_year_low']:,.0f}, {row['saved_a_year_high']:,.0f}]"
        table.add_row(
            escape(row["name"]), f"{row['replicas']:,} [{row['replicas_low']:,}, {row['replicas_high']:,}]",
            f"{row['load']:.0%}", f"{row['first_seconds']:.3g}", f"{row['pace_seconds']:.3g}",
            f"{row['cost_per_million_tokens']:.4g}", saved,
        )  # fmt: skip
    console.print(table)
    for row in result["variants"]:
        if row["why_not"]:
            console.print(f"[yellow]{escape(row['why_not'])}[/]")
    ends = {row["name"]: f"{row['slots']}, {row['slots_end']}" for row in result["variants"] if not row["why_not"]}
    console.print("Sequences a replica: " + "; ".join(f"{escape(n)} {e}" for n, e in ends.items()) + ".")
