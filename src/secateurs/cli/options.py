"""Options that commands share: one name, one meaning and one default each, in the same panels of --help.

A command takes them by these types, all None by default, and calibration_of() and evaluation_of() make the plan's parts of what was
given.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from secateurs.quality.settings import Calibration, Evaluation

# the panels of --help, in the order in which most commands show them
MODEL, PATTERN, METHOD, CALIBRATION = "Model", "Pattern", "Method", "Calibration"
EVALUATION, SPEED, OUTPUT, RARE = "Evaluation", "Speed", "Output", "Rarely needed"


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str, typer.Argument(help="A Hugging Face folder, a hub id, or a run directory: its model.", show_default=False)
]


def _trust(given: bool) -> bool:
    if given:
        from secateurs.model.source import trust_remote_code

        trust_remote_code()
    return given


TrustRemoteCode = Annotated[
    bool,
    option(
        RARE,
        "Run the Python code that lies in the model's folder; only for code that you have read. Default: it is refused.",
        "--trust-remote-code",
        callback=_trust,
    ),
]
Out = Annotated[Path, option(OUTPUT, "The run directory to make. Rerun after a kill: it goes on. E.g. runs/half.")]
Json = Annotated[bool, option(OUTPUT, "Print one JSON object to standard output and nothing else.", "--json")]
Quiet = Annotated[bool, option(OUTPUT, "Print nothing but errors.", "--quiet", "-q")]

Source = Annotated[
    str | None,
    option(
        CALIBRATION,
        "Text: FILE.txt, FILE.jsonl:COLUMN, also .csv and .parquet, folders, globs, hub:NAME, self; several with weights: "
        "'code.jsonl@2; stories.txt'. Or a folder of images or .wav files. Default: pydoc, Python's own.",
        "--calibration",
    ),
]
Samples = Annotated[int | None, option(CALIBRATION, "Windows of text, images or recordings, e.g. 128. Default: 64.")]
Seqlen = Annotated[int | None, option(CALIBRATION, "Tokens a window, e.g. 2048. Default: 512, or the model's limit.")]
Seed = Annotated[int | None, option(RARE, "Orders the text, and seeds what is drawn. Default: 0.")]

EvalText = Annotated[str | None, option(EVALUATION, "Like --calibration. Default: pydoc, its held-out part.")]
EvalWindows = Annotated[
    int | None, option(EVALUATION, "Windows of text, images or recordings, 0 for none, e.g. 12. Default: 24.")
]
EvalSeqlen = Annotated[int | None, option(EVALUATION, "Tokens a window. Default: 2048, or the model's limit.")]
Gates = Annotated[
    list[str] | None,
    option(
        EVALUATION,
        "A floor, e.g. 'ppl<=+5%'; also ppl<=12, kl<=0.1, agree>=90%, cosine>=0.98, neighbours>=0.9, error<=0.1, TASK>=0.3, "
        "TASK>=dense-0.02. Repeat it for more.",
        "--gate",
    ),
]
Tasks = Annotated[
    list[str] | None, option(EVALUATION, "An lm-eval task, e.g. piqa. Repeat it for more. Default: none.")
]
TasksPath = Annotated[
    str | None, option(RARE, "A folder of lm-eval task files of your own. Default: those of lm-eval.")
]
TasksLimit = Annotated[int | None, option(RARE, "Questions of each task, e.g. 200. Default: all.")]


def calibration_of(
    source: str | None, samples: int | None, seqlen: int | None, seed: int | None, base: Calibration | None = None
) -> Calibration:
    """The options that were given, over those of `base`."""
    return replace(base or Calibration(), **given(source=source, samples=samples, seqlen=seqlen, seed=seed))


def evaluation_of(
    text: str | None,
    windows: int | None,
    seqlen: int | None,
    gates: list[str] | None,
    tasks: list[str] | None,
    tasks_path: str | None,
    tasks_limit: int | None,
    base: Evaluation | None = None,
) -> Evaluation:
    """The options that were given, over those of `base`."""
    lists: dict[str, Any] = {name: tuple(value) for name, value in given(gates=gates, tasks=tasks).items()}
    plain = given(text=text, windows=windows, seqlen=seqlen, tasks_path=tasks_path, tasks_limit=tasks_limit)
    return replace(base or Evaluation(), **plain, **lists)


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
