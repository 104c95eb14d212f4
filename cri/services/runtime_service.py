"""The CRI's RuntimeService: each call makes one call to runtime/."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import msgspec

from cri.services import lists
from cri.services.stats_service import StatsCalls
from cri.services.verbose import container_information, node_information, sandbox_information
from cri.streaming.server import StreamingServer
from cri.version import API_VERSION, KUBELET_API_VERSION, RUNTIME_NAME, VERSION
from host.concurrency.threads import in_thread
from host.errors import InvalidArgumentError, WrongStateError
from proto.runtime.v1 import cri_pb2
from proto.wire import in_messages
from runtime.agent import Agent
from runtime.state import status

# Clients accept messages of up to 16 MiB: the output of both streams together must leave space for the rest.
EXEC_OUTPUT_LIMIT = 16 * 1024 * 1024 - 4096


class RuntimeService(StatsCalls):
    """Pods, containers, exec and events (errors are mapped by ``cri.methods``); statistics are in ``StatsCalls``."""

    def __init__(self, agent: Agent, streams: StreamingServer) -> None:
        super().__init__(agent)
        self._agent = agent
        self._streams = streams
        self._lists = lists.Lists(agent.state, agent.images.store)

    async def version(self, _request: cri_pb2.VersionRequest) -> cri_pb2.VersionResponse:
        """Four non-empty fields."""
        return cri_pb2.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name=RUNTIME_NAME,
            runtime_version=VERSION,
            runtime_api_version=API_VERSION,
        )

    async def status(self, request: cri_pb2.StatusRequest) -> cri_pb2.StatusResponse:
        """Conditions, runtime handlers and features."""
        agent = self._agent
        response = cri_pb2.StatusResponse()
        self._add_conditions(response)
        handlers = agent.handlers.working()
        default = agent.handlers.default
        named = [(handler.name, handler) for handler in handlers]
        for name, handler in ([("", default)] if default else []) + named:
            item = response.runtime_handlers.add(name=name)
            item.features.recursive_read_only_mounts = (
                handler.features.recursive_read_only_mounts and agent.facts.recursive_read_only
            )
            item.features.user_namespaces = handler.features.user_namespaces and agent.facts.kernel >= (5, 19)
        response.features.user_namespaces_host_network = any(handler.features.user_namespaces for handler in handlers)
        response.features.supplemental_groups_policy = True
        response.features.mount_options = True
        if request.verbose:
            await agent.checkpoints.support.known()
            await in_thread(agent.hooks_dir.read)  # the answer's condition reports the error
            for key, value in node_information(agent).items():
                response.info[key] = msgspec.json.encode(value).decode()
        return response

    def _add_conditions(self, response: cri_pb2.StatusResponse) -> None:
        agent = self._agent
        runtime = response.status.conditions.add(type="RuntimeReady", status=agent.handlers.default is not None)
        if not runtime.status:
            runtime.reason = "NoRuntimeHandler"
            failures = "; ".join(f"{name}: {why}" for name, why in agent.handlers.failures.items())
            runtime.message = f"no runtime handler works on this node: {failures}"
        condition = agent.network.condition()
        network = response.status.conditions.add(type="NetworkReady", status=condition.ready)
        if not condition.ready:
            network.reason, network.message = condition.reason, condition.message

    async def runtime_config(self, _request: cri_pb2.RuntimeConfigRequest) -> cri_pb2.RuntimeConfigResponse:
        """The cgroup driver in use."""
        driver = cri_pb2.SYSTEMD if self._agent.cgroups.driver == "systemd" else cri_pb2.CGROUPFS
        return cri_pb2.RuntimeConfigResponse(linux=cri_pb2.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(
        self, request: cri_pb2.UpdateRuntimeConfigRequest
    ) -> cri_pb2.UpdateRuntimeConfigResponse:
        """Take over the node's pod CIDRs, for pods made from now on."""
        given = request.runtime_config.network_config.pod_cidr
        cidrs = [cidr.strip() for cidr in given.split(",") if cidr.strip()]
        if cidrs:
            await self._agent.network.set_pod_cidrs(cidrs)
        return cri_pb2.UpdateRuntimeConfigResponse()

    async def run_pod_sandbox(self, request: cri_pb2.RunPodSandboxRequest) -> cri_pb2.RunPodSandboxResponse:
        """Make a sandbox."""
        sandbox = await self._agent.pods.run(request.config, request.runtime_handler)
        return cri_pb2.RunPodSandboxResponse(pod_sandbox_id=sandbox.id)

    async def stop_pod_sandbox(self, request: cri_pb2.StopPodSandboxRequest) -> cri_pb2.StopPodSandboxResponse:
        """Stop a sandbox; idempotent."""
        await self._agent.pod_stops.stop(request.pod_sandbox_id)
        return cri_pb2.StopPodSandboxResponse()

    async def remove_pod_sandbox(self, request: cri_pb2.RemovePodSandboxRequest) -> cri_pb2.RemovePodSandboxResponse:
        """Remove a sandbox; idempotent."""
        await self._agent.pod_removals.remove(request.pod_sandbox_id)
        return cri_pb2.RemovePodSandboxResponse()

    async def pod_sandbox_status(self, request: cri_pb2.PodSandboxStatusRequest) -> cri_pb2.PodSandboxStatusResponse:
        """A sandbox's status, with those of its containers."""
        sandbox = self._agent.state.get_sandbox(request.pod_sandbox_id)
        containers = [c for c in self._agent.state.containers_of(sandbox) if c.visible]
        response = cri_pb2.PodSandboxStatusResponse(
            status=status.sandbox_status(sandbox),
            containers_statuses=[status.container_status(container) for container in containers],
            timestamp=time.time_ns(),
        )
        if request.verbose:
            response.info["info"] = msgspec.json.encode(sandbox_information(self._agent, sandbox)).decode()
        return response

    async def list_pod_sandbox(self, request: cri_pb2.ListPodSandboxRequest) -> bytes:
        """Sandboxes that match a filter."""
        return b"".join(self._lists.sandboxes(request.filter))

    async def stream_pod_sandboxes(self, request: cri_pb2.StreamPodSandboxesRequest) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(self._lists.sandboxes(request.filter)):
            yield message

    async def update_pod_sandbox_resources(
        self, request: cri_pb2.UpdatePodSandboxResourcesRequest
    ) -> cri_pb2.UpdatePodSandboxResourcesResponse:
        """Record the pod's resources."""
        resources = request.resources if request.HasField("resources") else None
        overhead = request.overhead if request.HasField("overhead") else None
        await self._agent.pod_resources.update_resources(request.pod_sandbox_id, resources, overhead)
        return cri_pb2.UpdatePodSandboxResourcesResponse()

    async def create_container(self, request: cri_pb2.CreateContainerRequest) -> cri_pb2.CreateContainerResponse:
        """Make a container in a sandbox."""
        container = await self._agent.containers.create(request.pod_sandbox_id, request.config)
        return cri_pb2.CreateContainerResponse(container_id=container.id)

    async def start_container(self, request: cri_pb2.StartContainerRequest) -> cri_pb2.StartContainerResponse:
        """Start a created container."""
        await self._agent.starts.start(request.container_id)
        return cri_pb2.StartContainerResponse()

    async def stop_container(self, request: cri_pb2.StopContainerRequest) -> cri_pb2.StopContainerResponse:
        """Stop a container; idempotent."""
        if request.timeout < 0:
            raise InvalidArgumentError(f"stop of container {request.container_id!r}: the timeout is negative")
        await self._agent.stops.stop(request.container_id, request.timeout)
        return cri_pb2.StopContainerResponse()

    async def remove_container(self, request: cri_pb2.RemoveContainerRequest) -> cri_pb2.RemoveContainerResponse:
        """Remove a container; idempotent."""
        await self._agent.removals.remove(request.container_id)
        return cri_pb2.RemoveContainerResponse()

    async def container_status(self, request: cri_pb2.ContainerStatusRequest) -> cri_pb2.ContainerStatusResponse:
        """A container's status."""
        container = self._agent.state.get_container(request.container_id)
        response = cri_pb2.ContainerStatusResponse(status=status.container_status(container))
        if request.verbose:
            response.info["info"] = msgspec.json.encode(container_information(self._agent, container)).decode()
        return response

    async def list_containers(self, request: cri_pb2.ListContainersRequest) -> bytes:
        """Containers that match a filter."""
        return b"".join(self._lists.containers(request.filter))

    async def stream_containers(self, request: cri_pb2.StreamContainersRequest) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(self._lists.containers(request.filter)):
            yield message

    async def update_container_resources(
        self, request: cri_pb2.UpdateContainerResourcesRequest
    ) -> cri_pb2.UpdateContainerResourcesResponse:
        """Change a container's limits."""
        await self._agent.resources.update(request.container_id, request.linux)
        return cri_pb2.UpdateContainerResourcesResponse()

    async def reopen_container_log(
        self, request: cri_pb2.ReopenContainerLogRequest
    ) -> cri_pb2.ReopenContainerLogResponse:
        """Open the log again after it was renamed."""
        await self._agent.logs.reopen(request.container_id)
        return cri_pb2.ReopenContainerLogResponse()

    async def exec_sync(self, request: cri_pb2.ExecSyncRequest) -> cri_pb2.ExecSyncResponse:
        """Run a command to its end."""
        result = await self._agent.execution.exec_sync(request.container_id, list(request.cmd), request.timeout)
        half = EXEC_OUTPUT_LIMIT // 2
        stderr = result.stderr[: max(half, EXEC_OUTPUT_LIMIT - len(result.stdout))]
        stdout = result.stdout[: EXEC_OUTPUT_LIMIT - len(stderr)]
        return cri_pb2.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=result.status)

    async def exec(self, request: cri_pb2.ExecRequest) -> cri_pb2.ExecResponse:
        """A URL that runs a command, for one connection within a minute."""
        container = self._agent.state.running_container(request.container_id)
        if not request.cmd:
            raise InvalidArgumentError(f"{container.title}: no command to execute was given")
        url = self._streams.exec_url(
            container.id,
            request.cmd,
            tty=request.tty,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
        )
        return cri_pb2.ExecResponse(url=url)

    async def attach(self, request: cri_pb2.AttachRequest) -> cri_pb2.AttachResponse:
        """A URL that attaches to a container's streams, for one connection within a minute."""
        container = self._agent.state.running_container(request.container_id)
        wanted = {"stdin": request.stdin, "stdout": request.stdout, "stderr": request.stderr}
        url = self._streams.attach_url(container.id, tty=request.tty, **wanted)
        return cri_pb2.AttachResponse(url=url)

    async def port_forward(self, request: cri_pb2.PortForwardRequest) -> cri_pb2.PortForwardResponse:
        """A URL that forwards ports of a pod, for one connection within a minute."""
        sandbox = self._agent.state.get_sandbox(request.pod_sandbox_id)
        if status.sandbox_state(sandbox) != cri_pb2.SANDBOX_READY:
            raise WrongStateError(f"{sandbox.title} is not ready: nothing listens in it")
        return cri_pb2.PortForwardResponse(url=self._streams.port_forward_url(sandbox.id, request.port))

    async def checkpoint_container(
        self, request: cri_pb2.CheckpointContainerRequest
    ) -> cri_pb2.CheckpointContainerResponse:
        """Write a running container to an archive; it continues to run."""
        await self._agent.checkpoints.checkpoint(request.container_id, request.location, request.timeout)
        return cri_pb2.CheckpointContainerResponse()

    async def checkpoint_pod(self, request: cri_pb2.CheckpointPodRequest) -> cri_pb2.CheckpointPodResponse:
        """Write containers of a pod to a folder; they continue to run."""
        ids, options = list(request.container_ids), dict(request.options)
        await self._agent.checkpoints.checkpoint_pod(request.pod_sandbox_id, request.output_path, ids, options)
        return cri_pb2.CheckpointPodResponse()

    async def restore_pod(self, request: cri_pb2.RestorePodRequest) -> cri_pb2.RestorePodResponse:
        """Make a pod from a checkpoint; its containers are created."""
        options, configs = dict(request.options), list(request.container_configs)
        path, handler = request.checkpoint_path, request.runtime_handler
        restores = self._agent.pod_restores
        sandbox, containers = await restores.restore(path, request.config, handler, options, configs)
        restored = [
            cri_pb2.RestoredContainer(name=container.config.metadata.name, container_id=container.id)
            for container in containers
        ]
        return cri_pb2.RestorePodResponse(pod_sandbox_id=sandbox.id, restored_containers=restored)

    async def get_container_events(self, _request: cri_pb2.GetEventsRequest) -> AsyncIterator[bytes]:
        """Events from now on."""
        subscription = self._agent.state.events.subscribe()
        try:
            async for event in subscription.events():
                yield event
        finally:
            self._agent.state.events.unsubscribe(subscription)
