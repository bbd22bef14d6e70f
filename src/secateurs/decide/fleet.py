"""Sizes a fleet: from measured speed, traffic and latency objectives to replicas, latency and cost, for the dense model and others.

A replica runs one model. It holds at most as many sequences as were measured, as fit into memory and as keep the pace; the last two
at a percentile of the moments at which it is full. While it decodes b sequences that hold T tokens, each token also waits for its
share of the other sequences' prompts:
    pace(b, T) = base(b) + each * T + (b - 1) * mean seconds of a prompt / mean output
The fleet is sized for the peak rate: the fewest replicas that keep the headroom and, simulated (queueing.py), both objectives.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.base.errors import PlanError
from secateurs.base.progress import Progress, silent
from secateurs.decide.queueing import WARM, Array, Lengths, Requests, full_moments, poisson, simulate
from secateurs.decide.speed import Pace, Speed

HOURS_A_YEAR = 8760
# more requests than this share that are longer than the model's positions are refused; fewer are cut
_CUT = 0.01
# tokens; no model holds as many
_LONGEST = 1e9


@dataclass(frozen=True)
class Service:
    """The traffic of a fleet and its objectives.

    rate, peak: mean and highest requests a second. first_seconds, pace_seconds: to the first token and between tokens, for
    `percentile` percent of requests. price: of a node-hour. headroom: the share of a replica that stays free at the peak. fits:
    percent of the moments at which a replica is full in which its cache fits into memory.
    """

    rate: float
    peak: float
    first_seconds: float
    pace_seconds: float
    percentile: float
    price: float
    currency: str
    headroom: float = 0.2
    memory_bytes: int | None = None
    fits: float = 99.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise PlanError(f"traffic of {self.rate:g} requests a second needs no fleet; give --rate above 0")
        if not (self.peak >= self.rate and math.isfinite(self.peak)):
            raise PlanError(
                f"a peak of {self.peak:g} requests a second is no number at or above the mean of {self.rate:g}; raise --peak"
            )
        if not 0 < self.percentile < 100:
            raise PlanError(
                f"percentile {self.percentile:g} cannot be kept: it is above 0 and below 100, e.g. 95 or 99.9"
            )
        for name, value in (("ttft", self.first_seconds), ("tpot", self.pace_seconds), ("price", self.price)):
            if not (value > 0 and math.isfinite(value)):
                raise PlanError(f"{name} {value:g} is not above 0")
        if not 0 <= self.headroom < 1:
            raise PlanError(f"headroom {self.headroom:g} is not a share of a replica; give 0 <= headroom < 1")
        if not 0 < self.fits <= 100:
            raise PlanError(
                f"fits {self.fits:g} is no percentage of moments: it is above 0 and at most 100, e.g. 95 or 99"
            )
        if self.memory_bytes is not None and not 0 < self.memory_bytes < math.inf:
            raise PlanError(f"memory of {self.memory_bytes:g} bytes holds nothing; give --memory above 0, in GB")


def read_price(text: str) -> tuple[float, str]:
    """Read '2.50 USD' as (2.5, 'USD'). Raises PlanError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]{3})\s*", text)
    if not found:
        raise PlanError(f"price '{text}' cannot be read; write an amount and its currency, e.g. '2.50 USD'")
    return float(found[1]), found[2].upper()


def read_lengths(text: str, what: str) -> Lengths:
    """Read '512', 'uniform:16,1024' or 'lognormal:512,0.8' (mean, coefficient of variation). Raises PlanError."""
    found = re.fullmatch(r"(?:(fixed|uniform|lognormal):)?(\d+(?:\.\d+)?)(?:,(\d+(?:\.\d+)?))?", text.strip())
    if found:
        kind = found[1] or "fixed"
        values = tuple(float(v) for v in found.groups()[1:] if v is not None)
        wanted = 1 if kind == "fixed" else 2
        if (
            len(values) == wanted
            and values[0] >= 1
            and max(values) < _LONGEST
            and (kind != "uniform" or values[1] >= values[0])
        ):
            return Lengths(kind, values)
    raise PlanError(f"{what} tokens '{text}' cannot be read; write 512, uniform:16,1024 or lognormal:512,0.8")


