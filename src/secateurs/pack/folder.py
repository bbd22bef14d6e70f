"""The pack stage: a folder with zeros or on grids -> a folder whose zeros take no space and whose integers are packed, and back.

Tensors go through one at a time. Every shard is renamed into place and noted in pack.json; config.json comes last, so a
folder that was cut off does not load, and the same command goes on where it stopped.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.base.errors import OutputError, PlanError, nearest
from secateurs.base.files import PART, write_json, write_text
from secateurs.base.progress import Progress, silent
from secateurs.base.run_directory import models_of
from secateurs.kernels import formats
from secateurs.kernels.packed_embedding import tables
from secateurs.kernels.packed_linear import OPTIMIZE, linears
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.reads import READ, read_by_code
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.model.shards import shard_name, write_index, write_shard
from secateurs.model.unpacked import PARTS, PlainReader, packed_scales, packed_tensors
from secateurs.pack.experts import stored_experts
from secateurs.pack.matrices import Matrices

# dense bytes that are read for one shard
SHARD_BYTES = 1 << 29


def pack(
    source: str | Path,
    out: Path,
    profile: Any = None,
    progress: Progress = silent,
    merge_zeros: bool = False,
    optimize: str = "speed",
) -> dict[str, Any]:
    """Write `out`, a Hugging Face folder of packed layers, from a folder or hub id; return the contents of its pack.json.

    Each Linear (and Conv1D) and each matrix of fused experts takes the format of packed_linear.choose(), integers where the source
    has its scales, and so does an embedding on a grid, with the head that is tied to it; all other tensors are copied as they are,
    and what scales they have.
    Negative zeros, which weight * mask leaves behind, are kept as weights, for a dense export has every bit; merge_zeros drops
    them. Integers have none. optimize: 'speed' never takes a format that is slower for one token, 'size' takes the smallest. Raises
    CheckpointError for a source that cannot be read, PackError for a weight that is not on its grid, OutputError for a place that
    cannot be written, PlanError for another word in optimize.
    """
    if optimize not in OPTIMIZE:
        raise PlanError(f"cannot optimize for '{optimize}'; write {' or '.join(OPTIMIZE)}{nearest(optimize, OPTIMIZE)}")
    checkpoint = Checkpoint(source)
    scales = read_scales(checkpoint.folder / SCALES_FILE)
    skeleton = checkpoint.skeleton()
    modules = {f"{name}.weight": (name, transposed) for name, _, transposed in linears(skeleton)}
    uses: dict[int, int] = {}
    for module in skeleton.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    layer_of = {
        key: modules[target]
        for key, target in checkpoint.target_of.items()
        if target in modules and key not in checkpoint.converted and uses[id(skeleton.get_parameter(target))] == 1
    }
    # embeddings have integers to gain, or nothing
    looked_up = {
        f"{name}.weight": (name, why or _stored_once(checkpoint, skeleton, f"{name}.weight"))
        for name, _, why in tables(skeleton)
        if name in scales
    }
    embeddings = {target: name for target, (name, why) in looked_up.items() if why is None}
    layer_of |= {
        key: (embeddings[target], False)
        for key, target in checkpoint.target_of.items()
        if target in embeddings and key not in checkpoint.converted
    }
    read, unknown = read_by_code(skeleton)
    experts, unpacked_experts = stored_experts(checkpoint, skeleton)
    fused = {each.name: each for each in experts}
    matrices = Matrices(scales, profile, merge_zeros, optimize)
    packable = {name for name, _ in layer_of.values()}
    settings = {
        "source": checkpoint.fingerprint(),
        "profile": profile.name if profile is not None else None,
        "merge_zeros": merge_zeros,
        "optimize": optimize,
    }

    def followed(key: str, parts: tuple[str, ...]) -> bool:
        """Whether what lies beside that tensor gets the names of what lies beside the parameter."""
        target = checkpoint.target_of[key]
        return all(checkpoint.renamed(key + part, {target + part: True}) == (target + part, None) for part in parts)

    def convert(unit: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        if unit in fused:
            return fused[unit].packed(checkpoint, skeleton, matrices)
        tensor = checkpoint.read([unit])[unit]
        name, transposed = layer_of.get(unit, (None, False))
        if name is None:
            return {unit: tensor}, []
        stays = (
            READ
            if name in read
            else None
            if followed(unit, PARTS if name in scales else ("_mask",))
            else "transformers would not find its mask by its stored name"
        )
        looked_up = checkpoint.target_of[unit] in embeddings
        weight_OI = tensor.T.contiguous() if transposed else tensor
        stored, record = matrices.packed(name, weight_OI, transposed, stays, looked_up)
        if isinstance(stored, Tensor):
            return {unit: stored.T.contiguous() if transposed else stored}, [record]
        return packed_tensors(unit, stored), [record]

    owner = {key: each.name for each in experts for key in each.keys}
    units: dict[str, list[str]] = {}
    for key in checkpoint.ordered_keys():
        units.setdefault(owner.get(key, key), []).append(key)
    notes = _rewrite(checkpoint, out, settings, units, convert, progress)
    every = [r for shard in notes["shards"].values() for r in shard]
    records = [r for r in every if "left_out" not in r]
    config = dict(checkpoint.raw_config)
    # experts that stay dense beside packed ones are stored matrix by matrix, too
    stored = [r for r in records if _is_packed(r) or "experts" in r]
    layers = {
        r["name"]: {
            **{key: r[key] for key in ("format", "survivors", "transposed")},
            **({key: r[key] for key in ("grid", "dtype", "length")} if r["grid"] else {}),
        }
        for r in stored
    }
    packed_experts = {r["experts"]: fused[r["experts"]].stored for r in stored if "experts" in r}
    # of layers that are stored as plain weights
    rest = {name: found for name, found in scales.items() if not layers.get(name, {}).get("grid")}
    (out / SCALES_FILE).unlink(missing_ok=True)
    if rest:
        write_scales(out / SCALES_FILE, rest)
    version = formats.VERSION if packed_experts else formats.VERSION_WITHOUT_EXPERTS
    if layers:
        config["quantization_config"] = {
            "quant_method": "secateurs",
            "format_version": version,
            "layers": layers,
            **({"experts": packed_experts} if packed_experts else {}),
        }
    tied = {id(skeleton.get_parameter(target)) for target, name in embeddings.items() if name in packable}
    left = [f"{name}: {why}" for name, why in looked_up.values() if why is not None] + [
        f"{name}: its weight is shared or fused with others"
        for target, (name, _) in sorted(modules.items())
        if name not in packable and id(skeleton.get_parameter(target)) not in tied
    ]
    left += [f"{name}: {why}" for name, why in unpacked_experts.items()] + [
        r["left_out"] for r in every if "left_out" in r
    ]
    result = {
        "format_version": version,
        "status": "complete",
        **settings,
        "totals": {
            "layers_packed": sum(_is_packed(r) for r in records),
            "layers_dense": sum(not _is_packed(r) for r in records),
            "layers_slower": sum(r["slower"] for r in records),
            "nbytes": sum(r["nbytes"] for r in records),
            "least_nbytes": sum(r["least_nbytes"] for r in records),
            "dense_nbytes": sum(r["dense_nbytes"] for r in records),
            "packed_layers_nbytes": sum(r["nbytes"] for r in records if _is_packed(r)),
            "packed_layers_dense_nbytes": sum(r["dense_nbytes"] for r in records if _is_packed(r)),
            "negative_zeros": sum(r["negative_zeros"] for r in records),
            "folder_nbytes": _weights_nbytes(out),
            "source_folder_nbytes": checkpoint.nbytes,
        },
        "layers": records,
        "left_out": left,
        "warnings": [f"whether its code reads weights itself was not found out, so try it: {unknown}"]
        if unknown
        else [],
    }
    write_text(out / "README.md", _card(result))
    write_json(out / "pack.json", result)
    write_json(out / "config.json", config)
    return result


def pack_run(
    run: str | Path,
    out: Path | None = None,
    profile: Any = None,
    progress: Progress = silent,
    merge_zeros: bool = False,
    optimize: str = "speed",
) -> dict[str, Any]:
    """pack() for a run directory: writes its packed model to `out`, or to its folder `packed`, and the choices into its report.

    run: the run directory. profile: of `secateurs probe`; None for the one kept for this machine, measured where there is none.
    optimize: 'speed' packs what gets no slower, 'size' all that gets smaller. merge_zeros: negative zeros become zeros. progress:
    called with (stage, done, total). Returns pack.json as a dict. Raises OutputError, PackError, CheckpointError.

    Example:

        >>> import secateurs as sc
        >>> packed = sc.pack_run("half", optimize="size")
        >>> len(packed["layers"]), packed["totals"]["nbytes"] < packed["totals"]["dense_nbytes"]
        (15, True)
        >>> from transformers import AutoModelForCausalLM
        >>> type(AutoModelForCausalLM.from_pretrained("half/packed")).__name__
        'LlamaForCausalLM'
    """
    run = Path(run).expanduser()
    file, folder = run / "report.json", out or run / "packed"
    # of prune, shrink or recover
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        status = report.get("status", "complete")
    except (OSError, ValueError, AttributeError) as error:
        raise OutputError(f"{file} cannot be read: {error}; finish the run first") from None
    if status != "complete":
        raise OutputError(f"{run} is not finished (status '{status}'); rerun the command that began it")
    result = pack(run / "model", folder, profile, progress, merge_zeros, optimize)
    report["packed"] = {
        "folder": str(folder if out else "packed"),
        **{k: result[k] for k in ("profile", "optimize", "totals", "layers", "left_out", "warnings")},
    }
    if "bytes" not in report:
        dense, _ = models_of(run)
        report["bytes"] = {"dense": Checkpoint(dense).nbytes, "pruned": result["totals"]["source_folder_nbytes"]}
    report["bytes"]["packed"] = result["totals"]["folder_nbytes"]
    write_json(file, report)
    return result


def unpack(source: str | Path, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """The inverse of pack(): a plain folder and its scales, every weight bit for bit, but that zeros on a grid are positive.

    Raises as pack() does, and for damaged tensors.
    """
    checkpoint = Checkpoint(source, packed=True)
    reader = PlainReader(checkpoint)
    scales = packed_scales(checkpoint)
    settings = {"source": checkpoint.fingerprint(), "dense": True}
    _rewrite(checkpoint, out, settings, reader.units, lambda unit: (reader.read(unit), []), progress)
    if scales:
        write_scales(out / SCALES_FILE, scales)
    config = {k: v for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    (out / "pack.json").unlink(missing_ok=True)
    (out / "README.md").unlink(missing_ok=True)
    write_json(out / "config.json", config)
    return {"folder_nbytes": _weights_nbytes(out)}


def _rewrite(
    checkpoint: Checkpoint,
    out: Path,
    settings: dict[str, Any],
    units: Mapping[str, list[str]],
    convert: Callable[[str], tuple[dict[str, Tensor], list[dict[str, Any]]]],
    progress: Progress,
) -> dict[str, Any]:
    """Write what convert() makes of each unit, and note its records; shards that an earlier run finished are kept.

    units: of stored tensors that are converted together, by the name that convert() is given.
    """
    if out.resolve() == checkpoint.folder.resolve():
        raise OutputError(f"{out} is the folder to read; give another with --out")
    state = out / "pack.json"
    notes: dict[str, Any] = {**settings, "status": "packing", "shards": {}}
    if state.is_file():
        try:
            old = json.loads(state.read_text())
        except ValueError:
            old = {}
        if old.get("status") == "packing" and {k: old.get(k) for k in settings} == settings:
            notes = old
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not a packed folder; give an empty place with --out")
    # until config.json is back, no loader takes the folder for a model
    (out / "config.json").unlink(missing_ok=True)
    checkpoint.copy_small_files(out, but=("config.json", "pack.json"))
    groups = _in_shards(checkpoint, units)
    for index, names in enumerate(groups):
        done = sum(len(units[unit]) for group in groups[:index] for unit in group)
        progress("tensors", done, len(checkpoint.file_of))
        name = shard_name(index, len(groups))
        if name in notes["shards"] and (out / name).is_file():
            continue
        tensors: dict[str, Tensor] = {}
        records = []
        for unit in names:
            stored, made = convert(unit)
            tensors |= stored
            records += made
        write_shard(out, index, len(groups), tensors)
        notes["shards"][name] = records
        write_json(state, notes)
    for stale in {*out.glob("*.safetensors"), *out.glob(f"*{PART}")} - {
        out / shard_name(i, len(groups)) for i in range(len(groups))
    }:
        stale.unlink()
    write_index(out, len(groups))
    progress("tensors", len(checkpoint.file_of), len(checkpoint.file_of))
    return notes


def shards_of(checkpoint: Checkpoint) -> list[list[str]]:
    """Keys in natural order, in groups of at most SHARD_BYTES as they are stored; one tensor at least."""
    return _in_shards(checkpoint, {key: [key] for key in checkpoint.ordered_keys()})


def _in_shards(checkpoint: Checkpoint, units: Mapping[str, list[str]]) -> list[list[str]]:
    """Units in groups of at most SHARD_BYTES; one unit at least."""
    groups: list[list[str]] = []
    room = 0
    for unit, keys in units.items():
        nbytes = sum(map(checkpoint.nbytes_of, keys))
        if not groups or nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(unit)
        room -= nbytes
    return groups


def _stored_once(checkpoint: Checkpoint, skeleton: Any, target: str) -> str | None:
    """Why an embedding cannot be packed, or None: from_pretrained ties what is stored once, or twice with the same bits."""
    names = {target, *(tied for tied, to in skeleton.all_tied_weights_keys.items() if to == target)}
    stored = [found for found in checkpoint.target_of.values() if found in names]
    return None if stored == [target] else f"it is stored as {' and as '.join(stored)}"


def _is_packed(record: dict[str, Any]) -> bool:
    return record["format"] != "dense" or record["grid"] is not None


def _weights_nbytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _card(result: dict[str, Any]) -> str:
    totals = result["totals"]
    ratio = totals["packed_layers_nbytes"] / max(1, totals["packed_layers_dense_nbytes"])
    return "\n".join((
        "---", "library_name: transformers", "tags: [pruning, sparsity, secateurs]", "---", "", "# A packed model", "",
        f"{totals['layers_packed']} layers are packed, in {ratio:.3f}x the bytes; "
        f"{totals['layers_dense']} layers are dense. The folder has {totals['folder_nbytes']:,} bytes of weights, the one that "
        f"it was made from {totals['source_folder_nbytes']:,}.", "",
        "It needs secateurs, which registers the format with transformers:", "", "```python", "import secateurs",
        "from transformers import AutoModelForCausalLM", "", "model = AutoModelForCausalLM.from_pretrained(FOLDER)", "```", "",
        "`secateurs pack --dense FOLDER --out PLAIN` gives the plain checkpoint back, bit for bit.", "",
    ))  # fmt: skip
