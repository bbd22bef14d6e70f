"""The loss that recover trains on, and its gradients, for one window of text at a time.

    loss = kl t^2 KL(teacher || model, both at temperature t) + hidden mean_blocks |h - d|^2 / |d|^2 + labels cross entropy

Hinton et al. 2015 (arXiv 1503.02531); SquareHead, Kurtic et al. 2023 (arXiv 2310.06927).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.model.batches import Batch
from secateurs.model.blocks import leave
from secateurs.model.checkpoint import Checkpoint
from secateurs.prune.tune_model import cross_entropy, divergence, square_head
from secateurs.prune.tuning import loss_scale, unscaled
from secateurs.train.recover_plan import RecoverPlan

Place = tuple[int, int]
"""A batch, and a window of it."""


class Teacher:
    """The dense model, asked what it makes of a window.

    ends: the hidden states that left its last block, by batch; only its head is run then. None: the whole model is loaded and run.
    """

    def __init__(self, model: Any, source: Checkpoint, ends: Callable[[int], Tensor] | None) -> None:
        self.model, self.source, self.ends = model, source, ends

    @torch.no_grad()
    def output(self, place: Place, window: Batch) -> Any:
        """logits, and hidden_states where the whole model is run."""
        if self.ends is None:
            return self.model(**window, use_cache=False, output_hidden_states=True)
        batch, i = place
        return leave(self.model, self.source, self.ends(batch)[i : i + 1], window)


class Objective:
    """The plan's loss of a model. Without a teacher the plan weighs the text alone.

    answers: of every batch, the tokens that count [B, S]: what predicts them and the hidden states there; None for all.
    """

    def __init__(
        self,
        plan: RecoverPlan,
        model: Any,
        teacher: Teacher | None,
        batches: Sequence[Batch],
        answers: Sequence[Tensor] | None = None,
    ) -> None:
        self.answers = answers
        self.plan, self.model, self.teacher, self.batches = plan, model, teacher, batches
        self.places: list[Place] = [(b, i) for b, batch in enumerate(batches) for i in range(len(batch["input_ids"]))]

    def loss(self, place: Place) -> float:
        return self._taken(place)[0]

    def gradients(self, place: Place, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
        """Of the loss by each parameter; None for one that it does not depend on."""
        _, seen, by_seen = self._taken(place)
        scale = loss_scale(seen[0].dtype, seen[0][..., 0].numel())
        return unscaled(torch.autograd.grad(seen, parameters, by_seen, allow_unused=True), scale)

    def _taken(self, place: Place) -> tuple[float, list[Tensor], list[Tensor]]:
        """The loss, the model's outputs that it was taken of, and its gradients by them."""
        plan, (batch, i) = self.plan, place
        window = {name: value[i : i + 1] for name, value in self.batches[batch].items()}
        output = self.model(**window, use_cache=False, output_hidden_states=plan.hidden > 0)
        scale = loss_scale(output.logits.dtype, output.logits[..., 0].numel())
        by_logits = torch.zeros_like(output.logits)
        total = 0.0
        seen, gradients = [output.logits], [by_logits]
        wanted = self.teacher.output(place, window) if self.teacher else None
        counted = self._counted(place)
        if wanted is not None and plan.kl:
            value, gradient = divergence(output.logits[:, counted], wanted.logits[:, counted], plan.temperature, scale)
            total += plan.kl * value
            by_logits[:, counted] += plan.kl * gradient
        if plan.labels:
            value, gradient = cross_entropy(output.logits, window["input_ids"], scale, counted)
            total += plan.labels * value
            by_logits += plan.labels * gradient
        if wanted is not None and plan.hidden:
            mine, theirs = ([h[:, counted] for h in found.hidden_states[1:]] for found in (output, wanted))
            value, more = square_head(mine, theirs, scale)
            total += plan.hidden * value
            seen += output.hidden_states[1:]
            for h, g in zip(output.hidden_states[1:], more, strict=True):
                gradients.append(torch.zeros_like(h))
                gradients[-1][:, counted] = plan.hidden * g
        wanting = [(s, g) for s, g in zip(seen, gradients, strict=True) if s.requires_grad]
        return total, [s for s, _ in wanting], [g for _, g in wanting]

    def _counted(self, place: Place) -> Tensor | slice:
        """The positions of a window that the loss counts: those before the tokens that do."""
        if self.answers is None:
            return slice(None)
        batch, i = place
        return self.answers[batch][i, 1:].nonzero()[:, 0]
