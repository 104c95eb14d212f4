"""Resources of containers, computed from quantities as kubelet does."""

from __future__ import annotations

import math
from fractions import Fraction

CPU_PERIOD = 100_000
_MIN_QUOTA = 1_000
_MIN_SHARES = 2
_MAX_SHARES = 262_144


def whole(number: Fraction) -> int:
    """Rounded up, as Kubernetes rounds what must be a whole number."""
    return math.ceil(number)


def cpu_shares(cores: Fraction) -> int:
    """The weight that kubelet gives a request: 1024 for a core, 2 at least (also for none)."""
    return min(max(whole(cores * 1000) * 1024 // 1000, _MIN_SHARES), _MAX_SHARES)


def cpu_quota(cores: Fraction) -> int:
    """Microseconds in each CPU_PERIOD that kubelet gives a limit, at least 1000."""
    return max(whole(cores * 1000) * CPU_PERIOD // 1000, _MIN_QUOTA)
