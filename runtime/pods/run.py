"""Pod sandboxes: making, stopping and removing them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import replace
from functools import partial

from host.concurrency.tasks import wait_out
from host.concurrency.threads import in_fresh_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import PodkeelError, UnsupportedError
from host.stages import Operation
from proto.runtime.v1 import cri_pb2
from runtime.containers.create import ContainerManager
from runtime.namespaces.pid import end_holder
from runtime.namespaces.pinned import NamespacePlan, drop_namespaces, make_namespaces, set_link_sysctls
from runtime.node import Node
from runtime.oci.oci_runtime import OciRuntime
from runtime.pods.network import attach_request
from runtime.pods.pod_files import write_pod_files
from runtime.specgen.namespaces import user_mappings
from runtime.specgen.security.node_selinux import free_level
from runtime.specgen.security.selinux import selinux_labels
from runtime.specgen.sysctls import pod_sysctls
from runtime.state.registrar import PodRegistrar, PodRequest
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from runtime.state.sandbox_checks import validate_sandbox
from runtime.state.transitions import of_sandbox
from runtime.state.truncindex import new_id

_log = logging.getLogger("podkeel.pods")


class PodManager:
    """What the CRI's sandbox calls do."""

    def __init__(self, node: Node, names: PodRegistrar, containers: ContainerManager) -> None:
        self._node = node
        self._state = node.state
        self._names = names
        self._containers = containers
        self._io_weights = True

    def adopt(self, sandbox: Sandbox) -> None:
        """Take over a sandbox found in the store."""
        self._names.adopt(sandbox)

    async def run(self, config: cri_pb2.PodSandboxConfig, handler: str) -> Sandbox:
        """Make a sandbox and return it ready.

        One that exists with the same configuration is returned as it is; one in the making is waited for.

        Raises:
            InvalidArgumentError: the configuration is wrong.
            NotFoundError: the runtime handler is not there.
            AlreadyExistsError: the identity is taken by another configuration, or by a sandbox that was stopped.
        """
        validate_sandbox(config)
        runtime = self._node.handlers.get(handler)
        if user_mappings(config.linux.security_context.namespace_options) and not runtime.features.user_namespaces:
            raise UnsupportedError(
                f"runtime handler {runtime.name!r} has no user namespaces with mapped mounts: use another handler, or "
                "userns_options mode NODE"
            )
        return await self._names.run(PodRequest(config, handler), lambda: self._make(config, handler, runtime))

    async def _make(self, config: cri_pb2.PodSandboxConfig, handler: str, runtime: OciRuntime) -> Sandbox:
        node = self._node
        sandbox = self._new_sandbox(config, handler, runtime)
        node.moves.expect()
        operation = Operation("RunPodSandbox", f"sandbox {config.metadata.namespace}/{config.metadata.name}")
        sandbox.operations.append(operation)
        plan = self._namespace_plan(sandbox)
        async with Undo(sandbox.title) as undo:
            undo.push("the sandbox", partial(self._discard, sandbox))
            async with operation.stage("reserve"):
                plan = replace(plan, mount_label=self._label(sandbox))
                await self._state.add(sandbox)
            async with operation.stage("namespaces"):
                await in_fresh_thread(make_namespaces, node.layout.sandbox(sandbox.id), plan)
            async with operation.stage("network"):
                await self._attach(sandbox, plan)
            async with operation.stage("files"):
                await in_thread(write_pod_files, sandbox, node.layout.sandbox(sandbox.id))
            if weight := runtime.options.io_weight or node.options.io_weight:
                async with operation.stage("io_weight"):
                    await self._weigh(sandbox, weight)
            undo.push("what plugins know of it", partial(node.hooks.undo_sandbox, sandbox))
            async with node.hooks.passing():
                await node.hooks.run_sandbox(sandbox, operation)
                async with operation.stage("commit"):
                    await self._state.move(sandbox, SandboxState.READY)
        self._state.publish(cri_pb2.CONTAINER_CREATED_EVENT, sandbox)
        self._state.publish(cri_pb2.CONTAINER_STARTED_EVENT, sandbox)
        addresses = ", ".join(sandbox.record.addresses) or "of the node"
        _log.info("%s: ready: addresses %s", sandbox.title, addresses, extra=of_sandbox(sandbox, operation))
        return sandbox

    def _new_sandbox(self, config: cri_pb2.PodSandboxConfig, handler: str, runtime: OciRuntime) -> Sandbox:
        sandbox_id = new_id(self._node.agent_id)
        parent, own = config.linux.cgroup_parent, False
        if parent:
            self._node.cgroups.validate_parent(parent)
        else:
            parent, own = self._node.cgroups.default_parent(self._node.options.cgroup_parent, sandbox_id), True
        record = SandboxRecord(
            state=SandboxState.MAKING,
            created_at=time.time_ns(),
            handler=runtime.name,
            requested_handler=handler,
            boot_id=self._state.boot_id,
            cgroup_parent=parent,
            owns_cgroup_parent=own,
            resources=config.linux.resources.SerializeToString(),
            overhead=config.linux.overhead.SerializeToString(),
            oom_kills=self._node.cgroups.out_of_memory_kills(self._node.cgroups.parent_path(parent)),
        )
        return Sandbox(sandbox_id, config, record)

    def _namespace_plan(self, sandbox: Sandbox) -> NamespacePlan:
        hostname = "" if sandbox.host_network else sandbox.config.hostname or os.uname().nodename
        return NamespacePlan(
            kinds=sandbox.own_namespaces,
            hostname=hostname,
            sysctls=pod_sysctls(
                sandbox.config,
                host_network=sandbox.host_network,
                host_ipc=sandbox.namespace_options.ipc == cri_pb2.NODE,
                user_namespace=sandbox.user_namespace,
                defaults=self._node.options.default_sysctls,
            ),
            shm_size=self._node.options.shm_size,
            mappings=user_mappings(sandbox.namespace_options),
        )

    def _label(self, sandbox: Sandbox) -> str:
        """Choose the sandbox's SELinux level, which it has as long as the node knows it; the label of its files."""
        options = sandbox.config.linux.security_context.selinux_options
        if self._node.facts.selinux_enabled:
            used = {other.record.selinux_level for other in self._state.sandboxes}
            sandbox.record.selinux_level = options.level or free_level(used)
        return selinux_labels(options, self._node.facts, level=sandbox.record.selinux_level).mount

    async def _attach(self, sandbox: Sandbox, plan: NamespacePlan) -> None:
        if sandbox.host_network:
            return
        folder = self._node.layout.sandbox(sandbox.id)
        request = attach_request(sandbox, str(folder.pin("net")))
        sandbox.record.addresses = (await self._node.network.attach(request)).addresses
        if plan.link_sysctls:
            await in_fresh_thread(set_link_sysctls, folder, plan)

    async def _weigh(self, sandbox: Sandbox, weight: int) -> None:
        """A node whose kernel has no weights runs its pods without, and says so once."""
        try:
            await self._node.cgroups.set_io_weight(sandbox.record.cgroup_parent, weight)
        except (PodkeelError, OSError) as error:
            if self._io_weights:
                _log.warning("io_weight: cannot be set, pods run without it: %s", error)
            self._io_weights = False

    async def stop(self, sandbox_id: str) -> None:
        """Kill what runs in a sandbox and give back its network and namespaces. Repeatable; unknown ids are fine."""
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
                await self._containers.stop_all(sandbox)
            async with self._node.hooks.passing():
                await self._node.hooks.stop_sandbox(sandbox, operation)
            async with operation.stage("commit"):
                await self._state.move(sandbox, SandboxState.NOT_READY)
            await self._tear_down(sandbox, operation)
        self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, sandbox)
        _log.info("%s: stopped", sandbox.title, extra=of_sandbox(sandbox, operation))

    async def finish_stop(self, sandbox: Sandbox) -> None:
        """Carry a stop that was written down to its end."""
        sandbox.closing = True
        await self._tear_down(sandbox, sandbox.begin("StopPodSandbox"))

    async def _tear_down(self, sandbox: Sandbox, operation: Operation) -> None:
        """Give back network, then namespaces, then the cgroup; each step may be repeated after a crash."""
        self._node.meters.forget(sandbox.id)
        async with operation.stage("network"):
            await sandbox.end_port_forwards()
            if not sandbox.host_network:
                await self._node.network.detach(sandbox.id)
        async with operation.stage("namespaces"):
            await self._drop(sandbox)
        async with operation.stage("torn_down"):
            sandbox.record.torn_down = True
            await self._state.save(sandbox)

    async def _drop(self, sandbox: Sandbox) -> None:
        if sandbox.record.owns_cgroup_parent:
            await self._node.cgroups.end_parent(sandbox.record.cgroup_parent)
        await in_thread(self._drop_files, sandbox)

    def _drop_files(self, sandbox: Sandbox) -> None:
        folder = self._node.layout.sandbox(sandbox.id)
        if sandbox.record.boot_id == self._state.boot_id:
            end_holder(sandbox.record.pid_holder, folder, sandbox.id)
        drop_namespaces(folder)
        if sandbox.record.owns_cgroup_parent:
            self._node.cgroups.remove(self._node.cgroups.parent_path(sandbox.record.cgroup_parent))

    async def remove(self, sandbox_id: str) -> None:
        """Stop and remove a sandbox with all its containers. Unknown ids are fine."""
        sandbox = self._state.sandboxes.find(sandbox_id) if sandbox_id else None
        if sandbox is None or sandbox.record.state is SandboxState.MAKING:
            return
        await self.stop(sandbox.id)
        async with sandbox.lock:
            if sandbox.id not in self._state.sandboxes:
                return  # another call was faster
            operation = sandbox.begin("RemovePodSandbox")
            async with operation.stage("containers"):
                await self._containers.remove_all(sandbox)
            # Once it is written down no client sees it, so none would ask again: it is carried on without this one.
            await wait_out(asyncio.ensure_future(self.finish_removal(sandbox, operation)))

    async def force_remove(self, sandbox_id: str) -> list[str]:
        """Remove a sandbox also where its CNI network cannot be given back; returns what was given up.

        One that never came to be and waits for its network is found too. Raises NotFoundError or InvalidArgumentError
        for an id that names no sandbox.
        """
        sandbox = self._state.sandboxes.get(sandbox_id)
        try:
            await self.remove(sandbox.id)
        except (PodkeelError, OSError) as error:
            given_up = await self._give_up_network(sandbox, str(error))
            if not given_up:
                raise
        else:
            given_up = await self._give_up_network(sandbox, "it waits for its network")
        if given_up:
            await self.network_given_back(sandbox.id)
            await self.remove(sandbox.id)
        return given_up

    async def _give_up_network(self, sandbox: Sandbox, why: str) -> list[str]:
        sentence = await self._node.network.give_up(sandbox.id)
        if sentence is None:
            return []
        _log.error("%s: %s (%s)", sandbox.title, sentence, why)
        return [sentence]

    async def finish_removal(self, sandbox: Sandbox, operation: Operation | None = None) -> None:
        """Write a removal down, if it is not yet, and carry it to its end.

        A sandbox for which that fails is listed as stopped, so that its client tries again.
        """
        operation = operation or sandbox.begin("RemovePodSandbox")
        try:
            if sandbox.record.state is not SandboxState.REMOVING:
                async with self._node.hooks.passing():
                    await self._node.hooks.remove_sandbox(sandbox, operation)
                    async with operation.stage("intent"):
                        await self._state.move(sandbox, SandboxState.REMOVING)
            if not sandbox.record.torn_down:
                await self._tear_down(sandbox, operation)
            async with operation.stage("forget"):
                await self._state.delete(sandbox)
        except (PodkeelError, OSError):
            self._state.take_back(sandbox)
            raise
        self._state.publish(cri_pb2.CONTAINER_DELETED_EVENT, sandbox)
        self._forget(sandbox)
        _log.info("%s: removed", sandbox.title, extra=of_sandbox(sandbox, operation))

    async def _discard(self, sandbox: Sandbox) -> None:
        """Undo everything of a sandbox that did not come to be."""
        async with sandbox.lock:
            if sandbox.id not in self._state.sandboxes:
                return
            await self._node.network.detach(sandbox.id)
            await self._drop(sandbox)
            await self._state.delete(sandbox)
            self._forget(sandbox)

    async def network_given_back(self, sandbox_id: str) -> None:
        """Carry on with a sandbox whose network could not be given back when it was stopped or undone."""
        if sandbox_id not in self._state.sandboxes:
            return
        sandbox = self._state.sandboxes.get(sandbox_id)
        if sandbox.record.state is SandboxState.MAKING:
            await self._discard(sandbox)
            return
        async with sandbox.lock:
            if sandbox.record.state is SandboxState.NOT_READY and not sandbox.record.torn_down:
                await self.finish_stop(sandbox)
                self._state.publish(cri_pb2.CONTAINER_STOPPED_EVENT, sandbox)

    async def undo_half_made(self, sandbox: Sandbox) -> None:
        """Undo a sandbox whose making was cut short by the agent's death."""
        await self._discard(sandbox)

    def _forget(self, sandbox: Sandbox) -> None:
        self._names.release(sandbox)
        self._state.forget(sandbox)
        self._node.hooks.forget(sandbox.id)
        self._node.meters.forget(sandbox.id)

    async def update_resources(
        self,
        sandbox_id: str,
        resources: cri_pb2.LinuxContainerResources | None,
        overhead: cri_pb2.LinuxContainerResources | None,
    ) -> None:
        """Record what the pod as a whole may use (KEP-1287); its cgroup is the client's. Raises NotFoundError."""
        sandbox, hooks = self._state.get_sandbox(sandbox_id), self._node.hooks
        async with sandbox.lock, hooks.passing():
            await hooks.update_sandbox(sandbox, overhead, resources)
            if resources is not None:
                sandbox.record.resources = resources.SerializeToString()
            if overhead is not None:
                sandbox.record.overhead = overhead.SerializeToString()
            await self._state.save(sandbox)
            await hooks.updated_sandbox(sandbox)

    async def close(self) -> None:
        """Undo what is in the making; for the agent's end."""
        await self._names.drain()
