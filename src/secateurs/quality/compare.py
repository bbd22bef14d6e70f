"""What pruning cost: perplexity, KL and top-1 agreement with the dense model on the same tokens, each with an interval.

Windows are not overlapping, so the stride is the window. Position 0 of a window predicts nothing. Both models run in
their own dtype; logits are compared in fp32. V vocabulary, S positions.
"""

import dataclasses
import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.base.errors import CalibrationError, OutputError
from secateurs.base.estimate import Estimate, ratio_of
from secateurs.base.files import writing
from secateurs.base.processes import ALONE, Ranks
from secateurs.model.activations import InMemory, read_more, write_state
from secateurs.model.batches import Batch
from secateurs.model.blocks import Loader, blocks_of, device_of, leave, pieces, whole
from secateurs.model.discover import WHOLE, layout_of
from secateurs.model.walk import stream

# logits compared at a time, in fp32: few enough to stay in a cache, and enough to be worth waking threads
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Window:
    """Sums over the predicted tokens of one window. kl, agree: None for the dense model alone."""

    tokens: int
    nll_dense: float
    nll: float | None = None
    kl: float | None = None
    agree: float | None = None

    def __add__(self, other: "Window") -> "Window":
        """The sums of both, over the same models."""
        sums: dict[str, Any] = {}
        for name, mine in vars(self).items():
            sums[name] = None if mine is None else mine + getattr(other, name)
        return Window(**sums)


@dataclass(frozen=True)
class Quality:
    """Dense and pruned model on the same inputs. ppl_ratio is paired: it is of each window's difference.

    windows: how many inputs, of the kind that `unit` says. tokens: predictions in all; 0 where there are none. What a model of this
    kind does not have is None: cosine, neighbours and error are outputs.py's.
    """

    windows: int
    tokens: int
    ppl_dense: Estimate | None = None
    ppl: Estimate | None = None
    ppl_ratio: Estimate | None = None
    kl: Estimate | None = None
    agree: Estimate | None = None
    cosine: Estimate | None = None
    neighbours: Estimate | None = None
    error: Estimate | None = None
    unit: str = "windows"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def named(quality: dict[str, Any]) -> dict[str, str]:
    """The numbers of Quality.as_dict() in words, in the order in which they are shown."""
    # one prediction an input; or one for each token; or for each pixel, or token that is written about it
    of, what = "a token", "token"
    if quality["tokens"] == quality["windows"]:
        of, what = "an input", "class"
    elif quality.get("unit", "windows") != "windows":
        of, what = "a prediction", "prediction"
    return {
        "ppl_dense": "perplexity, dense",
        "ppl": "perplexity, pruned",
        "ppl_ratio": "perplexity, pruned / dense",
        "kl": f"KL to dense, nats {of}",
        "agree": f"same top {what} as dense",
        "cosine": "cosine with the dense model's embedding",
        "neighbours": "same nearest neighbour as dense",
        "error": "relative error of the outputs",
    }


def measure(
    dense: tuple[nn.Module, Loader],
    pruned: tuple[nn.Module, Loader] | None,
    windows: Tensor,
    done: Sequence[Window] = (),
    tick: Callable[[], None] = lambda: None,
    ends: Path | None = None,
    ranks: Ranks = ALONE,
) -> list[Window]:
    """Sums for each window [N, S] of one or two models, whose logits are compared. Both models are on one device.

    Memory holds one block of each model, the hidden states of all windows and at most 2^26 logits of each. done: windows that
    were measured before; they come first and are not measured again. tick is called for every window, block and model, and once
    for every window at the end. ends: a folder where the last hidden states of this dense model on these windows are kept; they
    are read from there, with the same bits, if they are there. ranks: those that share the windows. Raises CalibrationError if the
    model gives no logits.
    """
    numbers = ranks.share(range(len(done), len(windows)))
    windows = windows.to(device_of(dense[0]))
    todo = [{"input_ids": windows[number][None]} for number in numbers]
    models = [dense] if pruned is None else [dense, pruned]
    files = [ends / f"{number:05d}.safetensors" for number in numbers] if ends else []
    kept = [outputs_of(dense, todo, tick, files)]
    if pruned is not None:
        kept.append(outputs_of(pruned, todo, tick))
    results: list[Window] = []
    for i, batch in enumerate(todo):
        found = []
        for at in pieces(dense[0], batch):
            logits = [predicted(read(i, at))[0] for read in kept]
            found.append(compare(_next(batch, at)[0], logits))
        results.append(functools.reduce(operator.add, found))
        tick()
    for model, loader in models:
        loader.release(model)
    return [*done, *ranks.merged(results)]


def predicted(output: Any) -> Tensor:
    """The logits of a model's output. Raises CalibrationError if there are none."""
    if getattr(output, "logits", None) is None:
        raise CalibrationError(f"{type(output).__name__} has no logits, so there is no perplexity")
    logits: Tensor = output.logits
    return logits


