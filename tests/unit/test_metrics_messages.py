"""The CRI's metrics say what the catalogue has, with the descriptors' labels."""

from __future__ import annotations

import msgspec

from cri.services.metrics_messages import descriptors, pod_metrics
from metrics.catalog import CATALOG
from metrics.samples import Kind, Labels, Snapshot
from proto.runtime.v1 import cri_pb2
from runtime.statistics import PodSnapshot
from tests.unit.metrics.test_catalog import FULL, LABELS, samples

ODD = Labels(container="ünicode", id="/" + "x" * 5000, name="", namespace="n", pod="p")
LARGE = msgspec.structs.replace(FULL, seen_ns=2**63 - 1, started_ns=0)


def expected(labels: Labels, snapshot: Snapshot) -> list[cri_pb2.Metric]:
    types = {Kind.COUNTER: cri_pb2.COUNTER, Kind.GAUGE: cri_pb2.GAUGE}
    found = []
    for metric, (values, number) in samples(CATALOG, labels, snapshot):
        message = cri_pb2.Metric(
            name=metric.name, timestamp=snapshot.seen_ns, metric_type=types[metric.kind], label_values=values
        )
        message.value.value = max(0, int(number))
        found.append(message)
    return found


def test_every_value_of_a_pod_and_its_containers() -> None:
    pod = PodSnapshot("a" * 64, (LABELS, FULL), {"b" * 64: (ODD, LARGE), "c" * 64: (LABELS, Snapshot(seen_ns=1))})
    message = cri_pb2.PodSandboxMetrics.FromString(pod_metrics(pod))
    assert message.pod_sandbox_id == "a" * 64
    assert list(message.metrics) == expected(LABELS, FULL)
    assert [container.container_id for container in message.container_metrics] == ["b" * 64, "c" * 64]
    assert list(message.container_metrics[0].metrics) == expected(ODD, LARGE)
    assert [metric.name for metric in message.container_metrics[1].metrics] == ["container_last_seen"]
    assert all(metric.HasField("value") for metric in message.metrics)


def test_label_values_are_as_many_as_label_keys() -> None:
    keys = {descriptor.name: descriptor.label_keys for descriptor in descriptors().descriptors}
    pod = PodSnapshot("a", (LABELS, FULL), {})
    for metric in cri_pb2.PodSandboxMetrics.FromString(pod_metrics(pod)).metrics:
        assert len(metric.label_values) == len(keys[metric.name])
