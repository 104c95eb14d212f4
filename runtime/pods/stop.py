"""Stops pod sandboxes, and undoes those that were not completed."""

from __future__ import annotations

import logging

from host.concurrency.threads import in_thread
from host.stages import Operation
from metrics.meters import Meters
from network.node_network import NodeNetwork
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.tree import CgroupTree
from runtime.containers.create import ContainerCreate
from runtime.containers.endings.exit import clear_cgroup
from runtime.containers.stop import ContainerStop
from runtime.hooks import Hooks
from runtime.namespaces.pid import end_holder
from runtime.namespaces.pinned import drop_namespaces
from runtime.state.registrar import PodRegistrar
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State
from runtime.state.transitions import of_sandbox

_log = logging.getLogger("podkeel.pods")


class PodStop:
    """Stops sandboxes and releases their resources."""

    def __init__(
        self,
        *,
        state: State,
        names: PodRegistrar,
        containers: ContainerCreate,
        container_stops: ContainerStop,
        network: NodeNetwork,
        cgroups: CgroupTree,
        meters: Meters,
        hooks: Hooks,
    ) -> None:
        self._state = state
        self._names = names
        self._containers = containers
        self._container_stops = container_stops
        self._network = network
        self._cgroups = cgroups
        self._meters = meters
        self._hooks = hooks

    async def stop(self, sandbox_id: str) -> None:
        """Kill the containers of a sandbox and release its network and namespaces.

        May be repeated. An unknown id is no error.
        """
        sandbox = self._state.sandboxes.find(sandbox_id) if sandbox_id else None
        if sandbox is None or not sandbox.visible:
            return
        sandbox.closing = True
        await self._containers.abort_making(sandbox)
        async with sandbox.lock:
            if not sandbox.visible or sandbox.record.torn_down:
                return
            operation = sandbox.begin("StopPodSandbox")
            async with operation.stage("containers"):
                await self._container_stops.stop_all(sandbox)
            async with self._hooks.sync_blocked():
                await self._hooks.stop_sandbox(sandbox, operation)
            async with operation.stage("commit"):
                await self._state.move(sandbox, SandboxState.NOT_READY)
            await self.tear_down(sandbox, operation)
        self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, sandbox)
        _log.info("%s: stopped", sandbox.title, extra=of_sandbox(sandbox, operation))

    async def finish_stop(self, sandbox: Sandbox) -> None:
        """Complete a recorded stop."""
        sandbox.closing = True
        await self.tear_down(sandbox, sandbox.begin("StopPodSandbox"))

    async def tear_down(self, sandbox: Sandbox, operation: Operation) -> None:
        """Release the network, then the namespaces, then the cgroup. Each step may be repeated after a crash."""
        self._meters.forget(sandbox.id)
        async with operation.stage("network"):
            await sandbox.end_port_forwards()
            if not sandbox.host_network:
                await self._network.detach(sandbox.id)
        async with operation.stage("namespaces"):
            await self._drop(sandbox)
        async with operation.stage("torn_down"):
            sandbox.record.torn_down = True
            await self._state.save(sandbox)

    async def _drop(self, sandbox: Sandbox) -> None:
        if sandbox.record.owns_cgroup_parent:
            await self._cgroups.end_parent(sandbox.record.cgroup_parent)
        await in_thread(self._drop_files, sandbox)

    def _drop_files(self, sandbox: Sandbox) -> None:
        folder = sandbox.folder
        if sandbox.record.boot_id == self._state.boot_id:
            end_holder(sandbox.record.pid_holder, folder, sandbox.id)
        drop_namespaces(folder)
        if sandbox.record.owns_cgroup_parent:
            path = self._cgroups.parent_path(sandbox.record.cgroup_parent)
            self._cgroups.remove(path)
            if self._cgroups.exists(path):  # it was frozen when it was killed, and was not waited for
                clear_cgroup(self._cgroups, path)

    async def discard(self, sandbox: Sandbox) -> None:
        """Undo everything of a sandbox that was not completed."""
        async with sandbox.lock:
            if sandbox.id not in self._state.sandboxes:
                return
            await self._network.detach(sandbox.id)
            await self._drop(sandbox)
            await self._state.delete(sandbox)
            self.forget(sandbox)

    async def network_released(self, sandbox_id: str) -> None:
        """Continue with a sandbox whose network could not be released when it was stopped or undone."""
        if sandbox_id not in self._state.sandboxes:
            return
        sandbox = self._state.sandboxes.get(sandbox_id)
        if sandbox.record.state is SandboxState.MAKING:
            await self.discard(sandbox)
            return
        async with sandbox.lock:
            if sandbox.record.state is SandboxState.NOT_READY and not sandbox.record.torn_down:
                await self.finish_stop(sandbox)
                self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, sandbox)

    def forget(self, sandbox: Sandbox) -> None:
        """Forget a sandbox whose row is deleted, and free its name."""
        self._names.release(sandbox)
        self._state.forget(sandbox)
        self._hooks.forget(sandbox.id)
        self._meters.forget(sandbox.id)
