"""All container metrics, with cAdvisor's names, so that dashboards and rules made for kubelet work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from metrics.filesystems import device_name
from metrics.samples import Kind, Metric, Sample, Snapshot
from metrics.stats import (
    ConnectionsReading,
    CpuReading,
    FilesystemReading,
    HugetlbReading,
    InterfaceReading,
    IoReading,
    LimitsReading,
    MemoryEvents,
    MemoryReading,
    PidsReading,
    PressureReading,
    ProcessesReading,
    Reading,
)

_NS = 1e-9


def _of_reading(part: str, value: Callable[..., float | None]) -> Callable[[Snapshot], Iterable[Sample]]:
    """A function that returns one sample from a part of the cgroup's reading; none if part or value is missing."""

    def sample(snapshot: Snapshot) -> Iterable[Sample]:
        reading = getattr(snapshot.reading, part) if snapshot.reading is not None else None
        number = value(reading) if reading is not None else None
        return () if number is None else (((), number),)

    return sample


def _of_cgroup(part: str, rows: Iterable[tuple[str, str, Kind, Callable[..., float | None]]]) -> Iterator[Metric]:
    for name, text, kind, value in rows:
        yield Metric(f"container_{name}", text, kind, (), _of_reading(part, value))


def _cpu() -> Iterator[Metric]:
    def usage(snapshot: Snapshot) -> Iterable[Sample]:
        reading = snapshot.reading
        return () if reading is None or reading.cpu is None else ((("total",), reading.cpu.usage_ns * _NS),)

    rows: tuple[tuple[str, str, Kind, Callable[[CpuReading], float]], ...] = (
        ("cpu_user_seconds_total", "Processor time in user mode.", _COUNTER, lambda r: r.user_ns * _NS),
        ("cpu_system_seconds_total", "Processor time in the kernel.", _COUNTER, lambda r: r.system_ns * _NS),
        ("cpu_cfs_periods_total", "Enforcement periods of the CPU quota.", _COUNTER, lambda r: r.periods),
        ("cpu_cfs_throttled_periods_total", "Throttled periods.", _COUNTER, lambda r: r.throttled_periods),
        ("cpu_cfs_throttled_seconds_total", "Throttled time.", _COUNTER, lambda r: r.throttled_ns * _NS),
        ("cpu_cfs_burst_periods_total", "Periods in which a burst exceeded the quota.", _COUNTER, lambda r: r.bursts),
        ("cpu_cfs_burst_seconds_total", "Time used above the quota in bursts.", _COUNTER, lambda r: r.burst_ns * _NS),
    )
    text = "Processor time used."
    yield Metric("container_cpu_usage_seconds_total", text, _COUNTER, ("cpu",), usage)
    yield from _of_cgroup("cpu", rows)


