"""How long fuzz targets run: some seconds in every run of the tests, as long as ``PODKEEL_FUZZ_SECONDS`` says else."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator


def seconds(usually: float) -> float:
    """The seconds of one target, which ``usually`` takes so many."""
    return float(os.environ.get("PODKEEL_FUZZ_SECONDS", usually))


def rounds(duration: float) -> Iterator[int]:
    """Random seeds, one for each round, until ``duration`` seconds are over; at least one."""
    end = time.monotonic() + duration
    yield random.SystemRandom().randrange(1 << 48)
    while time.monotonic() < end:
        yield random.SystemRandom().randrange(1 << 48)
