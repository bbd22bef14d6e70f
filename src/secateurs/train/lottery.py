"""Iterative magnitude pruning with rewinding (lottery tickets) beside its controls. A killed run goes on at its last training.

    train, remove a fraction of what is left, rewind, repeat        (Frankle and Carbin 2019, arXiv 1803.03635)

Weights are rewound to step 0; or to step k, which larger nets need (Frankle et al. 2020, arXiv 1912.05671); or they are kept and
only the learning rate starts over (Renda et al. 2020, arXiv 2003.02389). The folder holds plan.json, results.json, ticket.svg, and
for every seed the initial weights, the rewind weights, and each round's mask and trained weights.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateurs.base.errors import PlanError
from secateurs.base.files import write_json, write_tensors
from secateurs.base.run_directory import claim, locked
from secateurs.base.seed import own_numbers
from secateurs.train.held import Held, hold
from secateurs.train.matrices import chosen, largest

CONTROLS = ("random", "reinit")
# makes other seeds of a seed: for the re-initialized control and for random masks
_ELSE = 1_000_003

Hold = Callable[[torch.optim.Optimizer], Held]


class Task(Protocol):
    """A model and how it is trained. steps: optimizer steps of a whole training."""

    steps: int

    def make(self, seed: int) -> nn.Module:
        """A fresh net."""

    def train(self, model: nn.Module, hold: Hold, start: int, stop: int, seed: int) -> None:
        """Train in place from step `start` to `stop`, with the learning rates and data of those steps of a whole training.

        Must call hold(optimizer) once the optimizer is made.
        """

    def score(self, model: nn.Module) -> float:
        """A score where higher is better, such as accuracy on held-out data."""


@dataclass(frozen=True)
class Rounds:
    """The plan of a search. Raises PlanError for what cannot be.

    rounds: after the dense training. fraction: of the weights that are left, removed in each. rewind: a step, or 'rate'. controls:
    of CONTROLS. scope: 'global' or 'layer'. skip: parameters that stay dense.
    seeds: of the searches, one each; their scores are averaged.

    Example:

        >>> import secateurs as sc
        >>> round(sc.train.Rounds(rounds=2, fraction=0.5).sparsity(2), 3)
        0.75
    """

    rounds: int = 10
    fraction: float = 0.2
    rewind: int | str = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[str, ...] = CONTROLS
    scope: str = "global"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.fraction < 1 or not self.seeds:
            raise PlanError(
                f"{self.rounds} rounds that remove {self.fraction:g} each, seeds {self.seeds}: give 1 or more, and a fraction"
            )
        if isinstance(self.rewind, str) and self.rewind != "rate":
            raise PlanError(f"rewind '{self.rewind}'; write a step, or rate")
        unknown = [control for control in self.controls if control not in CONTROLS]
        if unknown or self.scope not in ("global", "layer"):
            raise PlanError(
                f"controls {self.controls}, scope '{self.scope}'; write some of {CONTROLS}, and global or layer"
            )

    def sparsity(self, number: int) -> float:
        """The sparsity after `number` rounds."""
        return 1 - (1 - self.fraction) ** number


@torch.inference_mode(False)
@torch.enable_grad()
def iterative(
    task: Task,
    folder: str | Path,
    plan: Rounds | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Find tickets and train their controls. Returns {"plan": ..., "rows": [...], "summary": [...]}.

    A row is one training: seed, round, sparsity, kind ('ticket', 'random', 'reinit') and score; round 0 is the dense net. The
    random control keeps as many weights of every layer as the ticket, at random places; the re-initialized one has the ticket's
    mask and other initial weights. A killed run goes on after the last finished training. Raises PlanError, OutputError. task: an
    object with `steps`, make(seed), train(model, hold, start, stop, seed) and score(model). folder: where all of it is kept.
    plan: None for Rounds(). progress: called with (done, total) trainings.

    Example:

        >>> import torch, secateurs as sc
        >>> class Task:
        ...     steps = 4
        ...     def make(self, seed):
        ...         torch.manual_seed(seed)
        ...         return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        ...     def train(self, model, hold, start, stop, seed):
        ...         optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        ...         hold(optimizer)
        ...         for step in range(start, stop):
        ...             optimizer.zero_grad()
        ...             model(torch.ones(4, 8)).square().mean().backward()
        ...             optimizer.step()
        ...     def score(self, model):
        ...         return -float(model(torch.ones(4, 8)).square().mean())
        >>> found = sc.train.iterative(Task(), "tickets", sc.train.Rounds(rounds=1, fraction=0.5, seeds=(0,)))
        >>> [(row["kind"], row["sparsity"]) for row in found["rows"]]
        [('ticket', 0.0), ('ticket', 0.5), ('random', 0.5), ('reinit', 0.5)]
    """
    plan, folder = plan or Rounds(), Path(folder)
    if isinstance(plan.rewind, int) and not 0 <= plan.rewind < task.steps:
        raise PlanError(f"rewind to step {plan.rewind} of a training of {task.steps} steps; give one before its end")
    stated = json.loads(json.dumps({**asdict(plan), "steps": task.steps}))
    claim(folder, stated)
    with locked(folder), own_numbers():
        run = _Run(task, folder, plan, progress)
        for seed in plan.seeds:
            run.seed(seed)
        found = {"plan": stated, "rows": run.rows, "summary": summary(run.rows)}
        write_json(folder / "results.json", found)
        draw(found, folder / "ticket.svg")
    return found


