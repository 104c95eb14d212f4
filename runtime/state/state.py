"""The pods and containers of one agent, in memory and in the store, and the events about them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import overload

from host.concurrency.threads import in_thread
from host.errors import NotFoundError, WrongStateError
from proto.runtime.v1 import cri_pb2
from runtime.layout import Layout
from runtime.state import status
from runtime.state.container import Container, ContainerRecord, ContainerState
from runtime.state.events import EventBus
from runtime.state.rows import Store
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from runtime.state.transitions import check_container_move, check_sandbox_move
from runtime.state.truncindex import Registry, new_id


def read_boot_id() -> str:
    """An id of this boot, to know whether files of the run folder are from this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class State:
    """Owns the sandboxes and containers. Only this class sets their state and writes their rows.

    ``sandboxes`` and ``containers`` also have those that clients do not see, which are being created or removed.
    """

    def __init__(self, rows: Store, layout: Layout, agent_id: str, boot_id: str | None = None) -> None:
        self._rows = rows
        self._layout = layout
        self._agent_id = agent_id
        self.boot_id = boot_id if boot_id is not None else read_boot_id()
        self.events = EventBus()
        self.sandboxes: Registry[Sandbox] = Registry("sandbox")
        self.containers: Registry[Container] = Registry("container")
        self._members: dict[str, dict[str, Container]] = {}

    async def load(self) -> tuple[list[Sandbox], list[Container]]:
        """Load all rows of the store into memory, and return them, oldest first, at the start."""
        sandboxes, containers = await in_thread(self._rows.load)
        for sandbox in sandboxes:
            self._keep_sandbox(sandbox)
        for container in containers:
            self._keep_container(container)
        return sandboxes, containers

    def new_id(self) -> str:
        """An id for a sandbox or container of this agent."""
        return new_id(self._agent_id)

    def new_sandbox(self, sandbox_id: str, config: cri_pb2.PodSandboxConfig, record: SandboxRecord) -> Sandbox:
        """A sandbox for ``add``."""
        return Sandbox(sandbox_id, config, record, self._layout.sandbox(sandbox_id))

    def new_container(
        self, container_id: str, sandbox: Sandbox, config: cri_pb2.ContainerConfig, record: ContainerRecord
    ) -> Container:
        """A container for ``add``."""
        return Container(container_id, sandbox, config, record, self._layout.container(container_id))

    async def add(self, subject: Sandbox | Container) -> None:
        """Keep a new sandbox or container in memory, then write its row."""
        if isinstance(subject, Sandbox):
            self._keep_sandbox(subject)
            await self._rows.add_sandbox(subject)
        else:
            self._keep_container(subject)
            await self._rows.add_container(subject)

    async def save(self, subject: Sandbox | Container) -> None:
        """Write the record of a sandbox or container."""
        if isinstance(subject, Sandbox):
            await self._rows.save_sandbox(subject)
        else:
            await self._rows.save_container(subject)

    @overload
    async def move(self, subject: Sandbox, to: SandboxState) -> None: ...

    @overload
    async def move(self, subject: Container, to: ContainerState) -> None: ...

    async def move(self, subject: Sandbox | Container, to: SandboxState | ContainerState) -> None:
        """Change the state of a sandbox or container and write its record, with other changes of the caller.

        If the record cannot be written, the new state stays in memory, because it is true.

        Raises:
            WrongStateError: the table in ``transitions`` does not allow it; nothing is changed.
            PodkeelError: the record could not be written.
        """
        self._set(subject, to)
        await self.save(subject)

    def enter(self, container: Container, to: ContainerState) -> None:
        """Change the state of a container in memory; the caller writes its record. Raises WrongStateError."""
        self._set(container, to)

    def take_back(self, subject: Sandbox | Container) -> None:
        """After a failed removal, list an object again: a sandbox as stopped, a container as exited. In memory only.

        Its row still says that it is being removed, so that the next start finishes the removal.
        """
        if isinstance(subject, Sandbox):
            if subject.record.state is SandboxState.REMOVING:
                self._set(subject, SandboxState.NOT_READY)
        elif subject.record.state is ContainerState.REMOVING:
            self._set(subject, ContainerState.EXITED)
        subject.changed()

    def _set(self, subject: Sandbox | Container, to: SandboxState | ContainerState) -> None:
        if isinstance(subject, Sandbox):
            sandbox_state = SandboxState(to)
            check_sandbox_move(subject, sandbox_state)
            subject.record.state = sandbox_state
        else:
            container_state = ContainerState(to)
            check_container_move(subject, container_state)
            subject.record.state = container_state

    async def delete(self, subject: Sandbox | Container) -> None:
        """Delete the row of a sandbox or container. It stays in memory until ``forget``."""
        if isinstance(subject, Sandbox):
            await self._rows.delete_sandbox(subject.id)
        else:
            await self._rows.delete_container(subject.id)

    def forget(self, subject: Sandbox | Container) -> None:
        """Forget a sandbox or container whose row is deleted. May be repeated."""
        if isinstance(subject, Sandbox):
            self.sandboxes.discard(subject.id)
            self._members.pop(subject.id, None)
        else:
            self.containers.discard(subject.id)
            self._members.get(subject.sandbox.id, {}).pop(subject.id, None)

    def containers_of(self, sandbox: Sandbox) -> list[Container]:
        """The containers of a sandbox, oldest first, also those that are being created."""
        return list(self._members.get(sandbox.id, {}).values())

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

    def running_container(self, container_id: str) -> Container:
        """The running container with an id or unique prefix. Raises as ``get_container``, and WrongStateError."""
        container = self.get_container(container_id)
        if container.record.state is not ContainerState.RUNNING:
            raise WrongStateError(f"{container.title} is {container.record.state}, not running")
        return container

    def visible_sandboxes(self) -> Iterator[Sandbox]:
        """The sandboxes that clients may see."""
        return (sandbox for sandbox in self.sandboxes if sandbox.visible)

    def visible_containers(self) -> Iterator[Container]:
        """The containers that clients may see."""
        return (container for container in self.containers if container.visible)

    def publish(self, kind: cri_pb2.ContainerEventType, subject: Sandbox | Container) -> None:
        """Send an event of ``subject`` that just happened to the subscribers."""
        if not self.events.serving:
            self.events.keep(partial(self._event, kind, subject))
        elif self.events.subscribers:
            self.events.publish(self._event(kind, subject))

    def _event(self, kind: cri_pb2.ContainerEventType, subject: Sandbox | Container) -> bytes:
        sandbox = subject if isinstance(subject, Sandbox) else subject.sandbox
        return status.event(kind, subject.id, sandbox, self.containers_of(sandbox)).SerializeToString()

    def _keep_sandbox(self, sandbox: Sandbox) -> None:
        self.sandboxes.add(sandbox)
        self._members.setdefault(sandbox.id, {})

    def _keep_container(self, container: Container) -> None:
        self.containers.add(container)
        self._members[container.sandbox.id][container.id] = container
