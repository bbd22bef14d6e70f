"""The command line: typer over Plan and the stages. Parsing, progress and printing; no logic.

Exit codes: 0 done; 1 it cannot be done; 2 the request cannot be read; 3 a gate was missed; 4 layers were skipped;
5 nothing pays.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateurs.base.errors import SecateursError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prunes neural networks to the sparsity that their hardware can cash in, and proves it.",
)
lab_app = typer.Typer(no_args_is_help=True, help="Small experiments on one layer, reproduced to the digit.")
app.add_typer(lab_app, name="lab")

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output and nothing else.")]
Gates = Annotated[
    list[str] | None,
    typer.Option(help="A floor: ppl<=+5%, ppl<=12, kl<=0.1, agree>=0.9, TASK>=0.3, TASK>=dense-0.02; repeat it."),
]
EvalText = Annotated[str, typer.Option(help="Like --calibration of prune; of pydoc, its held-out part.")]
EvalWindows = Annotated[int, typer.Option(help="Evaluation windows; 0 for none.")]
EvalSeqlen = Annotated[
    int | None, typer.Option(help="Tokens an evaluation window. Default: 2048, or the model's limit.")
]
Tasks = Annotated[list[str] | None, typer.Option(help="An lm-eval task; repeat it.")]
TasksPath = Annotated[str | None, typer.Option(help="A folder of lm-eval task files of your own.")]
TasksLimit = Annotated[int | None, typer.Option(help="Questions of each task. Default: all.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def _console() -> Console:
    # a table folded at 80 columns is unreadable in a log file
    return Console() if sys.stdout.isatty() else Console(width=120)


@contextmanager
def _progress(show: bool) -> Iterator[Any]:
    """A progress callback: one bar with ETA per label, on standard error."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show) as bars:
        tasks: dict[str, Any] = {}

        def progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield progress


@contextmanager
def _on_cpu(quiet: bool, as_json: bool) -> Iterator[Any]:
    """_progress() of a command that works on model folders; says so where a GPU is left alone."""
    _say_cpu(quiet)
    with _progress(not quiet and not as_json) as progress:
        yield progress


def _say_cpu(quiet: bool) -> None:
    from secateurs.base.device import cpu_note

    note = None if quiet else cpu_note()
    if note:
        Console(stderr=True, soft_wrap=True).print(note, highlight=False, markup=False)


@contextmanager
def _live_table(show: bool) -> Iterator[tuple[Any, Any]]:
    """A progress callback, and one that redraws a table of candidates above the bars; on standard error."""
    from rich.console import Group
    from rich.live import Live

    from secateurs.report.tables import decision_table

    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=4) if show and console.is_terminal else nullcontext() as live:

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
                state = ", ".join(f"{row['candidate']} {row['status']}" for row in rows)
                console.print(state, highlight=False)

        yield progress, changed


