"""Estimates what a candidate saves on a machine, before anything is pruned: nominal and realizable fractions of the dense model.

Nominal: zeros cost nothing. Realizable: what the machine still computes and stores, and the time it takes, by its measured profile
or, without one, by published figures. Fractions are of the pruned layers; 1 is dense.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from secateurs.base.errors import DeviceError, PlanError
from secateurs.machine.hardware import HARDWARE, Hardware
from secateurs.machine.profile import DeviceProfile
from secateurs.matrix import grids, patterns
from secateurs.matrix.grids import Grid, bits_a_weight

# what `secateurs realize` shows if no candidate is named
USUAL = (
    "dense", "0.5", "0.7", "0.9", "0.95", "2:4", "4:8", "16x16:0.5", "shrink:mlp:flops=0.7x", "shrink:layers:flops=0.7x",
    "int8", "int4", "0.5+int8", "2:4+int4", "0.7+int4",
)  # fmt: skip
_FORMS = (
    "'0.7' (unstructured), '2:4', '16x16:0.5', 'shrink:latency=0.8x' or 'shrink:layers:params=0.8x', each with '+int4' or another "
    "grid after it, or 'int4', 'int4/128' or 'bits=3.3'"
)
# a smaller gain cannot be told from noise
GAIN = 1.05
# a matrix as wide as those of models of billions, for the bits of scales
_WIDE = (4096, 4096)
# bits for each weight beside the kept values: our format has one; tensor cores read two for each kept value of 2:4
_BITMASK, _TWO_FOUR = 1.0, 1.0


@dataclass(frozen=True)
class Candidate:
    """A model that might be shipped.

    kind: 'dense', 'mask' (sparsity 0 is plain quantization), 'bits' (a budget of bits, zeros included) or 'shrink'. pattern,
    sparsity: of a mask. budget, units: of `secateurs shrink`, () is its default units; or 'bits=3.3'. grid: what weights are
    rounded to, None for weights as they are.
    """

    text: str
    kind: str
    pattern: str = ""
    sparsity: float = 0.0
    budget: str = ""
    units: tuple[str, ...] = ()
    grid: Grid | None = None

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Read 'dense', '0.7', 'unstructured:0.7', '2:4', '16x16:0.5', 'shrink:latency=0.8x', 'shrink:mlp:params=0.8x' (width) or
        'shrink:layers:params=0.8x' (depth), units joined by +; any but 'dense' with '+int4' after it; 'int4', 'int4/128' or
        'bits=3.3'. Raises PlanError.
        """
        text = text.strip()
        base, _, last = text.rpartition("+")
        if re.match(r"int\d|q\d", last):
            try:
                grid = grids.parse(last)
            except ValueError as error:
                raise PlanError(str(error)) from None
            if not base:
                return cls(text, "mask", "unstructured", grid=grid)
            found = cls.parse(base)
            if found.kind not in ("mask", "shrink") or found.grid:
                raise PlanError(f"cannot read candidate '{text}'; write {_FORMS}")
            return replace(found, text=text, grid=grid)
        if text == "dense":
            return cls(text, "dense")
        if re.fullmatch(r"bits=\d*\.?\d+", text):
            return cls(text, "bits", budget=text)
        if text.startswith("shrink:"):
            from secateurs.shrink.budget import Budget

            units, _, budget = text.removeprefix("shrink:").rpartition(":")
            Budget.parse(budget)
            return cls(text, "shrink", budget=budget, units=tuple(units.split("+")) if units else ())
        number = re.fullmatch(r"(?:(unstructured|\d+x\d+):)?(0?\.\d+)", text)
        if number:
            return cls(text, "mask", number[1] or "unstructured", float(number[2]))
        try:
            fixed = patterns.parse(text).fixed_sparsity
        except ValueError:
            fixed = None
        if fixed is None:
            raise PlanError(f"cannot read candidate '{text}'; write {_FORMS}")
        return cls(text, "mask", text, fixed)

    @property
    def kept(self) -> float:
        """The nominal fraction of work that is left; 1 for a budget in seconds or bits, which states no fraction."""
        if self.kind == "mask":
            return 1 - self.sparsity
        found = re.fullmatch(r"\w+=(0?\.\d+)x?", self.budget)
        return float(found[1]) if found and self.kind == "shrink" and not self.budget.startswith("seconds") else 1.0

    @property
    def bits(self) -> float:
        """Bits of a kept weight, 16 if it stays as it is; of a budget, of any weight."""
        if self.kind == "bits":
            return float(self.budget.partition("=")[2])
        return self.grid.bits if self.grid else 16.0

    @property
    def plain(self) -> bool:
        """True if it has fewer bits and nothing else: no zeros that were asked for, no unit less."""
        return self.kind == "mask" and self.grid is not None and not self.sparsity

    @property
    def family(self) -> str:
        """What candidates share that differ only in how much they remove."""
        return self.pattern or "+".join((*self.units, self.budget.partition("=")[0])) or self.kind

    def milder(self, other: "Candidate") -> bool:
        """True if this removes less than the other: no more weights of the same kind, no more bits of each, and not the same."""
        if "bits" in (self.kind, other.kind):
            return self.kind == other.kind and self.bits > other.bits
        finer = self.grid == other.grid or self.bits > other.bits
        fewer = self.plain or (self.family == other.family and self.kept >= other.kept)
        return finer and fewer and (self.kept, self.grid) != (other.kept, other.grid)


