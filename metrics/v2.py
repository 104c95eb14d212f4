"""Readings from cgroup v2 (Documentation/admin-guide/cgroup-v2); None when the cgroup or its controller is gone."""

from __future__ import annotations

import time

from metrics.files import Fields, Folder
from metrics.readings import (
    CpuReading,
    CpuUsage,
    HugetlbReading,
    IoReading,
    MemoryEvents,
    MemoryReading,
    PidsReading,
    PressureReading,
    Psi,
    PsiLine,
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
    "inactive_file",
    "anon",
    "file",
    "file_mapped",
    "active_file",
    "pgfault",
    "pgmajfault",
    "workingset_refault_anon",
    "workingset_refault_file",
)
_KERNEL = Fields("kernel", "anon")
_MEMORY_EVENTS = Fields("high", "max", "oom", "oom_kill")
_HUGETLB_EVENTS = Fields("max", "max")


def cpu_usage(folder: Folder) -> CpuUsage | None:
    """Time used."""
    content = folder.read("cpu.stat")
    return None if content is None else CpuUsage(time.time_ns(), _CPU_USAGE.parse(content)[0] * 1000)


def cpu(folder: Folder) -> CpuReading | None:
    """Time used and throttling; all in one file."""
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


def memory(folder: Folder) -> MemoryReading | None:
    """Usage, swap and the counters of memory.stat (hierarchical on v2)."""
    usage = folder.number("memory.current")
    stat = folder.parsed("memory.stat", _MEMORY_STAT.parse)
    swap = folder.number("memory.swap.current")
    now = time.time_ns()
    if usage is None or stat is None:
        return None
    inactive, anon, file, mapped, active, faults, major, refaults_anon, refaults_file = stat
    return MemoryReading(
        time_ns=now,
        usage=usage,
        working_set=max(0, usage - inactive),
        rss=anon,
        cache=file,
        mapped_file=mapped,
        swap=swap or 0,
        active_file=active,
        inactive_file=inactive,
        page_faults=faults,
        major_page_faults=major,
        refaults_anon=refaults_anon,
        refaults_file=refaults_file,
    )


def memory_events(folder: Folder) -> MemoryEvents | None:
    """Limit hits, OOM kills, the peak (kernel 5.19 and later) and kernel memory (5.18 and later)."""
    content = folder.read("memory.events")
    if content is None:
        return None
    high, most, _, killed = _MEMORY_EVENTS.parse(content)
    return MemoryEvents(
        kernel=_KERNEL.parse(folder.read("memory.stat") or b"")[0],
        max_usage=folder.number("memory.peak"),
        failures=most,
        oom_kills=killed,
        high_events=high,
        max_events=most,
    )


def oom_kills(folder: Folder) -> int | None:
    """Processes that the OOM killer took from this cgroup and those below it."""
    content = folder.read("memory.events")
    return None if content is None else _MEMORY_EVENTS.parse(content)[3]


def memory_limit(folder: Folder) -> int | None:
    """The limit in bytes; None: none."""
    return folder.number("memory.max")


def swap_limit(folder: Folder) -> int | None:
    """The limit of swap in bytes; None: none."""
    return folder.number("memory.swap.max")


def memory_limits(folder: Folder) -> tuple[int | None, int | None, int | None]:
    """Limit, protected memory (memory.low, where the OCI runtimes put a reservation), and memory with swap; None: none.

    CRI and cAdvisor count swap limits together with memory, as v1 does.
    """
    limit = folder.number("memory.max")
    swap = folder.number("memory.swap.max")
    total = None if limit is None or swap is None else limit + swap
    return limit, folder.number("memory.low") or None, total


def cpu_limits(folder: Folder) -> tuple[int, int, int | None] | None:
    """Shares (from the weight, as the OCI runtimes convert them), period and quota in microseconds (None: none)."""
    weight = folder.number("cpu.weight")
    maximum = folder.read("cpu.max")
    if weight is None or maximum is None:
        return None
    quota, period = maximum.split()
    shares = 2 + (weight - 1) * 262142 // 9999
    return shares, int(period), None if quota == b"max" else int(quota)


def io(folder: Folder) -> tuple[IoReading, ...]:
    """Transfers per device."""
    content = folder.read("io.stat") or b""
    readings = []
    for line in content.decode().splitlines():
        device, *pairs = line.split()
        major, colon, minor = device.partition(":")
        if colon and pairs:
            values = dict(pair.split("=", 1) for pair in pairs)
            read, written, reads, writes = (int(values.get(key, 0)) for key in ("rbytes", "wbytes", "rios", "wios"))
            readings.append(IoReading(int(major), int(minor), read, written, reads, writes))
    return tuple(readings)


def pids(folder: Folder) -> PidsReading | None:
    """Tasks and their limit."""
    current = folder.number("pids.current")
    return None if current is None else PidsReading(current, folder.number("pids.max"))


def hugetlb(folder: Folder, sizes: tuple[str, ...]) -> tuple[HugetlbReading, ...]:
    """Huge pages of every size; v2 keeps no highest usage."""
    readings = []
    for size in sizes:
        usage = folder.number(f"hugetlb.{size}.current")
        if usage is not None:
            failures = _HUGETLB_EVENTS.parse(folder.read(f"hugetlb.{size}.events") or b"")[0]
            readings.append(HugetlbReading(size, usage, None, failures))
    return tuple(readings)


def pressure(folder: Folder) -> PressureReading | None:
    """Pressure stall information; None where the kernel has it switched off."""
    cpu, memory, io = (folder.parsed(f"{name}.pressure", parse_pressure) for name in ("cpu", "memory", "io"))
    if cpu is None or memory is None or io is None:
        return None
    return PressureReading(time.time_ns(), cpu, memory, io)


def parse_pressure(content: bytes) -> Psi:
    """The lines of a pressure file; older kernels have no ``full`` line for processors, which reads as zeros."""
    lines = {b"some": _NO_PRESSURE, b"full": _NO_PRESSURE}
    for line in content.splitlines():
        kind, *pairs = line.split()
        avg10, avg60, avg300, total = (pair.partition(b"=")[2] for pair in pairs)
        lines[kind] = PsiLine(float(avg10), float(avg60), float(avg300), int(total) * 1000)
    return Psi(lines[b"some"], lines[b"full"])


_NO_PRESSURE = PsiLine(0.0, 0.0, 0.0, 0)
