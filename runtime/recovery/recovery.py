"""At start: the store is held against the node, and the difference repaired in both directions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from functools import cache, partial

import msgspec

from host import processes, untrusted_json
from host.concurrency.threads import in_thread
from host.errors import PodkeelError, UnavailableError
from host.untrusted_json import JsonError
from runtime.containers.create import ContainerManager
from runtime.containers.lifecycle import Lifecycle
from runtime.namespaces.pinned import pins_hold
from runtime.node import Node
from runtime.oci import exec_call
from runtime.oci.oci_runtime import OciRuntime
from runtime.pods.network import attach_request
from runtime.pods.run import PodManager
from runtime.recovery import garbage, recorded_processes
from runtime.recovery.garbage import AllBut, Known
from runtime.state.container import Container, ContainerState
from runtime.state.sandbox import Sandbox, SandboxState
from runtime.state.truncindex import is_of

_SETTLE_SECONDS = 1.0

_log = logging.getLogger("podkeel.recovery")


class _RuntimeState(msgspec.Struct):
    status: str = ""


class Recovery:
    """Brings a node that may have lost its agent at any instant, or rebooted, back to what the store says."""

    def __init__(self, node: Node, pods: PodManager, containers: ContainerManager, lifecycle: Lifecycle) -> None:
        self._node = node
        self._state = node.state
        self._pods = pods
        self._containers = containers
        self._lifecycle = lifecycle
        self.findings: Counter[str] = Counter()

    async def run(self) -> None:
        """Load everything, undo what was half made, finish what was half removed, take up what runs."""
        sandboxes, containers = await self._state.load()
        self.findings["row set aside"] += len(await in_thread(self._node.database.set_asides))
        for sandbox in sandboxes:
            self._pods.adopt(sandbox)
        for container in containers:
            self._containers.adopt(container)
        await in_thread(self._correct_processes, containers)
        half_made = [container.id for container in containers if container.record.state is ContainerState.MAKING]
        ending = in_thread(garbage.end_monitors, self._node.monitors, set(half_made))
        await self._guarded("monitors of half made containers", ending)
        for container in containers:
            await self._guarded(container.title, self._recover_container(container))
        for sandbox in sandboxes:
            await self._guarded(sandbox.title, self._recover_sandbox(sandbox))
        await self._guarded("lost networks", self._restore_networks())
        await self._guarded("leftovers", self._drop_leftovers(self.known()))
        await self._guarded("network", self._node.network.repair(self.known().live_sandboxes))

    def _correct_processes(self, containers: Sequence[Container]) -> None:
        """Have no record name a process that is not its container's: it would be signalled and waited for."""
        running = cache(self._node.monitors.running)
        for container in containers:
            same_boot = container.record.boot_id == self._state.boot_id
            if same_boot and not recorded_processes.correct(container, self._node.layout, running):
                self.findings["process of others in a record"] += 1
                _log.error("%s: its row named a process that is not its own: it is left alone", container.title)

    async def _guarded(self, subject: str, work: Awaitable[object]) -> None:
        """One object that cannot be repaired must not keep the agent from serving the others."""
        try:
            await work
        except UnavailableError as error:
            _log.warning("%s is not finished yet: %s", subject, error)
        except (PodkeelError, OSError) as error:
            self.findings["unrecovered"] += 1
            _log.error("%s could not be recovered and is left as it is: %s", subject, error)
        except Exception as error:
            self.findings["unrecovered"] += 1
            _log.error("%s could not be recovered and is left as it is: %s", subject, error, exc_info=error)

    async def _recover_container(self, container: Container) -> None:
        state = container.record.state
        if state is ContainerState.MAKING:
            self.findings["container half made"] += 1
            _log.info("%s was half made: undoing it", container.title)
            await self._containers.undo_half_made(container)
        elif state is ContainerState.REMOVING:
            self.findings["container half removed"] += 1
            _log.info("%s was half removed: finishing it", container.title)
            await self._containers.finish_removal(container)
        elif state is ContainerState.EXITED:
            container.exited.set()
            await self._lifecycle.clean_up(container)
        else:
            await self._resume(container)

    async def _resume(self, container: Container) -> None:
        """Take up a container that was created or running when the agent went away."""
        node, record = self._node, container.record
        same_boot = record.boot_id == self._state.boot_id
        if record.start_error and same_boot:
            return
        monitor = record.monitor if same_boot else None
        pidfd = processes.open_process(monitor.pid, monitor.started) if monitor is not None else None
        async with container.lock:  # its end, should it come now, is handled afterwards
            if pidfd is not None:
                container.monitor_descriptor = pidfd
                self._lifecycle.watch(container)
            else:
                exit_record = node.monitors.exit_record(container.id)
                if not same_boot or exit_record or not await self._lifecycle.survives_its_monitor(container):
                    self.findings["container ended meanwhile"] += 1
                    await self._lifecycle.record_exit(container, exit_record)
                    return
            await in_thread(self._end_abandoned_calls, container)
            if record.state is ContainerState.CREATED and await self._was_started(container):
                record.started_at = time.time_ns()
                await self._state.move(container, ContainerState.RUNNING)

    def _end_abandoned_calls(self, container: Container) -> None:
        """Nobody can get the output of what the former agent executed in the container any more."""
        folder = self._node.layout.container(container.id).path
        ended = exec_call.end_abandoned(folder, partial(self._node.cgroups.processes, container.record.cgroup))
        if ended:
            self.findings["abandoned command"] += ended
            _log.warning("%s: %d commands that the former agent executed were ended", container.title, ended)

    async def _was_started(self, container: Container) -> bool:
        """Whether the runtime started it just before the agent died, too soon for that to be written down."""
        runtime = self._node.handlers.get(container.record.handler)
        result = await processes.run(runtime.command("state", container.id), check=False, timeout=30)
        if result.status != 0:
            return False
        try:
            return untrusted_json.decode(result.stdout, _RuntimeState).status == "running"
        except JsonError as error:
            _log.warning("%s: its OCI runtime tells no state that is understood: %s", container.title, error)
            return False

    async def _recover_sandbox(self, sandbox: Sandbox) -> None:
        record = sandbox.record
        if record.state is SandboxState.MAKING:
            self.findings["sandbox half made"] += 1
            _log.info("%s was half made: undoing it", sandbox.title)
            await self._pods.undo_half_made(sandbox)
        elif record.state is SandboxState.REMOVING:
            self.findings["sandbox half removed"] += 1
            _log.info("%s was half removed: finishing it", sandbox.title)
            await self._pods.finish_removal(sandbox)
        elif record.state is SandboxState.READY and not self._still_there(sandbox):
            self.findings["sandbox without namespaces"] += 1
            _log.warning("%s lost its namespaces: it is not ready any more", sandbox.title)
            await self._pods.stop(sandbox.id)
        elif record.state is SandboxState.NOT_READY and not record.torn_down:
            await self._pods.finish_stop(sandbox)

    async def _restore_networks(self) -> None:
        """Give ready pods the connection back that the store has lost; those for which that fails are stopped."""
        node = self._node

        def without() -> list[Sandbox]:
            ready = (s for s in self._state.sandboxes if s.record.state is SandboxState.READY and not s.host_network)
            return [sandbox for sandbox in ready if node.network.attachment(sandbox.id) is None]

        lost = without()
        if not lost:
            return
        pins = {sandbox.id: str(node.layout.sandbox(sandbox.id).pin("net")) for sandbox in lost}
        await node.network.restore_lost([attach_request(sandbox, pins[sandbox.id]) for sandbox in lost])
        self.findings["sandbox without network"] += len(lost)
        for sandbox in without():
            _log.warning("%s lost its network: it is not ready any more", sandbox.title)
            await self._guarded(sandbox.title, self._pods.stop(sandbox.id))

    def _still_there(self, sandbox: Sandbox) -> bool:
        if sandbox.record.boot_id != self._state.boot_id:
            return False
        kinds = sandbox.own_namespaces + (("user",) if sandbox.user_namespace else ())
        return pins_hold(self._node.layout.sandbox(sandbox.id), kinds)

    def known(self) -> Known:
        """What the store knows now."""
        live = (ContainerState.CREATED, ContainerState.RUNNING)
        return Known(
            sandboxes={sandbox.id for sandbox in self._state.sandboxes},
            containers={container.id for container in self._state.containers},
            live_sandboxes={sandbox.id for sandbox in self._state.sandboxes if not sandbox.record.torn_down},
            live_containers={container.id for container in self._state.containers if container.record.state in live},
        )

    def own_parents(self) -> dict[str, str]:
        """The cgroups of this agent's pods that brought none, by sandbox id; those of other agents lie beside them."""
        node = self._node
        parents = node.cgroups.default_parents(node.options.cgroup_parent)
        known = {sandbox.id for sandbox in self._state.sandboxes}  # also those that an older version made
        return {id_: path for id_, path in parents.items() if id_ in known or is_of(node.agent_id, id_)}

    async def repair(self) -> None:
        """While calls are under way: remove what belongs to nothing the store knows, and repair the network.

        What is removed must have been unknown twice, some time apart: by then a call that made it would have said so.
        """
        sandboxes, containers = await in_thread(self._strangers)
        await asyncio.sleep(_SETTLE_SECONDS)
        again = await in_thread(self._strangers)
        doomed_sandboxes, doomed_containers = AllBut(sandboxes & again[0]), AllBut(containers & again[1])
        await self._drop_leftovers(Known(doomed_sandboxes, doomed_containers, doomed_sandboxes, doomed_containers))
        await self._node.network.repair(self.known().live_sandboxes)

    def _strangers(self) -> tuple[set[str], set[str]]:
        node = self._node
        return garbage.strangers(node.layout, node.monitors, self.own_parents(), self.known())

    async def _drop_leftovers(self, known: Known) -> None:
        """Remove what belongs to nothing that is ``known``; what cannot be removed keeps nothing else from it."""
        node = self._node
        monitors = await in_thread(node.monitors.running)
        unknown = {container_id for container_id in monitors if container_id not in known.containers}
        await in_thread(garbage.end_monitors, node.monitors, unknown)
        await asyncio.gather(*(self._drop_unknown_to_store(runtime, known) for runtime in node.handlers.working()))
        self.findings["unrecovered"] += await in_thread(garbage.drop_run_folders, node.layout, known)
        for container_id in node.snapshots.ids():
            if container_id not in known.containers:
                self.findings["snapshot of no container"] += 1
                await self._guarded(f"snapshot {container_id[:13]}", node.snapshots.remove(container_id))
        for sandbox_id, parent in (await in_thread(self.own_parents)).items():
            if sandbox_id not in known.live_sandboxes:
                await self._guarded(f"cgroup {parent}", node.cgroups.remove_parent(parent))

    async def _drop_unknown_to_store(self, runtime: OciRuntime, known: Known) -> None:
        for container_id in await in_thread(garbage.runtime_containers, runtime.root):
            if container_id not in known.live_containers:
                self.findings["container known to the OCI runtime only"] += 1
                await self._guarded(f"{runtime.name} container {container_id[:13]}", runtime.delete(container_id))
