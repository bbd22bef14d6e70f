"""Terminal output of decide, inspect, methods and lab."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateurs.decide.needs import Anatomy, Need
from secateurs.matrix.lab import Iterative, Magnitude
from secateurs.matrix.patterns import PATTERNS
from secateurs.matrix.solvers import EXTRAS, SOLVERS
from secateurs.model.inspect import ModelFacts
from secateurs.prune.allocation import ALLOCATIONS
from secateurs.prune.effort import EFFORTS, Effort
from secateurs.report.run_tables import print_compute
from secateurs.report.terminal import megabytes, new_table


def print_facts(facts: ModelFacts, console: Console) -> None:
    """Print every prunable layer: shape, zeros, the N:M patterns that it holds, bytes."""
    console.print(f"[bold]{escape(facts.folder)}[/]")
    table = new_table("layer", "shape", "zeros", "N:M that hold", "stored as", "bytes")
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
        "headers. These zeros are stored as zeros and save nothing; `secateurs pack` stores a model without them."
    )


def print_needs(anatomy: Anatomy, runs: dict[str, list[Need]], there: int, console: Console) -> None:
    """Print what each step of each run needs. there: bytes of memory of this machine."""
    size = anatomy.parameters * anatomy.itemsize
    console.print(
        f"{anatomy.parameters:,} parameters, {_gigabytes(size)}, in {anatomy.layers} blocks of up to "
        f"{_gigabytes(max(b.parameters for b in anatomy.blocks) * anatomy.itemsize)}."
    )
    table = new_table("run", "step", "memory at its peak", "disk", "time here")
    for name, steps in runs.items():
        for need in steps:
            much = _gigabytes(need.memory) + (" (more than here)" if need.memory > there else "")
            table.add_row(name, need.step, much, _gigabytes(need.disk), _hours(need.seconds))
        memory, disk, seconds = max(n.memory for n in steps), sum(n.disk for n in steps), sum(n.seconds for n in steps)
        table.add_row(name, "all", _gigabytes(memory), _gigabytes(disk), _hours(seconds), end_section=True)
    console.print(table)
    console.print(
        f"This machine has {_gigabytes(there)} of memory. Times are counted from what it does in a second now."
    )


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes < 1e11 else f"{nbytes / 1e9:,.0f} GB"


def _hours(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:,.0f} h"
    )


# rows of the table of efforts: (effort, whether the pattern fixes the sparsity, as N:M does) -> cell
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
    """Print all choices: efforts, methods, patterns and allocations."""
    methods = new_table("method", "needs", "scope", "what it does")
    for solver in SOLVERS.values():
        methods.add_row(solver.name, solver.needs, solver.scope, solver.about)
    for name, (_, about) in EXTRAS.items():
        methods.add_row(f"METHOD+{name}", "gram", "its own", f"METHOD, then {about}")
    patterns = new_table("pattern", "which weights may stay")
    for name, about in PATTERNS.items():
        patterns.add_row(name, about)
    allocations = new_table("allocation", "how zeros are shared out")
    for allocation in ALLOCATIONS.values():
        allocations.add_row(allocation.name, allocation.about)
    kinds = [(e, fixed) for e in EFFORTS.values() for fixed in (False, True)]
    efforts = new_table("", *(f"{e.name}, N:M" if fixed else e.name for e, fixed in kinds))
    for what, of in _EFFORT.items():
        efforts.add_row(what, *(of(e, fixed) for e, fixed in kinds))
    titled = {
        "Efforts (--effort); times are SmolLM2-135M's with 64 windows, of best with 384": efforts,
        "Methods (--method)": methods,
        "Patterns (--pattern)": patterns,
        "Allocations (--allocation)": allocations,
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
    """print_methods() as data, for --json."""
    return {
        "efforts": {e.name: dataclasses.asdict(e) for e in EFFORTS.values()},
        "methods": {s.name: {"needs": s.needs, "scope": s.scope, "about": s.about} for s in SOLVERS.values()},
        "patterns": PATTERNS,
        "allocations": {a.name: a.about for a in ALLOCATIONS.values()},
    }


def print_magnitude(rows: Sequence[Magnitude], console: Console) -> None:
    """Print the errors of magnitude pruning beside the textbook's."""
    console.print("[bold]Magnitude pruning of the textbook's layer, relative output error[/]")
    table = new_table("pattern", "sparsity", "error", "zeros", "textbook's threshold", "zeros", "textbook prints")
    for r in rows:
        threshold = ("-", "-") if r.threshold_error is None else (f"{r.threshold_error:.4f}", str(r.threshold_zeros))
        printed = "-" if r.textbook is None else f"{r.textbook:.4f}"
        table.add_row(r.pattern, f"{r.sparsity:.0%}", f"{r.error:.4f}", str(r.zeros), *threshold, printed)
    console.print(table)
    console.print(
        "The textbook keeps |w| > sort(|w|)[k]. That threshold is the (k+1)-th smallest magnitude, and it is removed too: one "
        "weight too many. At 50% this changes the fourth decimal. Secateurs removes an exact count.",
        markup=False,
    )


