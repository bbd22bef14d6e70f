"""A short training of a live module that was cut or pruned, with the dense one as teacher.

AdamW with a warm-up and a cosine to 0; an average of the weights is what is kept. Zeros stay zero. A training that was killed
goes on from its file and ends with the same bits.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from secateurs.base.errors import CheckpointError, PlanError, said
from secateurs.base.files import replace
from secateurs.base.progress import Progress, silent
from secateurs.base.seed import own_numbers, seed_of
from secateurs.model.batches import placed
from secateurs.model.blocks import device_of, evaluating
from secateurs.shrink.outputs import Loss, distance
from secateurs.train.held import Held, hold, take_over
from secateurs.train.matrices import prunable

_PRECISIONS = ("no", "bf16", "fp16")
# steps over which the rate rises, of all
_WARM = 20


# tensors that are made in inference mode could not be trained
@torch.inference_mode(False)
def recover_module(
    model: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable[Any],
    steps: int,
    *,
    rate: float = 3e-4,
    loss: Loss | None = None,
    inputs: Callable[[Any], Sequence[Tensor]] | None = None,
    ema: float = 0.999,
    mixed_precision: str = "no",
    file: str | Path | None = None,
    every: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a module in place until `steps` steps are done, towards what its teacher gives, and return what was done.

    model: what shrink_module cut, or any module with zeros. teacher: the dense module, which stays as it is: the loss is the
    distance of outputs (secateurs.shrink.outputs.distance: KL of logits [N, classes], |out - teacher's|^2 / |teacher's|^2 of
    others). loss: loss(module, batch) -> scalar, added to that distance; alone if the teacher is None. loader: gives batches and
    can be iterated again, such as a DataLoader. inputs: inputs(batch) -> the module's arguments; by default a batch is a tuple of
    them. rate: of AdamW at its highest, after 1/20 of the steps.

    ema: the weights at the end are an average over steps, of decay min(ema, (1 + n) / (10 + n)) after n steps; 0: the last ones.
    mixed_precision: no, bf16 or fp16, by accelerate. Zeros of the module's matrices, and masks of torch.nn.utils.prune, are held.
    file: where the state is written every `every` steps; a training of the same settings goes on from there. Modules keep their
    modes. seed: of the order of steps that draw numbers. progress: called with (stage, done, total). Raises PlanError for settings
    that make no sense or a loss that is no number, CheckpointError for a file of another training.

    Example:

        >>> import torch, secateurs as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
        >>> batches = [(torch.randn(32, 8),) for _ in range(4)]
        >>> small, _ = sc.shrink_module(net, batches, budget="params=0.5x")
        >>> told = sc.recover_module(small, net, batches, steps=40, rate=3e-3)
        >>> told["loss"]["last"] < told["loss"]["first"]
        True
    """
    if mixed_precision not in _PRECISIONS:
        raise PlanError(f"mixed_precision '{mixed_precision}'; write {', '.join(_PRECISIONS)}")
    if steps < 1 or not rate > 0 or not 0 <= ema < 1 or every < 1:
        raise PlanError(
            f"steps {steps}, rate {rate:g}, ema {ema:g}, every {every}: give 1 step or more, a rate above 0 and ema in [0, 1)"
        )
    if teacher is None and loss is None:
        raise PlanError("without a teacher there is nothing to train towards; give the dense module, or a loss")
    if teacher is model:
        raise PlanError(
            "the teacher is the module itself; give the dense one, of which shrink_module left you the original"
        )
    settings = {"steps": steps, "rate": rate, "ema": ema, "mixed_precision": mixed_precision, "seed": seed}
    training = _Training(model, teacher, loss, inputs, settings)
    began = time.perf_counter()
    with own_numbers(), _accelerated(mixed_precision, device_of(model)) as accelerator:
        training.run(accelerator, loader, None if file is None else Path(file), every, progress)
    losses = training.losses
    part = max(1, len(losses) // 10)
    return {
        **settings, "held": 0.0 if training.held is None else training.held.sparsity, "begun_at": training.begun_at,
        "loss": {"first": sum(losses[:part]) / part, "last": sum(losses[-part:]) / part},
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


class _Training:
    """A training's state. losses: of every step. begun_at: the step that it went on from."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, loss: Loss | None, inputs: Any, settings: dict[str, Any]
    ) -> None:
        self.model, self.teacher, self.loss, self.inputs, self.settings = model, teacher, loss, inputs, settings
        masks = {**{name: p != 0 for name, p in prunable(model) if _some_zeros(p)}, **take_over(model)}
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise PlanError(
                f"{type(model).__name__} has no parameter that asks for gradients, so nothing can be trained"
            )
        self.optimizer = torch.optim.AdamW(trained, settings["rate"], weight_decay=1e-2)
        named = dict(model.named_parameters())
        masks = {name: mask for name, mask in masks.items() if named[name].requires_grad}
        self.held: Held | None = hold(model, self.optimizer, masks) if masks else None
        self.average = AveragedModel(model, avg_fn=_decaying(settings["ema"]), use_buffers=True)
        self.losses: list[float] = []
        self.begun_at = 0
        # of the loader: passes that are done, and batches of the one under way
        self.place = (0, 0)

    def run(self, accelerator: Any, loader: Iterable[Any], file: Path | None, every: int, progress: Progress) -> None:
        steps, seed = self.settings["steps"], self.settings["seed"]
        if file is not None and file.exists():
            self._read(file, accelerator)
        optimizer = accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        batches = self._batches(loader, seed)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        try:
            while len(self.losses) < steps:
                batch = next(batches)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.settings["rate"] * _share(len(self.losses), steps)
                with accelerator.autocast():
                    value = self._loss(batch)
                if not bool(value.detach().isfinite()):
                    raise PlanError(
                        f"the loss is {float(value.detach())} at step {len(self.losses) + 1}; lower the rate"
                    )
                accelerator.backward(value)
                optimizer.step()
                optimizer.zero_grad()
                self.average.update_parameters(self.model)
                self.losses.append(float(value.detach()))
                done = len(self.losses)
                if file is not None and (done % every == 0 or done == steps):
                    self._write(file, accelerator)
                progress("recovering", done, steps)
        finally:
            for module, mode in modes:
                module.training = mode
            if self.held is not None:
                self.held.release()
        self.model.load_state_dict(self.average.module.state_dict())

    def _loss(self, batch: Any) -> Tensor:
        total: Tensor | None = None
        if self.teacher is not None:
            given = batch if self.inputs is None else self.inputs(batch)
            if not isinstance(given, tuple | list):
                raise PlanError(
                    f"a batch is a {type(given).__name__}, and the module takes a tuple of arguments; say with inputs= which"
                )
            with torch.no_grad(), evaluating(self.teacher):
                wanted = self.teacher(*given)
            total = distance(self.model(*given), wanted)
        if self.loss is not None:
            value = self.loss(self.model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                what = f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise PlanError(f"loss(model, batch) gives {what}; it must give a scalar")
            total = value.reshape(()) if total is None else total + value.reshape(())
        assert total is not None
        return total

    def _batches(self, loader: Iterable[Any], seed: int) -> Iterator[Any]:
        """Batches from where the training is, on the module's device; random numbers are seeded for each pass and each batch."""
        device = device_of(self.model)
        number, skipped = self.place
        while True:
            _seed(seed, f"pass {number}")
            found = iter(loader)
            count = 0
            while True:
                _seed(seed, f"batch {number} {count}")
                batch = next(found, None)
                if batch is None:
                    break
                count += 1
                if count > skipped:
                    self.place = (number, count)
                    yield pytree.tree_map(lambda x: placed(x, device) if isinstance(x, Tensor) else x, batch)
            if not count:
                left = self.settings["steps"] - len(self.losses)
                raise PlanError(
                    f"the loader gave no batch in pass {number + 1}, and {left} steps are left; "
                    "give one that can be iterated again, as a list or a DataLoader"
                )
            number, skipped = number + 1, 0

    def _write(self, file: Path, accelerator: Any) -> None:
        scaler = accelerator.scaler
        state = {
            "settings": self.settings, "losses": self.losses, "place": list(self.place), "model": self.model.state_dict(),
            "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }  # fmt: skip
        replace(file, lambda part: torch.save(state, part))

    def _read(self, file: Path, accelerator: Any) -> None:
        try:
            # nothing in it is executed
            state = torch.load(file, map_location=device_of(self.model), weights_only=True)
            other = {k: (state["settings"][k], v) for k, v in self.settings.items() if state["settings"][k] != v}
        except Exception as error:
            raise CheckpointError(f"{file} holds no training of recover_module: {said(error)}") from None
        if other:
            name, (there, here) = next(iter(other.items()))
            raise CheckpointError(
                f"{file} holds a training with {name} {there}, and this one has {here}; give another file"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} holds a training of another module: {said(error)}") from None
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.losses, self.place = list(state["losses"]), (state["place"][0], state["place"][1])
        self.begun_at = len(self.losses)


@contextmanager
def _accelerated(mixed_precision: str, device: torch.device) -> Iterator[Any]:
    """An Accelerator of a precision. What it shares with others of this process, which may have another, is put aside meanwhile."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    shared: Any = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        yield Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu", device_placement=False)
    finally:
        shared.clear()
        shared.update(before)


def _seed(seed: int, name: str) -> None:
    number = seed_of(seed, name)
    torch.manual_seed(number)
    np.random.seed(number)


def _share(step: int, steps: int) -> float:
    """Of the highest rate, at a step: up in a straight line, then down along a cosine."""
    warm = max(1, steps // _WARM)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * cos(pi * (step - warm) / max(1, steps - warm))


def _decaying(ema: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    def average(averaged: Tensor, now: Tensor, count: Tensor | int) -> Tensor:
        decay = min(ema, (1 + int(count)) / (10 + int(count))) if ema else 0.0
        # counters are not averaged
        return torch.lerp(now, averaged, decay) if now.is_floating_point() else now

    return average


def _some_zeros(p: Tensor) -> bool:
    """True for a matrix with zeros; one without any weight is how added layers begin."""
    return bool((p == 0).any()) and bool((p != 0).any())