@dataclass(frozen=True)
class Worth:
    """What a candidate saves.

    flops, nbytes: realizable fractions. prefill, decode: fractions of the dense model's seconds. why: the reason if realizable is
    not nominal. measured: True by a measured profile, False by published figures.
    """

    candidate: str
    nominal_flops: float
    nominal_bytes: float
    flops: float
    nbytes: float
    prefill: float
    decode: float
    kernel: str
    why: str
    measured: bool

    @property
    def pays(self) -> bool:
        """True if it is faster in prefill or decoding, or smaller, by more than noise."""
        # what a budget in seconds removes is not known before it is timed
        if "seconds=" in self.candidate:
            return True
        return min(self.flops, self.nbytes, self.prefill, self.decode) < 1 / GAIN

    def pays_beside(self, other: "Worth") -> bool:
        """True if it is faster in prefill or decoding than another, or smaller, by more than noise."""
        names = ("nbytes", "prefill", "decode")
        return any(getattr(self, name) < getattr(other, name) / GAIN for name in names)


def realize(candidate: Candidate, machine: DeviceProfile | Hardware, dtype: str = "bf16") -> Worth:
    """What a candidate saves on a machine. Raises PlanError if a measured profile has no rows for the dtype."""
    if dtype not in ("bf16", "fp16", "fp32"):
        raise PlanError(f"unknown dtype '{dtype}'; write bf16, fp16 or fp32")
    kept, measured = candidate.kept, isinstance(machine, DeviceProfile)
    if candidate.kind == "bits" or candidate.grid is not None:
        return _integers(candidate, machine, dtype)
    if candidate.kind != "mask":
        why = "" if candidate.kind == "dense" else "what is left is dense and runs anywhere"
        if kept > 1 / GAIN and candidate.kind == "shrink" and not candidate.budget.startswith("seconds"):
            why = f"it removes {1 - kept:.0%} at most, which cannot be told from noise"
        return Worth(candidate.text, kept, kept, kept, kept, kept, kept, "dense", why, measured)
    if isinstance(machine, Hardware):
        return _published(candidate, machine, dtype)
    return _measured(candidate, machine, dtype)


def machine_named(profile: str | None) -> DeviceProfile | Hardware:
    """The machine of that name (of HARDWARE) or profile file; None is this machine's own profile. Raises DeviceError."""
    if profile is None:
        found = DeviceProfile.at_hand()
        if found is None:
            raise DeviceError(
                f"this machine was not measured yet: run `secateurs probe`, or name one of {', '.join(HARDWARE)}"
            )
        return found
    if profile in HARDWARE:
        return HARDWARE[profile]
    file = Path(profile).expanduser()
    if not file.is_file():
        raise DeviceError(
            f"no profile '{profile}': it is no file of `secateurs probe` and none of {', '.join(HARDWARE)}"
        )
    return DeviceProfile.read(file)


