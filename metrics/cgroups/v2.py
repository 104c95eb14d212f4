"""Readings from cgroup v2 (Documentation/admin-guide/cgroup-v2). None if the cgroup or its controller is gone."""

from __future__ import annotations

import time

from metrics.cgroups.files import Fields, Folder, number
from metrics.stats import (
    CpuReading,
    CpuUsage,
    HugetlbReading,
    IoReading,
    LimitedMemory,
    MemoryEvents,
    MemoryReading,
    PidsReading,
    PressureReading,
    Psi,
    PsiLine,
    memory_reading,
)

_CPU_USAGE = Fields("usage_usec", "user_usec")
_CPU_STAT = Fields(
    "usage_usec",
    "user_usec",
    "system_usec",
    "nr_periods",
    "nr_throttled",
    "throttled_usec",
    "nr_bursts",
    "burst_usec",
)
_MEMORY_STAT = Fields(
    "kernel",
    "anon",
    "file",
    "file_mapped",
    "active_file",
    "inactive_file",
    "pgfault",
    "pgmajfault",
    "workingset_refault_anon",
    "workingset_refault_file",
)
_MEMORY_EVENTS = Fields("high", "max", "oom", "oom_kill")
_HUGETLB_EVENTS = Fields("max", "max")
_MEMORY_FILES = ("memory.current", "memory.stat", "memory.swap.current")
_LIMITED_FILES = (*_MEMORY_FILES, "memory.max", "memory.swap.max")
_EVENT_FILES = (*_MEMORY_FILES, "memory.events", "memory.peak")
_PRESSURE_FILES = ("cpu.pressure", "memory.pressure", "io.pressure")


def cpu_usage(folder: Folder) -> CpuUsage | None:
    """Processor time used."""
    content = folder.read("cpu.stat")
    return None if content is None else CpuUsage(time.time_ns(), _CPU_USAGE.parse(content)[0] * 1000)


def cpu(folder: Folder) -> CpuReading | None:
    """Processor time used and throttling, from one file."""
    content = folder.read("cpu.stat")
    if content is None:
        return None
    usage, user, system, periods, throttled, throttled_us, bursts, burst_us = _CPU_STAT.parse(content)
    return CpuReading(
        time_ns=time.time_ns(),
        usage_ns=usage * 1000,
        user_ns=user * 1000,
        system_ns=system * 1000,
        periods=periods,
        throttled_periods=throttled,
        throttled_ns=throttled_us * 1000,
        bursts=bursts,
        burst_ns=burst_us * 1000,
    )


def memory(folder: Folder) -> tuple[MemoryReading | None, MemoryEvents | None]:
    """Usage, swap and the counters of memory.stat (hierarchical on v2), and events.

    The events are limit hits, OOM kills, the highest usage (since Linux 5.19) and kernel memory (since 5.18).
    """
    *files, events, peak = folder.read_all(_EVENT_FILES)
    found = _memory(folder, *files)
    if found is None or events is None:
        return found and found[0], None
    reading, kernel = found
    high, most, _, killed = _MEMORY_EVENTS.parse(events)
    return reading, MemoryEvents(kernel, number(peak), most, killed, high, most)


def limited_memory(folder: Folder) -> LimitedMemory | None:
    """The usage with the limits."""
    *files, limit, swap_limit = folder.read_all(_LIMITED_FILES)
    found = _memory(folder, *files)
    return LimitedMemory(found[0], number(limit), number(swap_limit)) if found is not None else None


def _memory(
    folder: Folder, usage: bytes | None, stat: bytes | None, swap: bytes | None
) -> tuple[MemoryReading, int] | None:
    """A reading, and the usage of kernel memory."""
    counters = folder.parsed_content("memory.stat", stat, _MEMORY_STAT.parse)
    if usage is None or counters is None:
        return None
    kernel, *others = counters
    return memory_reading(int(usage), number(swap) or 0, others), kernel


def memory_limits(folder: Folder) -> tuple[int | None, int | None, int | None] | None:
    """Limit, reservation (memory.low, as set by the OCI runtimes), and limit of memory plus swap (None: no limit).

    The CRI and cAdvisor count a swap limit together with memory, as v1 does. None if there is no memory controller.
    """
    limit, swap, low = folder.read_all(("memory.max", "memory.swap.max", "memory.low"))
    if limit is None:
        return None
    memory, more = number(limit), number(swap)
    return memory, number(low) or None, None if memory is None or more is None else memory + more


def cpu_limits(folder: Folder) -> tuple[int, int, int | None] | None:
    """Shares (converted from the weight as in the OCI runtimes), period and quota in microseconds (None: no limit)."""
    weight, maximum = folder.read_all(("cpu.weight", "cpu.max"))
    if weight is None or maximum is None:
        return None
    quota, period = maximum.split()
    shares = 2 + (max(int(weight), 1) - 1) * 262142 // 9999  # the weight of an idle group reads as 0
    return shares, int(period), None if quota == b"max" else int(quota)


def io(folder: Folder) -> tuple[IoReading, ...]:
    """Transfers of each device."""
    content = folder.read("io.stat") or b""
    readings = []
    for line in content.decode().splitlines():
        words = line.split()
        # Linux 5.14 to 5.17 print devices without transfers on the next device's line.
        device = next((word for word in reversed(words) if "=" not in word), "")
        values = dict(word.split("=", 1) for word in words if "=" in word)
        major, colon, minor = device.partition(":")
        if colon and values:
            read, written, reads, writes = (int(values.get(key, 0)) for key in ("rbytes", "wbytes", "rios", "wios"))
            readings.append(IoReading(int(major), int(minor), read, written, reads, writes))
    return tuple(readings)


def pids(folder: Folder) -> PidsReading | None:
    """The number of tasks and their limit. v1's controller has the same files."""
    current, limit = folder.numbers("pids.current", "pids.max")
    return None if current is None else PidsReading(current, limit)


def tasks(folder: Folder) -> int | None:
    """The number of tasks."""
    return folder.number("pids.current")


def hugetlb(folder: Folder, sizes: tuple[str, ...]) -> tuple[HugetlbReading, ...]:
    """Huge pages of each size. v2 does not record the highest usage."""
    readings = []
    for size in sizes:
        usage = folder.number(f"hugetlb.{size}.current")
        if usage is not None:
            failures = _HUGETLB_EVENTS.parse(folder.read(f"hugetlb.{size}.events") or b"")[0]
            readings.append(HugetlbReading(size, usage, None, failures))
    return tuple(readings)


def pressure(folder: Folder) -> PressureReading | None:
    """Pressure stall information; None if the kernel has it disabled."""
    cpu, memory, io = (
        folder.parsed_content(name, content, parse_pressure)
        for name, content in zip(_PRESSURE_FILES, folder.read_all(_PRESSURE_FILES), strict=True)
    )
    if cpu is None or memory is None or io is None:
        return None
    return PressureReading(time.time_ns(), cpu, memory, io)


def parse_pressure(content: bytes) -> Psi:
    """Decode a pressure file. Older kernels have no ``full`` line for processors; it becomes zeros."""
    lines = {b"some": _NO_PRESSURE, b"full": _NO_PRESSURE}
    for line in content.splitlines():
        kind, *pairs = line.split()
        avg10, avg60, avg300, total = (pair.partition(b"=")[2] for pair in pairs)
        lines[kind] = PsiLine(float(avg10), float(avg60), float(avg300), int(total) * 1000)
    return Psi(lines[b"some"], lines[b"full"])


_NO_PRESSURE = PsiLine(0.0, 0.0, 0.0, 0)
