"""Measures the time of a prompt and of each token after it, for models of any shape, and predicts it for shapes not yet measured.

    t(shape) = rest + hidden * (ends + layers * (block + mlp * neuron + heads * (head + queries * query)))
is fitted to measured shapes, for the prompt and for a token after it. It only says which shape to measure next.

A deep model is timed at two depths, on whose line its own time lies: blocks of one shape take equally long. So memory holds a few
blocks, but more than a cache does.
"""

import copy
import inspect
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch

from secateurs.base.device import machine
from secateurs.base.errors import PlanError
from secateurs.base.files import writing
from secateurs.base.precision import widened
from secateurs.base.progress import no_bars
from secateurs.model.batches import embeddings_of, text_config
from secateurs.model.made_up import uncached
from secateurs.model.on_meta import without_weights
from secateurs.shrink.units import Shape

# bytes of blocks that are timed; more blocks than fit are timed at two depths
_TIMED = 1 << 28


@dataclass(frozen=True)
class Seconds:
    """prefill: seconds of the prompt. decode: of one token after it."""

    prefill: float
    decode: float

    def over(self, other: "Seconds") -> "Seconds":
        return Seconds(self.prefill / other.prefill, self.decode / other.decode)

    def times(self, other: "Seconds") -> "Seconds":
        return Seconds(self.prefill * other.prefill, self.decode * other.decode)

    def on(self, share: float, other: "Seconds") -> "Seconds":
        """`share` times the way from these to those of a deeper model, which takes no less time."""
        prefill, decode = (max(0.0, b - a) for a, b in ((self.prefill, other.prefill), (self.decode, other.decode)))
        return Seconds(self.prefill + share * prefill, self.decode + share * decode)


