"""Every choice of a run of prune, as data: it checks itself, and is what plan.json holds. Where results go is not part of it."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs.base.errors import PlanError, nearest
from secateurs.matrix import grids, patterns, solvers
from secateurs.matrix.stats import Stats
from secateurs.prune.allocation import ALLOCATIONS, Allocation
from secateurs.prune.effort import EFFORTS, PLAIN
from secateurs.quality.settings import Calibration, Evaluation, from_json

SCOPES = ("row", "layer")
SYMMETRY = ("symmetric", "asymmetric")
# how far a layer's sparsity may lie from the target when zeros are shared out
SPREAD = 0.2
# and its bounds where a budget decides how many there are
BOUNDS = (0.0, 0.9)


@dataclass(frozen=True)
class Plan:
    """What to prune, how, on which text, and what the result must be worth. Raises PlanError for what cannot be.

    model: folder or hub id ('' for a live module). pattern: 'unstructured', 'N:M' (N kept of M) or 'RxC'; several with
    commas between them where allocation 'measured' is to choose for each layer.
    sparsity: fraction of zeros; None for 0.5, or what N:M implies.
    effort: a row of EFFORTS, which fills what is None below: method, sensitivity, blend, permute, reconstruct, distill,
    allocation.
    None for 'balanced', or for nothing but the method where that is given. method: a row of SOLVERS, '+refit' allowed.
    sensitivity: calibration tokens on which the loss's dependence on every output is measured; 0 for none; allocation
    'measured' needs them, whatever the effort. blend: how far
    layers aim at the dense model's outputs instead of their own (0 to 1). permute: reorder inputs for N:M where that
    can be folded away. reconstruct: steps of tuning a block's survivors against the dense block. distill: steps of tuning
    all blocks' survivors together against the dense model's predictions, which takes the whole model in memory.
    scope: where counts are equal ('row', 'layer'); None for the method's own. allocation: a row of ALLOCATIONS.
    min_sparsity, max_sparsity: bounds of a layer when zeros are shared out, but for N:M, which says itself; None for 0.2 below
    and above the target, where every layer keeps at least a third of the target's density, and with a budget for 0 and 0.9.
    budget: for allocation 'measured', in place of a count of zeros: 'bytes=0.5', a fraction of what all weights of the model take,
    embedding and head included; 'seconds=0.7', of the dense layers'; 'bits=3.3', bits a weight of the layers as stored.
    bits: of the survivors' integers, 8, 6, 5, 4, 3 or 2; several with commas between them where a budget is to choose for each
    layer; None for weights as they are, and for all of these with a budget in bits. group: inputs that share a scale, 32, 64,
    128 or 'row'; None for 64. grid: 'symmetric', 'asymmetric', or llama.cpp's 'q4_0' or 'q8_0', which say bits and group; None
    for symmetric.
    head_bits, embedding_bits: bits of the output head and of the input embedding, on grids of the same group and kind; None for
    weights as they are. Where both are one matrix, either asks for it.
    calibration: the text that is looked at. propagate: 'pruned' calibrates a block on what pruned blocks give it, 'dense' on
    what dense blocks would. damping: ridge, in units of the Gram matrix's mean diagonal;
    None for what damping_for() says of each layer's tokens, and for 0.01 where only a method was named.
    skip: globs of layer names to leave dense. part: which lists of blocks are pruned: 'all', 'text', or a word in their paths, such
    as 'encoder', 'vision', 'audio'; None for all that calibration reaches, and of a model that reads text and more for its text
    part.
    allow_skips: layers that cannot take the pattern are no failure.
    evaluation: how quality is measured, and the floors it must hold.

    Example:

        >>> import secateurs as sc
        >>> sc.Plan(pattern="2:4").target
        0.5
        >>> sc.Plan(pattern="2:4", sparsity=0.7)
        Traceback (most recent call last):
        secateurs.base.errors.PlanError: ...
    """

    model: str = ""
    pattern: str = "unstructured"
    sparsity: float | None = None
    effort: str | None = None
    method: str | None = None
    sensitivity: int | None = None
    blend: float | None = None
    permute: bool | None = None
    reconstruct: int | None = None
    distill: int | None = None
    scope: str | None = None
    allocation: str | None = None
    min_sparsity: float | None = None
    max_sparsity: float | None = None
    budget: str | None = None
    bits: str | None = None
    group: str | None = None
    grid: str | None = None
    head_bits: int | None = None
    embedding_bits: int | None = None
    calibration: Calibration = Calibration()
    propagate: str = "pruned"
    damping: float | None = None
    skip: tuple[str, ...] = ()
    part: str | None = None
    allow_skips: bool = False
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        self._resolve_grids()
        self._resolve_effort()
        try:
            parsed = [patterns.parse(text) for text in self.pattern.split(",")]
            solver = solvers.find(self.method or "")
        except ValueError as error:
            raise PlanError(str(error)) from None
        self._check_allocation(parsed)
        pattern = parsed[0]
        self._resolve_sparsity(pattern)
        if self.scope is None:
            # a count of its own for each layer is kept by the layer as a whole
            own = isinstance(pattern, patterns.Unstructured) and self.allocation == "uniform"
            scope = solver.scope if own else "layer"
            object.__setattr__(self, "scope", scope)
        spread = (BOUNDS[0], max(BOUNDS[1], self.target))
        # 0.9 + 0.2 would empty a layer
        most = min(self.target + SPREAD, 1 - (1 - self.target) / 3)
        bounds = spread if self.budget else (self.target - SPREAD, most)
        for name, value in zip(("min_sparsity", "max_sparsity"), bounds, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, min(1.0, max(0.0, value)))
        self._check()

    def _resolve_grids(self) -> None:
        for name in ("bits", "group"):
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, str(getattr(self, name)))
        named = grids.NAMED.get(self.grid or "")
        if named is not None:
            said = (str(named.bits), str(named.group))
            if (self.bits or said[0], self.group or said[1]) != said:
                raise PlanError(
                    f"grid {self.grid} is {said[0]} bits in groups of {said[1]}; leave --bits and --group out"
                )
            object.__setattr__(self, "bits", said[0])
            object.__setattr__(self, "group", said[1])
            self._check_outside(tuple(grid.bits for grid in grids.NAMED.values()))
            return
        self._check_outside(grids.BITS)
        if self.bits is None and (self.budget or "").startswith("bits="):
            object.__setattr__(self, "bits", ",".join(map(str, grids.BITS)))
        if self.bits is None and self.head_bits is None and self.embedding_bits is None:
            if self.group is not None or self.grid is not None:
                raise PlanError(f"a group or grid ({self.group or self.grid}) is for --bits, and none were given")
            return
        asked = self.bits.split(",") if self.bits else []
        unknown = [b for b in asked if b not in map(str, grids.BITS)]
        if unknown:
            raise PlanError(
                f"cannot store weights in '{unknown[0]}' bits; write one of {', '.join(map(str, grids.BITS))}, or with a budget "
                "several with commas between them"
            )
        if len(asked) > 1 and self.budget is None:
            raise PlanError(
                f"bits {self.bits} leave a choice for every layer, which only a budget decides; add e.g. --budget bits=3.5"
            )
        object.__setattr__(self, "group", self.group or "64")
        object.__setattr__(self, "grid", self.grid or SYMMETRY[0])
        if self.group not in (*map(str, grids.GROUPS), "row"):
            raise PlanError(f"unknown group '{self.group}'; write {', '.join(map(str, grids.GROUPS))} or row")
        if self.grid not in SYMMETRY:
            known = (*SYMMETRY, *grids.NAMED)
            raise PlanError(f"unknown grid '{self.grid}'; write {', '.join(known)}{nearest(str(self.grid), known)}")

    def _check_outside(self, known: tuple[int, ...]) -> None:
        for name in ("head_bits", "embedding_bits"):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise PlanError(
                    f"{name.replace('_', ' ')} {value} are on no grid that is known here; write one of {', '.join(map(str, known))}"
                )

    def _resolve_effort(self) -> None:
        if self.effort is None:
            object.__setattr__(self, "effort", "balanced" if self.method is None else PLAIN.name)
        efforts = {**EFFORTS, PLAIN.name: PLAIN}
        if self.effort not in efforts:
            raise PlanError(
                f"unknown effort '{self.effort}'; write {', '.join(EFFORTS)}{nearest(str(self.effort), EFFORTS)}"
            )
        effort = efforts[self.effort]
        if self.method is None and not effort.method:
            raise PlanError(f"effort {effort.name} has no method of its own; give --method")
        fixed = all(re.fullmatch(r"\d+:\d+", text) for text in self.pattern.split(","))
        # without zeros there is nothing to share out
        even = fixed or self.scope == "row" or (self.sparsity == 0 and not self.budget)
        # weights on a grid gain from tuning as those of a fixed pattern do
        tuned = even or self.bits is not None
        if self.damping is None and effort is PLAIN:
            object.__setattr__(self, "damping", solvers.DAMPING)
        allocation = self.allocation or ("measured" if self.budget else "uniform" if even else effort.allocation)
        # losses of layers compare in units of the model's loss only
        tokens = effort.sensitivity or (EFFORTS["balanced"].sensitivity if allocation == "measured" else 0)
        filled = {
            "method": effort.method,
            "sensitivity": 0 if even and allocation == "uniform" else tokens,
            "blend": effort.blend,
            "permute": effort.permute,
            "reconstruct": effort.fixed_reconstruct if tuned else effort.reconstruct,
            "distill": effort.distill,
            "allocation": allocation,
        }
        for name, value in filled.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_allocation(self, parsed: list[patterns.Pattern]) -> None:
        if self.allocation not in ALLOCATIONS:
            near = nearest(str(self.allocation), ALLOCATIONS)
            raise PlanError(f"unknown allocation '{self.allocation}'; write {', '.join(ALLOCATIONS)}{near}")
        if len(parsed) > 1 and self.allocation != "measured":
            raise PlanError(
                f"patterns {self.pattern} leave a choice for every layer, which only --allocation measured makes; "
                "name one pattern or add that"
            )
        fixed = len(parsed) == 1 and parsed[0].fixed_sparsity is not None
        if fixed and self.allocation != "uniform" and not self.budget:
            raise PlanError(
                f"allocation {self.allocation} moves zeros between layers, and {self.pattern} fixes every layer's; "
                "use unstructured"
            )
        if self.budget is None:
            return
        if self.allocation != "measured":
            raise PlanError(f"a budget is kept by --allocation measured, and {self.allocation} was asked; leave it out")
        found = re.fullmatch(r"(bytes|seconds|bits)=(\d*\.?\d+)x?", self.budget)
        most = 16.0 if found and found[1] == "bits" else 1.0
        if not found or not 0 < float(found[2]) <= most:
            raise PlanError(
                f"cannot read budget '{self.budget}'; write bytes=F, a fraction of all weights' bytes, or seconds=F, of the dense "
                "layers', with 0 < F <= 1, or bits=B with B <= 16, bits a weight of the layers"
            )

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

    def _check(self) -> None:
        if self.scope not in SCOPES:
            raise PlanError(f"unknown scope '{self.scope}'; write row or layer")
        if (
            self.min_sparsity is None
            or self.max_sparsity is None
            or not (0 <= self.min_sparsity <= self.target <= self.max_sparsity <= 1)
        ):
            raise PlanError(
                f"bounds {self.min_sparsity:g}..{self.max_sparsity:g} of a layer's sparsity do not hold {self.target:g}"
            )
        if self.propagate not in ("pruned", "dense"):
            raise PlanError(f"cannot propagate '{self.propagate}'; write pruned or dense")
        for name in ("sensitivity", "reconstruct", "distill"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise PlanError(f"{name} {value} is too small; give 0 or more")
        if self.blend is None or not 0 <= self.blend <= 1:
            raise PlanError(f"blend {self.blend} is not between 0 (a layer's own outputs) and 1 (the dense model's)")
        if self.blend and self.solver.needs != "gram":
            raise PlanError(
                f"a blend is for methods that solve on Gram matrices, and {self.method} does not; leave it out"
            )
        if self.damping is not None and not (self.damping > 0 and math.isfinite(self.damping)):
            raise PlanError(f"damping {self.damping:g} is not above 0; 0.01 is usual")
        if self.propagate == "dense" and (self.blend or self.reconstruct):
            raise PlanError("blend and reconstruct need the inputs that pruned blocks give; propagate dense hides them")

    @property
    def target(self) -> float:
        """The resolved sparsity."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and most sparsity of a layer."""
        assert self.min_sparsity is not None
        assert self.max_sparsity is not None
        return self.min_sparsity, self.max_sparsity

    @property
    def layer_patterns(self) -> list[patterns.Pattern]:
        """The pattern, or those that an allocation may choose from."""
        scope = "row" if self.scope == "row" else "layer"
        return [patterns.parse(text, scope) for text in self.pattern.split(",")]

    @property
    def layer_grids(self) -> list[grids.Grid]:
        """The grid, or those that a budget may choose from; empty where weights stay as they are."""
        return [self.grid_of(int(b)) for b in self.bits.split(",")] if self.bits else []

    def grid_of(self, bits: int) -> grids.Grid:
        """The grid of so many bits, of the plan's group and kind."""
        if self.grid in grids.NAMED:
            return next(grid for grid in grids.NAMED.values() if grid.bits == bits)
        group = grids.ROW if self.group == "row" else int(self.group or 0)
        return grids.Grid(bits, group, self.grid == SYMMETRY[0])

    @property
    def budgeted(self) -> tuple[str, float] | None:
        """What the budget counts and how much of it there is."""
        if self.budget is None:
            return None
        name, _, value = self.budget.removesuffix("x").partition("=")
        return name, float(value)

    @property
    def solver(self) -> solvers.Solver:
        """The method as a row of SOLVERS, with its options."""
        return solvers.find(self.method or "")

    def damping_of(self, stats: Stats) -> float:
        """The damping of a layer, by the number of tokens in its statistics."""
        return self.damping or solvers.damping_for(stats.tokens, len(stats.sqnorm_I))

    @property
    def allocator(self) -> Allocation:
        """The allocation as a row of ALLOCATIONS."""
        return ALLOCATIONS[self.allocation or "uniform"]

    @property
    def calibrated(self) -> bool:
        """True if anything in the plan needs calibration text."""
        asks = (self.sensitivity, self.blend, self.permute, self.reconstruct, self.distill)
        return self.solver.needs != "weights" or self.allocator.needs == "curves" or any(asks)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plan.json has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "plan") -> "Plan":
        """The inverse of as_dict(). Raises PlanError naming unknown keys and values of the wrong type."""
        if not isinstance(data, dict):
            raise PlanError(f"{where} is not a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PlanError(
                f"{where} has unknown key '{unknown[0]}'; known: {', '.join(sorted(known))}{nearest(unknown[0], known)}"
            )
        try:
            return cls(**from_json(data, where))
        except TypeError as error:
            raise PlanError(f"{where} holds a value of the wrong type: {error}") from None

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """plan.json -> Plan. file: its path. Raises PlanError for one that cannot be read."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise PlanError(f"{file} is not JSON: {error}") from None
        return cls.from_dict(data, str(file))
