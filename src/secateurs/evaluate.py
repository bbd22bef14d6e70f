"""What pruning cost: perplexity, KL and top-1 agreement with the dense model on the same tokens, each with an interval.

Windows are not overlapping, so the stride is the window. Position 0 of a window predicts nothing. Both models run in
their own dtype; logits are compared in fp32. V vocabulary, S positions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import CalibrationError
from secateurs.estimate import RESAMPLES, Estimate
from secateurs.files import write_tensors
from secateurs.walk import Batch, InMemory, Loader, blocks_of, device_of, leave, stream

# logits compared at a time, as fp32; more fall out of the cache and take three times as long
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Window:
    """Sums over the predicted tokens of one window. kl, agree: None for the dense model alone."""

    tokens: int
    nll_dense: float
    nll: float | None = None
    kl: float | None = None
    agree: float | None = None


@dataclass(frozen=True)
class Quality:
    """Dense and pruned on the same windows. ppl_ratio is paired: both perplexities from the same resamples."""

    windows: int
    tokens: int
    ppl_dense: Estimate
    ppl: Estimate | None = None
    ppl_ratio: Estimate | None = None
    kl: Estimate | None = None
    agree: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def measure(
    dense: tuple[nn.Module, Loader],
    pruned: tuple[nn.Module, Loader] | None,
    windows: Tensor,
    done: Sequence[Window] = (),
    tick: Callable[[], None] = lambda: None,
    ends: Path | None = None,
) -> list[Window]:
    """Run windows [N, S] through one or two models, block by block in step, and compare their logits. Both are on one device.

    Memory holds one block of each model, the hidden states of all windows and the logits of one. done: windows that
    were measured before, which come first and are not measured again. One tick a window, block and model, and one a
    window at the end. ends: a folder for this dense model and these windows, where what leaves its last block is kept; what
    lies there is not computed again, to the same bits. Raises CalibrationError if the model gives no logits.
    """
    first = len(done)
    windows = windows.to(device_of(dense[0]))
    todo = [{"input_ids": ids[None]} for ids in windows[first:]]
    models = [dense] if pruned is None else [dense, pruned]
    kept = [_kept(dense, todo, first, tick, ends)]
    if pruned is not None:
        kept.append(_kept(pruned, todo, first, tick))
    results = list(done)
    for i, batch in enumerate(todo):
        logits = []
        for (model, loader), hidden in zip(models, kept, strict=True):
            output = leave(model, loader, hidden(i), batch)
            if getattr(output, "logits", None) is None:
                raise CalibrationError(f"{type(model).__name__} predicts no next token, so it has no perplexity")
            logits.append(output.logits[0])
        results.append(compare(batch, logits))
        tick()
    for model, loader in models:
        loader.release(model)
    return results


def _kept(
    given: tuple[nn.Module, Loader],
    todo: Sequence[Batch],
    first: int,
    tick: Callable[[], None],
    ends: Path | None = None,
) -> Callable[[int], Tensor]:
    """What leaves a model's last block, by window."""
    model, loader = given
    # models may have different numbers of blocks
    count = len(blocks_of(model)[0])
    files = [ends / f"{first + i:05d}.safetensors" for i in range(len(todo))] if ends else []
    if not files or not all(file.is_file() for file in files):
        held = InMemory()
        for _ in stream(model, todo, loader, held, keep_last=True, tick=tick):
            pass
        for i, file in enumerate(files):
            write_tensors(file, {"hidden": held.read(count, i)})
        return lambda i: held.read(count, i)
    from safetensors.torch import load_file

    for _ in range(count * len(todo)):
        tick()
    return lambda i: load_file(files[i])["hidden"]


def compare(batch: Batch, logits: list[Tensor]) -> Window:
    """One window: logits [S, V] of the dense model, or of the dense and the pruned one."""
    labels = batch["input_ids"][0, 1:]
    sums = torch.zeros(4, dtype=torch.float64)
    rows = max(1, _CHUNK // logits[0].shape[-1])
    for start in range(0, len(labels), rows):
        part = slice(start, min(start + rows, len(labels)))
        wanted = labels[part, None]
        dense_SV = logits[0][part].float().log_softmax(-1)
        sums[0] -= dense_SV.gather(1, wanted).double().sum().item()
        if len(logits) == 1:
            continue
        pruned_SV = logits[1][part].float().log_softmax(-1)
        sums[1] -= pruned_SV.gather(1, wanted).double().sum().item()
        sums[3] += (dense_SV.argmax(-1) == pruned_SV.argmax(-1)).sum().item()
        chance_SV = dense_SV.exp()
        sums[2] += dense_SV.sub_(pruned_SV).mul_(chance_SV).sum().item()
    nll_dense, nll, kl, agree = sums.tolist()
    if len(logits) == 1:
        return Window(len(labels), nll_dense)
    return Window(len(labels), nll_dense, nll, kl, agree)


def summarise(windows: Sequence[Window], seed: int = 0) -> Quality:
    """Means over tokens, intervals from 10,000 resamples of whole windows (tokens inside one are not independent)."""
    n = len(windows)
    pick = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    tokens = np.array([w.tokens for w in windows], dtype=np.float64)

    def mean(name: str) -> tuple[float, Any]:
        values = np.array([getattr(w, name) for w in windows], dtype=np.float64)
        return float(values.sum() / tokens.sum()), values[pick].sum(1) / tokens[pick].sum(1)

    def estimate(value: float, samples: Any) -> Estimate:
        low, high = np.quantile(samples, [0.025, 0.975])
        return Estimate(value, float(low), float(high), n)

    dense, dense_samples = mean("nll_dense")
    ppl_dense = estimate(float(np.exp(dense)), np.exp(dense_samples))
    total = int(tokens.sum())
    if windows[0].nll is None:
        return Quality(n, total, ppl_dense)
    nll, samples = mean("nll")
    return Quality(
        n,
        total,
        ppl_dense,
        estimate(float(np.exp(nll)), np.exp(samples)),
        estimate(float(np.exp(nll - dense)), np.exp(samples - dense_samples)),
        estimate(*mean("kl")),
        estimate(*mean("agree")),
    )