def depths(layers: int, each: int, whole: int, cannot: Callable[[], str | None]) -> tuple[int, ...]:
    """How many blocks of a model of `layers` blocks are timed, ascending: all of them, or two numbers whose line gives all.

    each, whole: bytes of a block and of the model. cannot: says why blocks cannot go, or None. Raises PlanError for a model of
    which neither all blocks nor some of them can be timed.
    """
    most = max(2, _TIMED // max(1, each))
    if layers <= most:
        return (layers,)
    why = cannot()
    if why is None:
        return (most // 2, most)
    there = machine()["memory_bytes"]
    if 4 * whole > there:
        raise PlanError(
            f"a model of {whole / 1e9:.1f} GB is not timed as a whole on a machine of {there / 1e9:.1f} GB, and not on some of its "
            f"blocks either: {why}"
        )
    return (layers,)


@dataclass(frozen=True)
class Sample:
    """What is timed for a model of `layers` blocks. models: by their numbers of blocks, ascending."""

    layers: int
    models: dict[int, Any]

    def of(self, seconds: Sequence[Seconds]) -> Seconds:
        """The seconds of all blocks from those of the models."""
        if len(seconds) == 1:
            return seconds[0]
        few, some = self.models
        return seconds[0].on((self.layers - few) / (some - few), seconds[1])


def seconds_of(samples: Sequence[Sample], prompt: int, new: int, rounds: int = 5) -> list[Seconds]:
    """Median seconds of each sample; all models take turns."""
    found = iter(measure([model for sample in samples for model in sample.models.values()], prompt, new, rounds))
    return [sample.of([next(found) for _ in sample.models]) for sample in samples]


def measure(models: Sequence[Any], prompt: int, new: int, rounds: int = 5) -> list[Seconds]:
    """Median seconds of each model over `rounds` rounds, after one to warm up. Models take turns.

    The prompt has `prompt` random tokens, then `new` tokens are decoded one by one; batch 1, with a KV cache. If none are, there is
    no cache, and `decode` is as `prefill`.
    """
    samples: list[list[Seconds]] = [[] for _ in models]
    for number in range(rounds + 1):
        for model, kept in zip(models, samples, strict=True):
            found = _once(model, prompt, new)
            if number:
                kept.append(found)
    return [Seconds(median(s.prefill for s in kept), median(s.decode for s in kept)) for kept in samples]


def _once(model: Any, prompt: int, new: int) -> Seconds:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(embeddings_of(model)), (1, prompt), generator=generator)
    # as generate() does: the head is run for the last token only
    last = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    asked = {"use_cache": True, **({"logits_to_keep": 1} if last else {})} if new else uncached(model)
    with torch.no_grad():
        begin = time.perf_counter()
        with widened():
            output = model(input_ids=ids, **asked)
        first = time.perf_counter()
        if not new:
            return Seconds(first - begin, first - begin)
        cache = _cache(output)
        first = time.perf_counter()
        for i in range(new):
            at = i % prompt
            cache = _cache(model(input_ids=ids[:, at : at + 1], use_cache=True, **cache))
        return Seconds(first - begin, (time.perf_counter() - first) / new)


def _cache(output: Any) -> dict[str, Any]:
    """What the next token is given of a model's output: keys and values, or the states of a recurrence."""
    name = next(name for name in ("past_key_values", "cache_params") if getattr(output, name, None) is not None)
    return {name: getattr(output, name)}


def decodes(model: Any) -> bool:
    """True if a model runs token by token with its cache."""
    try:
        _once(model, 8, 2)
    # a class may raise anything
    except Exception:
        return False
    return True


def blank(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model with that config whose weights are all one small number, loaded from a folder as a trained one is.

    Loading matters, because from_pretrained places weights in memory differently. On two cores of an EPYC a model made of new
    tensors decoded 6% faster than the same weights loaded, and read prompts half as fast (docs/log.md).
    """
    with without_weights():
        model = cls._from_config(config)
    model.to(dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                filled = torch.full(parameter.shape, 0.01, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(filled, requires_grad=False)
    model.tie_weights()
    with no_bars(), writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        # the folder may be deleted: loaded weights stay mapped
        return cls.from_pretrained(folder, dtype=dtype).eval()


def shallower(model: Any, path: str, blocks: int, config: Any) -> Any:
    """A model of the first blocks of another one's list at `path`, whose weights it shares. config: of such a model."""
    found = parent = _alone(model, model.config, config)
    *steps, last = path.split(".")
    for step in steps:
        parent._modules[step] = parent = _alone(parent._modules[step], model.config, config)
    parent._modules[last] = torch.nn.ModuleList(list(parent._modules[last])[:blocks])
    return found


def _alone(module: Any, old: Any, new: Any) -> Any:
    """A module with the same members, of which others can be put in their places."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    for before, after in ((old, new), (text_config(old), text_config(new))):
        if getattr(module, "config", None) is before:
            found.config = after
            break
    return found


@dataclass(frozen=True)
class LatencyModel:
    """Predicts the seconds of a shape, over the dense model's.

    prefill, decode: the share of the dense model's seconds that each term takes [rest, ends, block, neuron, head, query]; shares
    add up to 1 where the fit is exact.
    """

    dense: Shape
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    @classmethod
    def fit(cls, dense: Shape, points: Sequence[tuple[Shape, Seconds]]) -> "LatencyModel":
        """Fit shares to shapes and their seconds over the dense model's: least squares of relative errors, no share negative."""
        from scipy.optimize import nnls

        rows = numpy.array([_terms(shape, dense) for shape, _ in points])

        def solve(stage: Callable[[Seconds], float]) -> tuple[float, ...]:
            taken = numpy.array([stage(s) for _, s in points])
            return tuple(nnls(rows / taken[:, None], numpy.ones(len(taken)))[0].tolist())

        return cls(dense, solve(lambda s: s.prefill), solve(lambda s: s.decode))

    def through(self, shape: Shape, seconds: Seconds) -> "LatencyModel":
        """Scale all shares so that the prediction for a shape is what was measured, and nearly so for similar shapes."""
        off = seconds.over(self.at(shape))
        return LatencyModel(
            self.dense, tuple(off.prefill * s for s in self.prefill), tuple(off.decode * s for s in self.decode)
        )

    def at(self, shape: Shape) -> Seconds:
        terms = _terms(shape, self.dense)
        prefill, decode = (sum(c * t for c, t in zip(k, terms, strict=True)) for k in (self.prefill, self.decode))
        return Seconds(prefill, decode)


def _terms(shape: Shape, dense: Shape) -> list[float]:
    """What each share is multiplied by: 1 for all terms of the dense model."""
    hidden = shape.hidden / dense.hidden if dense.hidden else 1.0
    blocks = hidden * shape.layers / dense.layers
    heads = blocks * shape.heads / dense.heads
    return [1.0, hidden, blocks, blocks * shape.mlp / dense.mlp, heads, heads * shape.queries / dense.queries]
