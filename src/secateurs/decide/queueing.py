"""Simulates requests that wait for replicas: one queue, first come first served, and replicas that batch their sequences.

A replica holds up to `slots` sequences and works on one prompt at a time. A request keeps the pace of the batch that it joins until
its end: requests that come later do not slow it, and ones that leave do not speed it up. Sequences, and the tokens they hold, are
spread evenly over replicas.
With one slot and exponential work this is M/M/c, whose waiting time has a closed form (erlang_wait).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Any

import numpy as np

from secateurs.base.errors import PlanError

Array = np.ndarray[Any, np.dtype[np.float64]]


# the share of the first requests that is not counted, because they find the fleet empty
WARM = 0.1


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival. arrival: seconds, from 0 on. prompt, output: tokens. Raises PlanError for what cannot be."""

    arrival: Array
    prompt: Array
    output: Array

    def __post_init__(self) -> None:
        if not (len(self.arrival) == len(self.prompt) == len(self.output) > 0):
            raise PlanError(
                f"{len(self.arrival)} times, {len(self.prompt)} prompts and {len(self.output)} answers are no requests: give one "
                "of each for every request"
            )
        for name, values, least, unit in (
            ("time", self.arrival, 0, "seconds"), ("prompt", self.prompt, 1, "tokens"), ("output", self.output, 1, "tokens"),
        ):  # fmt: skip
            # a comparison with NaN is false
            wrong = np.flatnonzero(~((values >= least) & (values < np.inf)))
            if len(wrong):
                raise PlanError(
                    f"request {wrong[0] + 1} has the {name} {values[wrong[0]]:g}; give {unit} from {least} on"
                )
        early = np.flatnonzero(np.diff(self.arrival) < 0)
        if len(early):
            raise PlanError(
                f"request {early[0] + 2} arrives before the one that it follows; give requests in order of time"
            )

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return (len(self) - 1) / float(self.arrival[-1] - self.arrival[0])

    @property
    def held(self) -> Array:
        """Tokens that each holds while it is answered, on average: its prompt and half of its answer."""
        return self.prompt + self.output / 2

    def at(self, rate: float) -> "Requests":
        """The same requests at another rate."""
        return Requests(self.arrival * (self.rate / rate), self.prompt, self.output)


@dataclass(frozen=True)
class Waits:
    """What the simulation measured.

    For each counted request: wait, seconds until it starts; first, until its first token; pace, seconds for each token after it.
    held: sequences in a replica, the mean over the starts of requests.
    """

    wait: Array
    first: Array
    pace: Array
    held: float


def simulate(
    requests: Requests,
    replicas: int,
    prompts: Array,
    token_seconds: Sequence[float],
    held_seconds: float = 0.0,
    warm: float = WARM,
) -> Waits:
    """Serve requests with that many replicas, and measure their waits.

    prompts: seconds of each request's prompt. token_seconds[b - 1]: seconds between tokens of a sequence when its replica holds b;
    its length is the number of slots. held_seconds: more for each token that the replica's sequences hold. warm: the share of the
    first requests that is not counted.
    """
    slots = len(token_seconds)
    capacity = replicas * slots
    # when each replica has finished its prompts; the next prompt goes to the one that is free first
    free = [0.0] * replicas
    # when each sequence in service ends, a heap; in a full fleet the next request starts at the earliest end
    ends: list[float] = []
    # tokens held by what ends then
    holds: dict[float, float] = {}
    wait, pace = np.empty(len(requests)), np.empty(len(requests))
    held, cached = 0, 0.0
    first_counted = int(len(requests) * warm)
    columns = (requests.arrival, prompts, requests.output, requests.held)
    for i, (now, prompt, tokens, own) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        start = now
        while ends and ends[0] <= now:
            cached -= holds.pop(heappop(ends), 0.0)
        if len(ends) == capacity:
            start = heappop(ends)
            cached -= holds.pop(start, 0.0)
        beside = len(ends) // replicas
        each = token_seconds[beside]
        if held_seconds:
            each += held_seconds * (own + (cached / len(ends) * beside if beside else 0.0))
        start = max(start, free[0])
        heapreplace(free, start + prompt)
        # the prompt gives the first token
        end = start + prompt + (tokens - 1) * each
        heappush(ends, end)
        holds[end] = holds.get(end, 0.0) + own
        cached += own
        wait[i], pace[i] = start - now, each
        if i >= first_counted:
            held += len(ends)
    counted = slice(first_counted, None)
    return Waits(
        wait[counted],
        wait[counted] + prompts[counted],
        pace[counted],
        held / max(1, len(requests) - first_counted) / replicas,
    )


def full_moments(requests: Requests, prompts: Array, step: float, most: int, moments: int = 10_000) -> Array:
    """Tokens held by 1, 2, ... `most` sequences together, at random moments of replicas that hold as many: [moments, most].

    A sequence is met in proportion to the time that it stays, prompts: seconds of its prompt, and `step` seconds for each later
    token; it then holds its prompt and the tokens that it has got so far.
    """
    random = np.random.default_rng(0)
    stays = prompts + (requests.output - 1) * step
    # all answers are of one token and prompts take no time
    share = stays / stays.sum() if stays.sum() else None
    met = random.choice(len(requests), (moments, most), p=share)
    since = random.random((moments, most)) * stays[met] - prompts[met]
    made = np.where(since > 0, np.minimum(requests.output[met], 1 + np.floor(since / step)), 0.0) if step else 0.0
    held: Array = (requests.prompt[met] + made).cumsum(1)
    return held


def erlang_wait(rate: float, service: float, servers: int) -> float:
    """Mean seconds of waiting in M/M/c: C(c, a) / (c / service - rate), a = rate * service (Erlang 1917).

    Raises ValueError where work arrives faster than it is done.
    """
    load = rate * service
    if load >= servers:
        raise ValueError(f"{load:g} servers' work for {servers} servers never ends")
    # Erlang's B by its recursion, which does not overflow or underflow
    blocked = 1.0
    for c in range(1, servers + 1):
        blocked = load * blocked / (c + load * blocked)
    waits = blocked / (1 - load / servers * (1 - blocked))
    return waits / (servers / service - rate)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt or an answer: kind 'fixed', 'uniform' (low, high) or 'lognormal' (mean, coefficient of variation)."""

    kind: str
    values: tuple[float, ...]

    def draw(self, n: int, random: np.random.Generator) -> Array:
        """n lengths, whole tokens, at least 1."""
        if self.kind == "fixed":
            found = np.full(n, self.values[0])
        elif self.kind == "uniform":
            found = random.uniform(self.values[0], self.values[1], n)
        else:
            mean, variation = self.values
            sigma = math.sqrt(math.log1p(variation**2))
            found = random.lognormal(math.log(mean) - sigma**2 / 2, sigma, n)
        lengths: Array = np.maximum(1.0, found.round())
        return lengths


def poisson(rate: float, n: int, prompt: Lengths, output: Lengths, seed: int) -> Requests:
    """n requests with exponential times between arrivals, `rate` a second on average."""
    random = np.random.default_rng(seed)
    arrival = np.cumsum(random.exponential(1 / rate, n))
    return Requests(arrival, prompt.draw(n, random), output.draw(n, random))
