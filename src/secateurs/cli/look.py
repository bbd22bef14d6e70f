"""Commands that look at a folder: eval, verify, inspect; and methods, which lists what there is."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from secateurs.cli import options
from secateurs.cli.output import check_gate, console, note, on_cpu, print_json, progress_bars


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run directory, measured against its dense model; or a model folder or hub id alone.",
            show_default=False,
        ),
    ],
    eval_text: options.EvalText = None,
    eval_windows: options.EvalWindows = None,
    eval_seqlen: options.EvalSeqlen = None,
    gate: options.Gates = None,
    tasks: options.Tasks = None,
    tasks_path: options.TasksPath = None,
    tasks_limit: options.TasksLimit = None,
    seed: Annotated[
        int, options.option(options.RARE, "Of the random numbers behind the intervals of tasks. Default: 0.")
    ] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a run directory against its dense model, or one model alone.

    Example: secateurs eval runs/half --eval-text wiki.txt
    """
    from secateurs.base.errors import CalibrationError, PlanError
    from secateurs.base.precision import described
    from secateurs.base.run_directory import calibrated_on, is_run, model_in, models_of
    from secateurs.model.checkpoint import Checkpoint
    from secateurs.quality.evaluation import check, measured
    from secateurs.report.run_tables import print_compute, print_quality, print_tasks

    asked = options.evaluation_of(eval_text, eval_windows, eval_seqlen, gate, tasks, tasks_path, tasks_limit)
    if not asked.windows:
        raise PlanError("eval-windows 0 is too small; give 1 or more")
    dense, left, looked_at = Checkpoint(model), None, None
    if is_run(model):
        # of a decision, the run of the candidate to ship
        before, after = models_of(model_in(model).parent)
        dense, left = Checkpoint(before), Checkpoint(after)
        looked_at = calibrated_on(model_in(model).parent)
    note(dense.note, quiet)
    check(asked, dense)
    with on_cpu(quiet, as_json) as progress:
        found = measured(dense, left, asked, seed, progress, calibration=looked_at)
    if found.numbers is None:
        raise CalibrationError(
            f"{model} predicts no next token, so it has no perplexity, and nothing to compare it with: give a run directory, "
            "which is measured against its dense model"
        )
    result = {"compute": described(dense.dtype), **found.as_dict(), "warnings": found.warnings}
    if as_json:
        print_json(result)
    elif not quiet:
        screen = console()
        print_quality(result["quality"], result["evaluation"], screen)
        for warning in found.warnings:
            screen.print(f"[yellow]Warning:[/] {escape(warning)}.")
        if result["tasks"]:
            print_tasks(result["tasks"], screen)
        print_compute(result["compute"], screen)
    check_gate(result)


def verify(
    run: Annotated[Path, typer.Argument(help="A finished run directory of prune.", show_default=False)],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Re-read a run directory from disk and check everything that its report claims.

    Example: secateurs verify runs/half
    """
    from secateurs.prune.verify import verify as check

    with progress_bars(not quiet and not as_json) as progress:
        report = check(run, progress)
    totals = report.totals
    if as_json:
        print_json({"verified": True, "shards": len(report.shards), "totals": totals, "warnings": report.warnings})
    elif not quiet:
        screen = console()
        screen.print(
            f"[green]{run} holds what its report says[/]: {len(report.shards)} shards, {totals['layers_pruned']} pruned "
            f"layers of pattern {report.plan['pattern']} with {totals['sparsity']:.2%} zeros; all else equals the dense model."
        )
        for warning in report.warnings:
            screen.print(f"[yellow]Warning:[/] {warning}.")


def inspect(
    model: options.Model,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what is in a model: of each layer its shape, zeros, the N:M patterns that hold, bytes as stored.

    Example: secateurs inspect runs/half
    """
    from secateurs.base.run_directory import model_note
    from secateurs.model.checkpoint import Checkpoint
    from secateurs.model.inspect import inspect as look
    from secateurs.report.tables import print_facts

    note(model_note(model), quiet)
    note(Checkpoint(model).note, quiet)
    with progress_bars(not quiet and not as_json) as progress:
        facts = look(model, progress)
    if as_json:
        print_json(dataclasses.asdict(facts))
    elif not quiet:
        print_facts(facts, console())


def methods(as_json: options.Json = False) -> None:
    """List methods, efforts, patterns and allocations, a line each."""
    from secateurs.report import tables

    print_json(tables.methods_as_dict()) if as_json else tables.print_methods(console())
