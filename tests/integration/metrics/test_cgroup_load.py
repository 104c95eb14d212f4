"""Readings of real cgroups, compared with what real loads did in them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from metrics.usage import CpuWindow
from tests.integration.metrics.own_cgroup import BUDGET, OwnCgroup, present, wait_for

BUSY = ("/bin/sh", "-c", "while :; do :; done")
MIB = 1024 * 1024


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", "-c", code)


def test_a_busy_loop_is_seen_as_processor_time(cgroup: OwnCgroup) -> None:
    load = cgroup.run(BUSY)
    window = CpuWindow()
    begin_process = process_time(load.pid)
    window.add(present(cgroup.reader.cpu_usage()))
    begin = present(cgroup.reader.cpu())
    time.sleep(0.6)
    end = present(cgroup.reader.cpu())
    rate = present(window.add(present(cgroup.reader.cpu_usage())))
    used = (end.usage_ns - begin.usage_ns) / 1e9
    assert used == pytest.approx(process_time(load.pid) - begin_process, abs=0.06)  # ticks of 10 ms
    assert (end.user_ns - begin.user_ns + end.system_ns - begin.system_ns) / 1e9 == pytest.approx(used, abs=0.06)
    assert rate / 1e9 == pytest.approx(used / ((end.time_ns - begin.time_ns) / 1e9), abs=0.1)
    assert end.throttled_periods == 0


def process_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_quota_throttles_and_shows_in_the_limits(cgroup: OwnCgroup) -> None:
    cgroup.write("cpu", ("cpu.cfs_quota_us", "10000"), ("cpu.max", "10000 100000"))
    limits = present(cgroup.reader.limits())
    assert (limits.cpu_quota, limits.cpu_period) == (10000, 100000)
    begin = present(cgroup.reader.cpu())
    cgroup.run(BUSY)
    wait_for(lambda: present(cgroup.reader.cpu()).throttled_periods >= 5)
    end = present(cgroup.reader.cpu())
    assert end.periods >= end.throttled_periods
    assert end.throttled_ns > begin.throttled_ns  # up to 90 ms in each period, less on a busy machine
    assert (end.usage_ns - begin.usage_ns) / (end.time_ns - begin.time_ns) < 0.3
    cgroup.end_loads()


def test_a_memory_hog_is_seen_as_anonymous_memory(cgroup: OwnCgroup) -> None:
    cgroup.on_v1("memory")
    load = cgroup.run(python("b = b'x' * (48 << 20); print('ready', flush=True); input()"))
    assert load.stdout is not None
    assert load.stdout.readline() == b"ready\n"
    reading = present(cgroup.reader.memory()[0])
    smaps = Path(f"/proc/{load.pid}/smaps_rollup").read_text()
    anonymous = int(next(line for line in smaps.splitlines() if line.startswith("Anonymous:")).split()[1]) * 1024
    assert anonymous > 48 * MIB
    assert reading.rss == pytest.approx(anonymous, abs=2 * MIB)
    assert reading.usage >= reading.working_set >= reading.rss - 2 * MIB
    assert reading.page_faults > 500
    events = present(cgroup.reader.memory()[1])
    assert present(events.kernel) > 0
    cgroup.end_loads()
    wait_for(lambda: present(cgroup.reader.memory()[0]).rss < 4 * MIB)
    assert present(present(cgroup.reader.memory()[1]).max_usage) > 48 * MIB


def test_a_file_read_is_page_cache_and_not_working_set(cgroup: OwnCgroup, tmp_path: Path) -> None:
    cgroup.on_v1("memory")
    file = tmp_path / "file"
    load = cgroup.run(("/bin/sh", "-c", f"head -c {32 * MIB} /dev/zero > {file}; sync {file}; echo ready; read _"))
    assert load.stdout is not None
    assert load.stdout.readline() == b"ready\n"
    reading = present(cgroup.reader.memory()[0])
    assert reading.cache == pytest.approx(32 * MIB, abs=2 * MIB)
    assert reading.inactive_file + reading.active_file == pytest.approx(reading.cache, abs=2 * MIB)
    assert reading.working_set <= reading.usage - 28 * MIB


def test_the_oom_killer_is_counted(cgroup: OwnCgroup) -> None:
    limit = str(16 * MIB)
    cgroup.write("memory", ("memory.limit_in_bytes", limit), ("memory.max", limit))
    swap = Path(f"{cgroup.hierarchies.unified}{cgroup.path}/memory.swap.max")
    if swap.exists():
        swap.write_text("0")
    assert present(cgroup.reader.limited_memory()).limit == 16 * MIB
    assert present(cgroup.reader.memory()[1]).oom_kills == 0
    load = cgroup.run(python("b = b'x' * (64 << 20); input()"))
    assert load.wait(20) == -9
    events = present(cgroup.reader.memory()[1])
    assert events.oom_kills == 1
    assert events.failures > 0
    assert present(events.max_usage) <= 16 * MIB


def test_a_disk_writer_is_seen_on_its_device(cgroup: OwnCgroup, tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    if not Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists():
        pytest.skip("the temporary folder is not on a block device")
    if cgroup.on_v1("blkio" if "blkio" in cgroup.hierarchies.v1 else "io"):
        # Recent kernels count on v1 only where there is a limit: one that is never reached.
        rule = f"{os.major(device)}:{os.minor(device)} {1 << 40}"
        Path(f"{cgroup.hierarchies.v1['blkio']}{cgroup.path}/blkio.throttle.write_bps_device").write_text(rule)
    code = f"""
