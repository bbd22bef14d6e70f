"""Tunes the survivors of all blocks together against the dense model's predictions: masks frozen.

The loss is the mean over tokens of KL(dense || pruned) of the next-token distributions (Hinton et al. 2015, arXiv 1503.02531,
at temperature 1). Embeddings, the last norm and the head are not tuned. The dense logits are the dense head on what left the last
dense block: that is kept, and the dense blocks are not. Memory holds the whole pruned
model, and for every weight that moves 12 bytes of Adam's, 4 of gradients and a copy of the best. T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from secateurs.base.processes import ALONE, Ranks
from secateurs.model.activations import Activations, note_place, read_place
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader, blocks_of, leave, whole
from secateurs.model.walk import stream
from secateurs.prune.tuning import Memory, Moving, Outcome, loss_scale, tune, unscaled

# Adam's rate, times the size of each tensor's survivors (docs/log.md)
RATE = 4e-3
# the same in units of a grid's steps, where weights are on one (docs/log.md)
GRID_RATE = 16e-3
# logits compared at a time
_ROWS = 128


def dense_ends(
    model: nn.Module,
    batches: Sequence[Batch],
    loader: Loader,
    store: Activations,
    tick: Callable[[], None],
    place: Path | None = None,
    ranks: Ranks = ALONE,
) -> Callable[[int], Tensor]:
    """Walk a dense model and keep the outputs of its last block; returns a function of the batch that reads them.

    batches: this rank's.

    place: a file that says which block is next, beside a store on disk, so that a killed walk goes on. One tick a batch and block,
    unless all of them are known.
    """
    count = len(blocks_of(model)[0])
    start = ranks.tell(read_place(place))
    if start < count:
        for _ in range(start * len(batches)):
            tick()
        for step in stream(model, batches, loader, store, start, keep_last=True, tick=tick):
            note_place(place, step.index, ranks)
        note_place(place, count, ranks)
    return lambda batch: store.read(count, batch)


def distill(
    model: nn.Module,
    moving: Sequence[Moving],
    head: tuple[nn.Module, Loader],
    ends: Callable[[int], Tensor],
    batches: Sequence[Batch],
    steps: int,
    rate: float | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    memory: Memory | None = None,
    ranks: Ranks = ALONE,
) -> Outcome | None:
    """Tune a whole model in place; None if it gives no logits. moving: of its blocks only (tuning.movable()).

    head: a model with the same embeddings and head, and their loader, for the dense logits; `model` itself will do. ends:
    dense_ends(). Losses are in nats a token. rate: None for RATE, or GRID_RATE. batches: of all ranks; ends is
    called for a rank's own.
    """
    trained = [m.parameter for m in moving]
    places = [(b, i) for b, batch in enumerate(batches) for i in range(len(next(iter(batch.values()))))]

    def logits(place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        b, i = place
        window = {name: value[i : i + 1] for name, value in batches[b].items()}
        with torch.no_grad():
            dense = leave(*head, ends(ranks.local(b))[i : i + 1], window).logits
        found: Tensor = whole(model, window).logits
        return found, dense

    def loss(place: tuple[int, int]) -> float:
        return divergence(*logits(place))[0]

    def gradients(place: tuple[int, int]) -> Sequence[Tensor | None]:
        found, dense = logits(place)
        scale = loss_scale(found.dtype, found[..., 0].numel())
        _, by_logits = divergence(found, dense, scale=scale)
        return unscaled(torch.autograd.grad(found, trained, by_logits, allow_unused=True), scale)

    # nothing moves before this is known
    with torch.no_grad():
        if getattr(whole(model, {name: value[:1] for name, value in batches[0].items()}), "logits", None) is None:
            return None
    rate = rate or (GRID_RATE if any(m.on_grid for m in moving) else RATE)
    return tune(
        moving,
        loss,
        gradients,
        places,
        steps,
        rate,
        seed,
        tick,
        memory,
        ranks=ranks,
        owner=lambda place: ranks.owner(place[0]),
    )


def divergence(logits: Tensor, dense: Tensor, temperature: float = 1.0, scale: float = 1.0) -> tuple[float, Tensor]:
    """t^2 KL(dense || logits) of chances at temperature t, mean over tokens, and its gradient by the logits, t (p - q) / T with
    q the dense chances, times `scale`.
    """
    rows_TV, dense_TV = (x.detach().reshape(-1, x.shape[-1]) for x in (logits, dense))
    total = 0.0
    by_logits_TV = torch.empty_like(rows_TV)
    for start in range(0, len(rows_TV), _ROWS):
        part = slice(start, start + _ROWS)
        log_p_TV, log_q_TV = ((x[part].float() / temperature).log_softmax(-1) for x in (rows_TV, dense_TV))
        q_TV = log_q_TV.exp()
        total += float(log_q_TV.sub_(log_p_TV).mul_(q_TV).sum())
        by_logits_TV[part] = log_p_TV.exp_().sub_(q_TV).mul_(scale * temperature / len(rows_TV))
    return temperature**2 * total / len(rows_TV), by_logits_TV.reshape(logits.shape)


def cross_entropy(
    logits: Tensor, ids: Tensor, scale: float = 1.0, counted: Tensor | slice = slice(None)
) -> tuple[float, Tensor]:
    """Nats by which the next token of `ids` [N, S] surprises, mean over those predicted, and `scale` times its gradient by the
    logits. counted: the positions whose next token counts, none of them the last.
    """
    labels_T = ids[:, 1:][:, counted].reshape(-1)
    rows_TV = logits.detach()[:, :-1][:, counted].reshape(-1, logits.shape[-1])
    total = 0.0
    by_logits = torch.zeros_like(logits)
    by_rows_TV = torch.empty_like(rows_TV)
    for start in range(0, len(rows_TV), _ROWS):
        part = slice(start, start + _ROWS)
        log_p_TV, wanted = rows_TV[part].float().log_softmax(-1), labels_T[part, None]
        total -= float(log_p_TV.gather(1, wanted).sum())
        p_TV = log_p_TV.exp_()
        by_rows_TV[part] = p_TV.scatter_add_(1, wanted, -torch.ones_like(p_TV[:, :1])).mul_(scale / len(rows_TV))
    part_NSV = by_logits[:, :-1][:, counted]
    by_logits[:, :-1][:, counted] = by_rows_TV.reshape(part_NSV.shape)
    return total / len(rows_TV), by_logits


def square_head(hidden: Sequence[Tensor], dense: Sequence[Tensor], scale: float = 1.0) -> tuple[float, list[Tensor]]:
    """Mean over blocks of |h - d|^2 / |d|^2, h and d what leaves the block and the dense block, and `scale` times its gradients by
    every h (Kurtic et al. 2023, arXiv 2310.06927).
    """
    total, gradients = 0.0, []
    for h, d in zip(hidden, dense, strict=True):
        difference = h.detach().float() - d.float()
        size = d.float().square().sum() * len(hidden)
        total += float(difference.square().sum() / size)
        gradients.append(difference.mul_(2 * scale / size).to(h.dtype))
    return total, gradients
