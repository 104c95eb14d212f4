"""``podkeel stats``."""

from __future__ import annotations

import argparse

from cli.connect import connect
from cli.lookup import find_container, list_pods
from cli.text import short, size, table
from proto.runtime.v1 import cri_pb2


def stats(options: argparse.Namespace) -> None:
    """Print what running containers use, in order of memory, the largest first."""
    with connect(options) as client:
        wanted = {find_container(client, name).id for name in options.containers}
        answer = client.call(cri_pb2.ListContainerStatsRequest(), cri_pb2.ListContainerStatsResponse, "read statistics")
        pods = {pod.metadata.uid: pod.metadata.name for pod in list_pods(client)}
    chosen = [item for item in answer.stats if not wanted or item.attributes.id in wanted]
    chosen.sort(key=lambda item: -item.memory.working_set_bytes.value)
    print(table(("CONTAINER", "NAME", "POD", "CPU", "MEMORY", "DISK", "FILES"), [_row(item, pods) for item in chosen]))


def _row(item: cri_pb2.ContainerStats, pods: dict[str, str]) -> tuple[object, ...]:
    labels = item.attributes.labels
    pod = labels.get("io.kubernetes.pod.name") or pods.get(labels.get("io.kubernetes.pod.uid", ""), "-")
    rate = item.cpu.usage_nano_cores
    return (
        short(item.attributes.id),
        item.attributes.metadata.name,
        pod,
        f"{rate.value / 1e7:.1f}%" if item.cpu.HasField("usage_nano_cores") else "-",
        size(item.memory.working_set_bytes.value),
        size(item.writable_layer.used_bytes.value),
        item.writable_layer.inodes_used.value,
    )
