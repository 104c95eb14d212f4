"""Everything one agent works with: its folders, store, runtimes, network, images, and the objects in memory."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from host.database import Database
from host.errors import NotFoundError
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from network.node_network import NodeNetwork
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.layout import Layout
from runtime.meters import Meters
from runtime.oci.conmon import Monitors
from runtime.oci.handlers import Handlers
from runtime.options import RuntimeOptions
from runtime.reserve import Reserve
from runtime.specgen.node_facts import NodeFacts
from runtime.state import status
from runtime.state.container import Container
from runtime.state.events import EventBus
from runtime.state.rows import Store
from runtime.state.sandbox import Sandbox
from runtime.state.truncindex import Registry


def read_boot_id() -> str:
    """An id of this boot: what lies in the run folder is from it or from before."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(slots=True)
class Node:
    """What the pod and container managers share.

    ``failures`` counts what monitors and OCI runtimes failed at, by program and action. ``renamed`` are the
    containers whose image had lost its name to another one at revision ``listed_images`` of the images.
    """

    options: RuntimeOptions
    agent_id: str
    layout: Layout
    reserve: Reserve
    database: Database
    store: Store
    cgroups: CgroupTree
    facts: NodeFacts
    apparmor_default: str
    handlers: Handlers
    monitors: Monitors
    network: NodeNetwork
    images: ImageStore
    snapshots: SnapshotStore
    boot_id: str = field(default_factory=read_boot_id)
    events: EventBus = field(default_factory=EventBus)
    sandboxes: Registry[Sandbox] = field(default_factory=lambda: Registry("sandbox"))
    containers: Registry[Container] = field(default_factory=lambda: Registry("container"))
    by_sandbox: dict[str, dict[str, Container]] = field(default_factory=dict)
    start_parallelism: int = field(init=False)
    starting: asyncio.Semaphore = field(init=False)
    meters: Meters = field(init=False)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    renamed: frozenset[str] = frozenset()
    listed_images: int = -1
    _preparing: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        # More at once finish no sooner, and every other call waits behind them for a processor.
        self.start_parallelism = self.options.container_start_parallelism or max(2, os.cpu_count() or 1)
        self.starting = asyncio.Semaphore(self.start_parallelism)
        self.meters = Meters(self.cgroups)
        self.snapshots.writable.activity = self._activity

    def expect_container(self) -> None:
        """A container is about to be made: let the kernel prepare for it in the background."""
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.get_running_loop().run_in_executor(None, self.cgroups.prepare_for_moves)

    def _activity(self, container_id: str) -> int | None:
        container = self.containers.exact(container_id)
        return self.meters.processor_time(container) if container is not None else None

    def containers_of(self, sandbox: Sandbox) -> list[Container]:
        """Containers of a sandbox, oldest first, also those being made."""
        return list(self.by_sandbox.get(sandbox.id, {}).values())

    def add_sandbox(self, sandbox: Sandbox) -> None:
        """Keep a sandbox in memory."""
        self.sandboxes.add(sandbox)
        self.by_sandbox.setdefault(sandbox.id, {})

    def discard_sandbox(self, sandbox_id: str) -> None:
        """Forget a sandbox that is gone."""
        self.sandboxes.discard(sandbox_id)
        self.meters.forget(sandbox_id)
        self.by_sandbox.pop(sandbox_id, None)

    def add_container(self, container: Container) -> None:
        """Keep a container in memory."""
        self.containers.add(container)
        self.by_sandbox[container.sandbox.id][container.id] = container

    def discard_container(self, container: Container) -> None:
        """Forget a container that is gone."""
        self.containers.discard(container.id)
        self.meters.forget(container.id)
        self.by_sandbox.get(container.sandbox.id, {}).pop(container.id, None)

    def get_sandbox(self, sandbox_id: str) -> Sandbox:
        """The sandbox of an id or unique prefix. Raises NotFoundError or InvalidArgumentError."""
        sandbox = self.sandboxes.get(sandbox_id)
        if not sandbox.visible:
            raise NotFoundError(f"sandbox {sandbox_id!r} not found")
        return sandbox

    def get_container(self, container_id: str) -> Container:
        """The container of an id or unique prefix. Raises NotFoundError or InvalidArgumentError."""
        container = self.containers.get(container_id)
        if not container.visible:
            raise NotFoundError(f"container {container_id!r} not found")
        return container

    def visible_sandboxes(self) -> Iterator[Sandbox]:
        """The sandboxes that clients may see."""
        return (sandbox for sandbox in self.sandboxes if sandbox.visible)

    def visible_containers(self) -> Iterator[Container]:
        """The containers that clients may see."""
        return (container for container in self.containers if container.visible)

    def publish(self, kind: cri_pb2.ContainerEventType, subject: Sandbox | Container) -> None:
        """Tell the subscribers, if there are any, what just happened to ``subject``."""
        if not self.events.serving:
            self.events.keep(partial(self._event, kind, subject))
        elif self.events.subscribers:
            self.events.publish(self._event(kind, subject))

    def _event(self, kind: cri_pb2.ContainerEventType, subject: Sandbox | Container) -> bytes:
        sandbox = subject if isinstance(subject, Sandbox) else subject.sandbox
        return status.event(kind, subject.id, sandbox, self.containers_of(sandbox)).SerializeToString()
