"""secateurs estimate."""

from typing import Annotated, Any

from secateurs.cli import options
from secateurs.cli.options import METHOD, option
from secateurs.cli.output import console, note, print_json


def estimate(
    model: options.Model,
    method: Annotated[
        str | None, option(METHOD, "Of prune: one method and nothing else, e.g. sparsegpt. Default: none.")
    ] = None,
    effort: Annotated[str | None, option(METHOD, "Of prune: fast, balanced or best. Default: balanced.")] = None,
    units: Annotated[
        str | None, option(METHOD, "Of shrink: what may go, as there, e.g. experts. Default: mlp,heads,layers.")
    ] = None,
    samples: options.Samples = None,
    seqlen: options.Seqlen = None,
    eval_windows: options.EvalWindows = None,
    eval_seqlen: options.EvalSeqlen = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """What prune and shrink need of a machine, from the model's config alone: memory, disk and time of each step.

    Example: secateurs estimate meta-llama/Llama-3.1-70B --method sparsegpt
    """
    import torch

    from secateurs.base.device import memory_bytes
    from secateurs.decide.needs import Anatomy, needs
    from secateurs.decide.rates import Rates
    from secateurs.model.source import from_config
    from secateurs.prune.plan import Plan
    from secateurs.report.tables import print_needs
    from secateurs.shrink.plan import ShrinkPlan

    shared: dict[str, Any] = {
        "calibration": options.calibration_of(None, samples, seqlen, None),
        "evaluation": options.evaluation_of(None, eval_windows, eval_seqlen, None, None, None, None),
    }
    asked = tuple(u.strip() for u in units.split(",")) if units else None
    # the budget of shrink decides what is left, and not what is needed
    plans: dict[str, Plan | ShrinkPlan] = {
        "prune": Plan(model, **options.given(method=method, effort=effort), **shared),
        "shrink": ShrinkPlan(model, "params=0.75x", **options.given(units=asked), **shared),
    }
    skeleton, itemsize, said = from_config(model)
    note(said and f"{model}: {said}.", quiet)
    anatomy = Anatomy.of(skeleton, itemsize)
    rates = Rates.of(torch.bfloat16 if itemsize == 2 else torch.float32)
    found = {
        name: needs(
            anatomy,
            plan,
            plan.calibration.length(skeleton),
            plan.evaluation.windows * plan.evaluation.length(skeleton),
            rates,
        )
        for name, plan in plans.items()
    }
    if as_json:
        runs = {name: [vars(need) for need in steps] for name, steps in found.items()}
        print_json({"parameters": anatomy.parameters, "bytes": anatomy.parameters * itemsize, "note": said, **runs})
    elif not quiet:
        print_needs(anatomy, found, memory_bytes(), console())