class _Run:
    def __init__(self, task: Task, folder: Path, plan: Rounds, progress: Callable[[int, int], None]) -> None:
        self.task, self.folder, self.plan, self.progress = task, folder, plan, progress
        results = folder / "results.json"
        self.rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results.is_file() else []
        self.total = len(plan.seeds) * (1 + plan.rounds * (1 + len(plan.controls)))

    def seed(self, seed: int) -> None:
        """All rounds of one seed."""
        task, plan = self.task, self.plan
        begin = plan.rewind if isinstance(plan.rewind, int) else 0
        initial = self._kept(f"initial-{seed}", lambda: _weights(task.make(seed)))
        rewind = self._kept(f"rewind-{seed}", lambda: self._trained(initial, {}, 0, begin, seed)) if begin else initial
        masks: dict[str, Tensor] = {}
        weights = rewind
        for number in range(plan.rounds + 1):
            if number:
                masks = self._kept(f"mask-{seed}-{number}", partial(self._tightened, weights, masks, number))
            # 'rate' keeps the trained weights, and only the learning rate starts over
            start = weights if plan.rewind == "rate" and number else rewind
            weights = self._row(seed, number, "ticket", start, masks, begin, seed)
            for control in plan.controls if number else ():
                if control == "random":
                    self._row(seed, number, control, rewind, _shuffled(masks, seed * _ELSE + number), begin, seed)
                else:
                    other = seed + _ELSE
                    self._row(seed, number, control, _weights(task.make(other)), masks, 0, seed)

    def _row(
        self,
        seed: int,
        number: int,
        kind: str,
        start: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        begin: int,
        order: int,
    ) -> dict[str, Tensor]:
        """Train once, unless results.json has it. Returns the trained weights; of a control that was trained earlier, {}."""
        file = f"trained-{seed}-{number}"
        known = any((r["seed"], r["round"], r["kind"]) == (seed, number, kind) for r in self.rows)
        if known:
            return _read(self.folder / f"{file}.safetensors") if kind == "ticket" else {}
        trained = self._trained(start, masks, begin, self.task.steps, order)
        model = self._loaded(trained)
        if kind == "ticket":
            write_tensors(self.folder / f"{file}.safetensors", trained)
        kept = sum(int(mask.sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        self.rows.append({
            "seed": seed, "round": number, "kind": kind, "sparsity": 1 - kept / total if total else 0.0,
            "score": self.task.score(model),
        })  # fmt: skip
        write_json(self.folder / "results.json", {"rows": self.rows})
        self.progress(len(self.rows), self.total)
        return trained

    def _trained(
        self, start: Mapping[str, Tensor], masks: Mapping[str, Tensor], begin: int, stop: int, seed: int
    ) -> dict[str, Tensor]:
        model = self._loaded(start)
        for name, mask in masks.items():
            weight = model.get_parameter(name).data
            weight.masked_fill_(~mask.to(weight.device), 0)
        torch.manual_seed(seed)
        self.task.train(model, lambda optimizer: hold(model, optimizer, masks), begin, stop, seed)
        for name, mask in masks.items():
            if bool((model.get_parameter(name).detach()[~mask] != 0).any()):
                raise PlanError(f"{name} has weights where the mask has none: train() did not call hold(optimizer)")
        return _weights(model)

    def _loaded(self, weights: Mapping[str, Tensor]) -> nn.Module:
        model = self.task.make(self.plan.seeds[0])
        model.load_state_dict(dict(weights))
        return model

    def _tightened(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """The next round's masks: the largest of the trained weights that the last masks kept."""
        model = self._loaded(weights)
        # on the CPU, where the masks are that were read from files
        sizes = {n: p.detach().abs().cpu() for n, p in chosen(model, self.plan.skip).items()}
        sizes = {n: s.masked_fill(~masks[n], -torch.inf) if n in masks else s for n, s in sizes.items()}
        sparsity = self.plan.sparsity(number)
        if self.plan.scope == "layer":
            return {n: largest({n: s}, sparsity)[n] for n, s in sizes.items()}
        # tensors in a file must not share memory
        return {n: mask.clone() for n, mask in largest(sizes, sparsity).items()}

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a file, which is made if it is not there."""
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            write_tensors(file, make())
        return _read(file)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each round and kind: mean, lowest and highest score over seeds."""
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["round"], row["kind"]), []).append(row)
    return [
        {
            "round": number, "kind": kind, "sparsity": mean(r["sparsity"] for r in group), "mean": mean(r["score"] for r in group),
            "low": min(r["score"] for r in group), "high": max(r["score"] for r in group), "seeds": len(group),
        }
        for (number, kind), group in sorted(found.items())
    ]  # fmt: skip


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draw scores over the share of weights left, a line for each kind, the range over seeds shaded.

    Draws nothing if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return
    # pyplot would take over the caller's backend and figures
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dense = next(r for r in found["summary"] if r["round"] == 0)
    axes.axhspan(dense["low"], dense["high"], color="#999999", alpha=0.25)
    axes.axhline(dense["mean"], color="#666666", linestyle="dashed", label="dense")
    looks = {"ticket": ("#0072B2", "o"), "random": ("#E69F00", "s"), "reinit": ("#D55E00", "^")}
    names = {"ticket": "ticket", "random": "random mask", "reinit": "the ticket's mask, other weights"}
    for kind, (colour, marker) in looks.items():
        points = [r for r in found["summary"] if r["kind"] == kind and r["round"]]
        if points:
            x = [1 - r["sparsity"] for r in points]
            axes.plot(x, [r["mean"] for r in points], color=colour, marker=marker, label=names[kind])
            axes.fill_between(x, [r["low"] for r in points], [r["high"] for r in points], color=colour, alpha=0.2)
    axes.set(xlabel="weights left", ylabel="score", xscale="log")
    shown = [1 - r["sparsity"] for r in found["summary"] if r["kind"] == "ticket" and r["round"]][::2]
    axes.set_xticks(shown, [f"{x:.0%}" if x >= 0.1 else f"{x:.1%}" for x in shown])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.set_title(f"Range over {dense['seeds']} seeds shaded", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    # the same numbers give the same bytes
    with rc_context({"svg.hashsalt": "secateurs"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _shuffled(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks that keep as many weights of every layer, at random places."""
    generator = torch.Generator().manual_seed(seed)
    return {n: m.flatten()[torch.randperm(m.numel(), generator=generator)].reshape(m.shape) for n, m in masks.items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(file)
    return found
