"""Prunes a model while it trains: gradually to a schedule, or with a fixed number of weights that move (RigL, SET).

    schedule = sc.train.cubic(0.9, begin=200, end=2000)
    sc.train.gradual(model, optimizer, schedule)            # the loop stays as it is

All of it happens in hooks of the optimizer's step.
"""

import warnings
from collections.abc import Callable, Mapping
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.base.seed import seed_of
from secateurs.matrix import patterns
from secateurs.prune.allocation import LayerSummary, erk
from secateurs.train.held import Held, check_owned, local, whole
from secateurs.train.matrices import apart, as_matrix, check_pattern, chosen, largest
from secateurs.train.schedules import Schedule

# (weight, running sum) -> score; the sum is over the steps since masks were last chosen
Score = Callable[[Tensor, Tensor], Tensor]
# (weight, gradient) -> what is added to the sum in each step
Summed = Callable[[Tensor, Tensor], Tensor]

SCORES: dict[str, tuple[Score, Summed | None, str]] = {
    "magnitude": (lambda w, s: w.abs(), None, "|w|"),
    "taylor": (
        lambda w, s: s,
        lambda w, g: (w * g).abs(),
        "sum of |w g|: the loss's change to first order, step by step",
    ),
    "movement": (lambda w, s: s, lambda w, g: -w * g, "sum of -w g: weights that move away from 0 (Sanh et al. 2020)"),
    "fisher": (lambda w, s: w.square() * s, lambda w, g: g.square(), "w^2 times the sum of g^2: the diagonal Fisher"),
    "random": (lambda w, s: torch.rand(w.shape).to(w.device), None, "uniform noise, the control"),
}


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """True if a GradScaler found gradients that are not finite. It still calls fused optimizers, which then do nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _scale(optimizer: torch.optim.Optimizer) -> Tensor | float:
    """The factor that gradients still carry: a fused optimizer divides by a GradScaler's scale itself."""
    found: Tensor | None = getattr(optimizer, "grad_scale", None)
    return 1.0 if found is None else found


def _reached(
    parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], what: str
) -> dict[str, nn.Parameter]:
    """The parameters that have a gradient; warns of the others."""
    found = {n: p for n, p in parameters.items() if n in gradients and bool(whole(gradients[n]).any())}
    lost = sorted(parameters.keys() - found.keys())
    if lost:
        warnings.warn(f"{', '.join(lost)} had no gradient {what}", stacklevel=2)
    return found