def print_iterative(rows: Sequence[Iterative], console: Console) -> None:
    """Print the errors of one-shot and of iterative pruning, and which is lower on held-out inputs."""
    console.print("[bold]One-shot against iterative magnitude pruning at 75%, relative output error[/]")
    table = new_table("inputs", "way", "on the inputs refit saw", "held out")
    table.columns[1].justify = "left"
    for r in rows:
        table.add_row(r.inputs, r.way, f"{r.calibration:.4f}", f"{r.held_out:.4f}")
    console.print(table)
    for inputs in dict.fromkeys(r.inputs for r in rows):
        best = min((r for r in rows if r.inputs == inputs), key=lambda r: r.held_out)
        console.print(f"{inputs}: [bold]{best.way}[/] wins on held-out inputs ({best.held_out:.4f}).")
    console.print(
        "Why: if inputs are isotropic, no weight can replace another. Magnitude is then the right order, and refit only fits the "
        "noise of its sample: the error falls on the inputs it saw and rises on others, more so with more rounds. If inputs are "
        "correlated, the weights that stay can replace removed ones, which is most of the gain. Several rounds help further, "
        "because each round ranks weights that were refit after the last one."
    )


def decision_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table of candidates, measured or not yet; estimates are in brackets."""
    table = new_table("candidate", "perplexity", "floor", "prefill", "decode", "request", "bytes", "bits", "state")
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
            f"{row['bits']:.2f}" if row.get("bits") else "",
            row["status"],
        )
    return table


def print_decision(result: dict[str, Any], console: Console, folder: str) -> None:
    """Print the candidates, the reason why each one is out, the front and the recommendation."""
    console.print(decision_table(result["rows"]))
    for row in result["rows"]:
        if row["reason"]:
            console.print(f"{row['candidate']}: {escape(row['reason'])}.", highlight=False)
        for warning in row["warnings"]:
            console.print(f"[yellow]Warning[/] ({row['candidate']}): {escape(warning)}.")
        if beside := _beside(row):
            console.print(f"{row['candidate']}: {beside}.", highlight=False)
    for rival in result.get("rivals", []):
        seconds = f"{rival['seconds_ratio']['value']:.2f}x s, {rival['bytes_ratio']:.2f}x bytes"
        floor = (
            "the same weights"
            if rival["same_weights"]
            else "holds the floor"
            if rival["passed"]
            else "misses the floor"
        )
        console.print(
            f"Dense {rival['words']}: {seconds}; {floor}; {escape(rival['engine'] or 'torch')}.", highlight=False
        )
    if through := [row for row in result["rows"] if row.get("through")]:
        _print_through(through, console)
    for sentence in result.get("left_out", []):
        console.print(f"[yellow]Note:[/] {escape(sentence)}.")
    if result["front"]:
        console.print(f"No candidate is both faster and better than one of these: {', '.join(result['front'])}.")
    print_compute(result["compute"], console)
    console.print(f"[bold]{escape(result['sentence'])}[/]")
    console.print(f"[bold]{folder}/decide.json[/] has the rest; `secateurs report {folder}` makes a page of it.")


def _beside(row: dict[str, Any]) -> str:
    """What a measured candidate takes of the dense one of the same bits and of the best dense one, in words."""
    found = row.get("beside") or {}
    same, best = found.get("same_bits"), found.get("best_dense")
    if row["status"] != "measured":
        return ""
    told = []
    for dense, which in ((same, "of the same bits"), (best, "the best that holds the floor")):
        if dense and not (which != "of the same bits" and same and same["candidate"] == dense["candidate"]):
            kl = "" if dense["kl"] is None else f", KL {dense['kl']:+.4f} nats"
            told.append(
                f"beside dense {dense['candidate']}, {which}: {dense['seconds']:.2f}x the seconds, {dense['bytes']:.2f}x the "
                f"bytes{kl}"
            )
    return "; ".join(told)


def _print_through(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the quality of packed models through their kernels, beside that of the same weights without them."""
    first = rows[0]["through"]
    console.print(
        f"[bold]Through the packed kernels[/]: KL to dense in nats a token (perplexity over dense), {first['windows']} windows of "
        f"{first['tokens']} tokens; kernels of integers round their inputs to 8 bits, in blocks of 32"
    )
    ways = {"plain": "plain weights"}
    ways |= {way: f"{first[way]['at_once']} tokens at once" for way in ("few", "many")}
    table = new_table("candidate", *ways.values())
    for row in rows:
        told = row["through"]
        table.add_row(row["candidate"], *(f"{told[way]['kl']:.4f} ({told[way]['ppl_ratio']:.3f}x)" for way in ways))
    console.print(table)
    for row in rows:
        few, many = (", ".join(row["through"][way]["kernels"]) for way in ("few", "many"))
        console.print(
            f"{row['candidate']}: {few}; at {row['through']['many']['at_once']} tokens {many}.", highlight=False
        )
