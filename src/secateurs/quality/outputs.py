"""What pruning cost a model that is no causal language model: its outputs beside the dense model's, on the same inputs.

    an encoder-decoder's next tokens   perplexity, KL, top-1 agreement, as compare.py has them
    classes                            KL and top-1 agreement of the distributions: of an input, its tokens or its pixels
    embeddings                         cosine with the dense model's, and whether an input's nearest neighbour is the same
    other outputs                      relative error: the root of |pruned - dense|^2 / |dense|^2, mean over an output's tensors

Each is an Estimate over inputs. N inputs of a batch, S positions, C classes, D width.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError
from secateurs.base.estimate import Estimate, ratio_of, score_of
from secateurs.base.processes import ALONE, Ranks
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader
from secateurs.model.checkpoint import Checkpoint
from secateurs.quality import compare
from secateurs.quality.compare import Quality, Window
from secateurs.quality.kinds import Kind

# inputs whose hidden states are in memory together
_TOGETHER = 64


@dataclass(frozen=True)
class Subject:
    """What is measured. pooling: as model/sentences.py says, () for the model's own. pictured: the token for an image."""

    kind: Kind
    pooling: tuple[str, ...] = ()
    pictured: int | None = None
    unit: str = "windows"

    @property
    def alone(self) -> bool:
        """True if each input is run by itself, since its outputs cannot be told from those of others."""
        return self.kind.predicts == "outputs" or self.kind.prompted


def measure(
    dense: tuple[nn.Module, Loader],
    pruned: tuple[nn.Module, Loader] | None,
    batches: Sequence[Batch],
    subject: Subject,
    tick: Callable[[], None] = lambda: None,
    keep: Callable[[list[Any]], None] = lambda found: None,
    ranks: Ranks = ALONE,
) -> list[Any]:
    """What READERS gives for each input. Memory holds one block of each model and the hidden states of about 64 inputs.

    tick: called for every batch, block and model, and once for every batch at the end. keep: called now and then with what there is
    so far. ranks: those that share the batches. Raises CalibrationError for outputs that are not of the subject's kind.
    """
    read = READERS[subject.kind.predicts]
    models = [dense] if pruned is None else [dense, pruned]
    found: list[Any] = []
    for group in _groups(batches):
        mine = ranks.share(group)
        runs = [compare.outputs_of(model, mine, tick) for model in models]
        here = []
        for i, batch in enumerate(mine):
            here.append(read([output(i) for output in runs], batch, subject))
            tick()
        for model, loader in models:
            loader.release(model)
        found += itertools.chain.from_iterable(ranks.merged(here))
        keep(found)
    return found


def as_json(found: Sequence[Any], subject: Subject) -> list[Any]:
    """What measure() found, to be written."""
    if subject.kind.predicts == "embeddings":
        return [[row.tolist() for row in pair] for pair in found]
    return [dataclasses.asdict(x) if isinstance(x, Window) else x for x in found]


def from_json(data: Sequence[Any], subject: Subject) -> list[Any]:
    """What as_json() gave, as measure() found it."""
    if subject.kind.predicts == "embeddings":
        return [tuple(torch.tensor(row, dtype=torch.float64) for row in pair) for pair in data]
    return list(data) if subject.kind.predicts == "outputs" else [Window(**x) for x in data]


def _groups(batches: Sequence[Batch]) -> list[list[Batch]]:
    groups: list[list[Batch]] = []
    room = 0
    for batch in batches:
        rows = len(next(iter(batch.values())))
        if rows > room:
            groups.append([])
            room = _TOGETHER
        groups[-1].append(batch)
        room -= rows
    return groups


# ------------------------------------------------------------------------------------------- from outputs to one input's


def _next_tokens(outputs: Sequence[Any], batch: Batch, subject: Subject) -> list[Window]:
    """Of an encoder-decoder: position i of its decoder predicts what the decoder reads at i + 1. With images: those of text."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    logits = [_logits(output, subject.kind) for output in outputs]
    if ids is None or logits[0].shape[:2] != ids.shape:
        raise CalibrationError(f"{subject.kind.name} gives logits {list(logits[0].shape)}, not one row for each token")
    found = []
    for n, row in enumerate(ids):
        counted = row[1:] != (-1 if subject.pictured is None else subject.pictured)
        found.append(compare.compare(row[1:][counted], [x[n, :-1][counted] for x in logits]))
    return found


def _classes(outputs: Sequence[Any], batch: Batch, subject: Subject) -> list[Window]:
    """Distributions over the last axis; over axis 1 of an image's classes by pixel. Padding is left out."""
    rows = [_rows(output, batch, subject.kind) for output in outputs]
    # no label is known, so its likelihood says nothing
    return [
        compare.compare(torch.zeros(len(given[0]), dtype=torch.long), list(given)) for given in zip(*rows, strict=True)
    ]


