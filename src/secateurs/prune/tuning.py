"""Adam on the survivors of pruning: masks frozen, a fixed number of steps, the weights that did best on held-out places kept.

Weights on a grid stay on it: what moves is a copy in fp32, and the parameter is that copy rounded (straight_through.py).

The caller says what a place is (some windows of a batch) and gives its loss and gradients: tune_block.py those of a block,
tune_model.py those of the whole model. A tenth of the places, 16 at most, is held out.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateurs.base.files import write_tensors
from secateurs.base.processes import ALONE, Ranks
from secateurs.prune.straight_through import OnGrid, StraightThrough

BETAS = (0.9, 0.95)
# of the steps, in which the learning rate climbs; after that it falls along a cosine to 0
_WARM = 0.1
_HELD_OUT = 0.1
_MOST_HELD_OUT = 16
# at most this many looks at the held-out places, spread over the steps, and no more than one in 24 steps
_LOOKS = 4
_LOOK_EVERY = 24
# looks without a lower loss than an earlier look before it stops; that of the given weights is not one of them, because at the
# height of its rate tuning is often above where it began and comes down below it
_PATIENCE = 2


@dataclass(frozen=True)
class Outcome:
    """Held-out loss before and after, steps taken of those planned."""

    before: float
    after: float
    steps: int

    @property
    def accepted(self) -> bool:
        return self.after < self.before


@dataclass(frozen=True)
class Moving:
    """A parameter that is tuned. mask: where it may move, None for everywhere. scale: of its steps, times the rate. on_grid: the
    layers of the parameter that are on grids; their scales are tuned in place.
    """

    parameter: nn.Parameter
    mask: Tensor | None
    scale: float
    on_grid: tuple[OnGrid, ...] = ()

    @classmethod
    def of(cls, parameter: nn.Parameter, mask: Tensor | None = None, on_grid: Sequence[OnGrid] = ()) -> "Moving":
        """Where the mask says, or else a matrix where it is not zero and a vector everywhere; the root mean square of what may
        move, or of the grid's steps: on a coarse grid shorter ones would move nothing, on a fine one longer ones all at once.
        """
        if mask is None and parameter.dim() > 1:
            mask = parameter.detach() != 0
        if on_grid:
            steps = torch.cat([on.scales.scale_OG.float().flatten() for on in on_grid])
            size = float(steps.square().mean().sqrt())
        else:
            size = _size(parameter.detach().float(), mask)
        return cls(parameter, mask, max(size, 1e-6), tuple(on_grid))


class Memory(Protocol):
    """Where tuning notes its place after every look, and when a note is due, so that it can go on after a kill."""

    def read(self) -> dict[str, Tensor] | None: ...
    def due(self) -> bool: ...
    def write(self, state: dict[str, Tensor]) -> None: ...


def loss_scale(dtype: torch.dtype, terms: int) -> float:
    """What a mean over so many terms is multiplied by while its gradients are taken: the least number of fp16 is 6e-8, and the
    gradient by one term is less.
    """
    return 2.0 ** int(math.log2(max(1, terms))) if dtype == torch.float16 else 1.0


def unscaled(gradients: Sequence[Tensor | None], scale: float) -> Sequence[Tensor | None]:
    """Gradients of a loss that was multiplied by loss_scale()."""
    return gradients if scale == 1 else [None if g is None else g.float() / scale for g in gradients]


def movable(
    block: nn.Module,
    pruned: Sequence[tuple[nn.Parameter, Tensor]],
    on_grid: Sequence[OnGrid] = (),
) -> list[Moving]:
    """The parameters of a block that are tuned: the `pruned` parameters where their masks say, and its vectors (norms, biases).
    on_grid: those of the layers that stay on a grid.
    """
    masks = {id(p): mask for p, mask in pruned}
    wanted = (p for p in block.parameters() if id(p) in masks or (p.dim() == 1 and p.is_floating_point()))
    return [Moving.of(p, masks.get(id(p)), [on for on in on_grid if on.layer.parameter is p]) for p in wanted]


def tune(
    trained: Sequence[Moving],
    loss: Callable[[Any], float],
    gradients: Callable[[Any], Sequence[Tensor | None]],
    places: Sequence[Any],
    steps: int,
    rate: float,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    memory: Memory | None = None,
    batch: int = 1,
    ranks: Ranks = ALONE,
    owner: Callable[[Any], int] | None = None,
) -> Outcome:
    """Tune parameters in place, on the mean of `batch` places a step, which `ranks` share. What a mask removed stays zero.

    loss(place) is called without gradients, gradients(place) with: one for each of `trained`, or None. owner: the rank that calls
    them for a place; by default ranks take turns.
    They move in fp32 copies and are rounded to their own dtype after every step. rate: Adam's learning rate, times each
    parameter's scale. Never raises the held-out loss. tick: after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(places), generator=generator).tolist()
    held = min(_MOST_HELD_OUT, max(1, round(len(places) * _HELD_OUT)))
    held_out, training = [places[i] for i in order[:held]], [places[i] for i in order[held:]]
    if not training or steps < 1:
        return Outcome(0.0, 0.0, 0)
    turns: list[int] = []
    while len(turns) < steps * batch:
        turns += torch.randperm(len(training), generator=generator).tolist()

    def mine(found: Sequence[int], among: Sequence[Any]) -> Sequence[int]:
        return [i for i in found if owner(among[i]) == ranks.rank] if owner else ranks.share(found)

    def held_out_loss() -> float:
        with torch.no_grad():
            found = [(i, loss(held_out[i])) for i in mine(range(held), held_out)]
        # added in one order, whoever has found them
        return sum(value for _, value in sorted(itertools.chain(*ranks.gather(found)))) / held

    state = memory.read() if memory else None
    survivors = _Survivors(trained, state)
    if state is None:
        before = best = held_out_loss()
        lowest = math.inf
        step, worse = 0, 0
    else:
        before, best, lowest = (float(state[name]) for name in ("before", "best", "lowest"))
        step, worse = (int(state[name]) for name in ("step", "worse"))
    look = max(_LOOK_EVERY, math.ceil(steps / _LOOKS))
    asked = [m.parameter.requires_grad for m in trained]
    for m in trained:
        m.parameter.requires_grad_(True)
    try:
        while step < steps and worse < _PATIENCE:
            step += 1
            # a lone window is one rank's, and the others wait
            with torch.enable_grad(), ranks.all_threads() if batch == 1 else nullcontext():
                for turn in mine(turns[(step - 1) * batch : step * batch], training):
                    survivors.add(gradients(training[turn]), 1 / batch)
            survivors.sum(ranks)
            survivors.step(rate * min(step / max(1, _WARM * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)))
            tick()
            looked = not step % look or step == steps
            if looked:
                now = held_out_loss()
                lowest, worse = (now, 0) if now < lowest else (lowest, worse + 1)
                if now < best:
                    best = now
                    survivors.keep()
            if memory and ranks.first and (looked or memory.due()):
                facts = {"before": before, "best": best, "lowest": lowest, "step": step, "worse": worse}
                numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in facts.items()}
                memory.write({**numbers, **survivors.state()})
    finally:
        survivors.restore()
        for m, flag in zip(trained, asked, strict=True):
            m.parameter.requires_grad_(flag)
    return Outcome(before, best, step)


