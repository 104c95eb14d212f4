"""Rates over a real window from counters that are read at any time."""

from __future__ import annotations

from metrics.stats import CpuUsage

WINDOW_NS = 10_000_000_000
SHORTEST_NS = 200_000_000


class CpuWindow:
    """Processor use of one cgroup in nano-cores (10^9 is one core fully used), averaged over 10 to 20 seconds.

    Two earlier readings are kept, at least ten seconds apart; the rate is taken from the older one, so that it does not
    depend on how often it is asked for. Until there is one that old, it is taken from the first reading, or from the
    container's start if ``started_ns`` (nanoseconds since the epoch) is given.
    """

    __slots__ = ("_last", "_newer", "_older")

    def __init__(self, started_ns: int | None = None) -> None:
        self._older = CpuUsage(started_ns, 0) if started_ns is not None else None
        self._newer = self._older
        self._last: int | None = None

    def add(self, usage: CpuUsage) -> int | None:
        """The rate up to this reading; None as long as there is no window of at least 0.2 seconds."""
        if self._older is None or self._newer is None or _goes_back(self._newer, usage):
            self._older = self._newer = usage
            self._last = None
            return None
        if usage.time_ns - self._newer.time_ns >= WINDOW_NS:
            self._older, self._newer = self._newer, usage
        elapsed = usage.time_ns - self._older.time_ns
        if elapsed >= SHORTEST_NS:
            self._last = (usage.usage_ns - self._older.usage_ns) * 1_000_000_000 // elapsed
        return self._last


def _goes_back(before: CpuUsage, after: CpuUsage) -> bool:
    """Whether the counter, or the clock, was set back; not whether two threads got ahead of each other."""
    return after.usage_ns < before.usage_ns or after.time_ns < before.time_ns - SHORTEST_NS