def _rows(output: Any, batch: Batch, kind: Kind) -> list[Tensor]:
    """Logits [T, C] of every input."""
    start, end = (getattr(output, name, None) for name in ("start_logits", "end_logits"))
    if start is not None and end is not None:
        return list(torch.stack([start, end], 1))
    logits = _logits(output, kind)
    if logits.dim() == 2:
        return list(logits[:, None])
    if logits.dim() == 4:
        return list(logits.permute(0, 2, 3, 1).flatten(1, 2))
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return list(logits)
    return [rows[kept.bool()] for rows, kept in zip(logits, mask, strict=True)]


def _logits(output: Any, kind: Kind) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise CalibrationError(f"{kind.name} gives no logits, so its predictions cannot be compared")
    return logits


def _embeddings(outputs: Sequence[Any], batch: Batch, subject: Subject) -> list[tuple[Tensor, ...]]:
    """The embedding of every input by each model, of length 1."""
    found = [embedding(output, batch.get("attention_mask"), subject) for output in outputs]
    return list(zip(*found, strict=True))


def subject_of(kind: Kind, source: Checkpoint | None = None) -> Subject:
    """What is measured of a model that is called with text. source: its folder, if any."""
    return Subject(kind, source.sentences.pooling if source and source.sentences else ())


def embedder(subject: Subject) -> Callable[[Any, Batch], Tensor] | None:
    """A function from a model's output for a batch to its embeddings, as embedding() makes them; None if it gives none."""
    if subject.kind.predicts != "embeddings":
        return None
    return lambda output, batch: embedding(output, batch.get("attention_mask"), subject)


def embedding(output: Any, mask_NS: Tensor | None, subject: Subject) -> Tensor:
    """[N, D] of length 1: as sentence-transformers pools it where the folder says how; else a contrastive model's embeddings of
    image and text side by side; else pooler_output; else the mean of the last hidden states.
    """
    parts = [getattr(output, name, None) for name in ("image_embeds", "text_embeds")]
    there = [F.normalize(part.double(), dim=-1) for part in parts if isinstance(part, Tensor) and part.dim() == 2]
    if not there:
        hidden = getattr(output, "last_hidden_state", None)
        pooler = getattr(output, "pooler_output", None)
        if not subject.pooling and isinstance(pooler, Tensor):
            there = [pooler.double().flatten(1)]
        elif isinstance(hidden, Tensor) and hidden.dim() >= 3:
            # of an image [N, D, H, W]
            hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
            if mask_NS is None or mask_NS.shape != hidden.shape[:2]:
                mask_NS = torch.ones(hidden.shape[:2], device=hidden.device)
            there = [POOLINGS[way](hidden.double(), mask_NS.double()) for way in subject.pooling or ("mean",)]
        else:
            raise CalibrationError(f"{subject.kind.name} gives neither hidden states nor an embedding to compare")
    return F.normalize(torch.cat(there, -1), dim=-1)


def _mean(hidden_NSD: Tensor, mask_NS: Tensor) -> Tensor:
    return (hidden_NSD * mask_NS[:, :, None]).sum(1) / mask_NS.sum(1, keepdim=True).clamp(min=1)


def _last(hidden_NSD: Tensor, mask_NS: Tensor) -> Tensor:
    # padding may be on either side
    places = torch.arange(1, mask_NS.shape[1] + 1, device=mask_NS.device)
    return hidden_NSD[torch.arange(len(hidden_NSD)), (mask_NS * places).argmax(1)]


def _largest(hidden_NSD: Tensor, mask_NS: Tensor) -> Tensor:
    return hidden_NSD.masked_fill(mask_NS[:, :, None] == 0, -torch.inf).amax(1)


