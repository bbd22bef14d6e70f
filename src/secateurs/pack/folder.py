"""The pack stage: a folder with zeros or on grids -> a folder whose zeros take no space and whose integers are packed, and back.

Tensors go through one at a time. Every shard is renamed into place and noted in pack.json; config.json comes last, so a
folder that was cut off does not load, and the same command goes on where it stopped.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.errors import OutputError, PackError, PlanError, nearest
from secateurs.base.files import PART, write_json, write_text
from secateurs.base.progress import Progress, silent
from secateurs.base.run_directory import models_of
from secateurs.kernels import formats
from secateurs.kernels.packed_embedding import tables
from secateurs.kernels.packed_linear import OPTIMIZE, LayerChoice, choose, linears
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.reads import READ, read_by_code
from secateurs.model.scales import SCALES_FILE, read_scales, write_scales
from secateurs.model.shards import shard_name, write_index, write_shard
from secateurs.model.unpacked import PARTS, packed_scales, packed_tensors, plain_reader
from secateurs.pack.on_grids import check

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

    Each Linear (and Conv1D) takes the format of packed_linear.choose(), integers where the source has its scales, and so does an
    embedding on a grid, with the head that is tied to it; all other tensors are copied as they are, and what scales they have.
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

    def convert(key: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        name, transposed = layer_of.get(key, (None, False))
        if name is None:
            return {key: tensor}, None
        weight_OI = tensor.T.contiguous() if transposed else tensor
        grid = scales.get(name)
        if grid is not None:
            check(name, grid, weight_OI)
        negative_zeros = int(((weight_OI == 0) & weight_OI.signbit()).sum())
        if (merge_zeros or grid is not None) and negative_zeros:
            weight_OI = weight_OI.masked_fill(weight_OI == 0, 0)
            tensor = weight_OI.T.contiguous() if transposed else weight_OI
        stays = (
            READ
            if name in read
            else None
            if followed(key, PARTS if grid else ("_mask",))
            else "transformers would not find its mask by its stored name"
        )
        choice = choose(name, weight_OI, profile, grid, checkpoint.target_of[key] in embeddings, optimize).but(stays)
        record = {
            **_record(choice),
            "transposed": transposed,
            "negative_zeros": 0 if merge_zeros or grid is not None else negative_zeros,
        }
        if choice.plain:
            return {key: tensor}, record
        packed = formats.pack(weight_OI, choice.format, grid if choice.grid else None)
        record["nbytes"] = packed.nbytes
        if choice.grid:
            record |= {"dtype": str(weight_OI.dtype).removeprefix("torch."), "length": packed.values.numel()}
        if not torch.equal(_bits(formats.unpack(packed)), _bits(weight_OI)):
            raise PackError(
                f"{name}: unpacking does not give the weights back; this is a bug, keep the model and report it"
            )
        return packed_tensors(key, packed), record

    notes = _rewrite(checkpoint, out, settings, convert, progress)
    records = [r for shard in notes["shards"].values() for r in shard]
    config = dict(checkpoint.raw_config)
    stored = [r for r in records if r["format"] != "dense" or r["grid"]]
    layers = {
        r["name"]: {
            **{key: r[key] for key in ("format", "survivors", "transposed")},
            **({key: r[key] for key in ("grid", "dtype", "length")} if r["grid"] else {}),
        }
        for r in stored
    }
    # of layers that are stored as plain weights
    rest = {name: found for name, found in scales.items() if not layers.get(name, {}).get("grid")}
    (out / SCALES_FILE).unlink(missing_ok=True)
    if rest:
        write_scales(out / SCALES_FILE, rest)
    if layers:
        config["quantization_config"] = {
            "quant_method": "secateurs",
            "format_version": formats.VERSION,
            "layers": layers,
        }
    tied = {id(skeleton.get_parameter(target)) for target, name in embeddings.items() if name in packable}
    left = [f"{name}: {why}" for name, why in looked_up.values() if why is not None] + [
        f"{name}: its weight is shared or fused with others"
        for target, (name, _) in sorted(modules.items())
        if name not in packable and id(skeleton.get_parameter(target)) not in tied
    ]
    result = {
        "format_version": formats.VERSION,
        "status": "complete",
        **settings,
        "totals": {
            "layers_packed": len(layers),
            "layers_dense": len(records) - len(layers),
            "layers_slower": sum(r["slower"] for r in records),
            "nbytes": sum(r["nbytes"] for r in records),
            "least_nbytes": sum(r["least_nbytes"] for r in records),
            "dense_nbytes": sum(r["dense_nbytes"] for r in records),
            "packed_layers_nbytes": sum(r["nbytes"] for r in stored),
            "packed_layers_dense_nbytes": sum(r["dense_nbytes"] for r in stored),
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
    """pack() for a run directory: writes its packed model to `out`, or to its folder `packed`, and the choices into its report."""
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
    plain = plain_reader(checkpoint)
    scales = packed_scales(checkpoint)

    def convert(key: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        beside = any(key.endswith(part) and key.removesuffix(part) in checkpoint.file_of for part in PARTS)
        return {} if beside else {key: plain(key)}, None

    _rewrite(checkpoint, out, {"source": checkpoint.fingerprint(), "dense": True}, convert, progress)
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
    convert: Callable[[str, Tensor], tuple[dict[str, Tensor], dict[str, Any] | None]],
    progress: Progress,
) -> dict[str, Any]:
    """Pass every tensor of a checkpoint through convert() into shards of `out`; shards that an earlier run finished are kept."""
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
    groups = shards_of(checkpoint)
    for index, keys in enumerate(groups):
        progress("tensors", sum(map(len, groups[:index])), len(checkpoint.file_of))
        name = shard_name(index, len(groups))
        if name in notes["shards"] and (out / name).is_file():
            continue
        tensors: dict[str, Tensor] = {}
        records = []
        for key in keys:
            stored, record = convert(key, checkpoint.read([key])[key])
            tensors.update(stored)
            if record:
                records.append(record)
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
    groups: list[list[str]] = []
    room = 0
    for key in checkpoint.ordered_keys():
        nbytes = checkpoint.nbytes_of(key)
        if not groups or nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(key)
        room -= nbytes
    return groups


def _stored_once(checkpoint: Checkpoint, skeleton: Any, target: str) -> str | None:
    """Why an embedding cannot be packed, or None: from_pretrained ties what is stored once, or twice with the same bits."""
    names = {target, *(tied for tied, to in skeleton.all_tied_weights_keys.items() if to == target)}
    stored = [found for found in checkpoint.target_of.values() if found in names]
    return None if stored == [target] else f"it is stored as {' and as '.join(stored)}"


def _record(choice: LayerChoice) -> dict[str, Any]:
    return {
        "name": choice.name, "shape": list(choice.shape), "sparsity": choice.sparsity, "format": choice.format,
        "grid": str(choice.grid) if choice.grid else None, "survivors": choice.survivors, "nbytes": choice.nbytes,
        "dense_nbytes": choice.dense_nbytes, "least_nbytes": choice.least_nbytes, "slower": choice.slower, "reason": choice.reason,
    }  # fmt: skip


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.int16 if weight.element_size() == 2 else torch.int32)


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
