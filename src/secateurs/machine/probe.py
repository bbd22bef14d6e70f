"""Measures what zeros are worth on this machine: peak rates, then shape x pattern x sparsity x tokens against the best dense.

Every cell times our packed kernels and all dense products, interleaved, on weights larger than the last cache: torch's in the
stored dtype and in fp32, and ours. Integers are timed in the same cells, with all zeros and without, so that a row of theirs has
its speed over the best 16-bit product and over all integers of the same bits. A cell without a gain says so. `secateurs probe` is
the command to run first.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateurs.base.device import machine
from secateurs.base.errors import DeviceError, PlanError
from secateurs.base.progress import Progress, silent
from secateurs.kernels import semi_structured
from secateurs.kernels.dispatch import Call, kernels, select
from secateurs.kernels.formats import DTYPES, INTEGER_PADDING, PANEL, Packed, pack, read_integers, unpack
from secateurs.kernels.library import library, threads_note
from secateurs.machine.profile import DeviceProfile
from secateurs.machine.timing import Timing, dense_runs, interleaved
from secateurs.matrix.grids import BITS, Grid, Scales
from secateurs.matrix.patterns import parse

NAMES = {name: dtype for dtype, name in DTYPES.items()}
# below this, noise and a gain look alike
GAIN = 1.05
# packing takes seconds for what a machine multiplies in milliseconds
_TIMES = 8
# weights are rotated through at least this much memory
COLD_BYTES = 160 << 20


@dataclass(frozen=True)
class Question:
    """What to measure. shapes: outputs x inputs. patterns: unstructured takes each sparsity, N:M its own. bits: of integers, in
    groups of 64, beside each dtype; () for none."""

    shapes: tuple[tuple[int, int], ...] = ((11008, 4096),)
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9)
    patterns: tuple[str, ...] = ("unstructured", "2:4")
    tokens: tuple[int, ...] = (1, 16, 256)
    dtypes: tuple[str, ...] = ("bf16",)
    bits: tuple[int, ...] = (8, 4)
    seconds_per_cell: float = 2.0

    def __post_init__(self) -> None:
        for o, i in self.shapes:
            if not (0 < o <= 1 << 20 and 0 < i <= 1 << 20):
                raise PlanError(f"shape {o}x{i} cannot be measured; give outputs x inputs, each from 1 to 1048576")
        for s in self.sparsities:
            if not 0 <= s < 1:
                raise PlanError(f"sparsity {s} is not a fraction of zeros; give 0 <= s < 1, e.g. 0.5")
        for t in self.tokens:
            if t < 1:
                raise PlanError(f"{t} tokens cannot be measured; give 1 or more")
        for d in self.dtypes:
            if d not in NAMES:
                raise PlanError(f"unknown dtype '{d}'; known: {', '.join(NAMES)}")
        for b in self.bits:
            if b not in BITS:
                raise PlanError(f"integers of {b} bits cannot be measured; known: {', '.join(map(str, BITS))}")

    def cells(self) -> list[tuple[str, float]]:
        """(pattern, sparsity) in order."""
        found: list[tuple[str, float]] = []
        for text in self.patterns:
            try:
                pattern = parse(text)
            except ValueError as error:
                raise PlanError(str(error)) from None
            for o, i in self.shapes:
                if reason := pattern.refuses(o, i):
                    raise PlanError(f"pattern {text} on {o}x{i}: {reason}")
            implied = pattern.fixed_sparsity
            found += [(text, s) for s in ((implied,) if implied is not None else self.sparsities)]
        return found


def read_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """'11008x4096,512x512' -> shapes. Raises PlanError."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise PlanError(f"shapes '{text}' cannot be read; write outputs x inputs, e.g. 11008x4096,4096x4096")
    return tuple((int(m[1]), int(m[2])) for m in found if m)


def read_list(text: str, kind: type, what: str) -> tuple[Any, ...]:
    """'1,16' -> (1, 16). Raises PlanError naming what could not be read."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise PlanError(f"{what} '{text}' cannot be read; write numbers with commas between") from None


def shapes_of(model: str, most: int = 3) -> tuple[tuple[int, int], ...]:
    """The Linear shapes that hold most weights of a model's blocks. Raises CheckpointError."""
    from secateurs.kernels.packed_linear import linears
    from secateurs.model.blocks import prefixes_of
    from secateurs.model.checkpoint import Checkpoint

    weights: dict[tuple[int, int], int] = {}
    checkpoint = Checkpoint(model, packed=True)
    skeleton = checkpoint.skeleton()
    inside = prefixes_of(skeleton)
    for name, module, transposed in linears(skeleton):
        if not name.startswith(inside):
            continue
        shape: Any = tuple(module.weight.shape)  # type: ignore[arg-type]
        shape = shape[::-1] if transposed else shape
        weights[shape] = weights.get(shape, 0) + math.prod(shape)
    if not weights:
        raise DeviceError(f"{model} has no linear layer to measure")
    return tuple(sorted(weights, key=lambda s: -weights[s])[:most])


def bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second that all threads together read from memory: the median over 256 MiB."""
    buffer = torch.zeros(1 << 28, dtype=torch.uint8)
    buffer.fill_(1)
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < 5:
        begin = time.perf_counter()
        library().secateurs_read(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())
        samples.append(time.perf_counter() - begin)
    return buffer.numel() / Timing.of(samples).seconds


def peak_flops() -> dict[str, float]:
    """Multiply-adds (as two) a second by dtype, of the fastest kernel's own instructions on all threads."""
    found: dict[str, float] = {}
    for kernel in kernels():
        if kernel.lacks or kernel.dtype not in DTYPES.values() or kernel.dtype in found or kernel.strategy != "tile":
            continue
        threads, rounds, best = torch.get_num_threads(), 200_000, 0.0
        for _ in range(5):
            begin = time.perf_counter()
            flops = library().secateurs_spin(kernel.index, rounds, threads)
            best = max(best, flops / (time.perf_counter() - begin))
        found[kernel.dtype] = best
    return found


def caches() -> dict[str, int]:
    """Bytes of the caches that the first core sees, by level and kind."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level} {kind.lower()}"] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return found


def accelerator() -> dict[str, Any]:
    """The GPU, its compute capability and whether it has 2:4; or why not."""
    reason = semi_structured.lacks()
    if not torch.cuda.is_available():
        return {"device": None, "two_four": False, "why_not": reason}
    return {
        "device": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "two_four": reason is None,
        "why_not": reason,
    }


def probe(question: Question, progress: Progress = silent) -> DeviceProfile:
    """Measure this machine. Raises PlanError for a question that cannot be measured."""
    here = machine()
    here["caches"] = caches()
    here["kernels"] = [k.name for k in kernels() if not k.lacks]
    if note := threads_note():
        here["note"] = note
    cells = question.cells()
    each = len(question.tokens) * (len(cells) + bool(question.bits))
    total = 1 + len(question.shapes) * len(question.dtypes) * (each + 1)
    done = 0
    progress("probe", done, total)
    rate, flops = bandwidth(), peak_flops()
    rows: list[dict[str, Any]] = []
    for shape in question.shapes:
        for name in question.dtypes:
            done += 1
            progress("probe", done, total)
            weights = _weights(shape, NAMES[name])
            wide = weights if NAMES[name] == torch.float32 else [w.float() for w in weights]
            rows += _stored_densely(weights, question)
            integers = {b: _copies(_integers(shape, NAMES[name], b), len(weights)) for b in question.bits}
            bench = _Bench(name, weights, wide, integers, question.seconds_per_cell)
            for pattern, sparsity in ([("dense", 0.0)] if integers else []) + cells:
                packed = []
                if pattern != "dense":
                    sparse = (
                        pack(_prune(weights[0], pattern, sparsity)),
                        *(_integers(shape, NAMES[name], b, pattern, sparsity) for b in question.bits),
                    )
                    packed = [_copies(p, len(weights)) for p in sparse]
                # what each is, to check its products by
                plain = [unpack(copies[0]) for copies in (packed or integers.values())]
                for tokens in question.tokens:
                    rows += bench.rows(pattern, sparsity, tokens, packed, plain)
                    done += 1
                    progress("probe", done, total)
            rows += _gpu_rows(shape, NAMES[name], question)
    progress("probe", total, total)
    label = f"{here['processor']}, {here['threads']} threads"
    return DeviceProfile(label, here, rate, flops, rows, accelerator())


def _weights(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    copies = min(64, max(2, -(-COLD_BYTES // (math.prod(shape) * dtype.itemsize))))
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).to(dtype)
    return [first, *(first.roll(i, 0) for i in range(1, copies))]


def _prune(weight_OI: Tensor, pattern: str, sparsity: float) -> Tensor:
    """A matrix with random survivors: times do not depend on which ones they are."""
    mask = parse(pattern).keep(torch.rand(weight_OI.shape), sparsity)
    # multiplying by the mask would leave negative zeros, which are stored
    return weight_OI.masked_fill(~mask, 0)


def _integers(
    shape: tuple[int, int], dtype: torch.dtype, bits: int, pattern: str = "dense", sparsity: float = 0.0
) -> Packed:
    """Random integers, none of which is zero but where the pattern says so; an eighth of the rows, eight times over where that
    makes whole panels."""
    times = _TIMES if shape[0] % (_TIMES * PANEL) == 0 else 1
    grid, rows = Grid(bits), shape[0] // times
    integer_OI = torch.randint(1, grid.middle, (rows, shape[1])) * (1 - 2 * torch.randint(0, 2, (rows, shape[1])))
    if pattern != "dense":
        integer_OI = _prune(integer_OI, pattern, sparsity)
    scales = Scales(grid, torch.full((rows, grid.groups(shape[1])), 1 / grid.levels, dtype=grid.scale_dtype))
    part = pack(scales.weights(integer_OI).to(dtype), "dense" if pattern == "dense" else "bitmask", scales)
    held = torch.cat([part.values[:-INTEGER_PADDING]] * times + [part.values[-INTEGER_PADDING:]])
    mask, scale = (None if t is None else t.repeat(times, 1, 1) for t in (part.mask_PJ4, part.scale_PG4))
    assert scale is not None
    return read_integers(held, mask, scale, None, shape, grid, dtype)


def _copies(packed: Packed, count: int) -> list[Packed]:
    """The matrix, and the same at other addresses."""
    names = ("values", "mask_PJ4", "scale_PG4")
    held = {name: tensor for name in names if (tensor := getattr(packed, name)) is not None}
    return [
        packed,
        *(dataclasses.replace(packed, **{n: t.clone() for n, t in held.items()}) for _ in range(1, count)),
    ]


@dataclass(frozen=True)
class _Bench:
    """One shape in one dtype. weights: dense copies; wide: in fp32; integers: all of them, by bits."""

    dtype: str
    weights: Sequence[Tensor]
    wide: Sequence[Tensor]
    integers: dict[int, list[Packed]]
    seconds_per_cell: float

    def rows(
        self, pattern: str, sparsity: float, tokens: int, packed: Sequence[list[Packed]], plain: Sequence[Tensor]
    ) -> list[dict[str, Any]]:
        """A row for each packed matrix, beside all dense products; of none, a row for all integers of each number of bits.

        plain: what these matrices are. Raises DeviceError for a wrong product.
        """
        shape = tuple(self.weights[0].shape)
        x = torch.randn(tokens, shape[1]).to(NAMES[self.dtype])
        runs: dict[str, Any] = dense_runs(self.weights, x, self.wide)
        dense_names = set(runs)
        names = [self._run(runs, copies, x) for copies in (*packed, *self.integers.values())]
        for name, weight_OI in zip(names, plain, strict=False):
            check(name, runs[name][0](), weight_OI, x)
        of_all = dict(zip(self.integers, names[len(packed) :], strict=True))
        found = interleaved(runs, rounds=25, budget_seconds=self.seconds_per_cell, droppable=dense_names)
        best = min(dense_names, key=lambda n: found[n].seconds)
        dense, rows = found[best], []
        for name, copies in zip(names, packed or self.integers.values(), strict=False):
            one, ours = copies[0], found[name]
            speedup = dense.seconds / ours.seconds
            row = {
                "shape": list(shape), "dtype": self.dtype, "pattern": pattern, "sparsity": sparsity, "tokens": tokens,
                "kernel": name, "seconds": ours.seconds, "low": ours.low, "high": ours.high, "samples": ours.samples,
                "nbytes": one.nbytes, "dense": best, "dense_seconds": dense.seconds, "dense_nbytes": one.dense_nbytes,
                "all_dense_seconds": {n: found[n].seconds for n in sorted(dense_names)},
                "speedup": speedup, "bytes_per_second": one.nbytes / ours.seconds, "verdict": _verdict(speedup),
            }  # fmt: skip
            if one.grid is not None:
                every = of_all[one.grid.bits]
                over = found[every].seconds / ours.seconds
                row |= {"grid": str(one.grid), "integers": every, "integers_seconds": found[every].seconds}
                row |= {"over_integers": over}
                if packed:
                    row["verdict"] = f"{row['verdict']}; {_verdict(over)} over int{one.grid.bits} with its zeros"
            rows.append(row)
        return rows

    @staticmethod
    def _run(runs: dict[str, Any], copies: list[Packed], x: Tensor) -> str:
        """Add the matrix to what is timed, under its kernel's name."""
        kernel = select(copies[0], len(x))
        calls = [Call([p], [None]) for p in copies]
        runs[kernel.name] = [lambda c=c: c(x, kernel.index) for c in calls]
        return kernel.name


