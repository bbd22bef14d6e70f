"""The command line: which commands there are, and how an error ends.

Exit codes: 0 done; 1 it cannot be done; 2 the request cannot be read; 3 a gate was missed; 4 layers were skipped;
5 nothing pays.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import secateurs
from secateurs.base.errors import PlanError, SecateursError
from secateurs.base.processes import is_alone
from secateurs.cli import decide, estimate, export, lab, look, machine, pack, prune, recover, rescue, shrink
from secateurs.cli.output import streams

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Prunes neural networks to the sparsity that their hardware can cash in, and proves it.",
)
MAKE, ASK, SEE = "Make a model smaller", "Ask what pays", "Look at what came of it"
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "decide": (decide.decide, ASK),
    "estimate": (estimate.estimate, ASK),
    "probe": (machine.probe, ASK),
    "realize": (machine.realize, ASK),
    "fleet": (decide.fleet, ASK),
    "prune": (prune.prune, MAKE),
    "shrink": (shrink.shrink, MAKE),
    "recover": (recover.recover, MAKE),
    "pack": (pack.pack, MAKE),
    "export": (export.export, MAKE),
    "import": (rescue.import_, MAKE),
    "bench": (pack.bench, SEE),
    "eval": (look.evaluate, SEE),
    "verify": (look.verify, SEE),
    "inspect": (look.inspect, SEE),
    "report": (decide.report, SEE),
    "methods": (look.methods, SEE),
}
# what several processes of a torchrun do together
TOGETHER = ("prune", "shrink", "recover")
for _name, (_function, _panel) in COMMANDS.items():
    app.command(_name, rich_help_panel=_panel)(_function)
app.add_typer(lab.app, name="lab", rich_help_panel=SEE)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"secateurs {secateurs.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    context.obj = debug
    if not is_alone() and context.invoked_subcommand not in TOGETHER:
        raise PlanError(
            f"{context.invoked_subcommand} runs in one process, and torchrun started several; start it without torchrun. In "
            f"several run: {', '.join(TOGETHER)}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error is one sentence on standard error and a non-zero exit."""
    with streams():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> None:
    try:
        app(arguments, prog_name="secateurs")
    except SecateursError as error:
        if "--debug" in arguments:
            raise
        _complain(str(error), error.exit_code)
    except SystemExit as stopped:
        # typer makes this of Ctrl-C
        if stopped.code != 130:
            raise
        _complain("interrupted; what was finished is kept, rerun the same command to go on", 130)
    except MemoryError:
        _complain("out of memory; lower --seqlen, or use a machine with more", 1)
    except BrokenPipeError:
        raise
    except OSError as error:
        if "--debug" in arguments:
            raise
        where = f" {error.filename}" if error.filename else ""
        _complain(f"the system refused{where}: {error.strerror or error}; nothing that was finished is lost", 1)


def _complain(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)
