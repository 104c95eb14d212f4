"""Readings of recorded trees of both versions, and what happens when files or whole cgroups are missing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.cgroups import Hierarchies, discover
from metrics.cgroups import files, reader
from metrics.cgroups.files import DescriptorBudget, Fields, Folder
from metrics.cgroups.reader import Cgroup
from metrics.stats import HugetlbReading, IoReading, LimitsReading, PidsReading, PsiLine
from tests.unit.metrics import trees

PATH = "/kubepods/pod1/c1"
Make = Callable[[Path, str], Hierarchies]
ALL = pytest.mark.parametrize("make", [trees.make_v1, trees.make_v2, trees.make_hybrid])


@pytest.fixture(autouse=True)
def huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAGE_SIZES", ("2MB", "1GB"))


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@ALL
def test_readings_that_are_the_same_in_both_versions(make: Make, tmp_path: Path) -> None:
    cgroup = Cgroup(PATH, make(tmp_path, PATH), DescriptorBudget(100))
    reading = cgroup.read()
    assert reading.cpu is not None
    assert reading.cpu.usage_ns // 1_000_000 == 12345
    assert (reading.cpu.periods, reading.cpu.throttled_periods, reading.cpu.throttled_ns) == (50, 7, 350_000_000)
    assert (reading.cpu.bursts, reading.cpu.burst_ns) == (2, 9000)
    memory = reading.memory
    assert memory is not None
    assert (memory.usage, memory.working_set, memory.rss) == (104857600, 74857600, 40000000)
    assert (memory.cache, memory.mapped_file, memory.swap) == (60000000, 5000000, 1000000)
    assert (memory.active_file, memory.inactive_file) == (20000000, 30000000)
    assert (memory.page_faults, memory.major_page_faults) == (3333, 44)
    assert (memory.refaults_anon, memory.refaults_file) == (11, 22)
    events = reading.memory_events
    assert events is not None
    assert (events.kernel, events.max_usage, events.failures, events.oom_kills) == (4096000, 209715200, 3, 2)
    limited = cgroup.limited_memory()
    assert limited is not None
    assert (limited.limit, limited.swap_limit, limited.reading.usage) == (268435456, 268435456, memory.usage)
    assert cgroup.tasks() == 5
    assert reading.io == (IoReading(254, 0, 4096, 8192, 1, 2),)
    assert reading.limits is not None
    assert (reading.limits.cpu_period, reading.limits.cpu_quota) == (100000, 50000)
    assert reading.limits.swap_limit == 536870912
    assert cgroup.process_ids() == [10, 11]
    usage = cgroup.cpu_usage()
    assert usage is not None
    assert usage.usage_ns == reading.cpu.usage_ns


def test_no_file_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = Folder.read_all

    def read_all(folder: Folder, names: Sequence[str]) -> list[bytes | None]:
        read.extend(f"{folder.path}/{name}" for name in names)
        return real(folder, names)

    monkeypatch.setattr(Folder, "read_all", read_all)
    for make in (trees.make_v1, trees.make_v2, trees.make_hybrid):
        Cgroup(PATH, make(tmp_path / make.__name__, PATH), DescriptorBudget(100)).read()
    assert sorted(set(read)) == sorted(read)
    assert len(read) > 30


@pytest.mark.parametrize(
    "line", ["7:0 254:0 rbytes=1 wbytes=2 rios=3 wios=4\n", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n"]
)
def test_devices_without_transfers_may_be_on_the_line_of_another(line: str, tmp_path: Path) -> None:
    hierarchies = trees.make_v2(tmp_path, PATH)
    (tmp_path / PATH.lstrip("/") / "io.stat").write_text(f"{line}7:1 \n8:0")
    assert Cgroup(PATH, hierarchies, DescriptorBudget(100)).io() == (IoReading(254, 0, 1, 2, 3, 4),)


def test_what_only_v1_has(tmp_path: Path) -> None:
    reading = Cgroup(PATH, trees.make_v1(tmp_path, PATH), DescriptorBudget(100)).read()
    assert reading.cpu is not None
    ticks = os.sysconf("SC_CLK_TCK")
    assert (reading.cpu.user_ns, reading.cpu.system_ns) == (1000 * 10**9 // ticks, 234 * 10**9 // ticks)
    assert reading.pids == PidsReading(5, 100)
    assert reading.hugetlb == (HugetlbReading("2MB", 2097152, 4194304, 1),)
    assert reading.limits == LimitsReading(512, 100000, 50000, 268435456, None, 536870912)
    assert reading.memory_events is not None
    assert (reading.memory_events.high_events, reading.memory_events.max_events) == (0, reading.memory_events.failures)
    assert reading.pressure is None


def test_what_only_v2_has(tmp_path: Path) -> None:
    reading = Cgroup(PATH, trees.make_v2(tmp_path, PATH), DescriptorBudget(100)).read()
    assert reading.cpu is not None
    assert (reading.cpu.user_ns, reading.cpu.system_ns) == (10_000_000_000, 2_345_678_000)
    assert reading.pids == PidsReading(5, None)
    assert reading.hugetlb == (HugetlbReading("2MB", 2097152, None, 1),)
    assert reading.limits is not None
    assert reading.limits.cpu_shares == 500  # weight 20 is what the OCI runtimes make of 512 shares, rounded down
    assert reading.memory_events is not None
    assert (reading.memory_events.high_events, reading.memory_events.max_events) == (6, 3)


@pytest.mark.parametrize("make", [trees.make_v2, trees.make_hybrid])
def test_pressure_is_read_wherever_cgroup2_is(make: Make, tmp_path: Path) -> None:
    pressure = Cgroup(PATH, make(tmp_path, PATH), DescriptorBudget(100)).pressure()
    assert pressure is not None
    assert pressure.cpu.some == PsiLine(1.5, 0.75, 0.1, 123456000)
    assert pressure.cpu.full == PsiLine(0.5, 0.25, 0.05, 23456000)
    assert (pressure.memory.some.total_ns, pressure.memory.full.total_ns) == (7000, 5000)
    assert (pressure.io.some.total_ns, pressure.io.full.total_ns) == (9000, 8000)


def test_an_old_kernel_has_no_full_line_for_processors(tmp_path: Path) -> None:
    hierarchies = trees.make_v2(tmp_path, PATH)
    file = tmp_path / PATH.lstrip("/") / "cpu.pressure"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    pressure = Cgroup(PATH, hierarchies, DescriptorBudget(100)).pressure()
    assert pressure is not None
    assert pressure.cpu.full == PsiLine(0, 0, 0, 0)


@ALL
def test_a_cgroup_is_read_once_it_exists(make: Make, tmp_path: Path) -> None:
    hierarchies = make(tmp_path / "made", PATH)
    cgroup = Cgroup("/other", hierarchies, DescriptorBudget(100))
    reading = cgroup.read()
    assert (reading.cpu, reading.memory, reading.memory_events, reading.io, reading.pids) == (
        None,
        None,
        None,
        (),
        None,
    )
    assert (reading.hugetlb, reading.pressure, reading.limits) == ((), None, None)
    assert cgroup.process_ids() == []
    assert not cgroup.exists()
    for root in {*hierarchies.v1.values(), hierarchies.unified} - {None}:
        shutil.copytree(f"{root}{PATH}", f"{root}/other")
    assert cgroup.exists()
    assert None not in cgroup.memory()
    assert cgroup.process_ids() == [10, 11]


def test_a_v2_cgroup_without_controllers_has_processor_time_only(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "cpu.stat").write_text("usage_usec 5\nuser_usec 3\nsystem_usec 2\n")
    (folder / "cgroup.procs").write_text("")
    reading = Cgroup("/plain", Hierarchies({}, str(tmp_path)), DescriptorBudget(100)).read()
    assert reading.cpu is not None
    assert (reading.cpu.usage_ns, reading.cpu.periods) == (5000, 0)
    assert (reading.memory, reading.pids, reading.io, reading.limits) == (None, None, (), None)


def test_limits_are_those_of_the_controllers_that_are_there(tmp_path: Path) -> None:
    """systemd gives a scope without processor limits no cpu controller."""
    hierarchies = trees.make_v2(tmp_path, PATH)
    folder = tmp_path / PATH.lstrip("/")
    (folder / "cpu.weight").write_text("0\n")  # what an idle group has
    limits = Cgroup(PATH, hierarchies, DescriptorBudget(100)).limits()
    assert limits == LimitsReading(2, 100000, 50000, 268435456, None, 536870912)
    for name in ("cpu.weight", "cpu.max"):
        (folder / name).unlink()
    limits = Cgroup(PATH, hierarchies, DescriptorBudget(100)).limits()
    assert limits == LimitsReading(None, None, None, 268435456, None, 536870912)


def test_descriptors_are_kept_up_to_the_budget_and_released(tmp_path: Path) -> None:
    budget = DescriptorBudget(3)
    hierarchies = trees.make_v2(tmp_path, PATH)
    first = Cgroup(PATH, hierarchies, budget)
    before = open_descriptors()
    readings = [first.read() for _ in range(3)]
    assert budget.kept == 3
    assert open_descriptors() == before + 3
    assert all(reading.pids == PidsReading(5, None) for reading in readings)
    first.close()
    assert budget.kept == 0
    assert open_descriptors() == before
    assert first.pids() == PidsReading(5, None)  # closing is not the end: it opens again
    del first
    assert budget.kept == 0


def test_kept_descriptors_see_new_content(tmp_path: Path) -> None:
    (tmp_path / "n").write_text("1\n")
    folder = Folder(str(tmp_path), DescriptorBudget(1))
    assert folder.number("n") == 1
    (tmp_path / "n").write_text("22\n")
    assert folder.number("n") == 22


def test_what_the_kernel_does_not_keep_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(descriptor: int, offset: int = 0) -> bytes:
        asked.append(descriptor)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "read_rest", refuse)
    (tmp_path / "cpu.pressure").touch()
    folder = Folder(str(tmp_path), DescriptorBudget(1))
    before = open_descriptors()
    assert [folder.read("cpu.pressure"), folder.read("cpu.pressure")] == [None, None]
    assert len(asked) == 1
    assert open_descriptors() == before


def test_a_file_longer_than_one_read_is_whole(tmp_path: Path) -> None:
    content = b"x" * 50_000
    (tmp_path / "long").write_bytes(content)
    folder = Folder(str(tmp_path), DescriptorBudget(1))
    assert folder.read("long") == content
    assert folder.read("long") == content


@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2**64 - 1)), max_size=8))
def test_fields_are_right_after_any_other_layout(contents: list[dict[str, int]]) -> None:
    fields = Fields("b", "e", "h")
    for values in contents:
        content = "".join(f"{key} {value}\n" for key, value in values.items()).encode()
        assert fields.parse(content) == (values.get("b", 0), values.get("e", 0), values.get("h", 0))


MOUNT = "31 23 0:28 / {target} rw,nosuid,nodev,noexec,relatime shared:9 - {kind} cgroup rw{options}\n"


def test_discovers_v1_hybrid_and_v2_mounts(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    both = MOUNT.format(target="/sys/fs/cgroup/cpu,cpuacct", kind="cgroup", options=",cpu,cpuacct")
    memory = MOUNT.format(target="/sys/fs/cgroup/memory", kind="cgroup", options=",memory")
    again = MOUNT.format(target="/elsewhere/memory", kind="cgroup", options=",memory")
    named = MOUNT.format(target="/sys/fs/cgroup/systemd", kind="cgroup", options=",xattr,name=systemd")
    unified = MOUNT.format(target="/sys/fs/cgroup/unified", kind="cgroup2", options=",nsdelegate")
    v1 = {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "name=systemd": "/sys/fs/cgroup/systemd",
    }
    file.write_text(both + memory + again + named)
    assert discover(str(file)) == Hierarchies(v1, None)
    file.write_text(both + memory + named + unified)
    assert discover(str(file)) == Hierarchies(v1, "/sys/fs/cgroup/unified")
    file.write_text(MOUNT.format(target="/sys/fs/cgroup", kind="cgroup2", options=""))
    assert discover(str(file)) == Hierarchies({}, "/sys/fs/cgroup")
    file.write_text("")
    assert discover(str(file)) == Hierarchies({}, None)
