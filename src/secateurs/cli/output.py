"""What commands print: progress and notes on standard error, tables or one JSON object on standard output.

Progress is bars on a terminal. In a log it is a line when a stage begins, and one for every 30 seconds after it.
"""

import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# a file or a pipe has no width: tables get this one, and sentences are not folded
_WIDTH = 120
# seconds between the lines of a log
_EVERY = 30.0


# of a process that the system would have ended for writing to nobody: 128 + SIGPIPE
GONE = 141


@contextmanager
def streams() -> Iterator[None]:
    """A context with all standard streams, which ends with code 141 and no word when nobody reads standard output any more.

    A pipe to another process that broke is an error, with code 1 and one sentence.
    """
    # a file that is opened later must not get the number of a stream that was closed
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # rich gives its number to another file
    out = os.dup(1)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as stopped:
        # rich and typer make a SystemExit of it
        if isinstance(stopped, SystemExit) and not isinstance(stopped.__context__, BrokenPipeError):
            raise
        if _read(out):
            note("error: a process that this one wrote to has ended; nothing that was finished is lost")
            sys.exit(1)
        _to_nobody(1)
        sys.exit(GONE)
    finally:
        os.close(out)


def _read(number: int) -> bool:
    """True unless what is written to a stream reaches nobody."""
    poll = select.poll()
    poll.register(number, 0)
    # without asking, errors and the other end's leaving are told
    return not poll.poll(0)


def _to_nobody(number: int) -> None:
    """Let what is written to a stream go nowhere, also what is still on its way."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def console() -> Console:
    """Standard output."""
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH, soft_wrap=True)


def note(sentence: str | None, quiet: bool = False) -> None:
    """A sentence on standard error, if there is one and somebody reads it: work goes on without."""
    if sentence and not quiet:
        try:
            print(sentence, file=sys.stderr, flush=True)
        except BrokenPipeError:
            _to_nobody(2)


def print_json(data: dict[str, Any]) -> None:
    """The one object of --json (docs/commands.md)."""
    from secateurs.base.files import to_json

    typer.echo(to_json(data, "the object of --json"))


@dataclass
class _Stage:
    """A stage as a log knows it: when it began, with how many steps done; when it reported last."""

    began: float
    first: int
    at: float
    done: int
    total: int

    def said(self, now: float) -> str:
        """'3 of 10, 0:01:00 elapsed, 0:02:20 left'."""
        line, took = f"{self.done} of {self.total}", now - self.began
        if self.first < self.done == self.total:
            return f"done in {_clock(self.at - self.began)}, and what follows has taken {_clock(now - self.at)} so far"
        if took >= 1:
            line += f", {_clock(took)} elapsed"
        if took >= 1 and self.done > self.first:
            line += f", {_clock(took / (self.done - self.first) * (self.total - self.done))} left"
        return line


class _Log:
    """A progress callback that writes lines."""

    def __init__(self) -> None:
        self.written = time.monotonic()
        self._stages: dict[str, _Stage] = {}
        self._label = ""

    def __call__(self, label: str, done: int, total: int) -> None:
        now, stage = time.monotonic(), self._stages.get(label)
        # a finished stage that is gone through again begins again
        begins = stage is None or done < stage.done == stage.total
        if stage is None or begins:
            stage = self._stages[label] = _Stage(now, done, now, done, total)
        stage.at, stage.done, stage.total = now, done, total
        self._label = label
        if begins:
            self.write()

    def write(self) -> None:
        """A line on the stage that reported last, if any did."""
        self.written = time.monotonic()
        if self._label:
            note(f"{self._label}: {self._stages[self._label].said(self.written)}")


def _clock(seconds: float) -> str:
    """'0:01:30'."""
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def _log() -> Iterator[_Log]:
    """A progress callback for a log, in which a line comes every 30 seconds however long a step takes."""
    log, over = _Log(), threading.Event()

    def again() -> None:
        while not over.wait(max(0.0, log.written + _EVERY - time.monotonic())):
            if time.monotonic() >= log.written + _EVERY:
                log.write()

    threading.Thread(target=again, daemon=True).start()
    try:
        yield log
    finally:
        over.set()


@contextmanager
def progress_bars(show: bool) -> Iterator[Any]:
    """A progress callback: on a terminal one bar with the time left for each label, else the lines of a log."""
    errors = Console(stderr=True)
    if show and not errors.is_interactive:
        with _log() as log:
            yield log
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=errors, disable=not show) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress


@contextmanager
def on_cpu(quiet: bool, as_json: bool, *models: object) -> Iterator[Any]:
    """progress_bars() of a command that works on model folders; says if a GPU is left alone, and what a run directory means."""
    from secateurs.base.device import cpu_note, return_at_once
    from secateurs.base.run_directory import model_note

    return_at_once()
    note(cpu_note(), quiet)
    for model in models:
        note(model_note(str(model)), quiet)
    with progress_bars(not quiet and not as_json) as progress:
        yield progress


@contextmanager
def live_table(show: bool) -> Iterator[tuple[Any, Any]]:
    """A progress callback, and one that redraws a table of candidates above the bars; on standard error, in a log as lines."""
    from rich.console import Group
    from rich.live import Live

    from secateurs.report.tables import decision_table

    errors = Console(stderr=True)
    if not show or not errors.is_interactive:

        def said(rows: list[dict[str, Any]]) -> None:
            note(", ".join(f"{row['candidate']} {row['status']}" for row in rows), not show)

        with progress_bars(show) as progress:
            yield progress, said
        return
    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    with Live(console=errors, refresh_per_second=4) as live:

        def draw() -> None:
            live.update(Group(decision_table(rows), bars))

        def progress_of(label: str, done: int, total: int) -> None:
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

        yield progress_of, changed


def check_gate(report: dict[str, Any]) -> None:
    """Raises QualityGateError if a floor was missed."""
    from secateurs.base.errors import QualityGateError

    missed = [g["missed"] for g in report["gate"] if not g["passed"]]
    if missed:
        raise QualityGateError("; ".join(missed) + "; the results are kept")
