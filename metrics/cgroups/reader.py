"""Readings of one cgroup for statistics and metrics. Each of its controllers may be of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

from host.cgroups import Hierarchies, huge_page_sizes
from metrics.cgroups import v1, v2
from metrics.cgroups.files import DescriptorBudget, Folder
from metrics.stats import (
    CpuReading,
    CpuUsage,
    HugetlbReading,
    IoReading,
    LimitedMemory,
    LimitsReading,
    MemoryEvents,
    MemoryReading,
    PidsReading,
    PressureReading,
    Reading,
)

_NOWHERE = "/nonexistent"
PAGE_SIZES = huge_page_sizes()


class Cgroup:
    """Reads the cgroup ``path`` (absolute, below each mount point).

    Each reading is a few ``pread`` calls on open descriptors, from any thread. It is None or empty if the cgroup is
    gone or has no such controller. Call ``close`` when the container is gone.
    """

    cpu_usage: Callable[[], CpuUsage | None]
    cpu: Callable[[], CpuReading | None]
    memory: Callable[[], tuple[MemoryReading | None, MemoryEvents | None]]
    limited_memory: Callable[[], LimitedMemory | None]
    pids: Callable[[], PidsReading | None]
    tasks: Callable[[], int | None]
    pressure: Callable[[], PressureReading | None]

    def __init__(self, path: str, hierarchies: Hierarchies, budget: DescriptorBudget) -> None:
        self.path = path
        self._hierarchies = hierarchies
        self._budget = budget
        self._folders: dict[str, Folder] = {}
        memory = self._folder("memory")
        old = hierarchies.v1.keys()
        self.memory = partial(v1.memory if "memory" in old else v2.memory, memory)
        self.limited_memory = partial(v1.limited_memory if "memory" in old else v2.limited_memory, memory)
        self.pids = partial(v2.pids, self._folder("pids"))
        self.tasks = partial(v2.tasks, self._folder("pids"))
        accounting = self._folder("cpuacct")
        if "cpuacct" in old:
            self.cpu_usage = partial(v1.cpu_usage, accounting)
            self.cpu = partial(v1.cpu, accounting, self._folder("cpu"))
        else:
            self.cpu_usage = partial(v2.cpu_usage, accounting)
            self.cpu = partial(v2.cpu, accounting)
        # Only cgroup2 has pressure files. If it is mounted beside v1, the OCI runtimes join it too.
        self.pressure = partial(v2.pressure, self._folder("unified"))

    def io(self) -> tuple[IoReading, ...]:
        """Transfers of each block device."""
        read = v1.io if "blkio" in self._hierarchies.v1 else v2.io
        return read(self._folder("blkio"))

    def hugetlb(self) -> tuple[HugetlbReading, ...]:
        """Huge pages of each size that the machine supports."""
        read = v1.hugetlb if "hugetlb" in self._hierarchies.v1 else v2.hugetlb
        return read(self._folder("hugetlb"), PAGE_SIZES)

    def limits(self) -> LimitsReading | None:
        """The limits in force; None if the cgroup is gone."""
        read_cpu = v1.cpu_limits if "cpu" in self._hierarchies.v1 else v2.cpu_limits
        read_memory = v1.memory_limits if "memory" in self._hierarchies.v1 else v2.memory_limits
        cpu, memory = read_cpu(self._folder("cpu")), read_memory(self._folder("memory"))
        if cpu is None and memory is None:
            return None
        shares, period, quota = cpu or (None, None, None)
        limit, reservation, swap = memory or (None, None, None)
        return LimitsReading(shares, period, quota, limit, reservation, swap)

    def read(self) -> Reading:
        """All readings together."""
        memory, events = self.memory()
        return Reading(
            cpu=self.cpu(),
            memory=memory,
            memory_events=events,
            io=self.io(),
            pids=self.pids(),
            hugetlb=self.hugetlb(),
            pressure=self.pressure(),
            limits=self.limits(),
        )

    def exists(self) -> bool:
        """Whether the cgroup exists in the hierarchy that counts its processes."""
        return os.access(self._processes_folder, os.F_OK)

    def process_ids(self) -> list[int]:
        """The processes in the cgroup and below it, each once."""
        found: list[int] = []
        for folder in _tree(self._processes_folder):
            with contextlib.suppress(OSError):  # the cgroup was removed since
                with open(f"{folder}/cgroup.procs", "rb") as file:
                    found += map(int, file.read().split())
        return found

    def close(self) -> None:
        """Close the kept descriptors."""
        for folder in self._folders.values():
            folder.close()

    @cached_property
    def _processes_folder(self) -> str:
        mounts = self._hierarchies.v1
        root = mounts.get("pids") or mounts.get("memory") or self._hierarchies.unified or _NOWHERE
        return root + self.path

    def _folder(self, controller: str) -> Folder:
        root = self._hierarchies.v1.get(controller) or self._hierarchies.unified or _NOWHERE
        if root not in self._folders:
            self._folders[root] = Folder(root + self.path, self._budget)
        return self._folders[root]


def _tree(folder: str) -> Iterator[str]:
    folders = [folder]
    while folders:
        current = folders.pop()
        yield current
        with contextlib.suppress(OSError):
            if Path(current).stat().st_nlink > 2:  # two for the cgroup itself and one per child cgroup
                folders += [entry.path for entry in os.scandir(current) if entry.is_dir(follow_symlinks=False)]