def _check_gate(report: dict[str, Any]) -> None:
    """Raises QualityGateError."""
    from secateurs.base.errors import QualityGateError

    missed = [g["missed"] for g in report["gate"] if not g["passed"]]
    if missed:
        raise QualityGateError("; ".join(missed) + "; the results are kept")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="A Hugging Face folder or hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory to make. Rerun after a kill: it goes on.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json; options given beside it win.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, N:M (N kept of M) or RxC. Default: unstructured.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros. Default: 0.5, or what N:M implies.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, balanced or best; fills what is not given below. Default: balanced.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `secateurs methods`; without --effort, this and nothing else is done.")
    ] = None,
    sensitivity: Annotated[
        int | None, typer.Option(help="Tokens on which the loss's dependence on every output is measured; 0: none.")
    ] = None,
    blend: Annotated[
        float | None, typer.Option(help="How far layers aim at the dense model's outputs, 0 to 1.")
    ] = None,
    permute: Annotated[
        bool | None, typer.Option("--permute/--no-permute", help="Reorder inputs for N:M where that folds away.")
    ] = None,
    reconstruct: Annotated[
        int | None, typer.Option(help="Steps of tuning each block's survivors against the dense block; 0: none.")
    ] = None,
    distill: Annotated[
        int | None, typer.Option(help="Steps of tuning all blocks against the dense model's predictions; 0: none.")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="Equal counts per row or layer. Default: the method's.")] = None,
    allocation: Annotated[
        str | None, typer.Option(help="How zeros are shared out: uniform, global, measured, owl, alpha or erk.")
    ] = None,
    min_sparsity: Annotated[
        float | None,
        typer.Option(
            help="Least of any layer when zeros are shared out. Default: 0.2 below the target; 0 with --budget."
        ),
    ] = None,
    max_sparsity: Annotated[
        float | None, typer.Option(help="Most of any layer. Default: 0.2 above the target; 0.9 with --budget.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="bytes=F or seconds=F of the dense layers', instead of --sparsity.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="pydoc, FILE.txt, FILE.jsonl:FIELD+FIELD, hub:NAME or self. Default: pydoc.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows. Default: 128.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens a calibration window. Default: 2048, or the model's limit.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Orders the calibration text. Default: 0.")] = None,
    propagate: Annotated[
        str | None, typer.Option(help="Blocks see inputs of pruned or dense ones. Default: pruned.")
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help="Ridge in units of the Gram's mean diagonal. Default: by tokens an input; 0.01 with --method."
        ),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Glob of layer names to leave dense; repeat it.")] = None,
    allow_skips: Annotated[
        bool | None, typer.Option("--allow-skips", help="Layers that cannot are no failure.")
    ] = None,
    gate: Gates = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Like --calibration. Default: pydoc, its held-out part.")
    ] = None,
    eval_windows: Annotated[int | None, typer.Option(help="Evaluation windows; 0 for none. Default: 24.")] = None,
    eval_seqlen: Annotated[int | None, typer.Option(help="Tokens an evaluation window. Default: 2048.")] = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    tasks_limit: TasksLimit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a language model in one shot, check it, measure it against the dense one, write a run directory."""
    given = {k: v for k, v in locals().items() if v is not None and k not in ("out", "plan", "as_json", "quiet")}
    from secateurs.base.errors import PlanError
    from secateurs.prune.folder import Run, failure
    from secateurs.prune.plan import Plan
    from secateurs.report.run_tables import print_report

    base = Plan.read(plan).as_dict() if plan else {}
    # what was resolved from a choice does not outlive it
    for choice, resolved in _RESOLVED.items():
        if choice in given:
            base = {key: value for key, value in base.items() if key not in resolved}
    chosen = Plan.from_dict({**base, **given})
    if not chosen.model:
        raise PlanError("no model: give a folder or hub id, or a --plan that names one")
    if out is None:
        raise PlanError("no place for the result: give --out DIR")
    with _on_cpu(quiet, as_json) as progress:
        report = Run(chosen, out.expanduser(), progress).complete()
    if as_json:
        _print_json(report.as_dict())
    elif not quiet:
        print_report(report, _console(), str(out))
    failed = failure(report)
    if failed:
        raise failed


_EXTRAS = ("sensitivity", "blend", "permute", "reconstruct", "distill", "allocation", "scope", "damping")
# choices of a plan, and what follows from each unless it is given
_RESOLVED = {
    "pattern": ("sparsity", "min_sparsity", "max_sparsity", "sensitivity", "reconstruct", "allocation", "scope"),
    "sparsity": ("min_sparsity", "max_sparsity"),
    "effort": ("method", *_EXTRAS),
    "method": ("effort", *_EXTRAS),
    "budget": ("allocation", "min_sparsity", "max_sparsity", "sensitivity"),
    "allocation": ("sensitivity",),
}


@app.command()
def shrink(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.")],
    budget: Annotated[
        str, typer.Option(help="params=0.75x, bytes=…, flops=…, latency=0.8x (prompt and token, both) or seconds=1.5.")
    ],
    out: Annotated[Path, typer.Option(help="The run directory to make. Rerun after a kill: it goes on.")],
    units: Annotated[
        str,
        typer.Option(
            help="What may go: mlp (neurons), heads (KV heads), queries (of each), experts, hidden (residual width), layers."
        ),
    ] = "mlp,heads,layers",
    criterion: Annotated[str, typer.Option(help="obs, taylor, energy or magnitude: which units go.")] = "obs",
    depth: Annotated[str, typer.Option(help="loss (measured) or influence: which blocks go.")] = "loss",
    refit: Annotated[bool, typer.Option("--refit/--no-refit", help="Least squares on what is left.")] = True,
    uniform: Annotated[bool, typer.Option(help="One shape for all blocks: all that config.json can state.")] = True,
    multiple: Annotated[int, typer.Option(help="MLP widths are multiples of this.")] = 64,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that latency is measured with.")] = 512,
    new: Annotated[int, typer.Option(help="Tokens after it.")] = 32,
    calibration: Annotated[str, typer.Option(help="Like --calibration of prune.")] = "pydoc",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Orders the calibration text.")] = 0,
    damping: Annotated[float, typer.Option(help="Ridge in units of the Gram's mean diagonal.")] = 0.01,
    gate: Gates = None,
    eval_text: EvalText = "pydoc",
    eval_windows: EvalWindows = 24,
    eval_seqlen: EvalSeqlen = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove neurons, heads and blocks until a budget is met: a smaller dense model, which needs no kernel and no code of ours."""
    from secateurs.report.run_tables import print_shrunk
    from secateurs.shrink.folder import shrink as run
    from secateurs.shrink.plan import ShrinkPlan

    plan = ShrinkPlan(
        model, budget, units=tuple(u.strip() for u in units.split(",")), criterion=criterion, depth=depth, refit=refit,
        uniform=uniform, multiple=multiple, prompt=prompt, new=new, calibration=calibration, samples=samples, seqlen=seqlen,
        seed=seed, damping=damping, gate=tuple(gate or ()), eval_text=eval_text, eval_windows=eval_windows, eval_seqlen=eval_seqlen,
    )  # fmt: skip
    with _on_cpu(quiet, as_json) as progress:
        report = run(plan, out.expanduser(), progress)
    if as_json:
        _print_json(report)
    elif not quiet:
        print_shrunk(report, _console(), str(out))
    _check_gate(report)


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="A run directory, a model folder with zeros, or a hub id.")],
    out: Annotated[Path, typer.Option(help="The run directory to make. Rerun after a kill: it goes on.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense model; 'none': the text alone. Default: the run's dense model.")
    ] = None,
    data: Annotated[str, typer.Option(help="Like --calibration of prune.")] = "pydoc",
    samples: Annotated[int | None, typer.Option(help="Windows of it. Default: one for every turn.")] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of training, at most.")] = 300,
    batch: Annotated[int, typer.Option(help="Windows a step; the processes of a torchrun share them.")] = 4,
    train: Annotated[str, typer.Option(help="blocks, all, vectors (norms, biases) or lora.")] = "blocks",
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher's predictions.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of that divergence.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the hidden states' distance, block by block.")] = 0.0,
    labels: Annotated[
        float | None, typer.Option(help="Weight of the text's own loss. Default: 0, or 1 without a teacher.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate, times each tensor's size. Default: by --train.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32. Default: the model's.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, a third more time.")] = False,
    seed: Annotated[int, typer.Option(help="Orders the text.")] = 0,
    gate: Gates = None,
    eval_text: EvalText = "pydoc",
    eval_windows: EvalWindows = 24,
    eval_seqlen: EvalSeqlen = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what pruning left until the quality is back; zeros stay zero. Alone, or in several processes under torchrun."""
    from secateurs.report.run_tables import print_recovered
    from secateurs.train import RecoverPlan
    from secateurs.train import recover as run

    plan = RecoverPlan(
        model, teacher=teacher, data=data, samples=samples, seqlen=seqlen, steps=steps, batch=batch, train=train, rank=rank, kl=kl,
        temperature=temperature, hidden=hidden, labels=labels, rate=rate, dtype=dtype, checkpointing=checkpointing, seed=seed,
        gate=tuple(gate or ()), eval_text=eval_text, eval_windows=eval_windows, eval_seqlen=eval_seqlen,
    )  # fmt: skip
    first = int(os.environ.get("RANK", "0")) == 0
    with _on_cpu(quiet or not first, as_json) as progress:
        report = run(plan, out.expanduser(), progress)
    if not first:
        return
    if as_json:
        _print_json(report)
    elif not quiet:
        print_recovered(report, _console(), str(out))
    _check_gate(report)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run directory, a model folder or a hub id.")],
    text: Annotated[str, typer.Option(help="Like --calibration of prune.")] = "pydoc",
    windows: Annotated[int, typer.Option(help="At most this many windows.")] = 24,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a window. Default: 2048, or the model's limit.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    gate: Gates = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    tasks_limit: TasksLimit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run directory against its dense model, or one model alone."""
    from secateurs.base.errors import CalibrationError, PlanError
    from secateurs.base.precision import described
    from secateurs.base.run_folder import models_of
    from secateurs.model.checkpoint import Checkpoint
    from secateurs.quality import gates
    from secateurs.quality import tasks as lm_eval_tasks
    from secateurs.quality.evaluation import quality
    from secateurs.report.run_tables import print_compute, print_quality, print_tasks

    try:
        gates.check(gate or (), tasks or ())
    except ValueError as error:
        raise PlanError(str(error)) from None
    if windows < 1:
        raise PlanError(f"windows {windows} is too small; give 1 or more")
    folder = Path(target).expanduser()
    if (folder / "plan.json").is_file():
        dense, left = models_of(folder)
        models = {"dense": Checkpoint(dense), "pruned": Checkpoint(left)}
    else:
        models = {"dense": Checkpoint(target)}
    with _on_cpu(quiet, as_json) as progress:
        found = quality(models["dense"], models.get("pruned"), text, windows, seqlen, seed, progress)
    if found is None:
        raise CalibrationError(f"{target} predicts no next token, so it has no perplexity")
    result: dict[str, Any] = {
        "compute": described(models["dense"].dtype), "evaluation": found[1].facts(), "quality": found[0].as_dict(),
    }  # fmt: skip
    if tasks:
        results = {n: lm_eval_tasks.run_tasks(c.folder, tasks, tasks_path, tasks_limit) for n, c in models.items()}
        result["tasks"] = {name: lm_eval_tasks.without_scores(found) for name, found in results.items()}
        result["compared"] = lm_eval_tasks.compare(results["dense"], results["pruned"]) if "pruned" in results else {}
    result["gate"] = gates.judge(gate or (), result["quality"], result.get("compared"))
    if as_json:
        _print_json(result)
    elif not quiet:
        console = _console()
        print_quality(result["quality"], result["evaluation"], console)
        if tasks:
            print_tasks(result["tasks"], console)
        print_compute(result["compute"], console)
    _check_gate(result)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A finished run directory.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Re-read a run directory from disk and check everything that its report claims."""
    from secateurs.prune.verify import verify as check

    with _progress(not quiet and not as_json) as progress:
        report = check(folder, progress)
    totals = report.totals
    if as_json:
        _print_json({"verified": True, "shards": len(report.shards), "totals": totals, "warnings": report.warnings})
    elif not quiet:
        console = _console()
        console.print(
            f"[green]{folder} holds what its report says[/]: {len(report.shards)} shards, {totals['layers_pruned']} pruned "
            f"layers of pattern {report.plan['pattern']} with {totals['sparsity']:.2%} zeros; all else equals the dense model."
        )
        for warning in report.warnings:
            console.print(f"[yellow]Warning:[/] {warning}.")


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="A run directory, a model folder with zeros, or a hub id.")],
    out: Annotated[Path | None, typer.Option(help="The folder to make. Default for a run: its folder packed.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The other way: packed to plain, bit for bit.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="A profile of `secateurs probe`. Default: the one of this machine, if any.")
    ] = None,
    merge_zeros: Annotated[
        bool, typer.Option("--merge-zeros", help="Store no negative zeros, which weight * mask leaves behind.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store a pruned model without its zeros, for the sparse kernels; or turn it back."""
    from secateurs.base.errors import PlanError
    from secateurs.machine.profile import DeviceProfile
    from secateurs.pack import folder as stage
    from secateurs.report.run_tables import print_packed

    run = (Path(source).expanduser() / "plan.json").is_file()
    if out is None and not (run and not dense):
        raise PlanError("no place for the result: give --out DIR")
    with _progress(not quiet and not as_json) as progress:
        if dense:
            assert out is not None
            folder = Path(source).expanduser() / "packed" if run else source
            result = stage.unpack(folder, out.expanduser(), progress)
        else:
            chosen = DeviceProfile.read(profile) if profile else DeviceProfile.at_hand()
            if run:
                result = stage.pack_run(Path(source).expanduser(), out, chosen, progress, merge_zeros)
                out = out or Path(source).expanduser() / "packed"
            else:
                assert out is not None
                result = stage.pack(source, out.expanduser(), chosen, progress, merge_zeros)
    if as_json:
        _print_json(result)
    elif not quiet:
        print_packed(result, str(out), _console())