def read_trace(file: Path) -> Requests:
    """JSONL, one request a line, in order of time: {"time": seconds, "prompt": tokens, "output": tokens}. Raises PlanError naming
    the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"trace {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_request(line, f"{file} line {number}", rows[-1][0] if rows else 0.0))
    if len(rows) < 2 or rows[0][0] == rows[-1][0]:
        raise PlanError(f"{file} has {len(rows)} requests; a trace has two or more, at different times")
    table = np.array(rows)
    return Requests(table[:, 0], table[:, 1], table[:, 2])


def _request(line: str, where: str, since: float) -> list[float]:
    """Time, prompt and output of a line of a trace. since: the time of the request before it."""
    try:
        row = json.loads(line)
        values = [row[name] for name in ("time", "prompt", "output")]
    except (ValueError, TypeError, KeyError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise PlanError(
            f'{where} is no request ({what}); a line is {{"time": 0.5, "prompt": 512, "output": 128}}'
        ) from None
    for name, value in zip(("time", "prompt", "output"), values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LONGEST**2:
            raise PlanError(f"{where} has the {name} {json.dumps(value)}, which is no number from 0 on")
        if name != "time" and not 1 <= value < _LONGEST:
            raise PlanError(f"{where} has {value:g} tokens of {name}; give 1 or more, below {_LONGEST:g}")
    if values[0] < since:
        raise PlanError(f"{where} has the time {values[0]:g} after {since:g}; put the requests in order of time")
    return [float(value) for value in values]


@dataclass(frozen=True)
class _Replica:
    """What one replica does: its pace, seconds of each request's prompt, seconds between tokens of 1, 2, ... sequences without what
    their cache takes, tokens that they hold on average when it is full, and what limits their number.
    """

    pace: Pace
    prompts: Array
    bases: list[float]
    held: float
    why: str


def _replica(speed: Speed, service: Service, requests: Requests, which: int) -> _Replica:
    pace, output = speed.pace(which), float(requests.output.mean())
    prompts = pace.prompt(requests.prompt)
    shared = float(prompts.mean()) / max(output - 1, 1)
    memory = speed.memory_bytes if service.memory_bytes is None else service.memory_bytes
    end = ("", " at the low end of its measured speed", " at the high end of its measured speed")[which]
    most, why = max(pace.batches), "the largest batch that was measured"
    bases = [pace.base(b) + (b - 1) * shared for b in range(1, most + 1)]
    while True:
        # whom a full moment meets depends on how long tokens take, which depends on how many sequences there are
        step = bases[most - 1] + pace.each * most * float(requests.held.mean())
        moments = full_moments(requests, prompts, step, most)
        # seconds between tokens of 1, 2, ... sequences at the percentile of those moments
        slow = np.percentile(moments, service.percentile, axis=0)
        paces = [base + pace.each * float(held) for base, held in zip(bases, slow, strict=False)]
        fits = (moments * speed.kv_bytes_per_token <= memory - speed.weights_bytes).mean(0) * 100
        limits = {
            why: most,
            "memory for the cache": len(list(takewhile(lambda share: share >= service.fits, fits))),
            "the pace that is asked": len(list(takewhile(lambda pace: pace <= service.pace_seconds, paces))),
        }
        # of equal limits the first one
        why = min(limits, key=lambda name: limits[name])
        slots = limits[why]
        if slots in (0, most):
            break
        most = slots
    if slots < 1:
        raise PlanError(
            f"{speed.name} cannot serve this on any number of replicas{end}: {why} leaves no sequence (a token takes "
            f"{paces[0]:.4g} s alone, at the {service.percentile:g}th percentile, {service.pace_seconds:g} s is asked; weights "
            f"take {speed.weights_bytes / 1e9:.3g} of {memory / 1e9:.3g} GB)"
        )
    counted = slice(int(len(requests) * WARM), None)
    lonely = float(np.percentile(bases[0] + pace.each * requests.held[counted], service.percentile))
    if lonely > service.pace_seconds:
        raise PlanError(
            f"{speed.name} cannot serve this on any number of replicas{end}: a token takes {lonely:.4g} s alone, at the "
            f"{service.percentile:g}th percentile of lengths, and {service.pace_seconds:g} s is asked"
        )
    alone = float(np.percentile(prompts[counted], service.percentile))
    if alone > service.first_seconds:
        raise PlanError(
            f"{speed.name} cannot serve this on any number of replicas{end}: the first token takes {alone:.4g} s without a wait, "
            f"at the {service.percentile:g}th percentile of prompts, and {service.first_seconds:g} s is asked"
        )
    return _Replica(pace, prompts, bases[:slots], float(moments[:, -1].mean()), why)


@dataclass(frozen=True)
class Size:
    """A fleet.

    slots: sequences a replica; slots_end: what limits them. load, mean_load: the share of its capacity that is used at the peak
    and on average. first_seconds, pace_seconds: at the percentile. held: sequences in a replica, on average.
    """

    replicas: int
    slots: int
    slots_end: str
    load: float
    mean_load: float
    first_seconds: float
    pace_seconds: float
    held: float


def size(speed: Speed, service: Service, requests: Requests, which: int = 0) -> Size:
    """The fewest replicas for the peak. which: the median (0), low (1) or high (2) end of the speed. Raises PlanError."""
    replica = _replica(speed, service, requests, which)
    slots, prompts = len(replica.bases), replica.prompts
    peak = requests.at(service.peak)
    # seconds of a sequence in a full replica: the prompts of all its sequences in turn, and its own tokens after the first
    step = replica.pace.step(slots, replica.held)
    busy = float((slots * prompts + (requests.output - 1) * step).mean())
    # requests a second that one full replica serves
    most = slots / busy

    def tried(replicas: int) -> Size:
        found = simulate(peak, replicas, prompts, replica.bases, replica.pace.each)
        first, pace = (float(np.percentile(v, service.percentile)) for v in (found.first, found.pace))
        load = service.peak / (replicas * most)
        return Size(replicas, slots, replica.why, load, service.rate / (replicas * most), first, pace, found.held)

    def holds(found: Size) -> bool:
        return found.first_seconds <= service.first_seconds and found.pace_seconds <= service.pace_seconds

    low = max(1, math.ceil(service.peak / (most * (1 - service.headroom)) - 1e-9))
    found = tried(low)
    if holds(found):
        return found
    # the objectives need more than the headroom does: double the step until they hold, then bisect
    step, high = max(1, low // 16), low
    while not holds(found):
        low, high, step = high, high + step, step * 2
        found = tried(high)
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = tried(middle)
        if holds(at_middle):
            high, found = middle, at_middle
        else:
            low = middle
    return found


def fleet(
    speeds: Sequence[Speed],
    service: Service,
    requests: Requests,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Sizes, costs and savings of each model; savings are over speeds[0], the dense one.

    Intervals come from sizing at the low and at the high end of each speed. A candidate that cannot serve gets a reason instead of
    a size; for the dense model this raises PlanError.
    """
    requests, cut = _within(requests, min((s.positions for s in speeds if s.positions), default=None))
    rows: list[dict[str, Any]] = []
    for number, speed in enumerate(speeds):
        try:
            sizes = []
            for which in (0, 1, 2):
                progress("sizing fleets", number * 3 + which, 3 * len(speeds))
                sizes.append(size(speed, service, requests, which))
        except PlanError as error:
            if not number:
                raise
            rows.append({"name": speed.name, "why_not": str(error), "speed": speed.told})
            continue
        replicas = [s.replicas for s in sizes]
        tokens = service.rate * 3600 * float((requests.prompt + requests.output).mean())
        row: dict[str, Any] = {
            "name": speed.name, "why_not": None, "speed": speed.told, **vars(sizes[0]),
            # a lower speed needs more replicas
            "replicas_low": min(replicas), "replicas_high": max(replicas),
            "cost_per_hour": sizes[0].replicas * service.price,
            "cost_per_million_tokens": sizes[0].replicas * service.price / tokens * 1e6,
        }  # fmt: skip
        if rows:
            dense = rows[0]
            year = service.price * HOURS_A_YEAR
            row["replicas_saved"] = dense["replicas"] - row["replicas"]
            row["saved_a_year"] = row["replicas_saved"] * year
            # the least saving: dense at its high speed against the candidate at its low speed
            row["saved_a_year_low"] = (dense["replicas_low"] - row["replicas_high"]) * year
            row["saved_a_year_high"] = (dense["replicas_high"] - row["replicas_low"]) * year
        rows.append(row)
    progress("sizing fleets", 3 * len(speeds), 3 * len(speeds))
    return {
        "service": vars(service),
        "requests": {
            "simulated": len(requests), "prompt_mean": float(requests.prompt.mean()), "output_mean": float(requests.output.mean()),
            "held_high": float(np.percentile(requests.prompt + requests.output, service.percentile)), "cut": cut,
        },
        "variants": rows,
    }  # fmt: skip


