"""Sizes a fleet: from measured speed, traffic and latency objectives to replicas, latency and cost, for the dense model and others.

A replica runs one model. It holds at most as many sequences as were measured, as fit into memory and as keep the pace. While it
decodes b sequences, each token also waits for its share of the other sequences' prompts:
    pace(b) = step(b) + (b - 1) * prompt_seconds * mean prompt / mean output
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

from secateurs.base.errors import OutputError, PlanError
from secateurs.base.progress import Progress, silent
from secateurs.decide.queueing import WARM, Lengths, Requests, poisson, simulate

HOURS_A_YEAR = 8760


@dataclass(frozen=True)
class Speed:
    """The speed of one model on one machine; rates are (median, low, high).

    prefill: prompt tokens a second. decode: {batch: tokens a second of all its sequences}. kv_bytes_per_token: of one sequence's
    cache. memory_bytes: of the machine.
    """

    name: str
    prefill: tuple[float, float, float]
    decode: dict[int, tuple[float, float, float]]
    weights_bytes: int
    kv_bytes_per_token: int
    memory_bytes: int

    @classmethod
    def of(cls, row: dict[str, Any], machine: dict[str, Any]) -> "Speed":
        """From a variant of bench.json."""

        def three(found: dict[str, Any]) -> tuple[float, float, float]:
            return found["tokens_per_second"], found["low"], found["high"]

        return cls(
            row["name"], three(row["prefill"]), {b["batch"]: three(b["decode"]) for b in row["batches"]},
            row["weights_bytes"], row["kv_bytes_per_token"], machine["memory_bytes"],
        )  # fmt: skip

    def step(self, batch: int, which: int = 0) -> float:
        """Seconds between tokens of `batch` sequences, interpolated between the batches that were measured."""
        known = sorted(self.decode)
        return float(np.interp(batch, known, [b / self.decode[b][which] for b in known]))


@dataclass(frozen=True)
class Service:
    """The traffic of a fleet and its objectives.

    rate, peak: mean and highest requests a second. first_seconds, pace_seconds: to the first token and between tokens, for
    `percentile` percent of requests. price: of a node-hour. headroom: the share of a replica that stays free at the peak.
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
        if len(values) == wanted and values[0] >= 1 and (kind != "uniform" or values[1] >= values[0]):
            return Lengths(kind, values)
    raise PlanError(f"{what} tokens '{text}' cannot be read; write 512, uniform:16,1024 or lognormal:512,0.8")


