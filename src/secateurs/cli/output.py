"""What commands print: progress bars and notes on standard error, tables or one JSON object on standard output."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# a file or a pipe has no width: tables get this one, and sentences are not folded
_WIDTH = 120


def console() -> Console:
    """Standard output."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH, soft_wrap=True)


def note(sentence: str | None, quiet: bool = False) -> None:
    """A sentence on standard error, if there is one."""
    if sentence and not quiet:
        Console(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)


def print_json(data: dict[str, Any]) -> None:
    """The one object of --json (docs/commands.md)."""
    from secateurs.base.files import to_json

    typer.echo(to_json(data, "the object of --json"))


@contextmanager
def progress_bars(show: bool) -> Iterator[Any]:
    """A progress callback: one bar with the time left for each label."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress


@contextmanager
def on_cpu(quiet: bool, as_json: bool, *models: object) -> Iterator[Any]:
    """progress_bars() of a command that works on model folders; says if a GPU is left alone, and what a run directory means."""
    from secateurs.base.device import cpu_note
    from secateurs.base.run_directory import model_note

    note(cpu_note(), quiet)
    for model in models:
        note(model_note(str(model)), quiet)
    with progress_bars(not quiet and not as_json) as progress:
        yield progress


@contextmanager
def live_table(show: bool) -> Iterator[tuple[Any, Any]]:
    """A progress callback, and one that redraws a table of candidates above the bars; on standard error."""
    from rich.console import Group
    from rich.live import Live

    from secateurs.report.tables import decision_table

    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    errors = Console(stderr=True)
    with Live(console=errors, refresh_per_second=4) if show and errors.is_terminal else nullcontext() as live:

        def draw() -> None:
            if live is not None:
                live.update(Group(decision_table(rows), bars))

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                # the last stages are enough on a screen
                for old in list(tasks)[:-2]:
                    bars.update(tasks[old], visible=False)
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)
            draw()

        def changed(found: list[dict[str, Any]]) -> None:
            rows[:] = found
            draw()
            if show and live is None:
                note(", ".join(f"{row['candidate']} {row['status']}" for row in rows))

        yield progress, changed


def check_gate(report: dict[str, Any]) -> None:
    """Raises QualityGateError if a floor was missed."""
    from secateurs.base.errors import QualityGateError

    missed = [g["missed"] for g in report["gate"] if not g["passed"]]
    if missed:
        raise QualityGateError("; ".join(missed) + "; the results are kept")
