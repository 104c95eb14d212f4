"""The statistics and metrics calls of the CRI's RuntimeService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence

from cri.services import lists, metrics_messages, stats_messages
from host.concurrency.threads import in_stats_thread
from metrics.stats import NetworkReading
from proto.runtime.v1 import cri_pb2
from proto.wire import encode_field, in_messages
from runtime.agent import Agent
from runtime.state.container import Container
from runtime.state.sandbox import Sandbox
from runtime.statistics import Pod


class StatsCalls:
    """Files are read and messages encoded on a thread, so that other calls run meanwhile."""

    def __init__(self, agent: Agent) -> None:
        self._state = agent.state
        self._statistics = agent.statistics
        self._mountpoint = str(agent.layout.data)

    async def container_stats(self, request: cri_pb2.ContainerStatsRequest) -> bytes:
        """The usage of one container; if it does not run, only that of its writable layer."""
        container = self._state.get_container(request.container_id)
        return encode_field(1, await in_stats_thread(self._encoded, container))

    async def list_container_stats(self, request: cri_pb2.ListContainerStatsRequest) -> bytes:
        """The usage of the running containers that match."""
        return b"".join(await self._container_items(request.filter))

    async def stream_container_stats(self, request: cri_pb2.StreamContainerStatsRequest) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(await self._container_items(request.filter)):
            yield message

    async def pod_sandbox_stats(self, request: cri_pb2.PodSandboxStatsRequest) -> bytes:
        """The usage of one pod; if it is not ready, only its attributes."""
        sandbox = self._state.get_sandbox(request.pod_sandbox_id)
        return b"".join(await self._pod_items(self._statistics.pods([sandbox])))

    async def list_pod_sandbox_stats(self, request: cri_pb2.ListPodSandboxStatsRequest) -> bytes:
        """The usage of the ready pods that match."""
        return b"".join(await self._pod_items(self._matching_pods(request.filter)))

    async def stream_pod_sandbox_stats(self, request: cri_pb2.StreamPodSandboxStatsRequest) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(await self._pod_items(self._matching_pods(request.filter))):
            yield message

    async def list_metric_descriptors(
        self, _request: cri_pb2.ListMetricDescriptorsRequest
    ) -> cri_pb2.ListMetricDescriptorsResponse:
        """The metrics there are."""
        return metrics_messages.descriptors()

    async def list_pod_sandbox_metrics(self, _request: cri_pb2.ListPodSandboxMetricsRequest) -> bytes:
        """The metrics of all ready pods."""
        return b"".join(await self._metrics_items())

    async def stream_pod_sandbox_metrics(
        self, _request: cri_pb2.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[bytes]:
        """The same in several messages."""
        for message in in_messages(await self._metrics_items()):
            yield message

    async def _container_items(self, wanted: cri_pb2.ContainerStatsFilter) -> list[bytes]:
        containers = [container for container in self._statistics.running() if _matches(container, wanted)]
        return await in_stats_thread(self._encode_running, containers)

    def _encode_running(self, containers: Sequence[Container]) -> list[bytes]:
        items = []
        for container in containers:
            usage = self._statistics.usage(container)
            if usage is not None:  # otherwise it has ended since
                written = self._statistics.written(container)
                item = stats_messages.container_stats(container, usage, written, self._mountpoint)
                items.append(encode_field(1, item))
        return items

    def _encoded(self, container: Container) -> bytes:
        usage, written = self._statistics.usage(container), self._statistics.written(container)
        return stats_messages.container_stats(container, usage, written, self._mountpoint)

    def _matching_pods(self, wanted: cri_pb2.PodSandboxStatsFilter) -> list[Pod]:
        return [pod for pod in self._statistics.pods() if _pod_matches(pod.sandbox, wanted)]

    async def _pod_items(self, pods: Sequence[Pod]) -> list[bytes]:
        return await self._statistics.with_networks(pods, lambda networks: list(self._encode_pods(pods, networks)))

    def _encode_pods(self, pods: Iterable[Pod], networks: Mapping[str, NetworkReading]) -> Iterator[bytes]:
        for pod in pods:
            usages, encoded = [], []
            for container in pod.containers:
                usage = self._statistics.usage(container, tasks=not pod.own_parent)
                if usage is not None:
                    usages.append(usage)
                    written = self._statistics.written(container)
                    encoded.append(stats_messages.container_stats(container, usage, written, self._mountpoint))
            usage = self._statistics.usage_of_pod(pod, usages)
            item = stats_messages.sandbox_stats(pod.sandbox, usage, networks.get(pod.sandbox.id), encoded)
            yield encode_field(1, item)

    async def _metrics_items(self) -> list[bytes]:
        pods = await self._statistics.snapshots()
        return await in_stats_thread(lambda: [encode_field(1, metrics_messages.pod_metrics(pod)) for pod in pods])


def _matches(container: Container, wanted: cri_pb2.ContainerStatsFilter) -> bool:
    return (
        container.id.startswith(wanted.id)
        and container.sandbox.id.startswith(wanted.pod_sandbox_id)
        and lists.matches(wanted.label_selector, container.config.labels)
    )


def _pod_matches(sandbox: Sandbox, wanted: cri_pb2.PodSandboxStatsFilter) -> bool:
    return sandbox.id.startswith(wanted.id) and lists.matches(wanted.label_selector, sandbox.config.labels)
