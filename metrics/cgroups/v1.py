"""Readings from cgroup v1 controllers (Documentation/admin-guide/cgroup-v1). None if the cgroup is gone."""

from __future__ import annotations

import os
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
    memory_reading,
)

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# v1's "no limit" is the largest page-aligned number; real limits are much smaller.
_UNLIMITED = 1 << 62

_CPU_TIMES = Fields("user", "system")
_CPU_STAT = Fields("nr_periods", "nr_throttled", "throttled_time", "nr_bursts", "burst_time")
_MEMORY_STAT = Fields(
    "hierarchical_memory_limit",
    "total_swap",
    "total_rss",
    "total_cache",
    "total_mapped_file",
    "total_active_file",
    "total_inactive_file",
    "total_pgfault",
    "total_pgmajfault",
    "total_workingset_refault_anon",
    "total_workingset_refault_file",
)
_OOM_CONTROL = Fields("oom_kill", "under_oom")
_EVENT_FILES = ("memory.failcnt", "memory.kmem.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_LIMIT_FILES = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.memsw.limit_in_bytes")


def cpu_usage(cpuacct: Folder) -> CpuUsage | None:
    """Processor time used, from one file."""
    usage = cpuacct.number("cpuacct.usage")
    return None if usage is None else CpuUsage(time.time_ns(), usage)


def cpu(cpuacct: Folder, cpu_folder: Folder) -> CpuReading | None:
    """Processor time used, its division into user and kernel time (in clock ticks), and throttling."""
    usage = cpuacct.number("cpuacct.usage")
    times = cpuacct.read("cpuacct.stat")
    now = time.time_ns()
    if usage is None or times is None:
        return None
    user, system = _CPU_TIMES.parse(times)
    periods, throttled, throttled_ns, bursts, burst_ns = _CPU_STAT.parse(cpu_folder.read("cpu.stat") or b"")
    return CpuReading(
        now, usage, user * _TICK_NS, system * _TICK_NS, periods, throttled, throttled_ns, bursts, burst_ns
    )


def memory(folder: Folder) -> tuple[MemoryReading | None, MemoryEvents | None]:
    """Usage, the hierarchical counters of memory.stat, limit hits, OOM kills, the highest usage and kernel memory.

    v1 has no high limit. Its limit hits are reported as v2's max events. OOM kills are those of this cgroup, not of
    cgroups below.
    """
    found = _memory(folder)
    failures, kernel, most, control = folder.read_all(_EVENT_FILES)
    if found is None or failures is None:
        return found and found[0], None
    hits, killed = int(failures), _OOM_CONTROL.parse(control or b"")[0]
    return found[0], MemoryEvents(number(kernel), number(most), hits, killed, 0, hits)


def limited_memory(folder: Folder) -> LimitedMemory | None:
    """The usage with the limits. v1 has no limit of swap alone, only one of memory and swap together."""
    found = _memory(folder)
    if found is None:
        return None
    reading, smallest = found
    if smallest >= _UNLIMITED:
        return LimitedMemory(reading, None, None)
    limit, total = map(_limit, folder.numbers("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"))
    return LimitedMemory(reading, limit, None if limit is None or total is None else max(0, total - limit))


def _memory(folder: Folder) -> tuple[MemoryReading, int] | None:
    """A reading, and the smallest limit of the cgroup and its parents."""
    usage, stat = folder.read_all(("memory.usage_in_bytes", "memory.stat"))
    counters = folder.parsed_content("memory.stat", stat, _MEMORY_STAT.parse)
    if usage is None or counters is None:
        return None
    smallest, swap, *others = counters
    return memory_reading(int(usage), swap, others), smallest


def memory_limits(folder: Folder) -> tuple[int | None, int | None, int | None] | None:
    """Limit, soft limit, and limit of memory plus swap, in bytes (None: no limit). None if there is no controller."""
    numbers = folder.numbers(*_LIMIT_FILES)
    if numbers[0] is None:
        return None
    limit, reservation, swap = map(_limit, numbers)
    return limit, reservation, swap


def cpu_limits(folder: Folder) -> tuple[int, int, int | None] | None:
    """Shares, period and quota in microseconds (quota None: no limit)."""
    shares, period, quota = folder.numbers("cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us")
    if shares is None:
        return None
    return shares, period or 0, quota if quota is not None and quota >= 0 else None


def io(folder: Folder) -> tuple[IoReading, ...]:
    """Transfers of each device, including those of cgroups below.

    The throttling policy counts them; on recent kernels only after a limit was set on the device. Otherwise the BFQ
    scheduler counts them, if it is in use.
    """
    devices: dict[str, dict[str, int]] = {}
    for policy in ("throttle", "bfq"):
        moved = folder.read(f"blkio.{policy}.io_service_bytes_recursive")
        if moved is not None and not devices:
            _collect(devices, moved, "bytes")
            if devices:
                _collect(devices, folder.read(f"blkio.{policy}.io_serviced_recursive") or b"", "count")
    return tuple(
        IoReading(
            int(device.partition(":")[0]),
            int(device.partition(":")[2]),
            values.get("Read bytes", 0),
            values.get("Write bytes", 0),
            values.get("Read count", 0),
            values.get("Write count", 0),
        )
        for device, values in devices.items()
    )


def hugetlb(folder: Folder, sizes: tuple[str, ...]) -> tuple[HugetlbReading, ...]:
    """Huge pages of every size."""
    names = [f"hugetlb.{size}.{file}" for size in sizes for file in ("usage_in_bytes", "max_usage_in_bytes", "failcnt")]
    found = folder.numbers(*names)
    readings = []
    for size, usage, most, failures in zip(sizes, found[::3], found[1::3], found[2::3], strict=True):
        if usage is not None:
            readings.append(HugetlbReading(size, usage, most, failures or 0))
    return tuple(readings)


def _limit(value: int | None) -> int | None:
    return None if value is None or value >= _UNLIMITED else value


def _collect(devices: dict[str, dict[str, int]], content: bytes, what: str) -> None:
    for line in content.decode().splitlines():
        words = line.split()
        if len(words) == 3:  # the last line is a total without device
            devices.setdefault(words[0], {})[f"{words[1]} {what}"] = int(words[2])
