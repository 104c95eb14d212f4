"""The resource usage of this node's containers and pods, for the CRI's statistics and for metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from host.concurrency.threads import in_fresh_thread, in_stats_thread
from images.snapshots.store import SnapshotStore
from images.snapshots.usage import WritableUsage
from metrics.filesystems import Filesystem
from metrics.meters import Meter, Meters
from metrics.network import read_networks
from metrics.processes import read_processes
from metrics.samples import Labels, Snapshot
from metrics.stats import ConnectionsReading, NetworkReading
from metrics.usage import Usage, total
from runtime.cgroups.tree import CgroupTree
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State

T = TypeVar("T")
Networks = dict[str, NetworkReading]  # by sandbox id

# To count the sockets of one pod, the kernel walks tables of the whole host, which takes milliseconds. So it is done in
# the background, at most this often, with pauses of a hundred times its duration.
_CONNECTIONS_SECONDS = 30.0
_CONNECTIONS_REST = 100
# If only so few pods are not counted yet, they are counted at once, so that their first metrics are complete.
_NEW_PODS = 8

_ENDED = -1

# Cgroups that are never a pod's own, although a pod may name them as its parent.
_SHARED_PARENTS = ("", "/")


@dataclass(frozen=True, slots=True)
class Pod:
    """A sandbox with its running containers; ``own_parent``: its parent cgroup holds only its containers."""

    sandbox: Sandbox
    containers: Sequence[Container]
    own_parent: bool


@dataclass(frozen=True, slots=True)
class PodSnapshot:
    """All metrics of a pod: its own, and those of its containers by id."""

    sandbox_id: str
    itself: tuple[Labels, Snapshot]
    containers: Mapping[str, tuple[Labels, Snapshot]]


class Statistics:
    """Measures the usage on one node. ``usage…`` and ``written`` read files: call them in a thread."""

    def __init__(self, state: State, cgroups: CgroupTree, meters: Meters, snapshots: SnapshotStore, data: Path) -> None:
        self._state = state
        self._cgroups = cgroups
        self._meters = meters
        self._writable = snapshots.writable
        self._data = data
        self._connections: dict[str, ConnectionsReading] = {}
        self._connections_due = 0.0
        self._counting: asyncio.Task[None] | None = None

    def running(self) -> list[Container]:
        """The containers that run."""
        return [container for container in self._state.containers if container.record.state is ContainerState.RUNNING]

    def pods(self, wanted: Iterable[Sandbox] | None = None) -> list[Pod]:
        """The sandboxes ``wanted``, or all ready ones, with their running containers."""
        live = [sandbox for sandbox in self._state.sandboxes if not sandbox.record.torn_down]
        users = Counter(sandbox.record.cgroup_parent.rstrip("/") for sandbox in live)
        if wanted is None:
            wanted = (sandbox for sandbox in live if sandbox.record.state is SandboxState.READY)
        return [
            Pod(
                sandbox,
                [c for c in self._state.containers_of(sandbox) if c.record.state is ContainerState.RUNNING],
                sandbox.record.cgroup_parent not in _SHARED_PARENTS
                and users[sandbox.record.cgroup_parent.rstrip("/")] == 1,
            )
            for sandbox in wanted
        ]

    def usage(self, container: Container, *, tasks: bool = False) -> Usage | None:
        """The usage of a container, its tasks only on request; None if it does not run."""
        meter = self._meter(container)
        return meter.usage(tasks=tasks) if meter is not None else None

    def processor_time(self, container: Container) -> int | None:
        """Nanoseconds of processor time of a container, constant while none of its processes runs; -1 if it does not
        run.

        None if they do not show whether its files change: other containers that see its processes may write to them.
        """
        meter = self._meter(container)
        if meter is None:
            return _ENDED
        usage = meter.cgroup.cpu_usage() if container.record.private_pid_namespace else None
        return usage.usage_ns if usage is not None else None

    def usage_of_pod(self, pod: Pod, containers: Iterable[Usage]) -> Usage | None:
        """The usage of a pod: of its parent cgroup if that has only this pod, else of its containers together, with
        their tasks.

        None if it is not ready.
        """
        meter = self._meter_of_pod(pod.sandbox)
        if meter is None:
            return None
        usage = meter.usage(tasks=True) if pod.own_parent else None
        return usage if usage is not None else total(containers)

    def written(self, container: Container) -> WritableUsage | None:
        """The container's writable layer as it was counted last."""
        return self._writable.usage(container.id)

    async def networks(self, pods: Sequence[Pod], *, connections: bool = False) -> Networks:
        """Traffic of the pods with a pod network, by sandbox id."""
        return await self.with_networks(pods, lambda networks: networks, connections=connections)

    async def with_networks(
        self, pods: Sequence[Pod], work: Callable[[Networks], T], *, connections: bool = False
    ) -> T:
        """The result of ``work`` for that traffic, in the thread that reads it: changing threads takes time."""
        own = [pod.sandbox for pod in pods if not pod.sandbox.host_network]
        pins = [str(sandbox.folder.pin("net")) for sandbox in own]

        def read() -> T:
            readings = read_networks(pins, connections=connections)
            return work({s.id: reading for s, reading in zip(own, readings, strict=True) if reading is not None})

        return await in_fresh_thread(read)

    async def snapshots(self) -> list[PodSnapshot]:
        """All metrics of all ready pods, now; with the last counts of sockets."""
        pods = self.pods()
        if self._connections_due <= time.monotonic() and (self._counting is None or self._counting.done()):
            self._counting = asyncio.create_task(self._count_connections(pods), name="connections")
        networks = await self.networks(pods)
        new = [pod for pod in pods if pod.sandbox.id in networks and pod.sandbox.id not in self._connections]
        if len(new) <= _NEW_PODS:
            self._connections |= await self._connections_of(new)
        for sandbox_id, reading in networks.items():
            counted = self._connections.get(sandbox_id)
            if counted is not None:
                networks[sandbox_id] = msgspec.structs.replace(reading, connections=counted)
        return await in_stats_thread(self._snapshots, pods, networks)

    async def _connections_of(self, pods: Sequence[Pod]) -> dict[str, ConnectionsReading]:
        readings = await self.networks(pods, connections=True) if pods else {}
        return {pod: reading.connections for pod, reading in readings.items() if reading.connections}

    async def _count_connections(self, pods: Sequence[Pod]) -> None:
        begin = time.monotonic()
        self._connections = await self._connections_of(pods)
        now = time.monotonic()
        self._connections_due = now + max(_CONNECTIONS_SECONDS, (now - begin) * _CONNECTIONS_REST)

    async def close(self) -> None:
        """End what is still being counted."""
        if self._counting is not None:
            self._counting.cancel()
            await asyncio.wait((self._counting,))

    def _snapshots(self, pods: Sequence[Pod], networks: Mapping[str, NetworkReading]) -> list[PodSnapshot]:
        filesystem = Filesystem(self._data)
        found = []
        for pod in pods:
            containers = {}
            for container in pod.containers:
                snapshot = self._snapshot(container, filesystem)
                if snapshot is not None:
                    containers[container.id] = (_labels(container), snapshot)
            itself = (self._pod_labels(pod.sandbox), self._pod_snapshot(pod, networks.get(pod.sandbox.id)))
            found.append(PodSnapshot(pod.sandbox.id, itself, containers))
        return found

    def _snapshot(self, container: Container, filesystem: Filesystem) -> Snapshot | None:
        meter = self._meter(container)
        reading = meter.cgroup.read() if meter is not None else None
        if meter is None or reading is None or reading.cpu is None:
            return None
        record = container.record
        init = record.init.pid if record.init is not None else None
        written = self.written(container)
        return Snapshot(
            seen_ns=time.time_ns(),
            reading=reading,
            started_ns=record.started_at,
            processes=read_processes(meter.cgroup.process_ids(), init),
            filesystem=filesystem.reading(written.used_bytes) if written is not None else None,
        )

    def _pod_snapshot(self, pod: Pod, network: NetworkReading | None) -> Snapshot:
        meter = self._meter_of_pod(pod.sandbox) if pod.own_parent else None
        return Snapshot(
            seen_ns=time.time_ns(),
            reading=meter.cgroup.read() if meter is not None else None,
            started_ns=pod.sandbox.record.created_at,
            network=network,
        )

    def _meter(self, container: Container) -> Meter | None:
        """The meter of a container; None when it does not run."""
        record = container.record
        if record.state is not ContainerState.RUNNING:
            return None
        return self._meters.of(container.id, record.cgroup, record.started_at, container.exited.is_set)

    def _meter_of_pod(self, sandbox: Sandbox) -> Meter | None:
        """The meter of a sandbox's parent cgroup; None when it is not ready."""
        record = sandbox.record
        if record.state is not SandboxState.READY or sandbox.closing:
            return None
        # The counters of a given parent may have begun long before the pod.
        started_ns = record.created_at if record.owns_cgroup_parent else 0
        path = self._cgroups.parent_path(record.cgroup_parent)
        return self._meters.of(sandbox.id, path, started_ns, lambda: sandbox.closing)

    def _pod_labels(self, sandbox: Sandbox) -> Labels:
        metadata = sandbox.config.metadata
        path = self._cgroups.parent_path(sandbox.record.cgroup_parent)
        return Labels(id=path, namespace=metadata.namespace, pod=metadata.name)


def _labels(container: Container) -> Labels:
    pod = container.sandbox.config.metadata
    image = container.config.image
    return Labels(
        container=container.config.metadata.name,
        id=container.record.cgroup,
        image=image.user_specified_image or image.image,
        name=container.id,
        namespace=pod.namespace,
        pod=pod.name,
    )
