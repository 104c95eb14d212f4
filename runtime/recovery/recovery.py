"""At the start, compares the store with the node and repairs the differences in both directions."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import msgspec

from host import processes, untrusted_json
from host.concurrency.threads import in_thread
from host.untrusted_json import JsonError
from network.node_network import NodeNetwork
from runtime.cgroups.tree import CgroupTree
from runtime.containers.create import ContainerCreate
from runtime.containers.endings.exit import ContainerExit
from runtime.containers.remove import ContainerRemove
from runtime.namespaces.pinned import pins_hold
from runtime.oci.conmon import Monitors
from runtime.oci.exec_session import end_abandoned
from runtime.oci.handlers import Handlers
from runtime.pods.network import attach_request
from runtime.pods.remove import PodRemove
from runtime.pods.run import PodRun
from runtime.pods.stop import PodStop
from runtime.recovery import garbage, recorded_processes
from runtime.recovery.audit import Audit
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.state import State

_log = logging.getLogger("podkeel.recovery")


class _RuntimeState(msgspec.Struct):
    status: str = ""


@dataclass(frozen=True, slots=True)
class Recovery:
    """Makes a node match the store after its agent ended at any instant, or after a reboot."""

    audit: Audit
    state: State
    monitors: Monitors
    handlers: Handlers
    cgroups: CgroupTree
    network: NodeNetwork
    pods: PodRun
    pod_stops: PodStop
    pod_removals: PodRemove
    containers: ContainerCreate
    removals: ContainerRemove
    exits: ContainerExit

    async def run(self) -> None:
        """Load everything, undo incomplete creations, finish incomplete removals, and adopt running containers."""
        sandboxes, containers = await self.state.load()
        self.audit.findings["row set aside"] += len(await in_thread(self.audit.database.set_asides))
        for sandbox in sandboxes:
            self.pods.adopt(sandbox)
        for container in containers:
            self.containers.adopt(container)
        await in_thread(self._correct_processes, containers)
        await self.audit.guarded("interrupted checkpoints", self._settle_checkpoints())
        half_made = [container.id for container in containers if container.record.state is ContainerState.MAKING]
        ending = in_thread(garbage.end_monitors, self.monitors, set(half_made))
        await self.audit.guarded("monitors of half made containers", ending)
        for container in containers:
            await self.audit.guarded(container.title, self._recover_container(container))
        for sandbox in sandboxes:
            await self.audit.guarded(sandbox.title, self._recover_sandbox(sandbox))
        await self.audit.guarded("lost networks", self._restore_networks())
        await self.audit.guarded("leftovers", self.audit.drop_leftovers(self.audit.known()))
        await self.audit.guarded("network", self.network.repair(self.audit.known().live_sandboxes))

    async def _settle_checkpoints(self) -> None:
        """Thaw containers that an interrupted checkpoint froze, and remove the files of the checkpoint."""
        if not await in_thread(_has_entries, self.audit.layout.checkpoints):
            return
        from runtime.checkpoint.interrupted import settle  # only if there are any
        from runtime.checkpoint.pod.interrupted import settle as settle_pods

        def thaw(container_id: str) -> None:
            container = self.state.containers.exact(container_id)
            if container is not None:
                self.cgroups.thaw(container.record.cgroup)

        for work in (settle_pods, settle):
            self.audit.findings["checkpoint interrupted"] += await in_thread(work, self.audit.layout.checkpoints, thaw)

    def _correct_processes(self, containers: Sequence[Container]) -> None:
        """Remove from each record a process that is not its container's: it would be signalled and waited for."""
        running = cache(self.monitors.running)
        for container in containers:
            same_boot = container.record.boot_id == self.state.boot_id
            if same_boot and not recorded_processes.correct(container, running):
                self.audit.findings["process of others in a record"] += 1
                _log.error("%s: its row names a process of another object: ignored", container.title)

    async def _recover_container(self, container: Container) -> None:
        state = container.record.state
        if state is ContainerState.MAKING:
            self.audit.findings["container half made"] += 1
            _log.info("%s: creation was interrupted: undoing it", container.title)
            await self.removals.discard(container)
        elif state is ContainerState.REMOVING:
            self.audit.findings["container half removed"] += 1
            _log.info("%s: removal was interrupted: finishing it", container.title)
            await self.removals.finish_removal(container)
        elif state is ContainerState.EXITED:
            container.exited.set()
            await self.exits.clean_up(container)
        else:
            await self._resume(container)

    async def _resume(self, container: Container) -> None:
        """Adopt a container that was created or running when the agent ended."""
        record = container.record
        same_boot = record.boot_id == self.state.boot_id
        if record.start_error and same_boot:
            return
        if record.restored_image and record.monitor is None and record.state is ContainerState.CREATED and same_boot:
            return  # its processes are restored by its start
        monitor = record.monitor if same_boot else None
        pidfd = processes.open_process(monitor.pid, monitor.started) if monitor is not None else None
        async with container.lock:  # if it ends now, the end is handled after that
            if pidfd is not None:
                container.monitor_descriptor = pidfd
                self.exits.watch(container)
            else:
                exit_record = self.monitors.exit_record(container.id)
                if not same_boot or exit_record or not await self.exits.still_runs(container):
                    self.audit.findings["container ended meanwhile"] += 1
                    await self.exits.record_exit(container, exit_record)
                    return
            await in_thread(self._end_abandoned_calls, container)
            if record.state is not ContainerState.CREATED:
                return
            if await self._was_started(container):
                record.started_at = time.time_ns()
                await self.state.move(container, ContainerState.RUNNING)
            elif record.restored_image:
                self.audit.findings["container half restored"] += 1
                await self.exits.record_exit(container, None)

    def _end_abandoned_calls(self, container: Container) -> None:
        """Kill commands that the earlier agent executed in the container, because their output is lost."""
        folder = container.folder.path
        ended = end_abandoned(folder, partial(self.cgroups.processes, container.record.cgroup))
        if ended:
            self.audit.findings["abandoned command"] += ended
            _log.warning("%s: ended %d commands of the earlier agent", container.title, ended)

    async def _was_started(self, container: Container) -> bool:
        """Whether the OCI runtime started it just before the agent died, and the start was not recorded."""
        runtime = self.handlers.get(container.record.handler)
        result = await processes.run(runtime.command("state", container.id), check=False, timeout=30)
        if result.status != 0:
            return False
        try:
            return untrusted_json.decode(result.stdout, _RuntimeState).status == "running"
        except JsonError as error:
            _log.warning("%s: the state from the OCI runtime cannot be read: %s", container.title, error)
            return False

    async def _recover_sandbox(self, sandbox: Sandbox) -> None:
        record = sandbox.record
        if record.state is SandboxState.MAKING:
            self.audit.findings["sandbox half made"] += 1
            _log.info("%s: creation was interrupted: undoing it", sandbox.title)
            await self.pod_stops.discard(sandbox)
        elif record.restoring and record.state is not SandboxState.REMOVING:
            self.audit.findings["pod half restored"] += 1
            _log.info("%s: its restore was interrupted: removing it", sandbox.title)
            await self.pod_removals.remove(sandbox.id)
        elif record.state is SandboxState.REMOVING:
            self.audit.findings["sandbox half removed"] += 1
            _log.info("%s: removal was interrupted: finishing it", sandbox.title)
            await self.pod_removals.finish_removal(sandbox)
        elif record.state is SandboxState.READY and not self._still_there(sandbox):
            self.audit.findings["sandbox without namespaces"] += 1
            _log.warning("%s: namespaces lost: no longer ready", sandbox.title)
            await self.pod_stops.stop(sandbox.id)
        elif record.state is SandboxState.NOT_READY and not record.torn_down:
            await self.pod_stops.finish_stop(sandbox)

    async def _restore_networks(self) -> None:
        """Restore connections of ready pods that the store has lost. If that fails, the pod is stopped."""

        def without() -> list[Sandbox]:
            ready = (s for s in self.state.sandboxes if s.record.state is SandboxState.READY and not s.host_network)
            return [sandbox for sandbox in ready if self.network.attachment(sandbox.id) is None]

        lost = without()
        if not lost:
            return
        pins = {sandbox.id: str(sandbox.folder.pin("net")) for sandbox in lost}
        await self.network.restore_lost([attach_request(sandbox, pins[sandbox.id]) for sandbox in lost])
        self.audit.findings["sandbox without network"] += len(lost)
        for sandbox in without():
            _log.warning("%s: network lost: no longer ready", sandbox.title)
            await self.audit.guarded(sandbox.title, self.pod_stops.stop(sandbox.id))

    def _still_there(self, sandbox: Sandbox) -> bool:
        if sandbox.record.boot_id != self.state.boot_id:
            return False
        kinds = sandbox.own_namespaces + (("user",) if sandbox.user_namespace else ())
        return pins_hold(sandbox.folder, kinds)


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