def _weighted(hidden_NSD: Tensor, mask_NS: Tensor) -> Tensor:
    return _mean(hidden_NSD, mask_NS * torch.arange(1, mask_NS.shape[1] + 1, device=mask_NS.device))


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": lambda hidden_NSD, mask_NS: hidden_NSD[:, 0],
    "mean": _mean,
    # it has another length and the same direction
    "mean_sqrt_len": _mean,
    "max": _largest,
    "lasttoken": _last,
    "weightedmean": _weighted,
}
"""sentence-transformers' ways to make an embedding of hidden states and their mask."""


Squares = dict[str, tuple[float, float]]
"""Of each tensor of an output |pruned - dense|^2 and |dense|^2."""


def _other(outputs: Sequence[Any], batch: Batch, subject: Subject) -> list[Squares]:
    """The tensors that an output holds; hidden states count where there is nothing else."""
    dense, pruned = (_leaves(output) for output in outputs)
    wanted = [name for name in dense if "hidden" not in name] or list(dense)
    if not wanted:
        raise CalibrationError(f"{subject.kind.name} gives no numbers to compare")
    return [{n: (float((pruned[n] - dense[n]).square().sum()), float(dense[n].square().sum())) for n in wanted}]


def _leaves(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors of an output by their place in it."""
    found: dict[str, Tensor] = {}

    def look(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found[name] = value.double()
        elif hasattr(value, "items"):
            for key, inside in value.items():
                if key not in ("past_key_values", "loss"):
                    look(inside, f"{name}.{key}")
        elif isinstance(value, list | tuple):
            for i, inside in enumerate(value):
                look(inside, f"{name}.{i}")

    look(output, "")
    return found


READERS: dict[str, Callable[[Sequence[Any], Batch, Subject], list[Any]]] = {
    "next token": _next_tokens,
    "classes": _classes,
    "embeddings": _embeddings,
    "outputs": _other,
}
"""What is kept of one batch's outputs, by what a model predicts: one entry for each input."""


# -------------------------------------------------------------------------------------------------------------- summaries


def summarise(found: Sequence[Any], subject: Subject, seed: int = 0) -> Quality:
    """Estimates over inputs of what measure() found."""
    unit, n = subject.unit, len(found)
    ones = np.ones(n)
    if subject.kind.predicts == "embeddings":
        dense, pruned = (torch.stack(list(rows)) for rows in zip(*found, strict=True))
        cosines = (dense * pruned).sum(-1).numpy()
        same = None if n < 3 else score_of((_nearest(dense) == _nearest(pruned)).double().numpy(), 0.0, 1.0, seed)
        return Quality(n, 0, unit=unit, cosine=ratio_of(cosines, ones).within(-1.0, 1.0), neighbours=same)
    if subject.kind.predicts == "outputs":
        # errors of each tensor in units of its mean square over the inputs, so that large ones do not hide small ones
        sizes = {name: sum(squares[name][1] for squares in found) / n for name in found[0]}
        errors = [np.mean([s[name][0] / sizes[name] for name in sizes if sizes[name]]) for s in found]
        square = ratio_of(np.array(errors), ones).within(0.0, float("inf"))
        value, low, high = (math.sqrt(end) for end in (square.value, square.low, square.high))
        return Quality(n, 0, unit=unit, error=Estimate(value, low, high, n))
    if subject.kind.predicts == "next token":
        return compare.summarise(found, unit)
    tokens = np.array([w.tokens for w in found], dtype=np.float64)
    kl, agree = (np.array([getattr(w, name) for w in found], dtype=np.float64) for name in ("kl", "agree"))
    # one answer an input is right or wrong
    same = score_of(agree, 0.0, 1.0, seed) if (tokens == 1).all() else ratio_of(agree, tokens).within(0.0, 1.0)
    return Quality(
        n, int(tokens.sum()), unit=unit, kl=ratio_of(kl, tokens).within(0.0, float("inf")), agree=same
    )  # fmt: skip


def distance(found: Sequence[Any], subject: Subject) -> float:
    """How far a model is from the dense one, by what measure() found: the KL in nats, 1 - cosine, or the squared relative error."""
    quality = summarise(found, subject)
    if quality.cosine is not None:
        return 1.0 - quality.cosine.value
    if quality.error is not None:
        return quality.error.value**2
    assert quality.kl is not None
    return quality.kl.value


def _nearest(rows_ND: Tensor) -> Tensor:
    """The other row that is nearest by cosine, of rows of length 1; the first of equal ones."""
    return (rows_ND @ rows_ND.T).fill_diagonal_(-torch.inf).argmax(1)
