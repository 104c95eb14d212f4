"""Reads the same cgroups repeatedly, and keeps state of each between two readings."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable

from host.cgroups import Hierarchies
from metrics.cgroups.files import DescriptorBudget
from metrics.cgroups.reader import Cgroup
from metrics.usage import CpuWindow, Usage

# A rate since the start describes the present only shortly after the start.
_RECENT_START_NS = 20_000_000_000


class Meter:
    """Reads one cgroup from any thread. Its counters began at ``started_ns`` (0: unknown)."""

    def __init__(self, cgroup: Cgroup, started_ns: int) -> None:
        self.cgroup = cgroup
        self._window = CpuWindow(started_ns if time.time_ns() - started_ns < _RECENT_START_NS else None)
        self._lock = threading.Lock()

    def usage(self, *, tasks: bool = False) -> Usage | None:
        """The values for statistics; None if the cgroup does not exist."""
        cgroup = self.cgroup
        cpu = cgroup.cpu_usage()
        if cpu is None:
            return None
        with self._lock:
            nano_cores = self._window.add(cpu)
        memory = cgroup.limited_memory()
        return Usage(
            cpu=cpu,
            nano_cores=nano_cores,
            memory=memory.reading if memory is not None else None,
            memory_limit=memory.limit if memory is not None else None,
            swap_limit=memory.swap_limit if memory is not None else None,
            pressure=cgroup.pressure(),
            tasks=cgroup.tasks() if tasks else None,
        )


class Meters:
    """The meters of one node by container or pod id, for any thread.

    A meter is made when it is needed. Call ``forget`` when its object ends.
    """

    def __init__(self, hierarchies: Hierarchies) -> None:
        self._hierarchies = hierarchies
        self._meters: dict[str, Meter] = {}
        # Half of the process's descriptors stay available for everything else.
        self._budget = DescriptorBudget(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def of(self, object_id: str, path: str, started_ns: int, ended: Callable[[], bool]) -> Meter:
        """The meter of cgroup ``path``, whose counters began at ``started_ns`` (0: unknown).

        The meter is not kept if its object has ``ended``.
        """
        meter = self._meters.get(object_id)
        if meter is None:
            meter = Meter(Cgroup(path, self._hierarchies, self._budget), started_ns)
            meter = self._meters.setdefault(object_id, meter)
        if ended():  # the object ended while the meter was made
            self.forget(object_id)
        return meter

    def forget(self, object_id: str) -> None:
        """Close the meter of a container or sandbox: its descriptors would keep the kernel from freeing the cgroup."""
        meter = self._meters.pop(object_id, None)
        if meter is not None:
            meter.cgroup.close()
