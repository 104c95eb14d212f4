"""Reading the same cgroup again and again for statistics."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterable

import msgspec

from host.cgroups import Hierarchies
from metrics.cgroups.files import DescriptorBudget
from metrics.cgroups.reader import Cgroup
from metrics.stats import CpuUsage, MemoryReading, PressureReading
from metrics.usage import CpuWindow
from runtime.cgroups.tree import CgroupTree
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState

# A rate since the start says something about the present only shortly after the start.
_YOUNG_NS = 20_000_000_000
_ENDED = -1


class Usage(msgspec.Struct, frozen=True):
    """What one cgroup, or several together, use; None if the kernel has no value; for limits: no limit.

    ``nano_cores`` is the rate of processor use over a window; ``tasks`` counts threads, if it was asked for.
    """

    cpu: CpuUsage
    nano_cores: int | None = None
    memory: MemoryReading | None = None
    memory_limit: int | None = None
    swap_limit: int | None = None
    pressure: PressureReading | None = None
    tasks: int | None = None


class Meter:
    """Reads one cgroup from any thread; its counters began at ``started_ns`` (0: unknown)."""

    def __init__(self, cgroup: Cgroup, started_ns: int) -> None:
        self.cgroup = cgroup
        self._window = CpuWindow(started_ns if time.time_ns() - started_ns < _YOUNG_NS else None)
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


def total(usages: Iterable[Usage]) -> Usage:
    """Several cgroups as one, for pods without their own; for an empty list: no use, now."""
    parts = list(usages)
    memories = [part.memory for part in parts if part.memory is not None]
    now = time.time_ns()
    sums = {name: sum(getattr(memory, name) for memory in memories) for name in _SUMMED}
    rates = [part.nano_cores for part in parts if part.nano_cores is not None]
    return Usage(
        cpu=CpuUsage(max((part.cpu.time_ns for part in parts), default=now), sum(part.cpu.usage_ns for part in parts)),
        nano_cores=sum(rates) if rates or not parts else None,
        memory=MemoryReading(time_ns=max((memory.time_ns for memory in memories), default=now), **sums),
        tasks=sum(part.tasks or 0 for part in parts),
    )


_SUMMED = tuple(name for name in MemoryReading.__struct_fields__ if name != "time_ns")


class Meters:
    """The meters of one node, made when they are needed; ``forget`` when what they read ends. For any thread."""

    def __init__(self, cgroups: CgroupTree, hierarchies: Hierarchies) -> None:
        self._cgroups = cgroups
        self._hierarchies = hierarchies
        self._meters: dict[str, Meter] = {}
        # Half of what the process may open is left for everything else.
        self._budget = DescriptorBudget(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def of_container(self, container: Container) -> Meter | None:
        """The meter of a container; None when it does not run."""
        record = container.record
        if record.state is not ContainerState.RUNNING:
            return None
        meter = self._meter(container.id, record.cgroup, record.started_at)
        if container.exited.is_set():  # it was forgotten while we made this
            self.forget(container.id)
        return meter

    def processor_time(self, container: Container) -> int | None:
        """Nanoseconds of processor time of a container, constant while none of its processes runs; -1 if it does not
        run.

        None if they do not show whether its files change: other containers that see its processes may write to them.
        """
        meter = self.of_container(container)
        if meter is None:
            return _ENDED
        usage = meter.cgroup.cpu_usage() if container.record.private_pid_namespace else None
        return usage.usage_ns if usage is not None else None

    def of_sandbox(self, sandbox: Sandbox) -> Meter | None:
        """The meter of a sandbox's parent cgroup; None when it is not ready."""
        record = sandbox.record
        if record.state is not SandboxState.READY or sandbox.closing:
            return None
        # The counters of a given parent may have begun long before the pod.
        started_ns = record.created_at if record.owns_cgroup_parent else 0
        meter = self._meter(sandbox.id, self._cgroups.parent_path(record.cgroup_parent), started_ns)
        if sandbox.closing:
            self.forget(sandbox.id)
        return meter

    def forget(self, object_id: str) -> None:
        """Close what is open for a container or sandbox: it would keep the kernel from freeing the cgroup."""
        meter = self._meters.pop(object_id, None)
        if meter is not None:
            meter.cgroup.close()

    def _meter(self, object_id: str, path: str, started_ns: int) -> Meter:
        meter = self._meters.get(object_id)
        if meter is None:
            meter = Meter(Cgroup(path, self._hierarchies, self._budget), started_ns)
            meter = self._meters.setdefault(object_id, meter)
        return meter