def _within(requests: Requests, positions: int | None) -> tuple[Requests, int]:
    """Requests whose prompt and answer the model's positions hold, and how many were cut to that. Raises PlanError for many."""
    longer = np.flatnonzero(requests.prompt + requests.output > (positions or math.inf))
    if positions is None or not len(longer):
        return requests, 0
    if len(longer) > _CUT * len(requests):
        i = longer[0]
        raise PlanError(
            f"{len(longer):,} of {len(requests):,} requests are longer than the model's {positions} positions, the first is "
            f"request {i + 1} with {requests.prompt[i]:g} and {requests.output[i]:g} tokens; give shorter ones"
        )
    prompt = np.minimum(requests.prompt, positions - 1)
    return Requests(requests.arrival, prompt, np.minimum(requests.output, positions - prompt)), len(longer)


def service_of(
    traced: Requests | None, rate: float | None, peak: float | None, ttft: float, tpot: float, percentile: float, price: str,
    headroom: float, memory: float | None, fits: float = 99.0,
) -> Service:  # fmt: skip
    """A Service from the options of `secateurs fleet`. rate: None is that of `traced`. memory: GB. Raises PlanError."""
    amount, currency = read_price(price)
    if rate is None:
        if traced is None:
            raise PlanError("no traffic: give --rate in requests a second, or a --trace")
        rate = traced.rate
    if memory is not None and not (memory > 0 and math.isfinite(memory)):
        raise PlanError(f"memory of {memory:g} GB holds nothing; give --memory above 0, in GB")
    return Service(
        rate, rate if peak is None else peak, ttft, tpot, percentile, amount, currency, headroom,
        None if memory is None else int(memory * 1e9), fits,
    )  # fmt: skip


def random_requests(rate: float, n: int, prompt: str, output: str, seed: int) -> Requests:
    """n requests, `rate` a second, with lengths as read_lengths() reads them."""
    return poisson(rate, n, read_lengths(prompt, "prompt"), read_lengths(output, "output"), seed)
