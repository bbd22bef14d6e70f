"""secateurs decide, fleet and report: what to ship, on how many machines, and the page that says why."""

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import options
from secateurs.cli.options import METHOD, OUTPUT, RARE, SPEED, option
from secateurs.cli.output import console, live_table, note, print_json, progress_bars

TRAFFIC = "Traffic"


def decide(
    model: options.Model,
    *,
    gate: options.Gates = None,
    candidates: Annotated[
        str | None,
        option(
            METHOD,
            "E.g. 0.7 (unstructured), 2:4, 16x16:0.5, shrink:latency=0.8x, 0.5+int8, 2:4+int4/128, bits=3.3; commas between. "
            "Default: 0.5, 0.5+int8, 2:4+int4, 0.7+int4, shrink:latency=0.8x and the same +int4. Dense int8 and int4 come in.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        option(
            METHOD, "What a candidate may take of the dense model's: e.g. seconds=0.8x (of a request) or bytes=0.6x."
        ),
    ] = None,
    effort: Annotated[str | None, option(METHOD, "fast, balanced or best. Default: balanced.")] = None,
    calibration: options.Source = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    seed: options.Seed = None,
    eval_text: options.EvalText = None,
    eval_windows: options.EvalWindows = None,
    eval_seqlen: options.EvalSeqlen = None,
    tasks: options.Tasks = None,
    prompt: Annotated[int | None, option(SPEED, "Tokens of the prompt of a request. Default: 256.")] = None,
    new: Annotated[int | None, option(SPEED, "New tokens of a request. Default: 64.")] = None,
    out: options.Out,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    profile: Annotated[
        str | None,
        option(
            RARE,
            "A profile of `secateurs probe`, or a100, h100, l4, rtx3090, avx2. Default: this machine's, measured if need be.",
        ),
    ] = None,
    allow_foreign_profile: Annotated[
        bool, option(RARE, "Decide for another machine by its profile's estimates.", "--allow-foreign-profile")
    ] = False,
    jobs: Annotated[
        int,
        option(
            METHOD, "Candidates that are made at once, each with its part of the threads. Default: 1, e.g. 4.", min=1
        ),
    ] = 1,
    plan: Annotated[
        bool,
        option(
            OUTPUT, "Print a command line for each candidate, for other machines that see --out, and stop.", "--plan"
        ),
    ] = False,
    collect: Annotated[
        bool, option(OUTPUT, "Decide between the candidates that are finished, and make none.", "--collect")
    ] = False,
    integers: Annotated[
        bool | None, option(RARE, "Dense int8 and int4 are candidates, too. Default: yes.", "--integers/--no-integers")
    ] = None,
    rivals: Annotated[
        bool | None,
        option(
            RARE,
            "The dense model under torch.compile, and in llama.cpp where xllamacpp is installed, has to be beaten. Default: yes.",
            "--rivals/--no-rivals",
        ),
    ] = None,
    repeats: Annotated[int | None, option(RARE, "Runs of each model, in turn. Default: 5.")] = None,
    multiple: Annotated[int | None, option(RARE, "MLP widths of shrink are multiples of this. Default: 64.")] = None,
    tasks_path: options.TasksPath = None,
    tasks_limit: options.TasksLimit = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Which candidate to ship on this machine: estimated, pruned, held to the floor, timed. Exit code 5: none pays.

    Example: secateurs decide MODEL --out runs/decision --gate 'ppl<=+5%'
    """
    from secateurs.base.device import cpu_note
    from secateurs.base.errors import NothingPaysError
    from secateurs.base.run_directory import model_note
    from secateurs.decide.decide import commands
    from secateurs.decide.decide import decide as run
    from secateurs.decide.plan import DecidePlan
    from secateurs.report.tables import print_decision

    chosen = None if candidates is None else tuple(c.strip() for c in candidates.split(",") if c.strip())
    values = {
        "candidates": chosen, "budget": budget, "effort": effort, "prompt": prompt, "new": new, "profile": profile,
        "repeats": repeats, "multiple": multiple, "integers": integers, "rivals": rivals,
    }  # fmt: skip
    asked = DecidePlan(
        model,
        options.evaluation_of(eval_text, eval_windows, eval_seqlen, gate, tasks, tasks_path, tasks_limit),
        calibration=options.calibration_of(calibration, samples, seqlen, seed),
        foreign=allow_foreign_profile,
        **options.given(**values),
    )
    note(cpu_note(), quiet)
    note(model_note(model), quiet)
    if plan:
        with progress_bars(not quiet and not as_json) as bars:
            lines, left = commands(asked, out.expanduser().absolute(), bars)
        for sentence in left:
            note(sentence, quiet)
        if as_json:
            print_json({"commands": lines, "left": left})
        else:
            typer.echo("\n".join(lines))
        return
    with live_table(not quiet and not as_json) as (progress, show):
        result = run(asked, out.expanduser(), progress, show, jobs, collect)
    if as_json:
        print_json(result)
    elif not quiet:
        print_decision(result, console(), str(out))
    if result["recommended"] == "dense":
        raise NothingPaysError(result["sentence"])


def fleet(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run directory that `secateurs bench --batch 1,4,16` or `decide` measured, or its bench.json.",
            show_default=False,
        ),
    ],
    price: Annotated[str, option(TRAFFIC, "Of a node-hour, with its currency, e.g. '2.50 USD'.")],
    rate: Annotated[float | None, option(TRAFFIC, "Requests a second, on average. Default: the trace's.")] = None,
    peak: Annotated[float | None, option(TRAFFIC, "Requests a second at the peak. Default: the average.")] = None,
    prompt: Annotated[
        str, option(TRAFFIC, "Tokens: 512, uniform:16,1024 or lognormal:512,0.8 (mean, variation). Default: 512.")
    ] = "512",
    output: Annotated[str, option(TRAFFIC, "Tokens of the answer, written alike. Default: 128.")] = "128",
    trace: Annotated[
        Path | None, option(TRAFFIC, 'A JSONL of {"time", "prompt", "output"} instead of the above. Default: none.')
    ] = None,
    ttft: Annotated[float, option(SPEED, "Seconds to the first token, at most. Default: 1.")] = 1.0,
    tpot: Annotated[float, option(SPEED, "Seconds a token after it, at most. Default: 0.1.")] = 0.1,
    percentile: Annotated[float, option(SPEED, "Percent of requests that keep both. Default: 95.")] = 95.0,
    headroom: Annotated[
        float, option(SPEED, "Share of every replica that stays free at the peak. Default: 0.2.")
    ] = 0.2,
    fits: Annotated[
        float, option(SPEED, "Percent of full replicas' moments in which the cache fits into memory. Default: 99.")
    ] = 99.0,
    out: Annotated[
        Path | None, option(OUTPUT, "Where the numbers go. Default: fleet.json beside the measurement.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    memory: Annotated[float | None, option(RARE, "GB of a replica. Default: the measured machine's.")] = None,
    requests: Annotated[int, option(RARE, "Requests to simulate. Default: 100000.", min=100)] = 100_000,
    seed: Annotated[int, option(RARE, "Of arrivals and lengths. Default: 0.")] = 0,
) -> None:
    """How many replicas the traffic takes, dense and pruned, what users would see and what is saved a year.

    Example: secateurs fleet runs/half --price '2.50 USD' --rate 3
    """
    from secateurs.base.files import write_json
    from secateurs.decide.fleet import fleet as size_all
    from secateurs.decide.fleet import random_requests, read_trace, service_of
    from secateurs.decide.speed import read_speeds
    from secateurs.report.machine_tables import print_fleet

    traced = read_trace(trace) if trace is not None else None
    service = service_of(traced, rate, peak, ttft, tpot, percentile, price, headroom, memory, fits)
    asked = traced or random_requests(service.peak, requests, prompt, output, seed)
    with progress_bars(not quiet and not as_json) as progress:
        result = size_all(read_speeds(source), service, asked, progress)
    write_json(out or (source if source.is_dir() else source.parent) / "fleet.json", result)
    if as_json:
        print_json(result)
    elif not quiet:
        print_fleet(result, console())


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories of decide, prune, shrink or recover; several stand side by side.", show_default=False
        ),
    ],
    out: Annotated[Path | None, option(OUTPUT, "The page. Default: report.html in the first directory.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """One HTML file, fit for a review: the decision, quality, speed, bytes, layers, the fleet, how to measure again.

    Example: secateurs report runs/decision
    """
    from secateurs.report.page import write

    file = write(runs, out)
    nbytes = file.stat().st_size
    if as_json:
        print_json({"file": str(file), "bytes": nbytes})
    elif not quiet:
        console().print(f"[bold]{file}[/]: {nbytes / 1e6:.1f} MB, needs no network.", soft_wrap=True)
