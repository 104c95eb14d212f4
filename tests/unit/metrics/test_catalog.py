"""The list of container metrics: names, labels, kinds and values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

import pytest

from metrics.catalog import CATALOG
from metrics.samples import Kind, Labels, Metric, Sample, Snapshot
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
    NetworkReading,
    PidsReading,
    PressureReading,
    ProcessesReading,
    Psi,
    PsiLine,
    Reading,
)

NAMES = """
cpu_{user,system,usage}_seconds_total cpu_cfs_{periods,throttled_periods,throttled_seconds}_total
cpu_cfs_burst_{periods,seconds}_total
memory_{cache,rss,kernel_usage,mapped_file,swap,failcnt,usage_bytes,max_usage_bytes,working_set_bytes}
memory_{total_active_file_bytes,total_inactive_file_bytes,failures_total}
memory_events_{high,max}_total memory_workingset_refault_{file,anon}_total oom_events_total
network_{receive,transmit}_{bytes,packets,packets_dropped,errors}_total network_{tcp,tcp6,udp,udp6}_usage_total
fs_{inodes_free,inodes_total,limit_bytes,usage_bytes,reads_bytes_total,reads_total,writes_bytes_total,writes_total}
blkio_device_usage_total
processes threads threads_max sockets file_descriptors ulimits_soft tasks_state
last_seen start_time_seconds
spec_{cpu_period,cpu_quota,cpu_shares,memory_limit_bytes,memory_reservation_limit_bytes,memory_swap_limit_bytes}
hugetlb_{usage,max_usage}_bytes pressure_{cpu,memory,io}_{waiting,stalled}_seconds_total
"""


def samples(metrics: Iterable[Metric], labels: Labels, snapshot: Snapshot) -> Iterator[tuple[Metric, Sample]]:
    """The values of ``metrics`` for one container or pod, each with all label values in the descriptor's order."""
    for metric in metrics:
        for own, value in metric.samples(snapshot):
            yield metric, (labels.values() + own, value)


def expand(pattern: str) -> list[str]:
    parts = [part.strip("{}").split(",") for part in re.findall(r"\{[^}]*\}|[^{}]+", pattern)]
    return ["container_" + "".join(choice) for choice in itertools.product(*parts)]


def line(total: int) -> PsiLine:
    return PsiLine(0, 0, 0, total)


FULL = Snapshot(
    seen_ns=1_700_000_000_500_000_000,
    started_ns=1_600_000_000_000_000_000,
    reading=Reading(
        cpu=CpuReading(1, 2_500_000_000, 2_000_000_000, 500_000_000, 10, 4, 1_500_000_000, 3, 250_000_000),
        memory=MemoryReading(1, 100, 70, 40, 60, 5, 1, 20, 30, 333, 44, 11, 22),
        memory_events=MemoryEvents(4096, 200, 3, 2, 6, 7),
        io=(IoReading(9999, 1, 4096, 8192, 1, 2),),
        pids=PidsReading(5, None),
        hugetlb=(HugetlbReading("2MB", 2, 4, 0), HugetlbReading("1GB", 1, None, 0)),
        pressure=PressureReading(
            1,
            Psi(line(1_000_000_000), line(2_000_000_000)),
            Psi(line(3_000_000_000), line(4_000_000_000)),
            Psi(line(5_000_000_000), line(6_000_000_000)),
        ),
        limits=LimitsReading(512, 100000, None, 1000, None, 3000),
    ),
    network=NetworkReading(
        1,
        (InterfaceReading("eth0", 1, 2, 3, 4, 5, 6, 7, 8),),
        ConnectionsReading({"listen": 2}, {"listen": 0}, {"dropped": 9}, {}),
    ),
    processes=ProcessesReading(2, 30, 4, 1024, {"sleeping": 5}),
    filesystem=FilesystemReading("/dev/sda1", 10, 20, 30, 40),
)
LABELS = Labels("c", "/kubepods/x", "busybox", "abc", "ns", "p")


def values(name: str, snapshot: Snapshot = FULL) -> dict[tuple[str, ...], float]:
    (metric,) = (metric for metric in CATALOG if metric.name == f"container_{name}")
    return dict(metric.samples(snapshot))


