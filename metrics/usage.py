"""The usage of cgroups for statistics, and rates over a time window."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from metrics.stats import CpuUsage, MemoryReading, PressureReading

WINDOW_NS = 10_000_000_000
MIN_WINDOW_NS = 200_000_000


class CpuWindow:
    """Processor use of one cgroup in nano-cores (10^9 is one fully used core), averaged over 10 to 20 seconds.

    It keeps two earlier readings, at least ten seconds apart. The rate is computed from the older one, so that it does
    not depend on how often it is read. Until a reading is that old, the rate is computed from the first reading, or
    from the container's start if ``started_ns`` (nanoseconds since the epoch) is given.
    """

    __slots__ = ("_last", "_newer", "_older")

    def __init__(self, started_ns: int | None = None) -> None:
        self._older = CpuUsage(started_ns, 0) if started_ns is not None else None
        self._newer = self._older
        self._last: int | None = None

    def add(self, usage: CpuUsage) -> int | None:
        """The rate up to this reading. None until there is a window of at least 0.2 seconds."""
        if self._older is None or self._newer is None or _was_set_back(self._newer, usage):
            self._older = self._newer = usage
            self._last = None
            return None
        if usage.time_ns - self._newer.time_ns >= WINDOW_NS:
            self._older, self._newer = self._newer, usage
        elapsed = usage.time_ns - self._older.time_ns
        if elapsed >= MIN_WINDOW_NS:
            self._last = (usage.usage_ns - self._older.usage_ns) * 1_000_000_000 // elapsed
        return self._last


def _was_set_back(before: CpuUsage, after: CpuUsage) -> bool:
    """Whether the counter or the clock was set back. A small step back only means that two threads overlapped."""
    return after.usage_ns < before.usage_ns or after.time_ns < before.time_ns - MIN_WINDOW_NS


class Usage(msgspec.Struct, frozen=True):
    """The usage of one cgroup or the sum of several. None if the kernel has no value; for limits: no limit.

    ``nano_cores`` is the rate of processor use over a window. ``tasks`` counts threads, if requested.
    """

    cpu: CpuUsage
    nano_cores: int | None = None
    memory: MemoryReading | None = None
    memory_limit: int | None = None
    swap_limit: int | None = None
    pressure: PressureReading | None = None
    tasks: int | None = None


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of several cgroups, for pods without their own. For an empty list: zero usage, now."""
    parts = list(usages)
    memories = [part.memory for part in parts if part.memory is not None]
    now = time.time_ns()
    sums = {name: sum(getattr(memory, name) for memory in memories) for name in _SUMMED}
    rates = [part.nano_cores for part in parts if part.nano_cores is not None]
    return Usage(
        cpu=CpuUsage(max((part.cpu.time_ns for part in parts), default=now), sum(part.cpu.usage_ns for part in parts)),
        nano_cores=sum(rates) if rates or not parts else None,
        memory=MemoryReading(time_ns=max((memory.time_ns for memory in memories), default=now), **sums),
        tasks=sum(part.tasks or 0 for part in parts),
    )


_SUMMED = tuple(name for name in MemoryReading.__struct_fields__ if name != "time_ns")
