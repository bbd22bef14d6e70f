"""report.json as data: one record a layer, totals, quality, machine. docs/report.md describes it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.base.errors import OutputError, QualityGateError, SecateursError, SkippedLayersError
from secateurs.base.files import write_json
from secateurs.base.run_directory import REPORT_FORMAT
from secateurs.matrix.grids import Grid, Scales, least_bits, parse

FORMAT = REPORT_FORMAT


@dataclass(frozen=True)
class LayerRecord:
    """One layer. sparsity: asked. kept: weights that are not zero. error: relative output error on calibration inputs of the
    weights as they were written, rounded and tuned.

    error_from: 'gram' (exact), 'norms' (as if inputs were uncorrelated) or 'weights' (of the weights themselves).
    skipped: why it is dense, or None; skipped_by: 'plan' (asked for), 'shape' (it cannot take the pattern) or 'kind' (it is no
    matrix that is pruned: an embedding, a head, a recurrent layer; its shape is that of its first axis and all others).
    note: what else a reader should know, or None. tokens: calibration tokens it saw. pattern: which it holds.
    emptied_rows, emptied_groups: outputs, and groups of M inputs of an N:M pattern, that had weights and have none.
    grid: what its weights were rounded to, or None; rounded_to_zero: survivors of the mask that became zero by that.
    role: of a matrix outside the blocks that is on a grid, 'embedding', 'head' or 'embedding and head'.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    kept: int
    error: float | None = None
    error_from: str | None = None
    tokens: int = 0
    seconds: float = 0.0
    skipped: str | None = None
    skipped_by: str | None = None
    note: str | None = None
    pattern: str | None = None
    emptied_rows: int = 0
    emptied_groups: int = 0
    grid: str | None = None
    rounded_to_zero: int = 0
    role: str | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def on(self) -> Grid | None:
        """The grid, parsed."""
        return None if self.grid is None else parse(self.grid)

    @property
    def stored_bits(self) -> float | None:
        """The least bits that the layer can be stored in on its grid; of an embedding, whose rows are looked up, those of all
        weights. `secateurs pack` takes more where leaving zeros out would be slower, unless it is told to optimize size.
        """
        if self.on is None:
            return None
        looked_up = self.role is not None and "embedding" in self.role
        return least_bits(self.on, self.shape, self.numel if looked_up else self.kept)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerRecord":
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass
class Report:
    """A run as a whole. status: 'pruned', then 'complete'. seconds: by stage. shards: sha256 by file name.
    tuned: tensors besides the layers' weights that were changed (norms and biases that were tuned, biases that were reordered).
    reconstruction: a record a block: held-out loss before and after, steps. distillation: the same of the whole model, or None.
    packed: what `secateurs pack` chose for each layer, or None. shrunk: what `secateurs shrink` had done to the model before, or
    None. compared: tasks, dense and pruned question by question. distance: of calibration from evaluation text (texts.Distance),
    or None. compute: precision.described() of the model's dtype. bytes: of weight files, dense and pruned; stored: what they take
    as `secateurs pack` stores layers on a grid. parameters: the numbers in these files. budget: of bytes, what was asked of the
    whole model and what it came to (cost.Whole), or None. trial: what a budget chose beside the best share for all layers, each
    tried on the model (trial.py), or None. plan, machine: as they were. layers: a record each. quality: against the dense model,
    on `evaluation`'s text. gate: a record a floor, passed or missed. warnings: sentences. peak_memory_bytes: of this process.
    lists: of blocks that were pruned. scales: of layers on a grid, by name; not in the file.

    Example, of the run directory that prune() wrote:

        >>> from pathlib import Path
        >>> import secateurs as sc
        >>> report = sc.Report.read(Path("half/report.json"))
        >>> len(report.pruned), report.layers[0].name
        (14, 'model.layers.0.self_attn.q_proj')
    """

    plan: dict[str, Any]
    machine: dict[str, Any]
    layers: list[LayerRecord] = field(default_factory=list)
    status: str = "pruned"
    calibration: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    distance: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    compared: dict[str, Any] = field(default_factory=dict)
    gate: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    budget: dict[str, Any] | None = None
    trial: dict[str, Any] | None = None
    shards: dict[str, str] = field(default_factory=dict)
    tuned: list[str] = field(default_factory=list)
    reconstruction: list[dict[str, Any]] = field(default_factory=list)
    distillation: dict[str, Any] | None = None
    packed: dict[str, Any] | None = None
    shrunk: dict[str, Any] | None = None
    compute: dict[str, Any] | None = None
    lists: list[str] = field(default_factory=list)
    # not in the file: those of a folder lie beside its weights (model/scales.py)
    scales: dict[str, Scales] = field(default_factory=dict, repr=False)

    @property
    def pruned(self) -> list[LayerRecord]:
        """The records of the layers that were pruned; all lie in blocks."""
        return [r for r in self.layers if r.skipped is None and r.role is None]

    @property
    def totals(self) -> dict[str, Any]:
        """Counts over layers: pruned, left dense by the plan, their shape or their kind; weights, zeros, sparsity; and of layers on
        a grid the weights, and bits a weight as stored; file_bits: those of all that is in the files.
        """
        weights = sum(r.numel for r in self.pruned)
        zeros = weights - sum(r.kept for r in self.pruned)
        on_grid = [r for r in self.pruned if r.stored_bits is not None]
        weights_on_grid = sum(r.numel for r in on_grid)
        return {
            "layers_pruned": len(self.pruned),
            "layers_skipped_by_plan": sum(r.skipped_by == "plan" for r in self.layers),
            "layers_skipped_by_shape": sum(r.skipped_by == "shape" for r in self.layers),
            "layers_skipped_by_kind": sum(r.skipped_by == "kind" for r in self.layers),
            "weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            "weights_on_grid": weights_on_grid,
            "bits": sum(r.stored_bits or 0.0 for r in on_grid) / weights_on_grid if on_grid else None,
            "file_bits": self.bytes["stored"] * 8 / self.parameters
            if self.parameters and "stored" in self.bytes
            else None,
            "rounded_to_zero": sum(r.rounded_to_zero for r in on_grid),
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as report.json has it."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "scales"}
        data["layers"] = [dataclasses.asdict(r) for r in self.layers]
        return {"format": FORMAT, **data, "totals": self.totals}

    def write(self, file: Path) -> None:
        """Write report.json. file: its path."""
        write_json(file, self.as_dict())

    @classmethod
    def read(cls, file: Path) -> "Report":
        """report.json -> Report. Raises OutputError if it is missing or not one of ours."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop("format") != FORMAT:
                raise OutputError(f"{file} is of another report format than {FORMAT}; use the secateurs that wrote it")
            data.pop("totals")
            data["layers"] = [LayerRecord.from_dict(r) for r in data["layers"]]
            return cls(**data)
        except OSError as error:
            raise OutputError(f"{file} cannot be read: {error.strerror}; is this a run directory?") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(f"{file} is not a secateurs report: {error}") from None


def failure(report: Report) -> SecateursError | None:
    """The error with which a finished run still ends: a missed gate, or layers left dense without --allow-skips; else None."""
    missed = [g["missed"] for g in report.gate if not g["passed"]]
    if missed:
        return QualityGateError("; ".join(missed) + "; the results are kept")
    skipped = [r for r in report.layers if r.skipped_by == "shape"]
    if skipped and not report.plan["allow_skips"]:
        count = sum(r.skipped_by != "kind" for r in report.layers)
        return SkippedLayersError(
            f"{len(skipped)} of {count} layers cannot take {report.plan['pattern']} and stay dense, first "
            f"{skipped[0].name}: {skipped[0].skipped}; the results are kept; pass --allow-skips if that is wanted"
        )
    return None
