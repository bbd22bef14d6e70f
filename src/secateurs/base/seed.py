"""Random numbers of their own for each thing that is named."""

import zlib


def seed_of(seed: int, name: str) -> int:
    """Of a layer's or block's random numbers: the same in a resumed run, another for every name."""
    return zlib.crc32(f"{seed} {name}".encode())
