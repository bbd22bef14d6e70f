"""secateurs prune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from secateurs.cli import options
from secateurs.cli.options import METHOD, MODEL, OUTPUT, PATTERN, RARE, option
from secateurs.cli.output import console, on_cpu, print_json

# choices of a plan, and what follows from each unless it is given
_EXTRAS = ("sensitivity", "blend", "permute", "reconstruct", "distill", "allocation", "scope", "damping")
_RESOLVED = {
    "pattern": ("sparsity", "min_sparsity", "max_sparsity", "sensitivity", "reconstruct", "allocation", "scope"),
    "sparsity": ("min_sparsity", "max_sparsity", "sensitivity", "reconstruct", "allocation", "scope"),
    "effort": ("method", *_EXTRAS),
    "method": ("effort", *_EXTRAS),
    "budget": ("allocation", "min_sparsity", "max_sparsity", "sensitivity", "bits", "group", "grid"),
    "bits": ("group", "grid"),
    "grid": ("bits", "group"),
    "allocation": ("sensitivity",),
}


def prune(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder, a hub id, or a run directory: its model.", show_default=False),
    ] = None,
    plan: Annotated[
        Path | None, option(MODEL, "A plan.json of an earlier run; options given beside it win. Default: none.")
    ] = None,
    pattern: Annotated[
        str | None,
        option(PATTERN, "unstructured, N:M (N kept of every M inputs) or RxC blocks, e.g. 2:4. Default: unstructured."),
    ] = None,
    sparsity: Annotated[
        float | None, option(PATTERN, "Fraction of zeros, e.g. 0.7. Default: 0.5, or what N:M says.")
    ] = None,
    bits: Annotated[
        str | None,
        option(PATTERN, "An integer's: 8, 6, 5, 4, 3 or 2, several with --budget. Default: none."),
    ] = None,
    effort: Annotated[
        str | None,
        option(METHOD, "fast, balanced or best: a preset for all that is not given below. Default: balanced."),
    ] = None,
    method: Annotated[
        str | None,
        option(METHOD, "One method and nothing else, e.g. wanda or sparsegpt; `secateurs methods` lists them."),
    ] = None,
    allocation: Annotated[
        str | None,
        option(
            METHOD,
            "How zeros are shared among layers: uniform, global, measured, owl, alpha or erk. Default: --effort's.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        option(
            METHOD,
            "Instead of --sparsity: bytes=F of the whole model's, e.g. bytes=0.6, seconds=F of the layers', or bits=B a weight of "
            "the layers, e.g. bits=3.3.",
        ),
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
    out: Annotated[
        Path | None, option(OUTPUT, "The run directory to make. Rerun after a kill: it goes on. E.g. runs/half.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    scope: Annotated[
        str | None, option(RARE, "Equal counts in each row or over the layer: row or layer. Default: the method's.")
    ] = None,
    group: Annotated[
        str | None, option(RARE, "Inputs that share a scale: 32, 64, 128 or row. Default: 64, e.g. 128.")
    ] = None,
    grid: Annotated[
        str | None,
        option(RARE, "symmetric, asymmetric, or llama.cpp's q4_0 or q8_0. Default: symmetric, e.g. q4_0."),
    ] = None,
    head_bits: Annotated[
        int | None, option(RARE, "Bits of the output head; one that is the embedding too, once. Default: none, e.g. 8.")
    ] = None,
    embedding_bits: Annotated[
        int | None, option(RARE, "Bits of the input embedding. Default: none, or --head-bits where both are one.")
    ] = None,
    min_sparsity: Annotated[
        float | None, option(RARE, "Least of any layer. Default: 0.2 below the target; 0 with --budget.")
    ] = None,
    max_sparsity: Annotated[
        float | None,
        option(
            RARE, "Most of any layer. Default: 0.2 above the target, a third of the density left; 0.9 with --budget."
        ),
    ] = None,
    sensitivity: Annotated[
        int | None, option(RARE, "Tokens on which the loss's gradients are measured; 0 for none. Default: --effort's.")
    ] = None,
    blend: Annotated[
        float | None,
        option(RARE, "How far a layer aims at the dense model's outputs, 0 to 1. Default: --effort's."),
    ] = None,
    permute: Annotated[
        bool | None,
        option(RARE, "Reorder inputs for N:M where that costs nothing. Default: --effort's.", "--permute/--no-permute"),
    ] = None,
    reconstruct: Annotated[
        int | None, option(RARE, "Steps of tuning each block against the dense block; 0 for none. Default: --effort's.")
    ] = None,
    distill: Annotated[
        int | None,
        option(RARE, "Steps of tuning the whole model against the dense one; 0 for none. Default: --effort's."),
    ] = None,
    propagate: Annotated[
        str | None, option(RARE, "Inputs of a block come from pruned or dense blocks. Default: pruned.")
    ] = None,
    damping: Annotated[
        float | None,
        option(
            RARE, "Ridge, in units of the Gram matrix's mean diagonal. Default: by tokens an input; 0.01 with --method."
        ),
    ] = None,
    skip: Annotated[
        list[str] | None, option(RARE, "Layers to leave dense, e.g. '*.down_proj'. Repeat it for more.")
    ] = None,
    part: Annotated[
        str | None,
        option(
            RARE,
            "Lists of blocks to prune: all, text, or a word in their paths, e.g. encoder, vision. Default: all that calibration "
            "reaches; of a model for text and images, its text part.",
        ),
    ] = None,
    allow_skips: Annotated[
        bool | None, option(RARE, "Layers that cannot take the pattern are no failure.", "--allow-skips")
    ] = None,
    tasks_path: options.TasksPath = None,
    tasks_limit: options.TasksLimit = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Prune a model in one shot, check it, measure it against the dense one. Alone, or in several processes under torchrun.

    Example: secateurs prune MODEL --out runs/half --sparsity 0.5
    """
    from secateurs.base.errors import PlanError
    from secateurs.base.processes import is_first
    from secateurs.prune.plan import Plan
    from secateurs.prune.record import failure
    from secateurs.prune.run import Run
    from secateurs.quality.settings import Calibration, Evaluation
    from secateurs.report.run_tables import print_report

    values: dict[str, Any] = {
        "model": model, "pattern": pattern, "sparsity": sparsity, "effort": effort, "method": method,
        "allocation": allocation, "budget": budget, "bits": bits, "group": group, "grid": grid,
        "head_bits": head_bits, "embedding_bits": embedding_bits, "scope": scope, "min_sparsity": min_sparsity,
        "max_sparsity": max_sparsity, "sensitivity": sensitivity, "blend": blend, "permute": permute,
        "reconstruct": reconstruct, "distill": distill, "propagate": propagate, "damping": damping, "skip": skip,
        "part": part, "allow_skips": allow_skips,
    }  # fmt: skip
    given = {name: value for name, value in values.items() if value is not None}
    base: dict[str, Any] = {"calibration": Calibration(), "evaluation": Evaluation()}
    if plan is not None:
        earlier = Plan.read(plan)
        base = {name: getattr(earlier, name) for name in earlier.as_dict()}
    # what was resolved from a choice does not outlive it
    for choice, resolved in _RESOLVED.items():
        if choice in given:
            base = {key: value for key, value in base.items() if key not in resolved}
    parts = {
        "calibration": options.calibration_of(calibration, samples, seqlen, seed, base["calibration"]),
        "evaluation": options.evaluation_of(
            eval_text, eval_windows, eval_seqlen, gate, tasks, tasks_path, tasks_limit, base["evaluation"]
        ),
    }
    chosen = Plan(**{**base, **given, **parts})
    if not chosen.model:
        raise PlanError("no model: give a folder or hub id, or a --plan that names one")
    if out is None:
        raise PlanError("no place for the result: give --out DIR")
    first = is_first()
    with on_cpu(quiet or not first, as_json, chosen.model) as progress:
        report = Run(chosen, out.expanduser(), progress).complete()
    if not first:
        return
    if as_json:
        print_json(report.as_dict())
    elif not quiet:
        print_report(report, console(), str(out))
    failed = failure(report)
    if failed:
        raise failed
