"""Metrics of pods as the CRI gives them: what is described is there, with as many label values as label keys."""

from __future__ import annotations

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import Pod
from tests.support.agent import AgentProcess
from tests.support.pods import container_config

# What this kernel, or a disk that nothing was read from, may have no values of.
OPTIONAL = (
    "container_blkio_device_usage_total",
    "container_fs_reads_bytes_total",
    "container_fs_reads_total",
    "container_fs_writes_bytes_total",
    "container_fs_writes_total",
    "container_hugetlb_max_usage_bytes",
    "container_hugetlb_usage_bytes",
    "container_pressure_cpu_stalled_seconds_total",
    "container_pressure_cpu_waiting_seconds_total",
    "container_pressure_io_stalled_seconds_total",
    "container_pressure_io_waiting_seconds_total",
    "container_pressure_memory_stalled_seconds_total",
    "container_pressure_memory_waiting_seconds_total",
)


def _descriptors(agent: AgentProcess) -> list[cri_pb2.MetricDescriptor]:
    answer = agent.client.call("ListMetricDescriptors", cri_pb2.ListMetricDescriptorsRequest())
    return list(answer.descriptors)


def _metrics(agent: AgentProcess, sandbox_id: str) -> list[cri_pb2.Metric]:
    pods = agent.client.call("ListPodSandboxMetrics", cri_pb2.ListPodSandboxMetricsRequest()).pod_metrics
    (pod,) = (pod for pod in pods if pod.pod_sandbox_id == sandbox_id)
    return [*pod.metrics, *(metric for container in pod.container_metrics for metric in container.metrics)]


def test_every_metric_that_is_described_has_values_at_the_first_look(pod: Pod) -> None:
    config = container_config("main", "top")
    config.linux.resources.cpu_period = 100_000
    config.linux.resources.cpu_quota = 20_000
    config.linux.resources.cpu_shares = 1024
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    config.linux.resources.memory_swap_limit_in_bytes = 64 << 20
    container_id = pod.start(config)
    pod.agent.client.output(container_id, "sh", "-c", "mkdir -p /var/lib/d && echo hi > /var/lib/d/file && sync")
    found: dict[str, int] = {}
    for metric in _metrics(pod.agent, pod.id):
        assert found.setdefault(metric.name, len(metric.label_values)) == len(metric.label_values)
    described = {descriptor.name: len(descriptor.label_keys) for descriptor in _descriptors(pod.agent)}
    assert found.keys() <= described.keys()
    assert described.keys() - found.keys() <= set(OPTIONAL)
    assert all(described[name] == count for name, count in found.items())


def test_descriptors_say_what_they_are(agent: AgentProcess) -> None:
    descriptors = _descriptors(agent)
    assert len({descriptor.name for descriptor in descriptors}) == len(descriptors)
    for descriptor in descriptors:
        assert descriptor.help
        assert descriptor.label_keys


def test_pod_without_containers_has_metrics(pod: Pod) -> None:
    assert any(metric.name == "container_network_receive_bytes_total" for metric in _metrics(pod.agent, pod.id))


def test_stream_gives_the_same_pods(pod: Pod) -> None:
    pod.sleeping()
    parts = pod.agent.client.stream("StreamPodSandboxMetrics", cri_pb2.StreamPodSandboxMetricsRequest())
    (streamed,) = (item for part in parts for item in part.pod_sandbox_metrics)
    assert streamed.pod_sandbox_id == pod.id
    assert {metric.name for metric in streamed.metrics} <= {metric.name for metric in _metrics(pod.agent, pod.id)}
