"""What a live module gives, and what it is judged by: the distance of its outputs to the dense module's, or a user's loss.

Outputs are tensors, or lists, tuples, dicts and dataclasses of them. N examples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateurs.base.errors import PlanError
from secateurs.model.batches import placed

# from so many examples on, some are held out
_PARTED = 16

Inputs = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Any], Tensor]
"""(module, batch) -> a scalar: the mean of a loss over the batch's examples."""


def tensors_of(out: Any) -> list[Tensor]:
    """All tensors in what a module gives, in order."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(out):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_of([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


@contextmanager
def only_tensors(model: nn.Module) -> Iterator[None]:
    """Let a module give the list of its outputs' tensors: torch.export does not know every class of outputs."""
    forward, own = model.forward, model.__dict__.get("forward")

    # the exporter reads the signature
    @functools.wraps(forward)
    def flat(*args: Any, **kwargs: Any) -> list[Tensor]:
        return tensors_of(forward(*args, **kwargs))

    model.forward = flat
    try:
        yield
    finally:
        # without one of its own, the class's is found again
        del model.__dict__["forward"]
        if own is not None:
            model.forward = own


class Objective:
    """The calibration inputs and what the module is judged by on them.

    batches: the module's inputs. given: the batches as the user gave them, for the loss. loss: None for the outputs' distance.
    """

    def __init__(self, batches: Sequence[Inputs], given: Sequence[Any], loss: Loss | None) -> None:
        self.batches, self.given, self.loss = list(batches), list(given), loss

    @classmethod
    def of(
        cls,
        given: Sequence[Any],
        inputs: Callable[[Any], Sequence[Tensor]] | None,
        loss: Loss | None,
        device: torch.device,
    ) -> "Objective":
        """Of batches as the user gave them. inputs: what the module takes of one. Raises PlanError for what is no batch."""
        if not given:
            raise PlanError("no calibration inputs were given")
        given = [pytree.tree_map(lambda x: placed(x, device) if isinstance(x, Tensor) else x, batch) for batch in given]
        taken = [batch if inputs is None else inputs(batch) for batch in given]
        odd = next((type(b).__name__ for b in taken if not isinstance(b, tuple | list)), None)
        if odd:
            raise PlanError(
                f"calibration inputs are tuples of positional arguments, and one is a {odd}; write (x,) for x"
            )
        strange = next((type(x).__name__ for b in taken for x in b if not isinstance(x, Tensor)), None)
        if strange:
            raise PlanError(
                f"calibration inputs are tuples of tensors, and one holds a {strange}; say with inputs= what the module takes"
            )
        return cls([tuple(batch) for batch in taken], given, loss)

    @property
    def examples(self) -> int:
        return sum(len(batch[0]) for batch in self.batches)

    def parted(self) -> tuple["Objective", "Objective | None"]:
        """What is used, and an eighth that is held out: whole batches for a user's loss. None of fewer than 16 examples."""
        if self.loss is not None:
            many = len(self.given) // 8 or int(len(self.given) >= 4)
            if not many or self.examples < _PARTED:
                return self, None
            cut = len(self.given) - many
            first, last = (Objective(self.batches[s], self.given[s], self.loss) for s in (slice(cut), slice(cut, None)))
            return first, last
        if self.examples < _PARTED:
            return self, None
        wanted, kept, held = self.examples // 8, [], []
        for batch in reversed(self.batches):
            many = min(wanted, len(batch[0]))
            wanted -= many
            if many:
                held.append(tuple(x[len(x) - many :] for x in batch))
            if many < len(batch[0]):
                kept.append(tuple(x[: len(x) - many] for x in batch))
        return Objective(kept[::-1], kept[::-1], None), Objective(held, held, None)

    def summed(self, model: nn.Module, number: int, generator: torch.Generator) -> Tensor:
        """The loss of a batch, summed over its examples, whose gradients by outputs make up the Fisher information.

        Without a user's loss: -log of a sampled class where outputs are [N, classes], else the outputs times Gaussian noise, over
        their root mean square. Raises PlanError where there is nothing to take gradients of.
        """
        batch = self.batches[number]
        if self.loss is not None:
            return self._users(model, number) * len(batch[0])
        out = model(*batch)
        found = [x for x in tensors_of(out) if x.requires_grad]
        if not found:
            raise PlanError(f"{type(model).__name__} gives a {type(out).__name__} without a tensor of floats")
        total: Tensor = sum((_sampled(x, generator) for x in found), torch.zeros((), device=found[0].device))
        return total

    def _users(self, model: nn.Module, number: int) -> Tensor:
        assert self.loss is not None
        value = self.loss(model, self.given[number])
        what = f"{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PlanError(
                f"loss(model, batch) gives {what}; it must give a scalar, the mean over the batch's examples"
            )
        if torch.is_grad_enabled() and not value.requires_grad:
            raise PlanError(
                "loss(model, batch) gives a number without a gradient; compute it from the module's outputs"
            )
        if not bool(value.detach().isfinite()):
            raise PlanError(f"loss(model, batch) gives {float(value.detach())} for batch {number}")
        return value.reshape(())

    @torch.no_grad()
    def error(self, model: nn.Module, dense: nn.Module) -> float:
        """The mean over batches, by their examples: of the user's loss, or of the outputs' distance to the dense module's."""
        total = 0.0
        for number, batch in enumerate(self.batches):
            value = distance(model(*batch), dense(*batch)) if self.loss is None else self._users(model, number)
            total += float(value) * len(batch[0])
        return total / self.examples


def distance(out: Any, wanted: Any) -> Tensor:
    """How far outputs are from the ones that are wanted, summed over their tensors of floats.

    [N, classes]: KL(softmax wanted || softmax out), nats an example. Others: |out - wanted|^2 / |wanted|^2.
    """
    parts = []
    for a, b in zip(tensors_of(out), tensors_of(wanted), strict=True):
        if b.is_floating_point():
            a, b = a.float(), b.detach().float()
            if _classes(b):
                log_a, log_b = a.log_softmax(1), b.log_softmax(1)
                parts.append((log_b.exp() * (log_b - log_a)).sum(1).mean())
            else:
                parts.append((a - b).square().sum() / b.square().sum().clamp(min=1e-12))
    if not parts:
        raise PlanError(f"a {type(out).__name__} without a tensor of floats has no distance to another; give a loss")
    return torch.stack(parts).sum()


def _classes(out: Tensor) -> bool:
    return out.dim() == 2 and out.shape[1] > 1


def _sampled(out: Tensor, generator: torch.Generator) -> Tensor:
    if _classes(out):
        chance = out.detach().float().softmax(1)
        # drawn on the CPU, where the generator is
        label_N = torch.multinomial(chance.cpu(), 1, generator=generator).to(out.device)
        return -out.float().log_softmax(1).gather(1, label_N).sum()
    noise = torch.randn(out.shape, generator=generator).to(out.device)
    return (out.float() * noise).sum() / out.detach().float().square().mean().sqrt().clamp(min=1e-12)
