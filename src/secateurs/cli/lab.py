"""secateurs lab: small experiments on one layer, reproduced to the digit."""

import dataclasses
from typing import Annotated

import typer

from secateurs.cli import options
from secateurs.cli.output import console, print_json

app = typer.Typer(no_args_is_help=True, help="Small experiments on one layer, reproduced to the digit.")


@app.command()
def magnitude(as_json: options.Json = False) -> None:
    """Magnitude pruning at 25, 50, 75, 90% and 2:4 on the textbook's seeded layer."""
    from secateurs.matrix import lab
    from secateurs.report.tables import print_magnitude

    rows = lab.magnitude()
    print_json({"rows": [dataclasses.asdict(r) for r in rows]}) if as_json else print_magnitude(rows, console())


@app.command()
def iterative(
    rounds: Annotated[int, options.option(options.METHOD, "Rounds of pruning and refit. Default: 5.", min=2)] = 5,
    as_json: options.Json = False,
) -> None:
    """One-shot against iterative pruning with least-squares refit at 75%: which wins, and why."""
    from secateurs.matrix import lab
    from secateurs.report.tables import print_iterative

    rows = lab.iterative(rounds)
    print_json({"rows": [dataclasses.asdict(r) for r in rows]}) if as_json else print_iterative(rows, console())
