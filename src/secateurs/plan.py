"""Every choice of one run, as data: checks itself, <-> plan.json. Where the result goes is not part of it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs import patterns, solvers
from secateurs.allocate import ALLOCATIONS
from secateurs.errors import PlanError
from secateurs.evaluate import Gate

SCOPES = ("row", "layer", "global")


@dataclass(frozen=True)
class Plan:
    """What to prune, how, on which text, and what the result must be worth. Raises PlanError for what cannot be.

    model: folder or hub id ('' for a live module). pattern: 'unstructured', 'N:M' (N kept of M) or 'RxC'.
    sparsity: fraction of zeros; None for 0.5, or what N:M implies. method: a row of SOLVERS, '+refit' allowed.
    scope: where counts are equal ('row', 'layer', 'global'); None for the method's own.
    min_sparsity, max_sparsity: bounds of a layer under scope 'global'.
    calibration, samples, seqlen, seed: the text, how many windows of how many tokens, their order. seqlen None: 2048 or
    what the model's positions allow. propagate: 'pruned' calibrates a block on what pruned blocks give it, 'dense' on
    what dense blocks would. damping: ridge, in units of the Gram matrix's mean diagonal.
    skip: globs of layer names to leave dense. allow_skips: layers that cannot take the pattern are no failure.
    gate: quality floors. eval_text, eval_windows, eval_seqlen: where quality is measured; eval_windows 0: not at all.
    tasks: names of lm-eval tasks; tasks_path: a folder of task files of your own.
    """

    model: str = ""
    pattern: str = "unstructured"
    sparsity: float | None = None
    method: str = "sparsegpt+refit"
    scope: str | None = None
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    calibration: str = "pydoc"
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    propagate: str = "pruned"
    damping: float = solvers.DAMPING
    skip: tuple[str, ...] = ()
    allow_skips: bool = False
    gate: tuple[str, ...] = ()
    eval_text: str = "pydoc"
    eval_windows: int = 24
    eval_seqlen: int | None = None
    tasks: tuple[str, ...] = ()
    tasks_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("skip", "gate", "tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        try:
            pattern = patterns.parse(self.pattern)
            solver = solvers.find(self.method)
            for text in self.gate:
                Gate.parse(text)
        except ValueError as error:
            raise PlanError(str(error)) from None
        self._resolve_sparsity(pattern)
        if self.scope is None:
            scope = solver.scope if isinstance(pattern, patterns.Unstructured) else "layer"
            object.__setattr__(self, "scope", scope)
        self._check(pattern)

    def _resolve_sparsity(self, pattern: patterns.Pattern) -> None:
        fixed = pattern.fixed_sparsity
        asked = self.sparsity
        if asked is None:
            object.__setattr__(self, "sparsity", 0.5 if fixed is None else fixed)
        elif not 0 <= asked < 1:
            raise PlanError(f"sparsity {asked} is not a fraction of zeros; give 0 <= sparsity < 1, e.g. 0.5")
        elif fixed is not None and not math.isclose(asked, fixed, abs_tol=1e-3):
            raise PlanError(
                f"pattern {self.pattern} keeps {self.pattern.replace(':', ' of ')}, which is sparsity {fixed:g}; "
                f"sparsity {asked:g} was asked: leave --sparsity out or change the pattern"
            )
        elif fixed is not None:
            object.__setattr__(self, "sparsity", fixed)

    def _check(self, pattern: patterns.Pattern) -> None:
        if self.scope not in SCOPES:
            raise PlanError(f"unknown scope '{self.scope}'; write row, layer or global")
        if self.scope == "global" and pattern.fixed_sparsity is not None:
            raise PlanError(
                f"scope global moves zeros between layers, and {self.pattern} fixes every layer's; use unstructured"
            )
        if not 0 <= self.min_sparsity <= self.target <= self.max_sparsity <= 1:
            raise PlanError(
                f"bounds {self.min_sparsity:g}..{self.max_sparsity:g} of a layer's sparsity do not hold {self.target:g}"
            )
        if self.propagate not in ("pruned", "dense"):
            raise PlanError(f"cannot propagate '{self.propagate}'; write pruned or dense")
        for name, least in (("samples", 1), ("seqlen", 2), ("eval_windows", 0), ("eval_seqlen", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PlanError(f"{name.replace('_', '-')} {value} is too small; give {least} or more")
        if not (self.damping > 0 and math.isfinite(self.damping)):
            raise PlanError(f"damping {self.damping:g} is not above 0; 0.01 is usual")
        if self.gate and not self.eval_windows:
            raise PlanError("a gate needs an evaluation, and eval-windows is 0")

    @property
    def target(self) -> float:
        """The resolved sparsity."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def layer_pattern(self) -> patterns.Pattern:
        """The pattern inside one layer: scope 'global' is 'layer' with a count of its own for each."""
        return patterns.parse(self.pattern, "row" if self.scope == "row" else "layer")

    @property
    def solver(self) -> solvers.Solver:
        return solvers.find(self.method)

    @property
    def allocation(self) -> str:
        """The row of ALLOCATIONS that gives each layer its sparsity."""
        name = "global_threshold" if self.scope == "global" else "uniform"
        assert name in ALLOCATIONS
        return name

    def as_dict(self) -> dict[str, Any]:
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "plan") -> "Plan":
        """The inverse of as_dict(). Raises PlanError naming unknown keys and values of the wrong type."""
        if not isinstance(data, dict):
            raise PlanError(f"{where} is not a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PlanError(f"{where} has unknown key '{unknown[0]}'; known: {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise PlanError(f"{where} holds a value of the wrong type: {error}") from None

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """plan.json -> Plan."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise PlanError(f"{file} is not JSON: {error}") from None
        return cls.from_dict(data, str(file))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
