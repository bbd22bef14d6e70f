"""Seconds of a prompt and of a token after it, for models of any shape: measured on this machine, not counted.

    t(shape) = rest + hidden * (ends + layers * (block + mlp * neuron + heads * (head + queries * query)))
is solved from six measured shapes for each stage, and says which shape to try; what counts is the measurement of that shape.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from secateurs.structured.units import Shape


@dataclass(frozen=True)
class Seconds:
    """prefill: of the prompt. decode: of one token after it."""

    prefill: float
    decode: float

    def over(self, other: "Seconds") -> "Seconds":
        return Seconds(self.prefill / other.prefill, self.decode / other.decode)


def measure(models: Sequence[Any], prompt: int, new: int, rounds: int = 5) -> list[Seconds]:
    """Every model in turn, `rounds` times after one that warms up; medians. Random tokens, batch 1, with a KV cache."""
    samples: list[list[Seconds]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, kept in zip(models, samples, strict=True):
            found = _once(model, prompt, new)
            if number:
                kept.append(found)
    return [Seconds(median(s.prefill for s in kept), median(s.decode for s in kept)) for kept in samples]


def _once(model: Any, prompt: int, new: int) -> Seconds:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=generator)
    with torch.no_grad():
        begin = time.perf_counter()
        # the head is needed for the last token only, as generate() has it
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        first = time.perf_counter()
        for i in range(new):
            cache = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
        return Seconds(first - begin, (time.perf_counter() - first) / new)


def blank(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of that shape whose weights are all one small number: as fast as a trained one."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config)
    model.to(dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                filled = torch.full(parameter.shape, 0.01, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(filled, requires_grad=False)
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class LatencyModel:
    """Coefficients [rest, ends, block, neuron, head, query] of both stages."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @classmethod
    def fit(cls, points: Sequence[tuple[Shape, Seconds]]) -> "LatencyModel":
        rows = torch.tensor([_terms(shape) for shape, _ in points], dtype=torch.float64)

        def solve(stage: Callable[[Seconds], float]) -> tuple[float, ...]:
            seconds = torch.tensor([stage(s) for _, s in points], dtype=torch.float64)
            found: Tensor = torch.linalg.lstsq(rows, seconds[:, None]).solution[:, 0]
            return tuple(found.clamp(min=0).tolist())

        return cls(solve(lambda s: s.prefill), solve(lambda s: s.decode))

    def at(self, shape: Shape) -> Seconds:
        terms = _terms(shape)
        prefill, decode = (sum(c * t for c, t in zip(k, terms, strict=True)) for k in (self.prefill, self.decode))
        return Seconds(prefill, decode)


def _terms(shape: Shape) -> list[float]:
    blocks = shape.hidden * shape.layers
    return [1.0, shape.hidden, blocks, blocks * shape.mlp, blocks * shape.heads, blocks * shape.heads * shape.queries]
