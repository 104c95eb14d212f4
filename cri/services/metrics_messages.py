"""The CRI's metrics messages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from metrics.catalog import CATALOG
from metrics.samples import Kind, Labels, Snapshot
from proto.runtime.v1 import cri_pb2
from proto.wire import encode_field, encode_number
from runtime.statistics import PodSnapshot


def descriptors() -> cri_pb2.ListMetricDescriptorsResponse:
    """The descriptors of all metrics, including those without samples now."""
    return cri_pb2.ListMetricDescriptorsResponse(
        descriptors=[
            cri_pb2.MetricDescriptor(name=metric.name, help=metric.help, label_keys=metric.label_keys)
            for metric in CATALOG
        ]
    )


def pod_metrics(pod: PodSnapshot) -> bytes:
    """An encoded PodSandboxMetrics: the values of a pod and of its containers, labels in the descriptors' order.

    A message object for each of some hundred values per pod would be most of the work.
    """
    parts = [encode_field(1, pod.sandbox_id.encode()), *_values(*pod.itself)]
    for container_id, (labels, snapshot) in pod.containers.items():
        parts.append(encode_field(3, encode_field(1, container_id.encode()) + b"".join(_values(labels, snapshot))))
    return b"".join(parts)


def _values(labels: Labels, snapshot: Snapshot) -> Iterator[bytes]:
    """Encoded Metric messages, each as an element of field 2."""
    moment = encode_number(2, snapshot.seen_ns)
    described = _encode_labels(labels.values())
    of_kind = [moment + encode_number(3, kind.value) + described for kind in Kind]
    for metric, name, kind in _NAMED:
        begin = name + of_kind[kind]
        for values, number in metric.samples(snapshot):
            whole = max(0, int(number))  # the CRI knows whole numbers only; -1, "no limit", becomes 0
            yield encode_field(2, begin + _own(values) + encode_field(5, encode_number(1, whole)))


def _encode_labels(values: tuple[str, ...]) -> bytes:
    return b"".join([encode_field(4, value.encode()) for value in values])


# values of labels such as devices, interfaces and states: few different ones, repeated often
_own = lru_cache(1024)(_encode_labels)
_NAMED = [(metric, encode_field(1, metric.name.encode()), metric.kind.value) for metric in CATALOG]
