"""Removes containers, and undoes those that were not completed."""

from __future__ import annotations

import asyncio
import logging

from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import in_thread
from host.errors import PodkeelError
from host.files.removal import remove_tree
from host.stages import Operation
from metrics.meters import Meters
from proto.runtime.v1 import cri_pb2
from runtime.containers.bundle.rootfs import Rootfs
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.stop import ContainerStop
from runtime.hooks import Hooks
from runtime.oci.conmon import Monitors
from runtime.state.container import Container, ContainerState
from runtime.state.registrar import ContainerRegistrar
from runtime.state.sandbox import Sandbox
from runtime.state.state import State
from runtime.state.transitions import of_container

_log = logging.getLogger("podkeel.containers")


class ContainerRemove:
    """Removes containers and everything that was made for them."""

    def __init__(
        self,
        *,
        state: State,
        names: ContainerRegistrar,
        rootfs: Rootfs,
        monitors: Monitors,
        meters: Meters,
        hooks: Hooks,
        exits: ContainerExit,
        stops: ContainerStop,
    ) -> None:
        self._state = state
        self._names = names
        self._rootfs = rootfs
        self._monitors = monitors
        self._meters = meters
        self._hooks = hooks
        self._exits = exits
        self._stops = stops

    async def remove(self, container_id: str) -> None:
        """Kill a container if it runs, and remove it. An unknown id is no error."""
        container = self._state.containers.find(container_id) if container_id else None
        if container is None or container.record.state is ContainerState.MAKING:
            return
        if container.record.state in (ContainerState.RUNNING, ContainerState.CREATED):
            await self._stops.kill(container)
        async with container.lock:
            if container.id not in self._state.containers:
                return  # another call has removed it
            # After the removal is recorded, clients no longer see the container. So it continues without this client.
            await uninterrupted(self.finish_removal(container))

    async def finish_removal(self, container: Container) -> None:
        """Record a removal, unless that is done, and complete it.

        If that fails, the container is listed as exited, so that its client tries again.
        """
        operation = container.begin("RemoveContainer")
        try:
            if container.record.state is not ContainerState.REMOVING:
                async with self._hooks.sync_blocked():
                    recorded = self._record_removal(container, operation)
                    await self._hooks.concurrently(recorded, self._hooks.remove_container(container, operation))
            await self._finish_removal(container, operation)
        except (PodkeelError, OSError):
            self._state.take_back(container)
            raise

    async def _record_removal(self, container: Container, operation: Operation) -> None:
        async with operation.stage("intent"):
            await self._state.move(container, ContainerState.REMOVING)

    async def _finish_removal(self, container: Container, operation: Operation) -> None:
        async with operation.stage("runtime"):
            await self._exits.released(container)
        async with operation.stage("snapshot"):
            if not container.unmounted:
                await self._rootfs.unmount(container)
            await self._rootfs.remove(container)
        async with operation.stage("files"):
            await in_thread(remove_tree, container.folder.path)
            self._monitors.forget(container.id)
        async with operation.stage("forget"):
            await self._state.delete(container)
        self._forget(container)
        self._state.publish(cri_pb2.CONTAINER_DELETED_EVENT, container)
        _log.info("%s: removed", container.title, extra=of_container(container, operation))

    async def remove_all(self, sandbox: Sandbox) -> None:
        """Remove every container of a sandbox, also those whose creation failed and could not be undone."""
        removals = [
            self.discard(container) if container.record.state is ContainerState.MAKING else self.remove(container.id)
            for container in self._state.containers_of(sandbox)
        ]
        await asyncio.gather(*removals)

    async def discard(self, container: Container) -> None:
        """Undo everything of a container that was not completed."""
        await self._exits.release_runtime(container)
        await self._exits.end_monitor(container)
        await self._rootfs.unmount(container)
        await self._rootfs.remove(container)
        await in_thread(remove_tree, container.folder.path)
        self._monitors.forget(container.id)
        await self._state.delete(container)
        self._forget(container)

    def _forget(self, container: Container) -> None:
        self._names.release(container)
        self._state.forget(container)
        self._hooks.forget(container.id)
        self._meters.forget(container.id)