@app.command()
def probe(
    model: Annotated[
        str | None, typer.Argument(help="Measure the shapes of this model. Default: a 7B's widest.")
    ] = None,
    shapes: Annotated[str | None, typer.Option(help="Outputs x inputs, e.g. 11008x4096,4096x4096.")] = None,
    sparsity: Annotated[str | None, typer.Option(help="Fractions of zeros. Default: 0.5,0.7,0.9.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Patterns. Default: unstructured,2:4.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens at once. Default: 1,16,256.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32. Default: bf16.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the profile goes. Default: the cache, where `pack` looks.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what zeros are worth on this machine, before pruning: seconds, bytes, speedup over the best dense."""
    from secateurs.machine.probe import Question, read_list, read_shapes, shapes_of
    from secateurs.machine.probe import probe as measure
    from secateurs.machine.profile import default_file
    from secateurs.report.machine_tables import print_profile

    given: dict[str, Any] = {}
    if model:
        given["shapes"] = shapes_of(model)
    if shapes:
        given["shapes"] = read_shapes(shapes)
    if sparsity:
        given["sparsities"] = read_list(sparsity, float, "sparsity")
    if pattern:
        given["patterns"] = tuple(pattern.split(","))
    if tokens:
        given["tokens"] = read_list(tokens, int, "tokens")
    if dtype:
        given["dtypes"] = tuple(dtype.split(","))
    with _progress(not quiet and not as_json) as progress:
        profile = measure(Question(**given), progress)
    file = (out or default_file()).expanduser()
    profile.write(file)
    if as_json:
        _print_json(profile.as_dict())
    elif not quiet:
        print_profile(profile, str(file), _console())


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="A run directory of prune (packed) or shrink, or a packed folder.")],
    against: Annotated[Path | None, typer.Option(help="Another folder. Default: the dense model.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    new: Annotated[int, typer.Option(help="New tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each model, in turn.")] = 5,
    batch: Annotated[str, typer.Option(help="Prompts at once, e.g. 1,4,16, as `secateurs fleet` needs.")] = "1",
    out: Annotated[
        Path | None, typer.Option(help="Where the numbers go. Default: bench.json in a run directory.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="The dense model under torch.compile, as well.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure tokens per second through generate, dense against packed: prefill, decode, peak memory."""
    from secateurs.base.files import write_json
    from secateurs.machine.bench import Variant, record_of, variants_of
    from secateurs.machine.bench import bench as measure
    from secateurs.machine.probe import read_list
    from secateurs.report.machine_tables import print_bench

    batches = read_list(batch, int, "batches")

    variants = variants_of(folder.expanduser(), against)
    if compiled:
        variants.insert(1, Variant("dense, compiled", variants[0].folder, "compiled"))
    with _on_cpu(quiet, as_json) as progress:
        result = measure(variants, prompt, new, repeats, progress, batches)
    file = out or record_of(folder.expanduser())
    if file is not None:
        write_json(file.expanduser(), result)
    if as_json:
        _print_json(result)
    elif not quiet:
        print_bench(result, _console())


@app.command()
def realize(
    candidates: Annotated[
        list[str] | None, typer.Argument(help="0.7, 2:4, 16x16:0.5, shrink:mlp:flops=0.7x. Default: a range of them.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="A file of `secateurs probe`, or a100, h100, l4, rtx3090, avx2. Default: this machine's."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What zeros would be worth on a machine, before any is made: nominal FLOPs and bytes against realizable ones, and why."""
    from secateurs.decide.realize import USUAL, Candidate, machine_named, rank
    from secateurs.report.machine_tables import print_worth

    machine = machine_named(profile)
    rows = rank([Candidate.parse(text) for text in candidates or USUAL], machine, dtype)
    if as_json:
        _print_json({"machine": machine.name, "rows": [dataclasses.asdict(row) for row in rows]})
    elif not quiet:
        print_worth(rows, machine.name, getattr(machine, "sources", {}), _console())


@app.command()
def decide(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.")],
    out: Annotated[Path, typer.Option(help="The run directory to make. Rerun after a kill: it goes on.")],
    gate: Gates = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="0.7 (unstructured), 2:4, 16x16:0.5, shrink:latency=0.8x, shrink:layers:params=0.8x; commas between. "
            "Default: 0.5, 0.7, 2:4 and shrink:latency=0.8x."
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="seconds=0.8x (of a request) or bytes=0.6x, of the dense model's.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="A file of `secateurs probe`, or a100, h100, l4, rtx3090, avx2. Default: this machine's, measured if need be."
        ),
    ] = None,
    allow_foreign_profile: Annotated[
        bool, typer.Option("--allow-foreign-profile", help="Decide for another machine by its profile's estimates.")
    ] = False,
    effort: Annotated[str, typer.Option(help="fast, balanced or best.")] = "balanced",
    calibration: Annotated[str, typer.Option(help="Like --calibration of prune.")] = "pydoc",
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 512,
    seed: Annotated[int, typer.Option(help="Orders the calibration text.")] = 0,
    eval_text: EvalText = "pydoc",
    eval_windows: EvalWindows = 24,
    eval_seqlen: EvalSeqlen = None,
    tasks: Tasks = None,
    tasks_path: TasksPath = None,
    tasks_limit: TasksLimit = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that speed is measured with.")] = 256,
    new: Annotated[int, typer.Option(help="New tokens after it.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each model, in turn.")] = 5,
    multiple: Annotated[int, typer.Option(help="MLP widths of shrink are multiples of this.")] = 64,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which candidate to ship on this machine: estimated, pruned, held to the floor, timed; one sentence says. Exit 5: none."""
    from secateurs.base.errors import NothingPaysError
    from secateurs.decide.decide import decide as run
    from secateurs.decide.plan import DEFAULT_CANDIDATES, DecidePlan
    from secateurs.report.tables import print_decision

    chosen = DEFAULT_CANDIDATES
    if candidates is not None:
        chosen = tuple(c.strip() for c in candidates.split(",") if c.strip())
    plan = DecidePlan(
        model, tuple(gate or ()), chosen, budget=budget, profile=profile,
        foreign=allow_foreign_profile, effort=effort, calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        eval_text=eval_text, eval_windows=eval_windows, eval_seqlen=eval_seqlen, tasks=tuple(tasks or ()), tasks_path=tasks_path,
        tasks_limit=tasks_limit, prompt=prompt, new=new, repeats=repeats, multiple=multiple,
    )  # fmt: skip
    _say_cpu(quiet)
    with _live_table(not quiet and not as_json) as (progress, show):
        result = run(plan, out.expanduser(), progress, show)
    if as_json:
        _print_json(result)
    elif not quiet:
        print_decision(result, _console(), str(out))
    if result["recommended"] == "dense":
        raise NothingPaysError(result["sentence"])


@app.command()
def fleet(
    source: Annotated[
        Path, typer.Argument(help="A run directory that `secateurs bench --batch 1,4,16` measured, or its bench.json.")
    ],
    price: Annotated[str, typer.Option(help="Of a node-hour, with its currency: '2.50 USD'.")],
    rate: Annotated[float | None, typer.Option(help="Requests a second, on average. Default: the trace's.")] = None,
    peak: Annotated[float | None, typer.Option(help="Requests a second at the peak. Default: the mean.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Tokens: 512, uniform:16,1024 or lognormal:512,0.8 (mean, variation).")
    ] = "512",
    output: Annotated[str, typer.Option(help="Tokens of the answer, written alike.")] = "128",
    trace: Annotated[
        Path | None, typer.Option(help='JSONL of {"time", "prompt", "output"} instead of the above.')
    ] = None,
    ttft: Annotated[float, typer.Option(help="Seconds to the first token, at most.")] = 1.0,
    tpot: Annotated[float, typer.Option(help="Seconds a token after it, at most.")] = 0.1,
    percentile: Annotated[float, typer.Option(help="Percent of requests that keep both.")] = 95.0,
    headroom: Annotated[float, typer.Option(help="Share of every replica that stays free at the peak.")] = 0.2,
    memory: Annotated[float | None, typer.Option(help="GB of a replica. Default: the measured machine's.")] = None,
    requests: Annotated[int, typer.Option(help="Requests to simulate.", min=100)] = 100_000,
    seed: Annotated[int, typer.Option(help="Of arrivals and lengths.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where the numbers go. Default: fleet.json beside the measurement.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How many replicas the traffic takes, dense and pruned, what they would see and what is saved a year."""
    from secateurs.base.files import write_json
    from secateurs.decide.fleet import fleet as size_all
    from secateurs.decide.fleet import random_requests, read_speeds, read_trace, service_of
    from secateurs.report.machine_tables import print_fleet

    traced = read_trace(trace) if trace is not None else None
    service = service_of(traced, rate, peak, ttft, tpot, percentile, price, headroom, memory)
    asked = traced or random_requests(service.peak, requests, prompt, output, seed)
    with _progress(not quiet and not as_json) as progress:
        result = size_all(read_speeds(source), service, asked, progress)
    write_json(out or (source if source.is_dir() else source.parent) / "fleet.json", result)
    if as_json:
        _print_json(result)
    elif not quiet:
        print_fleet(result, _console())


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories of decide, prune, shrink or recover; several stand side by side."),
    ],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in the first directory.")] = None,
    quiet: Quiet = False,
) -> None:
    """One HTML file, fit for a review: the decision, quality, speed, bytes, layers, the fleet, and how to measure it all again."""
    from secateurs.report.page import write

    file = write(runs, out)
    if not quiet:
        _console().print(f"[bold]{file}[/]: {file.stat().st_size / 1e6:.1f} MB, needs no network.", soft_wrap=True)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(help="A run directory, a model folder or a hub id.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model: per layer shape, zeros, N:M patterns that hold, bytes as stored."""
    from secateurs.model.inspect import inspect as look
    from secateurs.report.tables import print_facts

    with _progress(not quiet and not as_json) as progress:
        facts = look(target, progress)
    if as_json:
        _print_json(dataclasses.asdict(facts))
    elif not quiet:
        print_facts(facts, _console())


@app.command()
def methods(as_json: Json = False) -> None:
    """List methods, patterns, allocations and model families, a line each."""
    from secateurs.report import tables

    _print_json(tables.methods_as_dict()) if as_json else tables.print_methods(_console())


@lab_app.command("magnitude")
def lab_magnitude(as_json: Json = False) -> None:
    """Magnitude pruning at 25, 50, 75, 90% and 2:4 on the textbook's seeded layer."""
    from secateurs.matrix import lab
    from secateurs.report.tables import print_magnitude

    rows = lab.magnitude()
    _print_json([dataclasses.asdict(r) for r in rows]) if as_json else print_magnitude(rows, _console())


@lab_app.command("iterative")
def lab_iterative(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of pruning and refit.")] = 5, as_json: Json = False
) -> None:
    """One-shot against iterative pruning with least-squares refit at 75%: which wins, and why."""
    from secateurs.matrix import lab
    from secateurs.report.tables import print_iterative

    rows = lab.iterative(rounds)
    _print_json([dataclasses.asdict(r) for r in rows]) if as_json else print_iterative(rows, _console())


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    context.obj = debug


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error is one sentence on standard error and a non-zero exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
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
    except OSError as error:
        if "--debug" in arguments:
            raise
        where = f" {error.filename}" if error.filename else ""
        _complain(f"the system refused{where}: {error.strerror or error}; nothing that was finished is lost", 1)


def _complain(message: str, code: int) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(message)}", highlight=False)
    sys.exit(code)
