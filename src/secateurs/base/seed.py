"""Seeds for layers and blocks, and the caller's random numbers left as they are."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(seed: int, name: str) -> int:
    """The seed for a layer or block: the same in a run that is continued, another one for every name."""
    return zlib.crc32(f"{seed} {name}".encode())


@contextmanager
def own_numbers() -> Iterator[None]:
    """A context for code that seeds or draws from shared generators: those of Python, NumPy and torch are restored after it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        # torch.manual_seed() seeds all cards
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