def read_trace(file: Path) -> Requests:
    """JSONL, one request a line: {"time": seconds, "prompt": tokens, "output": tokens}. Raises PlanError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"trace {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [float(row[name]) for name in ("time", "prompt", "output")]
        except (ValueError, TypeError, KeyError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise PlanError(
                f'{file} line {number} is no request ({what}); a line is {{"time": 0.5, "prompt": 512, "output": 128}}'
            ) from None
        if not (all(math.isfinite(v) for v in values) and values[1] >= 1 and values[2] >= 1):
            raise PlanError(f"{file} line {number} has a time that is no number, or less than one token")
        rows.append(values)
    if len(rows) < 2 or min(r[0] for r in rows) == max(r[0] for r in rows):
        raise PlanError(f"{file} has {len(rows)} requests; a trace has two or more, at different times")
    table = np.array(sorted(rows))
    return Requests(table[:, 0], table[:, 1], table[:, 2])


def read_speeds(source: Path) -> list[Speed]:
    """The variants of a bench.json, or of the one in a run directory; the first is dense. Raises OutputError."""
    file = source / "bench.json" if source.is_dir() else source
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        speeds = [Speed.of(row, data["machine"]) for row in data["variants"]]
        rates = [rate for s in speeds for three in (s.prefill, *s.decode.values()) for rate in three]
        if (
            not speeds
            or not all(s.decode for s in speeds)
            or not all(rate > 0 and math.isfinite(rate) for rate in rates)
        ):
            raise ValueError("a variant has no speed above 0")
        return speeds
    except OSError as error:
        raise OutputError(
            f"{file} cannot be read: {error.strerror}; `secateurs bench DIR --batch 1,4,16` measures speed and writes it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{file} is not a measurement of `secateurs bench`: {error}") from None


def _paces(speed: Speed, service: Service, requests: Requests, which: int) -> tuple[float, list[float], str]:
    """Seconds of a prompt token, seconds between tokens with 1, 2, ... sequences in a replica, and what limits their number."""
    prompt, output = float(requests.prompt.mean()), float(requests.output.mean())
    each = 1 / speed.prefill[which]
    shared = each * prompt / max(output - 1, 1)
    measured = max(speed.decode)
    limits = {"the largest batch that was measured": measured}
    memory = speed.memory_bytes if service.memory_bytes is None else service.memory_bytes
    end = ("", " at the low end of its measured speed", " at the high end of its measured speed")[which]
    if speed.kv_bytes_per_token:
        room = memory - speed.weights_bytes
        limits["memory for the cache"] = max(0, int(room / (speed.kv_bytes_per_token * (prompt + output))))
    paces = [speed.step(b, which) + (b - 1) * shared for b in range(1, measured + 1)]
    limits["the pace that is asked"] = len(list(takewhile(lambda p: p <= service.pace_seconds, paces)))
    slots, why = min((n, why) for why, n in limits.items())
    if slots < 1:
        raise PlanError(
            f"{speed.name} cannot serve this on any number of replicas{end}: {why} leaves no sequence (a token takes "
            f"{paces[0]:.4g} s alone, {service.pace_seconds:g} s is asked; weights take {speed.weights_bytes / 1e9:.3g} of "
            f"{memory / 1e9:.3g} GB)"
        )
    counted = requests.prompt[int(len(requests) * WARM) :]
    alone = float(np.percentile(counted, service.percentile)) * each
    if alone > service.first_seconds:
        raise PlanError(
            f"{speed.name} cannot serve this on any number of replicas{end}: the first token takes {alone:.4g} s without a wait, "
            f"at the {service.percentile:g}th percentile of prompts, and {service.first_seconds:g} s is asked"
        )
    return each, paces[:slots], why


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
    each, paces, why = _paces(speed, service, requests, which)
    slots = len(paces)
    peak = requests.at(service.peak)
    # seconds of a sequence in a full replica: the prompts of all its sequences in turn, and its own tokens after the first
    busy = float((slots * requests.prompt * each + (requests.output - 1) * speed.step(slots, which)).mean())
    # requests a second that one full replica serves
    most = slots / busy

    def tried(replicas: int) -> Size:
        found = simulate(peak, replicas, each, paces)
        first, pace = (float(np.percentile(v, service.percentile)) for v in (found.first, found.pace))
        load = service.peak / (replicas * most)
        return Size(replicas, slots, why, load, service.rate / (replicas * most), first, pace, found.held)

    low = max(1, math.ceil(service.peak / (most * (1 - service.headroom)) - 1e-9))
    found = tried(low)
    if found.first_seconds <= service.first_seconds:
        return found
    # the objectives need more than the headroom does: double the step until they hold, then bisect
    step, high = max(1, low // 16), low
    while found.first_seconds > service.first_seconds:
        low, high, step = high, high + step, step * 2
        found = tried(high)
    while high - low > 1:
        middle = (low + high) // 2
        at_middle = tried(middle)
        if at_middle.first_seconds <= service.first_seconds:
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
            rows.append({"name": speed.name, "why_not": str(error)})
            continue
        replicas = [s.replicas for s in sizes]
        tokens = service.rate * 3600 * float((requests.prompt + requests.output).mean())
        row: dict[str, Any] = {
            "name": speed.name, "why_not": None, **vars(sizes[0]),
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
        },
        "variants": rows,
    }  # fmt: skip


def service_of(
    traced: Requests | None, rate: float | None, peak: float | None, ttft: float, tpot: float, percentile: float, price: str,
    headroom: float, memory: float | None,
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
        None if memory is None else int(memory * 1e9),
    )  # fmt: skip


def random_requests(rate: float, n: int, prompt: str, output: str, seed: int) -> Requests:
    """n requests, `rate` a second, with lengths as read_lengths() reads them."""
    return poisson(rate, n, read_lengths(prompt, "prompt"), read_lengths(output, "output"), seed)