def rank(candidates: Sequence[Candidate], machine: DeviceProfile | Hardware, dtype: str = "bf16") -> list[Worth]:
    """Candidates with the fewest realizable FLOPs first, then the least time, then the fewest bytes."""
    found = [realize(c, machine, dtype) for c in candidates]
    return sorted(found, key=lambda w: (w.flops, w.prefill + w.decode, w.nbytes))


def usual(machine: DeviceProfile | Hardware, dtype: str) -> tuple[list[Candidate], str | None]:
    """USUAL without those on grids that a profile has no rows for, and a sentence if there are such."""
    found = [Candidate.parse(text) for text in USUAL]
    if isinstance(machine, Hardware):
        return found, None
    unknown = {c.text for c in found if c.grid and machine.relative(dtype, c.grid, c.sparsity, 1) is None}
    said = (
        f"{machine.name} has no rows for {', '.join(sorted(unknown))} beside {dtype}; `secateurs probe` measures them"
    )
    return [c for c in found if c.text not in unknown], said if unknown else None


def _stored(kept: float, extra_bits: float, dtype: str) -> float:
    """Bytes of the kept values and `extra_bits` for each weight, over the dense bytes."""
    return min(1.0, kept + extra_bits / (32 if dtype == "fp32" else 16))


def _dense(candidate: Candidate, why: str, measured: bool) -> Worth:
    kept = candidate.kept
    return Worth(candidate.text, kept, kept, 1.0, 1.0, 1.0, 1.0, "dense", why, measured)


def _published(candidate: Candidate, machine: Hardware, dtype: str) -> Worth:
    kept = candidate.kept
    if machine.two_four and candidate.pattern == "2:4":
        prefill, decode = machine.two_four
        return Worth(
            candidate.text, kept, kept, 0.5, _stored(kept, _TWO_FOUR, dtype), 1 / prefill, 1 / decode, "sparse tensor cores",
            "tensor cores skip half of the products; few tokens wait for memory and launches, and gain little", False,
        )  # fmt: skip
    if machine.bitmask:
        nbytes = _stored(kept, _BITMASK, dtype)
        why = (
            "zeros are not read, but survivors are expanded before they are multiplied: fewer bytes, not fewer products"
        )
        return Worth(candidate.text, kept, kept, 1.0, nbytes, 1.0, nbytes, "bitmask", why, False)
    return _dense(
        candidate,
        f"no kernel of {machine.name} skips {candidate.pattern} zeros: a dense kernel multiplies them, a dense tensor stores them",
        False,
    )


def _measured(candidate: Candidate, profile: DeviceProfile, dtype: str) -> Worth:
    kept = candidate.kept
    if candidate.pattern == "2:4" and profile.accelerator.get("device"):
        rows = [r for r in profile.rows if r["kernel"].startswith("nm24") and r["dtype"] == dtype]
        if rows:
            return _two_four(candidate, rows, dtype)
    tokens = sorted(
        {r["tokens"] for r in profile.rows if r["dtype"] == dtype and r["kernel"].startswith(f"bitmask_{dtype}")}
    )
    if not tokens:
        raise PlanError(f"the profile has no packed row for {dtype}; run `secateurs probe --dtype {dtype}`")
    few, many = (profile.speedup(dtype, candidate.sparsity, t) or 1.0 for t in (tokens[0], tokens[-1]))
    nbytes = _stored(kept, _BITMASK, dtype)
    # a layer that is packed because few tokens gain is packed for many tokens too
    if few < GAIN:
        why = f"packed products are no faster here at {candidate.sparsity:.0%} zeros ({few:.2f}x at {tokens[0]} tokens at once)"
        return _dense(candidate, why, True)
    why = (
        f"measured {few:.2f}x at {tokens[0]} and {many:.2f}x at {tokens[-1]} tokens at once: zeros are not read, but survivors are "
        "expanded before they are multiplied"
    )
    return Worth(candidate.text, kept, kept, min(1.0, 1 / many), nbytes, 1 / many, 1 / few, "bitmask", why, True)


