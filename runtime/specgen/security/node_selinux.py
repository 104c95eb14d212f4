"""A different level for each pod, by which SELinux separates pods (multi-category security)."""

from __future__ import annotations

import random
from collections.abc import Collection

CATEGORIES = 1024

_random = random.SystemRandom()


def free_level(used: Collection[str]) -> str:
    """A level of two categories that is none of those in use, such as ``s0:c12,c345``.

    It is drawn at random, so that the containers of other agents on the node hardly ever have the same.
    """
    while True:
        low, high = sorted(_random.sample(range(CATEGORIES), 2))
        level = f"s0:c{low},c{high}"
        if level not in used:
            return level
