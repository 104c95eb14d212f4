"""The duration of fuzz targets: some seconds by default, otherwise ``PODKEEL_FUZZ_SECONDS``."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

_INTERESTING = (0, 1, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)


def seconds(usually: float) -> float:
    """The duration of one target in seconds; ``usually`` is its default."""
    return float(os.environ.get("PODKEEL_FUZZ_SECONDS", usually))


def rounds(duration: float) -> Iterator[int]:
    """Random seeds, one per round, until ``duration`` seconds have passed; at least one."""
    end = time.monotonic() + duration
    yield random.SystemRandom().randrange(1 << 48)
    while time.monotonic() < end:
        yield random.SystemRandom().randrange(1 << 48)


def changed(generator: random.Random, data: bytes) -> bytes:
    """``data`` with some bytes changed, removed, repeated or inserted."""
    mutated = bytearray(data)
    for _ in range(generator.randrange(1, 8)):
        position = generator.randrange(len(mutated) + 1)
        change = generator.randrange(5)
        if change == 0 and position < len(mutated):
            mutated[position] = generator.choice(_INTERESTING)
        elif change == 1 and position < len(mutated):
            mutated[position] ^= 1 << generator.randrange(8)
        elif change == 2:
            del mutated[position : position + generator.randrange(1, 20)]
        elif change == 3:
            mutated[position:position] = mutated[position : position + generator.randrange(1, 60)]
        else:
            mutated[position:position] = generator.randbytes(generator.randrange(1, 12))
    return bytes(mutated)