def test_every_promised_name_is_there_once_and_no_other() -> None:
    promised = [name for pattern in NAMES.split() for name in expand(pattern)]
    assert sorted(metric.name for metric in CATALOG) == sorted(promised)


def test_label_values_are_in_the_order_of_the_keys() -> None:
    for metric, (label_values, _) in samples(CATALOG, LABELS, FULL):
        assert metric.label_keys[:6] == ("container", "id", "image", "name", "namespace", "pod")
        assert label_values[:6] == ("c", "/kubepods/x", "busybox", "abc", "ns", "p")
        assert len(label_values) == len(metric.label_keys)


def test_totals_are_counters_and_the_rest_are_gauges() -> None:
    for metric in CATALOG:
        misnamed = re.fullmatch(r"container_(network_(tcp|udp)6?_usage|fs_inodes)_total", metric.name)  # by cAdvisor
        counts = (metric.name.endswith("_total") and not misnamed) or metric.name == "container_memory_failcnt"
        assert metric.kind is (Kind.COUNTER if counts else Kind.GAUGE), metric.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu_usage_seconds_total", {("total",): 2.5}),
        ("cpu_user_seconds_total", {(): 2.0}),
        ("cpu_system_seconds_total", {(): 0.5}),
        ("cpu_cfs_throttled_seconds_total", {(): 1.5}),
        ("cpu_cfs_burst_seconds_total", {(): 0.25}),
        ("memory_working_set_bytes", {(): 70}),
        ("memory_max_usage_bytes", {(): 200}),
        ("memory_failcnt", {(): 3}),
        ("memory_events_high_total", {(): 6}),
        (
            "memory_failures_total",
            {
                ("pgfault", "container"): 333,
                ("pgfault", "hierarchy"): 333,
                ("pgmajfault", "container"): 44,
                ("pgmajfault", "hierarchy"): 44,
            },
        ),
        ("oom_events_total", {(): 2}),
        ("network_receive_bytes_total", {("eth0",): 1}),
        ("network_receive_packets_dropped_total", {("eth0",): 4}),
        ("network_transmit_errors_total", {("eth0",): 7}),
        ("network_transmit_packets_dropped_total", {("eth0",): 8}),
        ("network_tcp_usage_total", {("listen",): 2}),
        ("network_udp_usage_total", {("dropped",): 9}),
        ("fs_usage_bytes", {("/dev/sda1",): 10}),
        ("fs_inodes_total", {("/dev/sda1",): 40}),
        ("fs_reads_bytes_total", {("9999:1",): 4096}),
        ("fs_writes_total", {("9999:1",): 2}),
        (
            "blkio_device_usage_total",
            {("9999:1", "9999", "1", "Read"): 4096, ("9999:1", "9999", "1", "Write"): 8192},
        ),
        ("processes", {(): 2}),
        ("threads", {(): 5}),
        ("threads_max", {(): 0}),
        ("ulimits_soft", {("max_open_files",): 1024}),
        ("tasks_state", {("sleeping",): 5}),
        ("hugetlb_usage_bytes", {("2MB",): 2, ("1GB",): 1}),
        ("hugetlb_max_usage_bytes", {("2MB",): 4}),
        ("pressure_cpu_waiting_seconds_total", {(): 1.0}),
        ("pressure_io_stalled_seconds_total", {(): 6.0}),
        ("spec_cpu_quota", {}),
        ("spec_cpu_shares", {(): 512}),
        ("spec_memory_reservation_limit_bytes", {(): 0}),
        ("start_time_seconds", {(): 1_600_000_000.0}),
        ("last_seen", {(): 1_700_000_000}),
    ],
)
def test_values(name: str, expected: dict[tuple[str, ...], float]) -> None:
    assert values(name) == pytest.approx(expected)


def test_nothing_known_gives_no_samples_but_the_time() -> None:
    found = [metric.name for metric, _ in samples(CATALOG, LABELS, Snapshot(seen_ns=1))]
    assert found == ["container_last_seen"]
