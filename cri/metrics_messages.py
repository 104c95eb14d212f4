"""The CRI's metrics messages."""

from __future__ import annotations

from metrics.catalog import CATALOG, samples
from metrics.samples import Kind, Labels, Snapshot
from proto.runtime.v1 import cri_pb2
from runtime.statistics import PodSnapshot

_TYPES = {Kind.COUNTER: cri_pb2.COUNTER, Kind.GAUGE: cri_pb2.GAUGE}


def descriptors() -> cri_pb2.ListMetricDescriptorsResponse:
    """Every metric there is, also those without samples now."""
    return cri_pb2.ListMetricDescriptorsResponse(
        descriptors=[
            cri_pb2.MetricDescriptor(name=metric.name, help=metric.help, label_keys=metric.label_keys)
            for metric in CATALOG
        ]
    )


def pod_metrics(pod: PodSnapshot) -> cri_pb2.PodSandboxMetrics:
    """The values of a pod and of its containers; labels stand in the descriptors' order."""
    message = cri_pb2.PodSandboxMetrics(pod_sandbox_id=pod.sandbox_id, metrics=_values(*pod.itself))
    for container_id, (labels, snapshot) in pod.containers.items():
        message.container_metrics.add(container_id=container_id, metrics=_values(labels, snapshot))
    return message


def _values(labels: Labels, snapshot: Snapshot) -> list[cri_pb2.Metric]:
    values = []
    for metric, (label_values, number) in samples(CATALOG, labels, snapshot):
        value = cri_pb2.Metric(
            name=metric.name,
            timestamp=snapshot.seen_ns,
            metric_type=_TYPES[metric.kind],
            label_values=label_values,
        )
        value.value.value = max(0, int(number))  # the CRI knows whole numbers only; -1, "no limit", becomes 0
        values.append(value)
    return values