def _integers(candidate: Candidate, machine: DeviceProfile | Hardware, dtype: str) -> Worth:
    """Of weights on a grid, whose zeros are left out where `pack` would; or of a mixture of bits."""
    kept, grid, width = candidate.kept, candidate.grid, 32 if dtype == "fp32" else 16
    shrunk = kept if candidate.kind == "shrink" else 1.0
    sparsity = candidate.sparsity if candidate.kind == "mask" else 0.0
    left_out = bool(sparsity) and isinstance(machine, Hardware) and machine.bitmask
    if isinstance(machine, DeviceProfile) and grid and sparsity:
        left_out = bool(machine.leaves_zeros_out(dtype, grid, sparsity, candidate.pattern == "2:4"))
    bits = candidate.bits
    if grid:
        survivors = round((1 - sparsity) * _WIDE[0] * _WIDE[1])
        of_all, of_some = bits_a_weight(grid, _WIDE), bits_a_weight(grid, _WIDE, survivors)
        left_out = left_out and of_some < of_all
        bits = of_some if left_out else of_all
    nbytes = min(1.0, bits / width)
    if isinstance(machine, Hardware):
        few, many = (nbytes if machine.bitmask else 1.0), 1.0
        why = "integers are not expanded in memory: fewer bytes, as many products"
        if not machine.bitmask:
            why = f"no figure is published for integer kernels on {machine.name}: only bytes are counted"
    else:
        few, many = (_seconds(candidate, machine, dtype, sparsity, most) for most in (False, True))
        why = f"measured {1 / few:.2f}x for few and {1 / many:.2f}x for many tokens at once"
        if candidate.kind == "bits":
            why += ", by the rows of the nearest bits: which layer gets how many is not known before it is measured"
        elif sparsity and not left_out:
            speedup = machine.speedup(f"int{candidate.bits:g}", sparsity, 1, candidate.pattern == "2:4") or 1.0
            why = (
                f"at {sparsity:.0%} zeros int{candidate.bits:g} without them is {speedup:.2f}x as fast for one token as all "
                f"integers, and takes {of_some / of_all:.2f}x the bytes, so its zeros are stored like other integers; {why}"
            )
    kernel = "bitmask" if left_out else "integers"
    return Worth(
        candidate.text, kept, kept * candidate.bits / width, shrunk * min(1.0, many), shrunk * nbytes, shrunk * many,
        shrunk * few, kernel, why, isinstance(machine, DeviceProfile),
    )  # fmt: skip


def _seconds(candidate: Candidate, profile: DeviceProfile, dtype: str, sparsity: float, most: bool) -> float:
    """Seconds over the best dense product's, at the fewest or the most tokens that were measured. Raises PlanError for no rows."""
    tokens = (max if most else min)(r["tokens"] for r in profile.rows)
    if candidate.grid:
        found = profile.relative(dtype, candidate.grid, sparsity, tokens, candidate.pattern == "2:4")
        if found is not None:
            return found
    else:
        of = {b: profile.relative(dtype, Grid(b), 0.0, tokens) for b in sorted(grids.BITS)}
        known = {b: seconds for b, seconds in of.items() if seconds is not None}
        if known:
            return float(np.interp(candidate.bits, [*known, 16], [*known.values(), 1.0]))
    bits = f"{candidate.bits:g}" if candidate.grid else "8,4"
    raise PlanError(
        f"the profile has no row for int{bits.partition(',')[0]} beside {dtype}; run `secateurs probe --dtype {dtype} "
        f"--bits {bits}`"
    )


def _two_four(candidate: Candidate, rows: list[dict[str, Any]], dtype: str) -> Worth:
    def best(tokens: int) -> float:
        """The speedup of the fastest backend for each shape, the median over shapes."""
        by_shape: dict[str, float] = {}
        for r in rows:
            if r["tokens"] == tokens:
                shape = str(r.get("shape"))
                by_shape[shape] = max(by_shape.get(shape, 0.0), float(r["speedup"]))
        return median(by_shape.values())

    few, many = best(min(r["tokens"] for r in rows)), best(max(r["tokens"] for r in rows))
    kept = candidate.kept
    why = f"measured {few:.2f}x for few tokens and {many:.2f}x for many"
    return Worth(
        candidate.text, kept, kept, min(1.0, 1 / many), _stored(kept, _TWO_FOUR, dtype), min(1.0, 1 / many), min(1.0, 1 / few),
        "sparse tensor cores", why, True,
    )  # fmt: skip
