"""A seed for each layer or block, derived from its name."""

import zlib


def seed_of(seed: int, name: str) -> int:
    """The seed for a layer or block: the same in a run that is continued, another one for every name."""
    return zlib.crc32(f"{seed} {name}".encode())
