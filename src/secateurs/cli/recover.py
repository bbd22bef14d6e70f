"""secateurs recover."""

from typing import Annotated

from secateurs.cli import options
from secateurs.cli.options import METHOD, MODEL, RARE, option
from secateurs.cli.output import check_gate, console, on_cpu, print_json


def recover(
    model: options.Model,
    *,
    teacher: Annotated[
        str | None,
        option(MODEL, "The dense model, or none to train on the text alone. Default: the run directory's dense model."),
    ] = None,
    steps: Annotated[int | None, option(METHOD, "Steps of training, at most, e.g. 1000. Default: 300.")] = None,
    batch: Annotated[
        int | None, option(METHOD, "Windows a step; the processes of a torchrun share them. Default: 4.")
    ] = None,
    train: Annotated[
        str | None, option(METHOD, "blocks, all, vectors (norms and biases) or lora. Default: blocks.")
    ] = None,
    calibration: options.Source = None,
    train_on: Annotated[
        str | None,
        option(
            options.CALIBRATION, "Whose tokens count: all, or assistant, the answers of conversations. Default: all."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        option(options.CALIBRATION, "Windows of text, e.g. 128. Default: one for each window of each step."),
    ] = None,
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
    rank: Annotated[int | None, option(RARE, "Rank of LoRA. Default: 16.")] = None,
    rate: Annotated[float | None, option(RARE, "Learning rate, times each tensor's size. Default: by --train.")] = None,
    kl: Annotated[
        float | None, option(RARE, "Weight of the divergence from the teacher's predictions. Default: 1.")
    ] = None,
    temperature: Annotated[float | None, option(RARE, "Temperature of that divergence. Default: 1.")] = None,
    hidden: Annotated[
        float | None, option(RARE, "Weight of the distance of hidden states, block by block. Default: 0.")
    ] = None,
    labels: Annotated[
        float | None, option(RARE, "Weight of the text's own loss. Default: 0, or 1 without a teacher.")
    ] = None,
    dtype: Annotated[str | None, option(RARE, "Of the computation: bf16 or fp32. Default: the model's.")] = None,
    checkpointing: Annotated[
        bool, option(RARE, "Compute blocks again on the way back: less memory, a third more time.", "--checkpointing")
    ] = False,
    tasks_path: options.TasksPath = None,
    tasks_limit: options.TasksLimit = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train what pruning left until the quality is back; zeros stay zero. Alone, or in several processes under torchrun.

    Example: secateurs recover runs/half --out runs/half-recovered --steps 300
    """
    from secateurs.base.processes import is_first
    from secateurs.quality.settings import Calibration
    from secateurs.report.run_tables import print_recovered
    from secateurs.train import RecoverPlan
    from secateurs.train import recover as run

    values = {
        "steps": steps, "batch": batch, "train": train, "train_on": train_on, "rank": rank, "rate": rate, "kl": kl,
        "temperature": temperature, "hidden": hidden, "labels": labels, "dtype": dtype,
    }  # fmt: skip
    plan = RecoverPlan(
        model,
        teacher=teacher,
        calibration=options.calibration_of(calibration, samples, seqlen, seed, Calibration(samples=None)),
        evaluation=options.evaluation_of(eval_text, eval_windows, eval_seqlen, gate, tasks, tasks_path, tasks_limit),
        checkpointing=checkpointing,
        **options.given(**values),
    )
    first = is_first()
    with on_cpu(quiet or not first, as_json, model) as progress:
        report = run(plan, out.expanduser(), progress)
    if not first:
        return
    if as_json:
        print_json(report)
    elif not quiet:
        print_recovered(report, console(), str(out))
    check_gate(report)