def check(kernel: str, y: Tensor, weight_OI: Tensor, x: Tensor) -> None:
    """Compare a product with fp32's, for sixteen of its tokens or all. Raises DeviceError for a wrong one."""
    some = slice(None, None, max(1, len(x) // 16))
    got = y.view(len(x), -1)[some].float()
    want = torch.nn.functional.linear(x[some].float(), weight_OI.float())
    error, size = float((got - want).norm()), float(want.norm())
    # kernels of integers round x to steps of 1/127 of the greatest of 32; a step is 1/sqrt(12) of itself off
    noise = _rounding(x[some].float(), weight_OI.float()) if "_int" in kernel else 0.0
    if not error <= 0.01 * size + 3 * noise:
        raise DeviceError(
            f"{kernel} is wrong on {weight_OI.shape[0]}x{weight_OI.shape[1]}, {len(x)} tokens: relative error "
            f"{error / max(size, 1e-30):.3g}"
        )


def _rounding(x_TI: Tensor, weight_OI: Tensor) -> float:
    """The error to expect of a product, as a norm, if each 32 inputs are rounded to 127 steps: sqrt(sum (w step)^2 / 12)."""
    inputs = x_TI.shape[1]
    blocks = torch.nn.functional.pad(x_TI, (0, -inputs % 32)).view(len(x_TI), -1, 32)
    step_TI = (blocks.abs().amax(-1) / 127).repeat_interleave(32, dim=1)[:, :inputs]
    return float((step_TI.square() @ weight_OI.square().T).sum().div(12).sqrt())


def _verdict(speedup: float) -> str:
    return f"{speedup:.2f}x" if speedup >= GAIN else "no gain" if speedup > 1 / GAIN else f"no gain: {speedup:.2f}x"


def _stored_densely(weights: Sequence[Tensor], question: Question) -> list[dict[str, Any]]:
    """Rows for the textbook case: zeros in a dense tensor, multiplied by the dense kernel."""
    shape, dtype = tuple(weights[0].shape), DTYPES[weights[0].dtype]
    x = torch.randn(1, shape[1]).to(weights[0].dtype)
    runs: dict[str, Any] = {"dense": [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]}
    cases = {"unstructured": 0.95}
    if "2:4" in question.patterns:
        cases["2:4"] = 0.5
    for pattern, sparsity in cases.items():
        pruned = [_prune(w, pattern, sparsity) for w in weights]
        runs[pattern] = [lambda w=w: torch.nn.functional.linear(x, w) for w in pruned]
    found = interleaved(runs, rounds=15, budget_seconds=question.seconds_per_cell)
    needs = {
        "unstructured": "stored as zeros and multiplied as numbers; it needs a packed format and a kernel that reads it",
        "2:4": "a dense-only kernel multiplies it like any other; it needs sparse tensor cores, or a packed format and its kernel",
    }
    rows = []
    for pattern, sparsity in cases.items():
        speedup = found["dense"].seconds / found[pattern].seconds
        nbytes = math.prod(shape) * weights[0].element_size()
        rows.append({
            "shape": list(shape), "dtype": dtype, "pattern": pattern, "sparsity": sparsity, "tokens": 1,
            "kernel": "stored densely", "seconds": found[pattern].seconds, "low": found[pattern].low,
            "high": found[pattern].high, "samples": found[pattern].samples, "nbytes": nbytes,
            "dense": f"torch {dtype}", "dense_seconds": found["dense"].seconds, "dense_nbytes": nbytes,
            "speedup": speedup, "verdict": f"no gain: {needs[pattern]}",
        })  # fmt: skip
    return rows


def _gpu_rows(shape: tuple[int, int], dtype: torch.dtype, question: Question) -> list[dict[str, Any]]:
    if semi_structured.lacks(dtype) or "2:4" not in question.patterns:
        return []
    rows = []
    nbytes = math.prod(shape) * dtype.itemsize
    for tokens in question.tokens:
        found = semi_structured.measure(shape, tokens, dtype)
        for backend in semi_structured.BACKENDS:
            speedup = found.speedup(backend)
            if speedup is None:
                continue
            rows.append({
                "shape": list(shape), "dtype": DTYPES[dtype], "pattern": "2:4", "sparsity": 0.5, "tokens": tokens,
                "kernel": f"{semi_structured.NAME} {backend}", "seconds": found.seconds[backend], "nbytes": nbytes * 9 // 16,
                "dense": "cuBLAS", "dense_seconds": found.seconds["dense"], "dense_nbytes": nbytes, "speedup": speedup,
                "verdict": f"{speedup:.2f}x" if speedup >= GAIN else "no gain",
            })  # fmt: skip
    return rows
