"""Simulates requests that wait for replicas: one queue, first come first served, and replicas that batch their sequences.

A replica holds up to `slots` sequences and works on one prompt at a time. A request keeps the pace of the batch that it joins until
its end: requests that come later do not slow it, and ones that leave do not speed it up. Sequences are spread evenly over replicas.
With one slot and exponential work this is M/M/c, whose waiting time has a closed form (erlang_wait).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


# the share of the first requests that is not counted, because they find the fleet empty
WARM = 0.1


@dataclass(frozen=True)
class Requests:
    """Requests in order of arrival. arrival: seconds. prompt, output: tokens."""

    arrival: Array
    prompt: Array
    output: Array

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests a second."""
        return (len(self) - 1) / float(self.arrival[-1] - self.arrival[0])

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
    requests: Requests, replicas: int, prompt_seconds: float, token_seconds: Sequence[float], warm: float = WARM
) -> Waits:
    """Serve requests with that many replicas, and measure their waits.

    prompt_seconds: of one prompt token. token_seconds[b - 1]: seconds between tokens of a sequence when its replica holds b; its
    length is the number of slots. warm: the share of the first requests that is not counted.
    """
    slots = len(token_seconds)
    capacity = replicas * slots
    # when each replica has finished its prompts; the next prompt goes to the one that is free first
    free = [0.0] * replicas
    # when each sequence in service ends, a heap; in a full fleet the next request starts at the earliest end
    ends: list[float] = []
    wait, pace = np.empty(len(requests)), np.empty(len(requests))
    prompts = requests.prompt * prompt_seconds
    held = 0
    first_counted = int(len(requests) * warm)
    for i, (now, prompt, tokens) in enumerate(
        zip(requests.arrival.tolist(), prompts.tolist(), requests.output.tolist(), strict=True)
    ):
        start = now
        while ends and ends[0] <= now:
            heappop(ends)
        if len(ends) == capacity:
            start = heappop(ends)
        each = token_seconds[len(ends) // replicas]
        start = max(start, free[0])
        heapreplace(free, start + prompt)
        # the prompt gives the first token
        heappush(ends, start + prompt + (tokens - 1) * each)
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