class Gradual:
    """Gradual pruning under way. held: the masks. step: optimizer steps so far."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, pattern: str, scope: str, score: str,
        names: Mapping[str, nn.Parameter], seed: int, once: Mapping[str, nn.Parameter],
    ) -> None:  # fmt: skip
        """once: frozen parameters, which get the schedule's last sparsity now."""
        self.schedule, self.step, self._optimizer, self._seed = schedule, 0, optimizer, seed
        self._score, self._summed, _ = SCORES[score]
        alone = "layer" if scope == "global" else scope
        self._pattern = patterns.parse(pattern, alone if pattern == "unstructured" else None)
        self._scope = scope
        self._matrices = {n: as_matrix(model, p) for n, p in {**names, **once}.items()}
        self._sums: dict[str, Tensor] = {}
        self._trained = dict(names)
        masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in names.items()}
        masks |= self._kept({n: whole(p).float().abs() for n, p in once.items()}, schedule.at(schedule.last))
        self.held = Held({**names, **once}, masks, optimizer, self._collect, self._after)
        if schedule.due(0):
            self._decide(schedule.at(0))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "masks": self.held.state_dict(), "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        held = self.held.parameters
        self.step = int(state["step"])
        self._sums = {name: total.to(held[name].device, copy=True) for name, total in state["sums"].items()}
        self.held.load_state_dict(state["masks"])

    def _collect(self) -> None:
        if not self._summed or _overflowed(self._optimizer):
            return
        for name, parameter in self.held.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.detach().float() / _scale(self._optimizer)
                found = self._summed(parameter.detach().float(), gradient)
                self._sums[name] = self._sums[name].add_(found) if name in self._sums else found

    def _after(self) -> None:
        if _overflowed(self._optimizer):
            return
        self.step += 1
        if self.schedule.due(self.step):
            self._decide(self.schedule.at(self.step))
            self._sums.clear()

    def _decide(self, sparsity: float) -> None:
        """Choose new masks inside the old ones: removed weights stay removed."""
        if not sparsity:
            # an N:M pattern has one sparsity, and it is not 0
            return
        scores, old = {}, {name: whole(mask) for name, mask in self.held.masks.items()}
        ranked: Mapping[str, nn.Parameter] = self._trained
        if self._summed:
            ranked = _reached(ranked, self._sums, f"to rank weights by at step {self.step}; not pruned")
        for name, parameter in ranked.items():
            weight = whole(parameter).float()
            # the same numbers on every rank
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self._seed, f"{self.step} {name}"))
                score = self._score(weight, whole(self._sums[name]) if self._summed else weight)
            scores[name] = score.masked_fill(~old[name], -torch.inf)
        masks = largest(scores, sparsity) if self._scope == "global" and scores else self._kept(scores, sparsity)
        self.held.update({name: mask & old[name] for name, mask in masks.items()})

    def _kept(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """{name: mask} of each matrix by itself."""
        matrices = self._matrices
        return {n: matrices[n][1](self._pattern.keep(matrices[n][0](s), sparsity)) for n, s in scores.items()}


def gradual(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, pattern: str = "unstructured", scope: str = "layer",
    score: str = "magnitude", skip: tuple[str, ...] = (), seed: int = 0, frozen: str | None = None,
) -> Gradual:  # fmt: skip
    """Prune every matrix of a model to the schedule's sparsity as its optimizer steps.

    pattern: as in patterns.py; an N:M pattern has one sparsity, which the schedule must reach in one step. scope: over what an
    unstructured pattern counts: 'layer', 'row' or 'global'. score: a row of SCORES; where it is a sum over gradients, the first
    pruning is after step 1 at the earliest, and a matrix that no gradient reached keeps its weights, with a warning. skip:
    parameters that stay dense. seed: of random scores. frozen: 'prune' prunes frozen matrices now, each by magnitude to the
    schedule's last sparsity, and keeps their zeros; 'skip' leaves them dense; without it they are refused by name. held.release()
    ends it. Raises PlanError.
    model: any; its Linear, Conv and fused experts' matrices. optimizer: of the model's parameters. schedule: sparsity by step.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        >>> pruner = sc.train.gradual(net, optimizer, sc.train.cubic(0.75, begin=2, end=8, every=2))
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.held.sparsity
        0.75
    """
    if score not in SCORES:
        raise PlanError(f"unknown score '{score}'; write {', '.join(SCORES)}")
    if scope not in ("layer", "row", "global"):
        raise PlanError(f"unknown scope '{scope}'; write layer, row or global")
    if scope == "global" and pattern != "unstructured":
        raise PlanError(
            f"scope global shares zeros out over all matrices, and {pattern} says where they are; leave one out"
        )
    fixed = patterns.parse(pattern).fixed_sparsity
    if fixed is not None and any(
        schedule.due(s) and schedule.at(s) not in (0.0, fixed) for s in range(schedule.last + 1)
    ):
        raise PlanError(f"{pattern} is {fixed:g} zeros and nothing else; give one_step({fixed:g}, at=...)")
    names = chosen(model, skip)
    for name, parameter in names.items():
        check_pattern(name, as_matrix(model, parameter)[0](parameter.detach()), pattern)
    trained, once = apart(names, frozen, "nothing trains what pruning leaves of them")
    check_owned(optimizer, trained, "give it model.parameters(), or put it in skip")
    if SCORES[score][1] and schedule.due(0) and schedule.at(0):
        raise PlanError(
            f"score {score} is a sum over steps, and none is taken before step 0; begin the schedule at step 1 or later"
        )
    return Gradual(model, optimizer, schedule, pattern, scope, score, trained, seed, once)


class Dynamic:
    """Dynamic sparse training under way. held: the masks. step: optimizer steps so far."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], every: int,
        until: int, fraction: float, by_gradient: bool, generator: torch.Generator, trained: Mapping[str, nn.Parameter],
    ) -> None:  # fmt: skip
        """names: what is held; trained: those of them whose connections move."""
        self._trained = dict(trained)
        self.step, self.every, self.until, self.fraction, self.by_gradient = 0, every, until, fraction, by_gradient
        self._generator, self._optimizer = generator, optimizer
        self._gradients: dict[str, Tensor] = {}
        # the first masks may zero weights of a checkpoint, which load_state_dict() brings back; dropped before the first step, in
        # which an optimizer makes copies of its own
        self._given = {name: parameter.detach().clone() for name, parameter in names.items()}
        self.held = Held(names, masks, optimizer, self._look, self._after)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "masks": self.held.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self._generator.set_state(state["generator"].cpu())
        for name, mask in (self.held.masks if self._given else {}).items():
            parameter, given = local(self.held.parameters[name]), local(self._given[name])
            # weights were loaded before the first masks, unless others were after
            if torch.equal(parameter, given.masked_fill(~local(mask), 0)):
                parameter.copy_(given)
        self._given.clear()
        self.held.load_state_dict(state["masks"])

    def _due(self, step: int) -> bool:
        return step % self.every == 0 and 0 < step < self.until

    def _look(self) -> None:
        self._given.clear()
        if self.by_gradient and self._due(self.step + 1) and not _overflowed(self._optimizer):
            for name, parameter in self.held.parameters.items():
                if parameter.grad is not None:
                    self._gradients[name] = parameter.grad.detach().abs().float()

    def _after(self) -> None:
        if _overflowed(self._optimizer):
            return
        self.step += 1
        if not self._due(self.step):
            return
        share = self.fraction / 2 * (1 + cos(pi * self.step / self.until))
        masks, old = {}, {name: whole(mask) for name, mask in self.held.masks.items()}
        moving: Mapping[str, nn.Parameter] = self._trained
        if self.by_gradient:
            moving = _reached(moving, self._gradients, f"in step {self.step}; connections not moved")
        for name, parameter in moving.items():
            mask = old[name].flatten()
            kept = int(mask.sum())
            moved = min(round(share * kept), len(mask) - kept)
            size = whole(parameter).float().abs().flatten().masked_fill(~mask, -torch.inf)
            stays = patterns.top(size, kept - moved)
            if self.by_gradient:
                wish = whole(self._gradients[name]).flatten()
            else:
                wish = torch.rand(len(mask), generator=self._generator).to(mask.device)
            # connections dropped in this step may grow back, as in RigL
            grown = patterns.top(wish.masked_fill(stays, -torch.inf), moved)
            # new connections begin at 0, as they were held
            masks[name] = (stays | grown).reshape(parameter.shape)
        self._gradients.clear()
        self.held.update(masks)


def dynamic(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsity: float, until: int, every: int = 100, fraction: float = 0.3,
    grow: str = "gradient", seed: int = 0, skip: tuple[str, ...] = (), frozen: str | None = None,
) -> Dynamic:  # fmt: skip
    """Train sparse from the first step: masks begin at random, then each layer drops its smallest weights and grows others.

    Layers get Erdos-Renyi-Kernel densities. Every `every` steps before step `until` (three quarters of training is usual) a share
    fraction / 2 (1 + cos(pi step / until)) of a layer's connections moves. grow: 'gradient' is RigL (Evci et al. 2019, arXiv
    1911.11134), 'random' is SET (Mocanu et al. 2017, arXiv 1707.04780). A checkpoint's weights and optimizer state may be loaded
    before this or after. frozen: 'prune' prunes frozen matrices now, each by magnitude to its density, and keeps their zeros;
    'skip' leaves them dense; without it they are refused by name. held.release() ends it. Raises PlanError. model, optimizer: as
    for gradual(). sparsity: the fraction of zeros over all matrices. seed: of the first masks and of random growth.

    Example:

        >>> import torch, secateurs as sc
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        >>> pruner = sc.train.dynamic(net, optimizer, sparsity=0.5, until=8, every=2)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(32, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.held.sparsity
        0.5
    """
    if grow not in ("gradient", "random"):
        raise PlanError(f"unknown grow '{grow}'; write gradient (RigL) or random (SET)")
    if not 0 < sparsity < 1 or every < 1 or until < every or not 0 < fraction <= 1:
        raise PlanError(
            f"sparsity {sparsity:g}, every {every}, until {until}, fraction {fraction:g}: give 0 < sparsity < 1, 1 <= every <= "
            "until and 0 < fraction <= 1"
        )
    trained, once = apart(chosen(model, skip), frozen, "connections move by training")
    names = {**trained, **once}
    generator = torch.Generator().manual_seed(seed)
    matrices = {n: as_matrix(model, p)[0](p.detach()) for n, p in names.items()}
    summaries = {n: _summary(m, tuple(names[n].shape[2:]) if names[n].dim() == 4 else ()) for n, m in matrices.items()}
    shares = erk(summaries, sparsity, (0.0, 1.0))
    masks = {}
    for name, parameter in names.items():
        kept = parameter.numel() - patterns.count_zeros(parameter.numel(), shares[name])
        first = (
            parameter.detach().float().abs().flatten()
            if name in once
            else torch.rand(parameter.numel(), generator=generator)
        )
        masks[name] = patterns.top(first, kept).reshape(parameter.shape)
    check_owned(optimizer, trained, "give it model.parameters(), or put it in skip")
    return Dynamic(optimizer, names, masks, every, until, fraction, grow == "gradient", generator, trained)


def _summary(weight_OI: Tensor, kernel: tuple[int, ...]) -> LayerSummary:
    return LayerSummary((weight_OI.shape[0], weight_OI.shape[1]), "", lambda: iter(()), lambda: weight_OI, kernel)