import mmap, os
file = os.open({str(tmp_path / "file")!r}, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
for _ in range(8):
    os.write(file, buffer)
os.lseek(file, 0, 0)
os.readv(file, [buffer])
print("ready", flush=True)
input()
"""
    load = cgroup.run(python(code))
    assert load.stdout is not None
    assert load.stdout.readline() == b"ready\n"
    moved = cgroup.reader.io()
    assert moved, "no device shows transfers"
    assert sum(device.write_bytes for device in moved) >= 8 * MIB
    assert sum(device.write_bytes for device in moved) < 12 * MIB
    assert sum(device.read_bytes for device in moved) >= MIB
    assert sum(device.writes for device in moved) >= 8


def test_tasks_and_processes_of_the_whole_tree(cgroup: OwnCgroup) -> None:
    cgroup.write("pids", ("pids.max", "40"), ("pids.max", "40"))
    threads = "import threading; [threading.Thread(target=threading.Event().wait).start() for _ in range(5)]"
    load = cgroup.run(python(f"{threads}; print('ready', flush=True); input()"))
    assert load.stdout is not None
    assert load.stdout.readline() == b"ready\n"
    pids = present(cgroup.reader.pids())
    assert (pids.current, pids.limit) == (6, 40)
    assert cgroup.reader.process_ids() == [load.pid]
    root = cgroup.hierarchies.v1.get("pids") or cgroup.hierarchies.unified
    below = Path(f"{root}{cgroup.path}/below")
    below.mkdir()
    (below / "cgroup.procs").write_text(str(load.pid))
    assert cgroup.reader.process_ids() == [load.pid]
    assert present(cgroup.reader.pids()).current == 6


def test_waiting_for_a_processor_is_pressure(cgroup: OwnCgroup) -> None:
    if cgroup.reader.pressure() is None:
        pytest.skip("no pressure stall information here")
    for _ in range((os.cpu_count() or 1) + 1):
        cgroup.run(BUSY)
    wait_for(lambda: present(cgroup.reader.pressure()).cpu.some.total_ns > 20_000_000)


def test_a_removed_cgroup_reads_as_nothing_and_keeps_no_descriptor(cgroup: OwnCgroup) -> None:
    before = BUDGET.kept
    assert cgroup.reader.read().cpu is not None
    assert BUDGET.kept > before
    cgroup.remove()
    reading = cgroup.reader.read()
    assert (reading.cpu, reading.memory, reading.pids, reading.pressure, reading.limits) == (None,) * 5
    assert BUDGET.kept == before
    assert not cgroup.reader.exists()
    cgroup.__init__(cgroup.hierarchies, cgroup.path)  # type: ignore[misc]  # one of the same name is another one
    assert present(cgroup.reader.cpu()).usage_ns == 0
