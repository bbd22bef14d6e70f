"""Re-read a run directory from disk and check everything that the report claims."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from secateurs.base.errors import CheckpointError, VerifyError
from secateurs.base.files import inside
from secateurs.base.processes import ALONE, Ranks
from secateurs.base.progress import Progress, silent
from secateurs.matrix.grids import Scales, tensors_of
from secateurs.matrix.patterns import parse
from secateurs.model.checkpoint import Checkpoint
from secateurs.model.discover import STEPPED, assume, layout_of
from secateurs.model.layers import Layer
from secateurs.model.scales import SCALES_FILE, read_scales
from secateurs.model.shards import checksum
from secateurs.model.unpacked import PlainReader, packed_scales
from secateurs.model.walk import layers_at
from secateurs.prune.outside import matrix_at
from secateurs.prune.plan import Plan
from secateurs.prune.record import LayerRecord, Report


def verify(folder: str | Path, progress: Progress = silent) -> Report:
    """Check a finished run directory; returns its report. Raises VerifyError with the first thing that is wrong.

    Checked: the checksum of every shard; the names, shapes and dtypes of all tensors against the source, and that
    nothing but pruned layers and what the report lists as tuned differs from it (where the source is still there, else a
    warning); every layer's count, pattern and grid; that no weight is NaN or infinite; that a packed model unpacks to the
    same weights.
    folder: the run directory. progress: called with (stage, done, total).

    Example:

        >>> import secateurs as sc
        >>> sc.verify("half").totals["sparsity"]
        0.5
        >>> sc.verify("nowhere")
        Traceback (most recent call last):
        secateurs.base.errors.OutputError: ...
    """
    folder = Path(folder).expanduser()
    # plans of shrink, recover and decide
    if _keys(folder / "plan.json") & {"units", "teacher", "candidates"}:
        raise VerifyError(
            f"{folder} is no run of `secateurs prune`, so its report claims no masks that could be checked"
        )
    report = Report.read(folder / "report.json")
    if report.status != "complete":
        raise VerifyError(f"{folder} is not finished (status '{report.status}'); rerun the command that began it")
    report.warnings += [w for w in check_run(folder, report, progress) if w not in report.warnings]
    return report


def _keys(file: Path) -> set[str]:
    """The keys of a JSON object; none if the file holds something else."""
    try:
        return set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return set()


def check_run(
    folder: Path, report: Report, progress: Callable[[str, int, int], None], ranks: Ranks = ALONE
) -> list[str]:
    """verify() for a report in hand: raises VerifyError, returns warnings. ranks: those that share the files and the blocks."""
    plan = Plan.from_dict(report.plan)
    model_folder = folder / "model"
    for name, expected in ranks.share(list(report.shards.items())):
        file = inside(model_folder, name, folder / "report.json")
        if not file.is_file():
            raise VerifyError(f"{file} is missing")
        if checksum(file) != expected:
            raise VerifyError(f"{file} is not the file that was written: its sha256 differs from report.json's")
    result = Checkpoint(model_folder)
    model = result.skeleton()
    records = {record.name: record for record in report.layers}
    if report.lists:
        # the run's own, where another kind of input shows other lists
        assume(model, replace(layout_of(model), lists=tuple(report.lists), how=STEPPED))
    names = ranks.share(result.block_names(model))
    scales = read_scales(model_folder / SCALES_FILE)
    seen: set[str] = set()
    pruned: set[str] = set()
    for i, name in enumerate(names):
        result.load(model, name)
        for layer in layers_at(model, name):
            if layer.name not in records:
                raise VerifyError(f"{layer.name} is in the model and not in report.json")
            _check_layer(layer, records[layer.name], plan.scope, scales)
            seen.add(layer.name)
            if records[layer.name].skipped is None:
                pruned |= {layer.tensor_name, *layer.also, *(f"{other}.weight" for other in layer.also)}
        result.release(model)
        progress("verifying", i + 1, len(names))
    seen, pruned = (set().union(*ranks.gather(found)) for found in (seen, pruned))
    if outside := [records[name] for name in sorted(records) if records[name].role]:
        result.load_outside(model)
        for record in outside:
            layer = matrix_at(model, record.name)
            _check_layer(layer, record, None, scales)
            seen.add(layer.name)
            pruned |= {f"{name}.weight" for name in (layer.name, *layer.also)}
        result.release(model)
    # what is no layer is compared with the dense model, like all that was not pruned
    missing = sorted(name for name in set(records) - seen if records[name].skipped_by != "kind")
    if missing:
        raise VerifyError(f"{missing[0]} is in report.json and not in the model")
    unknown = sorted(name for name in scales if name not in records or records[name].grid is None)
    if unknown:
        raise VerifyError(f"{unknown[0]} has scales in {SCALES_FILE} and no grid in report.json")
    if report.packed:
        _check_packed(folder / report.packed["folder"], result)
    return _check_source(plan, result, pruned | set(report.tuned), ranks)


def _check_layer(layer: Layer, record: LayerRecord, scope: str | None, scales: Mapping[str, Scales]) -> None:
    weight_OI = layer.read()
    if layer.shape != record.shape:
        raise VerifyError(f"{layer.name} has shape {layer.shape}, report.json says {record.shape}")
    kept = int((weight_OI != 0).sum())
    if kept != record.kept:
        raise VerifyError(f"{layer.name} keeps {kept} weights, report.json says {record.kept}")
    if record.skipped is None and record.pattern is not None:
        broken = parse(record.pattern, scope).violation(weight_OI != 0, record.sparsity)
        if broken:
            raise VerifyError(f"{layer.name} does not hold {record.pattern}: {broken}")
    if record.grid is not None:
        found = scales.get(layer.name)
        if found is None or str(found.grid) != record.grid:
            has = "no scales" if found is None else f"scales of {found.grid}"
            raise VerifyError(f"{layer.name} has {has} in {SCALES_FILE}, report.json says {record.grid}")
        if off := found.off(weight_OI):
            raise VerifyError(f"{layer.name}: {off}")


def _check_packed(folder: Path, result: Checkpoint) -> None:
    """Check that the packed model has the pruned one's weights, bit for bit but for the sign of zeros, and its scales."""
    packed = Checkpoint(folder, packed=True)
    reader, unseen = PlainReader(packed), set(result.file_of)
    for unit in reader.units:
        for name, after in reader.read(unit).items():
            before = result.read([name])[name] if name in unseen else None
            if before is None or before.dtype != after.dtype or not torch.equal(before, after):
                raise VerifyError(f"{name} in {folder} is not what {result.folder} has; pack it again")
            unseen.discard(name)
    if unseen:
        raise VerifyError(f"{min(unseen)} is in {result.folder} and not in {folder}; pack it again")
    (wanted, grids), (found, others) = map(
        tensors_of, (read_scales(result.folder / SCALES_FILE), packed_scales(packed))
    )
    wrong = [name for name in wanted.keys() | found.keys() if not _same(wanted.get(name), found.get(name))]
    if wrong or grids != others:
        name = min(wrong) if wrong else min(n for n in grids if grids[n] != others.get(n))
        raise VerifyError(f"{name} in {folder} is not what {result.folder} has; pack it again")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and torch.equal(one, other)


def _check_source(plan: Plan, result: Checkpoint, changed: set[str], ranks: Ranks) -> list[str]:
    """Check that only the named tensors differ from the dense model."""
    try:
        source = Checkpoint(plan.model)
    except CheckpointError as error:
        return [f"not compared with the dense model: {error}"]
    if set(source.file_of) != set(result.file_of):
        name = sorted(set(source.file_of) ^ set(result.file_of))[0]
        raise VerifyError(f"tensor {name} is in only one of {source.folder} and {result.folder}")
    for name in ranks.share(list(source.file_of)):
        before, after = source.read([name])[name], result.read([name])[name]
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerifyError(
                f"{name} was {before.dtype} {list(before.shape)} and is {after.dtype} {list(after.shape)}"
            )
        if not result.targets_of(name) & changed and not torch.equal(_bits(before), _bits(after)):
            raise VerifyError(f"{name} was not to be pruned and differs from {source.folder}")
    return []


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
