"""Readings from cgroup v1 controllers (Documentation/admin-guide/cgroup-v1); None when the cgroup is gone."""

from __future__ import annotations

import os
import time

from metrics.files import Fields, Folder
from metrics.readings import CpuReading, CpuUsage, HugetlbReading, IoReading, MemoryEvents, MemoryReading, PidsReading

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
# What v1 calls "no limit" is the largest page-aligned number; nothing real comes near it.
_UNLIMITED = 1 << 62

_CPU_TIMES = Fields("user", "system")
_CPU_STAT = Fields("nr_periods", "nr_throttled", "throttled_time", "nr_bursts", "burst_time")
_MEMORY_STAT = Fields(
    "total_inactive_file",
    "total_rss",
    "total_cache",
    "total_mapped_file",
    "total_swap",
    "total_active_file",
    "total_pgfault",
    "total_pgmajfault",
    "total_workingset_refault_anon",
    "total_workingset_refault_file",
)
_OOM_CONTROL = Fields("oom_kill", "under_oom")


def cpu_usage(cpuacct: Folder) -> CpuUsage | None:
    """Time used, from one file."""
    usage = cpuacct.number("cpuacct.usage")
    return None if usage is None else CpuUsage(time.time_ns(), usage)


def cpu(cpuacct: Folder, cpu_folder: Folder) -> CpuReading | None:
    """Time used, its division between user and kernel (in clock ticks), and throttling."""
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


def memory(folder: Folder) -> MemoryReading | None:
    """Usage and the hierarchical counters of memory.stat."""
    usage = folder.number("memory.usage_in_bytes")
    stat = folder.parsed("memory.stat", _MEMORY_STAT.parse)
    now = time.time_ns()
    if usage is None or stat is None:
        return None
    inactive, rss, cache, mapped, swap, active, faults, major, anon, file = stat
    return MemoryReading(
        time_ns=now,
        usage=usage,
        working_set=max(0, usage - inactive),
        rss=rss,
        cache=cache,
        mapped_file=mapped,
        swap=swap,
        active_file=active,
        inactive_file=inactive,
        page_faults=faults,
        major_page_faults=major,
        refaults_anon=anon,
        refaults_file=file,
    )


def memory_events(folder: Folder) -> MemoryEvents | None:
    """Limit hits, OOM kills, the peak and kernel memory; v1 has no high limit, and its hits are what v2 calls max."""
    failures = folder.number("memory.failcnt")
    if failures is None:
        return None
    return MemoryEvents(
        kernel=folder.number("memory.kmem.usage_in_bytes"),
        max_usage=folder.number("memory.max_usage_in_bytes"),
        failures=failures,
        oom_kills=oom_kills(folder) or 0,
        high_events=0,
        max_events=failures,
    )


def oom_kills(folder: Folder) -> int | None:
    """Processes that the OOM killer took from this cgroup (not from those below it)."""
    content = folder.read("memory.oom_control")
    return None if content is None else _OOM_CONTROL.parse(content)[0]


def memory_limit(folder: Folder) -> int | None:
    """The limit in bytes; None: none."""
    return _limit(folder.number("memory.limit_in_bytes"))


def swap_limit(folder: Folder) -> int | None:
    """The limit of swap alone in bytes, which v1 keeps as one of memory and swap together; None: none."""
    total = _limit(folder.number("memory.memsw.limit_in_bytes"))
    limit = _limit(folder.number("memory.limit_in_bytes")) if total is not None else None
    return None if limit is None or total is None else max(0, total - limit)


def memory_limits(folder: Folder) -> tuple[int | None, int | None, int | None]:
    """Limit, soft limit, and limit of memory and swap together, in bytes; None: none."""
    names = ("memory.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.memsw.limit_in_bytes")
    limit, reservation, swap = (_limit(folder.number(name)) for name in names)
    return limit, reservation, swap


def cpu_limits(folder: Folder) -> tuple[int, int, int | None] | None:
    """Shares, period and quota in microseconds (None: none)."""
    shares = folder.number("cpu.shares")
    period = folder.number("cpu.cfs_period_us")
    quota = folder.number("cpu.cfs_quota_us")
    if shares is None:
        return None
    return shares, period or 0, quota if quota is not None and quota >= 0 else None


def io(folder: Folder) -> tuple[IoReading, ...]:
    """Transfers per device, those of cgroups below included.

    The throttling policy counts them, on recent kernels only once some limit was set on the device; else the BFQ
    scheduler does, where it is in use.
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


def pids(folder: Folder) -> PidsReading | None:
    """Tasks and their limit."""
    current = folder.number("pids.current")
    return None if current is None else PidsReading(current, folder.number("pids.max"))


def hugetlb(folder: Folder, sizes: tuple[str, ...]) -> tuple[HugetlbReading, ...]:
    """Huge pages of every size."""
    readings = []
    for size in sizes:
        usage = folder.number(f"hugetlb.{size}.usage_in_bytes")
        if usage is not None:
            most = folder.number(f"hugetlb.{size}.max_usage_in_bytes")
            readings.append(HugetlbReading(size, usage, most, folder.number(f"hugetlb.{size}.failcnt") or 0))
    return tuple(readings)


def _limit(value: int | None) -> int | None:
    return None if value is None or value >= _UNLIMITED else value


def _collect(devices: dict[str, dict[str, int]], content: bytes, what: str) -> None:
    for line in content.decode().splitlines():
        words = line.split()
        if len(words) == 3:  # the last line is a total without device
            devices.setdefault(words[0], {})[f"{words[1]} {what}"] = int(words[2])
