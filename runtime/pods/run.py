"""Creates pod sandboxes."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from functools import partial

from host.concurrency.threads import in_fresh_thread, in_thread
from host.concurrency.undo import Undo
from host.errors import PodkeelError, UnsupportedError
from host.stages import Operation
from network.node_network import NodeNetwork
from proto.runtime.v1 import cri_pb2
from runtime.cgroups.limits import out_of_memory_kills, set_io_weight
from runtime.cgroups.moves import CgroupMoves
from runtime.cgroups.tree import CgroupTree
from runtime.hooks import Hooks
from runtime.namespaces.pinned import NamespacePlan, make_namespaces, set_link_sysctls
from runtime.oci.handlers import Handlers
from runtime.oci.oci_runtime import OciRuntime
from runtime.options import RuntimeOptions
from runtime.pods.network import attach_request
from runtime.pods.pod_files import write_pod_files
from runtime.pods.stop import PodStop
from runtime.specgen.namespaces import user_mappings
from runtime.specgen.node_facts import NodeFacts
from runtime.specgen.security.node_selinux import free_level
from runtime.specgen.security.selinux import selinux_labels
from runtime.specgen.sysctls import pod_sysctls
from runtime.state.registrar import PodRegistrar, PodRequest
from runtime.state.sandbox import Sandbox, SandboxRecord, SandboxState
from runtime.state.sandbox_checks import validate_sandbox
from runtime.state.state import State
from runtime.state.transitions import of_sandbox

_log = logging.getLogger("podkeel.pods")


class PodRun:
    """Creates sandboxes."""

    def __init__(
        self,
        *,
        options: RuntimeOptions,
        state: State,
        names: PodRegistrar,
        handlers: Handlers,
        network: NodeNetwork,
        cgroups: CgroupTree,
        moves: CgroupMoves,
        facts: NodeFacts,
        hooks: Hooks,
        stops: PodStop,
    ) -> None:
        self._options = options
        self._state = state
        self._names = names
        self._handlers = handlers
        self._network = network
        self._cgroups = cgroups
        self._moves = moves
        self._facts = facts
        self._hooks = hooks
        self._stops = stops
        self._io_weights = True

    def adopt(self, sandbox: Sandbox) -> None:
        """Take over a sandbox from the store."""
        self._names.adopt(sandbox)

    async def run(self, config: cri_pb2.PodSandboxConfig, handler: str, restoring: str = "") -> Sandbox:
        """Create a sandbox and return it when it is ready.

        If one with the same configuration exists, it is returned; if one is being created, it is waited for. With
        ``restoring`` a new one is created, and its record names that call of RestorePod.

        Raises:
            InvalidArgumentError: the configuration is invalid.
            NotFoundError: the runtime handler is missing.
            AlreadyExistsError: a sandbox with another configuration, or a stopped one, has this identity.
        """
        validate_sandbox(config)
        runtime = self._handlers.for_new_pods(handler)
        if user_mappings(config.linux.security_context.namespace_options) and not runtime.features.user_namespaces:
            raise UnsupportedError(
                f"runtime handler {runtime.name!r} has no user namespaces with mapped mounts: use another handler, or "
                "userns_options mode NODE"
            )
        request = PodRequest(config, handler, restoring)
        return await self._names.run(request, lambda: self._make(request, runtime))

    async def _make(self, request: PodRequest, runtime: OciRuntime) -> Sandbox:
        config = request.config
        sandbox = self._new_sandbox(request, runtime)
        self._moves.expect()
        operation = Operation("RunPodSandbox", f"sandbox {config.metadata.namespace}/{config.metadata.name}")
        sandbox.operations.append(operation)
        plan = self._namespace_plan(sandbox)
        async with Undo(sandbox.title) as undo:
            undo.push("the sandbox", partial(self._stops.discard, sandbox))
            async with operation.stage("reserve"):
                plan = replace(plan, mount_label=self._label(sandbox))
                await self._state.add(sandbox)
            async with operation.stage("namespaces"):
                await in_fresh_thread(make_namespaces, sandbox.folder, plan)
            async with operation.stage("network"):
                await self._attach(sandbox, plan)
            async with operation.stage("files"):
                await in_thread(write_pod_files, sandbox)
            if weight := runtime.options.io_weight or self._options.io_weight:
                async with operation.stage("io_weight"):
                    await self._weigh(sandbox, weight)
            undo.push("what plugins know of it", partial(self._hooks.undo_sandbox, sandbox))
            async with self._hooks.sync_blocked():
                await self._hooks.run_sandbox(sandbox, operation)
                async with operation.stage("commit"):
                    await self._state.move(sandbox, SandboxState.READY)
        self._state.publish(cri_pb2.CONTAINER_CREATED_EVENT, sandbox)
        self._state.publish(cri_pb2.CONTAINER_STARTED_EVENT, sandbox)
        addresses = ", ".join(sandbox.record.addresses) or "of the node"
        _log.info("%s: ready: addresses %s", sandbox.title, addresses, extra=of_sandbox(sandbox, operation))
        return sandbox

    def _new_sandbox(self, request: PodRequest, runtime: OciRuntime) -> Sandbox:
        config = request.config
        sandbox_id = self._state.new_id()
        parent, own = config.linux.cgroup_parent, False
        if parent:
            self._cgroups.validate_parent(parent)
        else:
            parent, own = self._cgroups.default_parent(self._options.cgroup_parent, sandbox_id), True
        record = SandboxRecord(
            state=SandboxState.MAKING,
            created_at=time.time_ns(),
            handler=runtime.name,
            requested_handler=request.handler,
            restoring=request.restoring,
            boot_id=self._state.boot_id,
            cgroup_parent=parent,
            owns_cgroup_parent=own,
            resources=config.linux.resources.SerializeToString(),
            overhead=config.linux.overhead.SerializeToString(),
            oom_kills=out_of_memory_kills(self._cgroups, self._cgroups.parent_path(parent)),
        )
        return self._state.new_sandbox(sandbox_id, config, record)

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
                defaults=self._options.default_sysctls,
            ),
            shm_size=self._options.shm_size,
            mappings=user_mappings(sandbox.namespace_options),
        )

    def _label(self, sandbox: Sandbox) -> str:
        """Choose the sandbox's SELinux level, which it keeps until it is removed. Returns the label of its files."""
        options = sandbox.config.linux.security_context.selinux_options
        if self._facts.selinux_enabled:
            used = {other.record.selinux_level for other in self._state.sandboxes}
            sandbox.record.selinux_level = options.level or free_level(used)
        return selinux_labels(options, self._facts, level=sandbox.record.selinux_level).mount

    async def _attach(self, sandbox: Sandbox, plan: NamespacePlan) -> None:
        if sandbox.host_network:
            return
        folder = sandbox.folder
        request = attach_request(sandbox, str(folder.pin("net")))
        sandbox.record.addresses = (await self._network.attach(request)).addresses
        if plan.link_sysctls:
            await in_fresh_thread(set_link_sysctls, folder, plan)

    async def _weigh(self, sandbox: Sandbox, weight: int) -> None:
        """Set the weight of block I/O. If the kernel has no weights, this is logged once and pods run without."""
        try:
            await set_io_weight(self._cgroups, sandbox.record.cgroup_parent, weight)
        except (PodkeelError, OSError) as error:
            if self._io_weights:
                _log.warning("io_weight: cannot be set: pods run without it: %s", error)
            self._io_weights = False

    async def close(self) -> None:
        """Undo the sandboxes that are being created, when the agent stops."""
        await self._names.drain()
