"""secateurs shrink."""

from typing import Annotated

from secateurs.cli import options
from secateurs.cli.options import METHOD, RARE, option
from secateurs.cli.output import check_gate, console, note, on_cpu, print_json


def shrink(
    model: options.Model,
    *,
    budget: Annotated[
        str,
        option(
            METHOD,
            "What may be left of the dense model: latency=0.8x (of a prompt and of each token after it), params=0.75x, "
            "bytes=0.75x, flops=0.75x; or seconds=1.5.",
        ),
    ],
    units: Annotated[
        str | None,
        option(
            METHOD,
            "What may go: mlp (neurons), heads (KV heads), queries (query heads of each), experts, hidden (residual width), "
            "layers. Default: mlp,heads,layers, whichever the model can lose.",
        ),
    ] = None,
    criterion: Annotated[
        str | None, option(METHOD, "Which units go first: obs, taylor, energy or magnitude. Default: obs.")
    ] = None,
    experts: Annotated[
        str | None,
        option(
            METHOD,
            "Which experts go: loss (least measured change of their mixture), reap, frequency, or ream, which merges them into "
            "the others. Default: loss.",
        ),
    ] = None,
    experts_per_token: Annotated[
        int | None, option(METHOD, "Experts that a token is sent to, e.g. 4. Default: as many as before.")
    ] = None,
    calibration: options.Source = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    eval_text: options.EvalText = None,
    eval_windows: options.EvalWindows = None,
    eval_seqlen: options.EvalSeqlen = None,
    gate: options.Gates = None,
    tasks: options.Tasks = None,
    out: options.Out,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    depth: Annotated[
        str | None, option(RARE, "Which blocks go: loss (measured) or influence (cosine). Default: loss.")
    ] = None,
    refit: Annotated[
        bool, option(RARE, "Least squares on what is left. Default: --refit.", "--refit/--no-refit")
    ] = True,
    multiple: Annotated[int | None, option(RARE, "MLP widths are multiples of this, e.g. 128. Default: 64.")] = None,
    prompt: Annotated[int | None, option(RARE, "Tokens of the prompt that is timed. Default: 512.")] = None,
    new: Annotated[int | None, option(RARE, "Tokens after it that are timed. Default: 32.")] = None,
    damping: Annotated[
        float | None, option(RARE, "Ridge, in units of the Gram matrix's mean diagonal. Default: 0.01.")
    ] = None,
    tasks_path: options.TasksPath = None,
    tasks_limit: options.TasksLimit = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Remove neurons, heads and blocks until a budget is met: a smaller dense model that any tool loads. Alone, or in several
    processes under torchrun.

    Example: secateurs shrink MODEL --budget latency=0.8x --out runs/smaller
    """
    from secateurs.base.processes import is_first
    from secateurs.report.run_tables import print_shrunk
    from secateurs.shrink.plan import ShrinkPlan
    from secateurs.shrink.run import shrink as run

    values = {
        "units": tuple(u.strip() for u in units.split(",")) if units else None, "criterion": criterion, "depth": depth,
        "experts": experts, "experts_per_token": experts_per_token,
        "multiple": multiple, "prompt": prompt, "new": new, "damping": damping,
    }  # fmt: skip
    plan = ShrinkPlan(
        model,
        budget,
        refit=refit,
        calibration=options.calibration_of(calibration, samples, seqlen, seed),
        evaluation=options.evaluation_of(eval_text, eval_windows, eval_seqlen, gate, tasks, tasks_path, tasks_limit),
        **options.given(**values),
    )
    first = is_first()
    with on_cpu(quiet or not first, as_json, model) as progress:
        report = run(plan, out.expanduser(), progress, say=lambda sentence: note(f"{sentence}.", quiet))
    if not first:
        return
    if as_json:
        print_json(report)
    elif not quiet:
        print_shrunk(report, console(), str(out))
    check_gate(report)