class _Survivors:
    """fp32 copies of parameters, their masks and moments, and the best weights so far."""

    def __init__(self, trained: Sequence[Moving], state: dict[str, Tensor] | None) -> None:
        self.trained = [m.parameter for m in trained]
        self.copies = [p.detach().float().clone() for p in self.trained]
        self.masks = [m.mask for m in trained]
        self.kept = [p.detach().clone() for p in self.trained]
        self.scales = [m.scale for m in trained]
        self.rounded = [
            [StraightThrough(on, copy, m.mask) for on in m.on_grid]
            for m, copy in zip(trained, self.copies, strict=True)
        ]
        groups = [{"params": [copy]} for copy in self.copies]
        groups += [{"params": [r.scale_OG]} for found in self.rounded for r in found]
        self.scales += [r.size for found in self.rounded for r in found]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=1e-12, fused=True)
        if state is not None:
            self._go_on(state)

    def add(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """A place's part in the next step; none if fp16 could not hold it."""
        if any(p.dtype == torch.float16 for p in self.trained):
            found = [g for g in gradients if g is not None]
            if not all(bool(torch.isfinite(g).all()) for g in found):
                return
        for copy, gradient in zip(self.copies, gradients, strict=True):
            if gradient is not None:
                part = gradient.float() * share
                copy.grad = part if copy.grad is None else copy.grad.add_(part)

    def sum(self, ranks: Ranks) -> None:
        """The sum over all ranks; None if no rank has any."""
        if ranks.size == 1:
            return
        found = torch.tensor([copy.grad is not None for copy in self.copies], dtype=torch.float32)
        ranks.sum(found)
        for copy, some in zip(self.copies, found.tolist(), strict=True):
            if some:
                copy.grad = torch.zeros_like(copy) if copy.grad is None else copy.grad
                ranks.sum(copy.grad)

    def step(self, rate: float) -> None:
        """One step of Adam. A parameter without a gradient stays where it is."""
        for copy, mask in zip(self.copies, self.masks, strict=True):
            if mask is not None and copy.grad is not None:
                copy.grad.mul_(mask)
        for copy, found in zip(self.copies, self.rounded, strict=True):
            for r in found:
                if copy.grad is not None:
                    r.pull(copy.grad)
        for group, scale in zip(self.adam.param_groups, self.scales, strict=True):
            group["lr"] = rate * scale
        self.adam.step()
        self._write()
        for copy in self.copies:
            copy.grad = None

    def _write(self) -> None:
        for p, copy, found in zip(self.trained, self.copies, self.rounded, strict=True):
            p.detach().copy_(copy)
            for r in found:
                r.write()

    def keep(self) -> None:
        for kept, p, found in zip(self.kept, self.trained, self.rounded, strict=True):
            kept.copy_(p.detach())
            for r in found:
                r.keep()

    def restore(self) -> None:
        for kept, p, found in zip(self.kept, self.trained, self.rounded, strict=True):
            p.detach().copy_(kept)
            for r in found:
                r.restore()

    def state(self) -> dict[str, Tensor]:
        out = {f"scale {i}": torch.tensor(scale, dtype=torch.float64) for i, scale in enumerate(self.scales)}
        for i, (copy, mask, kept) in enumerate(zip(self.copies, self.masks, self.kept, strict=True)):
            out[f"copy {i}"], out[f"kept {i}"] = copy, kept
            out.update({f"{name} {i}": value for name, value in self.adam.state[copy].items()})
            if mask is not None:
                out[f"mask {i}"] = mask
        for i, r in enumerate(r for found in self.rounded for r in found):
            out[f"grid {i} scale"], out[f"grid {i} kept"] = r.scale_OG.detach(), r.kept_OG
            out.update({f"grid {i} {name}": value for name, value in self.adam.state[r.scale_OG].items()})
        return out

    def _go_on(self, state: dict[str, Tensor]) -> None:
        for i, (copy, kept) in enumerate(zip(self.copies, self.kept, strict=True)):
            copy.copy_(state[f"copy {i}"])
            kept.copy_(state[f"kept {i}"])
            mask = state.get(f"mask {i}")
            self.masks[i] = None if mask is None else mask.to(copy.device)
            self.scales[i] = float(state[f"scale {i}"])
            names = ("step", "exp_avg", "exp_avg_sq")
            if f"step {i}" in state:
                self.adam.state[copy] = {name: state[f"{name} {i}"].to(copy.device, copy=True) for name in names}
        for i, r in enumerate(r for found in self.rounded for r in found):
            r.scale_OG.copy_(state[f"grid {i} scale"])
            r.kept_OG.copy_(state[f"grid {i} kept"])
            if f"grid {i} step" in state:
                self.adam.state[r.scale_OG] = {
                    name: state[f"grid {i} {name}"].to(r.scale_OG.device, copy=True)
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }
        self._write()


def _size(copy: Tensor, mask: Tensor | None) -> float:
    """Root mean square of the weights that may move."""
    moving = copy if mask is None else copy[mask]
    return math.sqrt(float(moving.square().sum()) / max(1, moving.numel()))


# tuning notes its place when so much would be lost
_NOTE_SECONDS = 300


class Noted:
    """A file in which tuning notes its place (tuning.Memory)."""

    def __init__(self, file: Path) -> None:
        self.file, self.last = file, time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last > _NOTE_SECONDS

    def read(self) -> dict[str, Tensor] | None:
        from safetensors.torch import load_file

        return load_file(self.file) if self.file.is_file() else None

    def write(self, state: dict[str, Tensor]) -> None:
        write_tensors(self.file, state)
        self.last = time.monotonic()

    def step(self) -> int:
        state = self.read()
        return 0 if state is None else int(state["step"])