def _memory() -> Iterator[Metric]:
    rows: tuple[tuple[str, str, Kind, Callable[[MemoryReading], float]], ...] = (
        ("memory_usage_bytes", "Memory in use, page cache included.", _GAUGE, lambda r: r.usage),
        ("memory_working_set_bytes", "Memory in use minus inactive file pages.", _GAUGE, lambda r: r.working_set),
        ("memory_rss", "Anonymous memory.", _GAUGE, lambda r: r.rss),
        ("memory_cache", "Page cache.", _GAUGE, lambda r: r.cache),
        ("memory_mapped_file", "Files mapped into memory.", _GAUGE, lambda r: r.mapped_file),
        ("memory_swap", "Swap in use.", _GAUGE, lambda r: r.swap),
        ("memory_total_active_file_bytes", "Active file pages.", _GAUGE, lambda r: r.active_file),
        ("memory_total_inactive_file_bytes", "Inactive file pages.", _GAUGE, lambda r: r.inactive_file),
        ("memory_workingset_refault_file_total", "Refaults of file pages.", _COUNTER, lambda r: r.refaults_file),
        ("memory_workingset_refault_anon_total", "Refaults of swapped pages.", _COUNTER, lambda r: r.refaults_anon),
    )
    events: tuple[tuple[str, str, Kind, Callable[[MemoryEvents], float | None]], ...] = (
        ("memory_kernel_usage", "Kernel memory.", _GAUGE, lambda r: r.kernel),
        ("memory_max_usage_bytes", "Highest memory use so far.", _GAUGE, lambda r: r.max_usage),
        ("memory_failcnt", "How often the memory limit was hit.", _COUNTER, lambda r: r.failures),
        ("memory_events_high_total", "Times memory.high was exceeded.", _COUNTER, lambda r: r.high_events),
        ("memory_events_max_total", "Times memory.max was about to be exceeded.", _COUNTER, lambda r: r.max_events),
    )

    def failures(snapshot: Snapshot) -> Iterable[Sample]:
        if snapshot.reading is None or snapshot.reading.memory is None:
            return
        memory = snapshot.reading.memory
        for kind, count in (("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)):
            for scope in ("container", "hierarchy"):
                yield (kind, scope), count

    yield from _of_cgroup("memory", rows)
    yield from _of_cgroup("memory_events", events)
    text = "Page faults."
    yield Metric("container_memory_failures_total", text, _COUNTER, ("failure_type", "scope"), failures)
    out_of_memory: tuple[tuple[str, str, Kind, Callable[[MemoryEvents], float]], ...] = (
        ("oom_events_total", "Processes killed by the OOM killer.", _COUNTER, lambda r: r.oom_kills),
    )
    yield from _of_cgroup("memory_events", out_of_memory)


def _network() -> Iterator[Metric]:
    def per_interface(value: Callable[[InterfaceReading], int]) -> Callable[[Snapshot], Iterable[Sample]]:
        return lambda s: (((i.name,), value(i)) for i in s.network.interfaces) if s.network is not None else ()

    rows: tuple[tuple[str, str, Callable[[InterfaceReading], int]], ...] = (
        ("receive_bytes", "Bytes received.", lambda i: i.rx_bytes),
        ("receive_packets", "Packets received.", lambda i: i.rx_packets),
        ("receive_packets_dropped", "Packets dropped while receiving.", lambda i: i.rx_dropped),
        ("receive_errors", "Errors while receiving.", lambda i: i.rx_errors),
        ("transmit_bytes", "Bytes sent.", lambda i: i.tx_bytes),
        ("transmit_packets", "Packets sent.", lambda i: i.tx_packets),
        ("transmit_packets_dropped", "Packets dropped while sending.", lambda i: i.tx_dropped),
        ("transmit_errors", "Errors while sending.", lambda i: i.tx_errors),
    )
    for name, text, value in rows:
        full_name = f"container_network_{name}_total"
        yield Metric(full_name, text, _COUNTER, ("interface",), per_interface(value))

    def per_state(value: Callable[[ConnectionsReading], dict[str, int]]) -> Callable[[Snapshot], Iterable[Sample]]:
        def sample(snapshot: Snapshot) -> Iterable[Sample]:
            connections = snapshot.network.connections if snapshot.network is not None else None
            return () if connections is None else (((state,), n) for state, n in value(connections).items())

        return sample

    tables: tuple[tuple[str, str, Callable[[ConnectionsReading], dict[str, int]]], ...] = (
        ("tcp", "tcp_state", lambda c: c.tcp),
        ("tcp6", "tcp_state", lambda c: c.tcp6),
        ("udp", "udp_state", lambda c: c.udp),
        ("udp6", "udp_state", lambda c: c.udp6),
    )
    for name, label, table in tables:
        text = f"Sockets in {name} states."
        yield Metric(f"container_network_{name}_usage_total", text, _GAUGE, (label,), per_state(table))


def _filesystem() -> Iterator[Metric]:
    def of_layer(value: Callable[[FilesystemReading], int]) -> Callable[[Snapshot], Iterable[Sample]]:
        return lambda s: (((s.filesystem.device,), value(s.filesystem)),) if s.filesystem is not None else ()

    def per_device(value: Callable[[IoReading], int]) -> Callable[[Snapshot], Iterable[Sample]]:
        return lambda s: (((device_name(io.major, io.minor),), value(io)) for io in _io(s.reading))

    layer: tuple[tuple[str, str, Callable[[FilesystemReading], int]], ...] = (
        ("usage_bytes", "Size of the container's writable layer in bytes.", lambda f: f.usage),
        ("limit_bytes", "Size of the file system of the writable layer.", lambda f: f.limit),
        ("inodes_free", "Free inodes of that file system.", lambda f: f.inodes_free),
        ("inodes_total", "Inodes of that file system.", lambda f: f.inodes_total),
    )
    transfers: tuple[tuple[str, str, Callable[[IoReading], int]], ...] = (
        ("reads_bytes_total", "Bytes read from the device.", lambda io: io.read_bytes),
        ("reads_total", "Reads from the device.", lambda io: io.reads),
        ("writes_bytes_total", "Bytes written to the device.", lambda io: io.write_bytes),
        ("writes_total", "Writes to the device.", lambda io: io.writes),
    )
    for name, text, of_file in layer:
        yield Metric(f"container_fs_{name}", text, _GAUGE, ("device",), of_layer(of_file))
    for name, text, of_io in transfers:
        yield Metric(f"container_fs_{name}", text, _COUNTER, ("device",), per_device(of_io))

    def usage(snapshot: Snapshot) -> Iterable[Sample]:
        for io in _io(snapshot.reading):
            device = (device_name(io.major, io.minor), str(io.major), str(io.minor))
            yield (*device, "Read"), io.read_bytes
            yield (*device, "Write"), io.write_bytes

    labels = ("device", "major", "minor", "operation")
    text = "Bytes transferred to and from the device."
    yield Metric("container_blkio_device_usage_total", text, _COUNTER, labels, usage)


def _processes() -> Iterator[Metric]:
    def of_processes(value: Callable[[ProcessesReading], int]) -> Callable[[Snapshot], Iterable[Sample]]:
        return lambda s: (((), value(s.processes)),) if s.processes is not None else ()

    rows: tuple[tuple[str, str, Callable[[ProcessesReading], int]], ...] = (
        ("processes", "Number of processes.", lambda p: p.processes),
        ("file_descriptors", "Open file descriptors.", lambda p: p.descriptors),
        ("sockets", "Open sockets.", lambda p: p.sockets),
    )
    for name, text, value in rows:
        yield Metric(f"container_{name}", text, _GAUGE, (), of_processes(value))
    pids: tuple[tuple[str, str, Kind, Callable[[PidsReading], float]], ...] = (
        ("threads", "Number of threads.", _GAUGE, lambda r: r.current),
        ("threads_max", "Maximum number of threads; 0: no limit.", _GAUGE, lambda r: r.limit or 0),
    )
    yield from _of_cgroup("pids", pids)

    def soft_limits(snapshot: Snapshot) -> Iterable[Sample]:
        limit = snapshot.processes.open_files_soft_limit if snapshot.processes is not None else None
        return () if limit is None else ((("max_open_files",), limit),)

    def states(snapshot: Snapshot) -> Iterable[Sample]:
        found = snapshot.processes.states if snapshot.processes is not None else {}
        return (((state,), count) for state, count in found.items())

    text = "Soft limits of the container's first process; -1: no limit."
    yield Metric("container_ulimits_soft", text, _GAUGE, ("ulimit",), soft_limits)
    text = "Threads by state."
    yield Metric("container_tasks_state", text, _GAUGE, ("state",), states)


def _hugetlb() -> Iterator[Metric]:
    def per_size(value: Callable[[HugetlbReading], int | None]) -> Callable[[Snapshot], Iterable[Sample]]:
        def sample(snapshot: Snapshot) -> Iterable[Sample]:
            for pages in snapshot.reading.hugetlb if snapshot.reading is not None else ():
                number = value(pages)
                if number is not None:
                    yield (pages.page_size,), number

        return sample

    for name, text, value in (
        ("usage_bytes", "Huge pages in use, in bytes.", lambda h: h.usage),
        ("max_usage_bytes", "Highest usage of huge pages so far, in bytes.", lambda h: h.max_usage),
    ):
        yield Metric(f"container_hugetlb_{name}", text, _GAUGE, ("pagesize",), per_size(value))


def _pressure() -> Iterator[Metric]:
    rows: tuple[tuple[str, str, Kind, Callable[[PressureReading], float]], ...] = (
        ("cpu_waiting", "Time some tasks waited for a processor.", _COUNTER, lambda r: r.cpu.some.total_ns * _NS),
        ("cpu_stalled", "Time all tasks waited for a processor.", _COUNTER, lambda r: r.cpu.full.total_ns * _NS),
        ("memory_waiting", "Time some tasks waited for memory.", _COUNTER, lambda r: r.memory.some.total_ns * _NS),
        ("memory_stalled", "Time all tasks waited for memory.", _COUNTER, lambda r: r.memory.full.total_ns * _NS),
        ("io_waiting", "Time some tasks waited for I/O.", _COUNTER, lambda r: r.io.some.total_ns * _NS),
        ("io_stalled", "Time all tasks waited for I/O.", _COUNTER, lambda r: r.io.full.total_ns * _NS),
    )
    named = ((f"pressure_{name}_seconds_total", text, kind, value) for name, text, kind, value in rows)
    return _of_cgroup("pressure", named)


def _specification() -> Iterator[Metric]:
    rows: tuple[tuple[str, str, Kind, Callable[[LimitsReading], float | None]], ...] = (
        ("spec_cpu_period", "Period of the CPU quota in microseconds.", _GAUGE, lambda r: r.cpu_period),
        ("spec_cpu_quota", "CPU quota in microseconds per period.", _GAUGE, lambda r: r.cpu_quota),
        ("spec_cpu_shares", "CPU shares.", _GAUGE, lambda r: r.cpu_shares),
        ("spec_memory_limit_bytes", "Memory limit; 0: no limit.", _GAUGE, lambda r: r.memory_limit or 0),
        (
            "spec_memory_reservation_limit_bytes",
            "Reserved memory, or the soft limit; 0: none.",
            _GAUGE,
            lambda r: r.memory_reservation or 0,
        ),
        ("spec_memory_swap_limit_bytes", "Limit of memory plus swap; 0: none.", _GAUGE, lambda r: r.swap_limit or 0),
    )
    return _of_cgroup("limits", rows)


def _times() -> Iterator[Metric]:
    def started(snapshot: Snapshot) -> Iterable[Sample]:
        return () if snapshot.started_ns is None else (((), snapshot.started_ns * _NS),)

    text = "Start time of the container in seconds since the epoch."
    yield Metric("container_start_time_seconds", text, _GAUGE, (), started)
    text = "Time of the reading in seconds since the epoch."
    yield Metric("container_last_seen", text, _GAUGE, (), lambda s: (((), s.seen_ns // 1_000_000_000),))


def _io(reading: Reading | None) -> tuple[IoReading, ...]:
    return reading.io if reading is not None else ()


_COUNTER = Kind.COUNTER
_GAUGE = Kind.GAUGE
CATALOG: tuple[Metric, ...] = (
    *_cpu(),
    *_memory(),
    *_network(),
    *_filesystem(),
    *_processes(),
    *_hugetlb(),
    *_pressure(),
    *_specification(),
    *_times(),
)
