"""What readers return: plain numbers in base units (bytes, nanoseconds); None if the kernel has no value."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec


class CpuUsage(msgspec.Struct, frozen=True, gc=False):
    """Processor time used since the cgroup was made, and the time of the reading (nanoseconds since the epoch)."""

    time_ns: int
    usage_ns: int


class CpuReading(msgspec.Struct, frozen=True, gc=False):
    """Processor time, and how often and how long the quota throttled it."""

    time_ns: int
    usage_ns: int
    user_ns: int
    system_ns: int
    periods: int
    throttled_periods: int
    throttled_ns: int
    bursts: int
    burst_ns: int


class MemoryReading(msgspec.Struct, frozen=True, gc=False):
    """Memory in use, in bytes. The working set is the usage minus inactive file pages, at least 0."""

    time_ns: int
    usage: int
    working_set: int
    rss: int
    cache: int
    mapped_file: int
    swap: int
    active_file: int
    inactive_file: int
    page_faults: int
    major_page_faults: int
    refaults_anon: int
    refaults_file: int


def memory_reading(usage: int, swap: int, counters: Sequence[int]) -> MemoryReading:
    """A reading taken now. ``counters`` are the fields from ``rss`` on, without ``swap``, in their order."""
    rss, cache, mapped_file, active_file, inactive_file, *events = counters
    working_set = usage - inactive_file if usage > inactive_file else 0
    now = time.time_ns()
    return MemoryReading(now, usage, working_set, rss, cache, mapped_file, swap, active_file, inactive_file, *events)


class LimitedMemory(msgspec.Struct, frozen=True, gc=False):
    """Memory in use, and the limits of memory and of swap alone. None: no limit."""

    reading: MemoryReading
    limit: int | None
    swap_limit: int | None


class MemoryEvents(msgspec.Struct, frozen=True, gc=False):
    """Events at the limits, the highest usage, and kernel memory."""

    kernel: int | None
    max_usage: int | None
    failures: int
    oom_kills: int
    high_events: int
    max_events: int


class IoReading(msgspec.Struct, frozen=True, gc=False):
    """Transfers to and from one block device."""

    major: int
    minor: int
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int


class PidsReading(msgspec.Struct, frozen=True, gc=False):
    """The number of tasks (each thread counts) and their limit. None: no limit."""

    current: int
    limit: int | None


class HugetlbReading(msgspec.Struct, frozen=True, gc=False):
    """Huge pages of one size, in bytes. ``page_size`` is as in the cgroup's file names (``2MB``)."""

    page_size: str
    usage: int
    max_usage: int | None
    failures: int


class PsiLine(msgspec.Struct, frozen=True, gc=False):
    """One line of a pressure file: per cent of the last 10, 60 and 300 seconds, and the total time."""

    avg10: float
    avg60: float
    avg300: float
    total_ns: int


class Psi(msgspec.Struct, frozen=True, gc=False):
    """Time in which some tasks, or all of them (full), waited for a resource."""

    some: PsiLine
    full: PsiLine


class PressureReading(msgspec.Struct, frozen=True, gc=False):
    """Pressure stall information of a cgroup."""

    time_ns: int
    cpu: Psi
    memory: Psi
    io: Psi


class LimitsReading(msgspec.Struct, frozen=True, gc=False):
    """The limits in force. None: no limit. Shares are v1's (converted from v2's weight), times are microseconds.

    Shares and period are None if the cgroup has no cpu controller.
    """

    cpu_shares: int | None
    cpu_period: int | None
    cpu_quota: int | None
    memory_limit: int | None
    memory_reservation: int | None
    swap_limit: int | None


class Reading(msgspec.Struct, frozen=True):
    """All readings of one cgroup. None or empty if a controller is missing."""

    cpu: CpuReading | None = None
    memory: MemoryReading | None = None
    memory_events: MemoryEvents | None = None
    io: tuple[IoReading, ...] = ()
    pids: PidsReading | None = None
    hugetlb: tuple[HugetlbReading, ...] = ()
    pressure: PressureReading | None = None
    limits: LimitsReading | None = None


class InterfaceReading(msgspec.Struct, frozen=True, gc=False):
    """Traffic of one interface, from the pod's side."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


class ConnectionsReading(msgspec.Struct, frozen=True):
    """Sockets of a network namespace: TCP by state (``established``…); UDP with queues and drops."""

    tcp: dict[str, int]
    tcp6: dict[str, int]
    udp: dict[str, int]
    udp6: dict[str, int]


class NetworkReading(msgspec.Struct, frozen=True):
    """Every interface of a pod's network namespace except the loopback."""

    time_ns: int
    interfaces: tuple[InterfaceReading, ...]
    connections: ConnectionsReading | None = None


class ProcessesReading(msgspec.Struct, frozen=True):
    """The processes of a cgroup and of the cgroups below it. ``states`` counts threads, with cAdvisor's names."""

    processes: int
    descriptors: int
    sockets: int
    open_files_soft_limit: int | None
    states: dict[str, int]


class FilesystemReading(msgspec.Struct, frozen=True, gc=False):
    """The size of a container's writable layer, and its file system."""

    device: str
    usage: int
    limit: int
    inodes_free: int
    inodes_total: int
