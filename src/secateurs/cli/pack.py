"""secateurs pack and secateurs bench."""

from pathlib import Path
from typing import Annotated

import typer

from secateurs.cli import options
from secateurs.cli.options import MODEL, OUTPUT, RARE, SPEED, option
from secateurs.cli.output import console, on_cpu, print_json, progress_bars


def pack(
    model: Annotated[
        str,
        typer.Argument(help="A run directory, a model folder with zeros or on grids, or a hub id.", show_default=False),
    ],
    out: Annotated[
        Path | None, option(OUTPUT, "The folder to make. Default: the folder packed in a run directory.")
    ] = None,
    dense: Annotated[bool, option(MODEL, "The other way: packed to plain, bit for bit.", "--dense")] = False,
    profile: Annotated[
        Path | None, option(SPEED, "A profile of `secateurs probe`. Default: the one of this machine, if any.")
    ] = None,
    optimize: Annotated[
        str,
        option(
            SPEED,
            "speed: leave zeros out where one token is not slower for it. size: wherever that takes fewer bytes. Default: speed.",
        ),
    ] = "speed",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    merge_zeros: Annotated[
        bool, option(RARE, "Store no negative zeros, which weight * mask leaves behind.", "--merge-zeros")
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Store a pruned model without its zeros, and a quantized one in its bits, for our kernels; or turn it back.

    Example: secateurs pack runs/half
    """
    from secateurs.base.errors import PlanError
    from secateurs.base.run_directory import is_run, model_in
    from secateurs.machine.profile import DeviceProfile
    from secateurs.pack import folder as stage
    from secateurs.report.run_tables import print_packed

    # of a decision, the run of the candidate to ship
    run = model_in(model).parent if is_run(model) else None
    if out is None and (run is None or dense):
        raise PlanError("no place for the result: give --out DIR")
    out = out.expanduser() if out else None
    with progress_bars(not quiet and not as_json) as progress:
        if dense:
            assert out is not None
            result = stage.unpack(run / "packed" if run else model, out, progress)
        else:
            chosen = DeviceProfile.read(profile) if profile else DeviceProfile.at_hand()
            if run is not None:
                result = stage.pack_run(run, out, chosen, progress, merge_zeros, optimize)
                out = out or run / "packed"
            else:
                assert out is not None
                result = stage.pack(model, out, chosen, progress, merge_zeros, optimize)
    if as_json:
        print_json(result)
    elif not quiet:
        print_packed(result, str(out), console())


def bench(
    model: Annotated[
        Path,
        typer.Argument(
            help="A run directory of prune (packed), shrink or decide, or a packed folder.", show_default=False
        ),
    ],
    against: Annotated[Path | None, option(MODEL, "Another folder to compare with. Default: the dense model.")] = None,
    prompt: Annotated[
        str | None,
        option(
            SPEED,
            "Tokens of the prompt; after a comma longer ones, from which `secateurs fleet` learns what they cost. Default: 64,512.",
        ),
    ] = None,
    new: Annotated[int, option(SPEED, "New tokens to generate. Default: 64.")] = 64,
    repeats: Annotated[int, option(SPEED, "Runs of each model, in turn. Default: 5.")] = 5,
    batch: Annotated[
        str, option(SPEED, "Prompts at once, e.g. 1,4,16, which `secateurs fleet` needs. Default: 1.")
    ] = "1",
    rivals: Annotated[
        bool,
        option(
            SPEED,
            "The dense model as people would run it otherwise, too: under torch.compile, and in llama.cpp (pip install xllamacpp) "
            "in its own, 8 and 4 bits.",
            "--rivals",
        ),
    ] = False,
    compiled: Annotated[bool, option(SPEED, "The dense model under torch.compile, as well.", "--compiled")] = False,
    out: Annotated[Path | None, option(OUTPUT, "Where the numbers go. Default: bench.json in a run directory.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure tokens per second of whole models: prefill, decode, peak memory; dense against packed, in turn.

    Example: secateurs bench runs/half --prompt 512,4096
    """
    from secateurs.base.files import write_json
    from secateurs.base.run_directory import is_run, model_in
    from secateurs.machine.bench import bench as measure
    from secateurs.machine.bench import record_of, variants_of
    from secateurs.machine.probe import read_list
    from secateurs.pack.rivals import beside, in_torch_compile
    from secateurs.report.machine_tables import print_bench

    batches = read_list(batch, int, "batches")
    prompts = None if prompt is None else read_list(prompt, int, "prompts")
    # of a decision, the run of the candidate to ship
    folder = model_in(model).parent if is_run(model) else model.expanduser()
    variants = variants_of(folder, against)
    if compiled and not rivals:
        variants.insert(-1, in_torch_compile(variants[0].folder))
    with on_cpu(quiet, as_json) as progress, beside(variants, rivals, folder, progress) as (ways, said):
        result = measure(ways, prompts, new, repeats, progress, batches)
    result["left_out"] = [*said, *result["left_out"]]
    file = out or record_of(folder)
    if file is not None:
        write_json(file.expanduser(), result)
    if as_json:
        print_json(result)
    elif not quiet:
        print_bench(result, console())