def surprise(model: nn.Module, loader: Loader, hidden: Tensor, batch: Batch) -> float:
    """Mean negative log-likelihood in nats a token, from the hidden states that left the last block [N, S, D]."""
    found = []
    for at in pieces(model, batch):
        logits = predicted(_left(model, loader, hidden, batch, at))
        found += [compare(labels, [row]) for labels, row in zip(_next(batch, at), logits, strict=True)]
    total = functools.reduce(operator.add, found)
    return total.nll_dense / total.tokens


def _next(batch: Batch, at: slice) -> Tensor:
    """The tokens that positions `at` should predict, [N, S]; the last position of a window predicts none."""
    return batch["input_ids"][:, at.start + 1 : None if at.stop is None else at.stop + 1]


def outputs_of(
    given: tuple[nn.Module, Loader],
    todo: Sequence[Batch],
    tick: Callable[[], None],
    files: Sequence[Path] = (),
) -> Callable[..., Any]:
    """A function (number of a batch, at=None) that gives the model's output, of positions `at` where pieces() says so. Walked by
    its layout. files: where the last hidden states of each batch are kept, none if they are not.
    """
    model, loader = given
    if layout_of(model).how == WHOLE:
        loader.load(model, "")
        return lambda i, at=None: _run(model, todo[i], tick)
    # models may have different numbers of blocks
    count = len(blocks_of(model)[0])
    # a rank may have none
    if todo and not (files and all(file.is_file() for file in files)):
        held = InMemory()
        for _ in stream(model, todo, loader, held, keep_last=True, tick=tick):
            pass
        for i, file in enumerate(files):
            # another process may write the same files; where there is no room, the next run computes them again
            own = file.with_name(f"{os.getpid()}-{file.name}")
            with suppress(OutputError, OSError), writing(own):
                write_state(own, held.read(count, i), held.more(count, i))
                own.replace(file)
        return lambda i, at=None: _left(model, loader, held.read(count, i), todo[i], at, held.more(count, i))
    from safetensors.torch import load_file

    for _ in range(count * len(todo)):
        tick()
    return lambda i, at=None: _left(model, loader, load_file(files[i])["hidden"], todo[i], at, read_more(files[i]))


def _run(model: nn.Module, batch: Batch, tick: Callable[[], None]) -> Any:
    with torch.no_grad():
        output = whole(model, batch)
    tick()
    return output


def _left(
    model: nn.Module, loader: Loader, hidden: Tensor, batch: Batch, at: slice | None, more: Sequence[Any] = ()
) -> Any:
    """The output of what comes after the blocks, for positions `at` of the batch; None for all."""
    return leave(model, loader, hidden if at is None else hidden[:, at], batch, at, more)


def compare(labels_T: Tensor, logits: list[Tensor]) -> Window:
    """Sums over the tokens of a window, from logits [T, V] of the dense model, or of both. Rows without a label are left out."""
    sums = torch.zeros(4, dtype=torch.float64)
    rows = max(1, _CHUNK // logits[0].shape[-1])
    for start in range(0, len(labels_T), rows):
        part = slice(start, min(start + rows, len(labels_T)))
        wanted = labels_T[part, None]
        dense_TV = logits[0][part].float().log_softmax(-1)
        sums[0] -= dense_TV.gather(1, wanted).double().sum().item()
        if len(logits) == 1:
            continue
        pruned_TV = logits[1][part].float().log_softmax(-1)
        sums[1] -= pruned_TV.gather(1, wanted).double().sum().item()
        sums[3] += (_first_largest(dense_TV) == _first_largest(pruned_TV)).sum().item()
        chance_TV = dense_TV.exp()
        # a row of probabilities times a column of differences: one pass, without their product in memory
        sums[2] += torch.bmm(chance_TV[:, None], dense_TV.sub_(pruned_TV)[:, :, None]).double().sum().item()
    nll_dense, nll, kl, agree = sums.tolist()
    if len(logits) == 1:
        return Window(len(labels_T), nll_dense)
    return Window(len(labels_T), nll_dense, nll, kl, agree)


def _first_largest(rows_TV: Tensor) -> Any:
    """The index of each row's largest value, [T]. NumPy finds it many times as fast as torch."""
    return rows_TV.cpu().numpy().argmax(-1)


def summarise(windows: Sequence[Window], unit: str = "windows") -> Quality:
    """Means over tokens, with intervals over whole windows, since tokens of one window are not independent."""
    tokens = np.array([w.tokens for w in windows], dtype=np.float64)

    def mean(name: str, less: str | None = None) -> Estimate:
        values = np.array([getattr(w, name) - (getattr(w, less) if less else 0.0) for w in windows], dtype=np.float64)
        return ratio_of(values, tokens)

    n, total, ppl_dense = len(windows), int(tokens.sum()), mean("nll_dense").exp()
    if windows[0].nll is None:
        return Quality(n, total, ppl_dense, unit=unit)
    return Quality(
        n,
        total,
        ppl_dense,
        mean("nll").exp(),
        mean("nll", "nll_dense").exp(),
        mean("kl").within(0.0, math.inf),
        mean("agree").within(0.0, 1.0),
        unit=unit,
    )
