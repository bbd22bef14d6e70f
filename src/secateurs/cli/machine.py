"""secateurs probe and secateurs realize: what zeros are worth on a machine."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from secateurs.cli import options
from secateurs.cli.options import OUTPUT, PATTERN, SPEED, option
from secateurs.cli.output import console, note, print_json, progress_bars


def probe(
    model: Annotated[
        str | None,
        typer.Argument(help="Measure the shapes of this model. Default: the widest of a 7B.", show_default=False),
    ] = None,
    shapes: Annotated[str | None, option(SPEED, "Outputs x inputs, e.g. 11008x4096,4096x4096.")] = None,
    tokens: Annotated[str | None, option(SPEED, "Tokens at once. Default: 1,16,256.")] = None,
    dtype: Annotated[str | None, option(SPEED, "bf16, fp16 or fp32, commas between. Default: bf16.")] = None,
    sparsity: Annotated[str | None, option(PATTERN, "Fractions of zeros. Default: 0.5,0.7,0.9.")] = None,
    pattern: Annotated[str | None, option(PATTERN, "Patterns. Default: unstructured,2:4.")] = None,
    bits: Annotated[
        str | None, option(PATTERN, "Bits of integers, beside the dtype; none for none. Default: 8,4.")
    ] = None,
    out: Annotated[
        Path | None, option(OUTPUT, "Where the profile goes. Default: the cache, where `pack` looks.")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure what zeros are worth on this machine, before pruning: seconds, bytes, speedup over the best dense.

    Example: secateurs probe MODEL --sparsity 0.5,0.7
    """
    from secateurs.base.run_directory import model_note
    from secateurs.machine.probe import Question, read_list, read_shapes, shapes_of
    from secateurs.machine.probe import probe as measure
    from secateurs.machine.profile import default_file
    from secateurs.report.machine_tables import print_profile

    given: dict[str, Any] = {}
    if model:
        note(model_note(model), quiet)
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
    if bits:
        given["bits"] = () if bits == "none" else read_list(bits, int, "bits")
    with progress_bars(not quiet and not as_json) as progress:
        profile = measure(Question(**given), progress)
    file = (out or default_file()).expanduser()
    profile.write(file)
    if as_json:
        print_json(profile.as_dict())
    elif not quiet:
        print_profile(profile, str(file), console())


def realize(
    candidates: Annotated[
        list[str] | None,
        typer.Argument(
            help="E.g. 0.7, 2:4, 0.5+int8, int4, shrink:mlp:flops=0.7x. Default: a range of them.", show_default=False
        ),
    ] = None,
    profile: Annotated[
        str | None,
        option(
            SPEED, "A profile of `secateurs probe`, or a100, h100, l4, rtx3090, avx2. Default: this machine's, if any."
        ),
    ] = None,
    dtype: Annotated[str, option(SPEED, "bf16, fp16 or fp32. Default: bf16.")] = "bf16",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What zeros would be worth on a machine, before any is made: nominal FLOPs and bytes against realizable ones.

    Example: secateurs realize 0.5 2:4 --profile a100
    """
    from secateurs.decide.realize import Candidate, machine_named, rank, usual
    from secateurs.report.machine_tables import print_worth

    machine = machine_named(profile)
    asked, unknown = usual(machine, dtype)
    if candidates:
        asked, unknown = [Candidate.parse(text) for text in candidates], None
    note(unknown, quiet)
    rows = rank(asked, machine, dtype)
    if as_json:
        print_json({"machine": machine.name, "rows": [dataclasses.asdict(row) for row in rows]})
    elif not quiet:
        print_worth(rows, machine.name, getattr(machine, "sources", {}), console())
