"""Limits at creation and their change."""

from __future__ import annotations

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, UNKNOWN_ID, Pod, refused
from tests.integration.replay.player import limits_of
from tests.support.agent import wait_for
from tests.support.pods import container_config

Limits = cri_pb2.LinuxContainerResources


def _update(pod: Pod, container_id: str, limits: Limits) -> None:
    request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
    pod.agent.client.call("UpdateContainerResources", request)


def _kernel(pod: Pod, container_id: str) -> tuple[int, int]:
    """The memory limit and the CPU quota per 100 ms that hold."""
    found = limits_of(pod.agent.client, container_id)
    if "cpu.max" in found:
        quota = found["cpu.max"].split()[0].replace("max", "-1")
        return int(found["memory.max"].replace("max", "-1")), int(quota)
    return int(found["memory.limit_in_bytes"]), int(found["cpu.cfs_quota_us"])


def test_limits_hold_and_show(pod: Pod) -> None:
    config = container_config("main", *SLEEP)
    given = Limits(cpu_period=100000, cpu_quota=50000, cpu_shares=512, memory_limit_in_bytes=64 << 20)
    given.oom_score_adj = 500
    config.linux.resources.CopyFrom(given)
    container_id = pod.start(config)
    assert _kernel(pod, container_id) == (64 << 20, 50000)
    assert pod.agent.client.output(container_id, "cat", "/proc/1/oom_score_adj").strip() == "500"
    assert pod.agent.client.status(container_id).resources.linux == given


@pytest.mark.parametrize("started", [False, True])
def test_update(pod: Pod, started: bool) -> None:
    config = container_config("main", *SLEEP)
    config.linux.resources.CopyFrom(
        Limits(cpu_period=100000, cpu_quota=20000, memory_limit_in_bytes=32 << 20, memory_swap_limit_in_bytes=32 << 20)
    )
    container_id = pod.start(config) if started else pod.create(config)
    change = Limits(cpu_period=100000, cpu_quota=70000, cpu_shares=256, memory_limit_in_bytes=48 << 20)
    change.memory_swap_limit_in_bytes = 48 << 20
    _update(pod, container_id, change)
    assert _kernel(pod, container_id) == (48 << 20, 70000)
    shown = pod.agent.client.status(container_id).resources.linux
    assert (shown.cpu_quota, shown.cpu_shares, shown.memory_limit_in_bytes) == (70000, 256, 48 << 20)
    smaller = Limits(memory_limit_in_bytes=24 << 20, memory_swap_limit_in_bytes=24 << 20)
    _update(pod, container_id, smaller)
    assert _kernel(pod, container_id) == (24 << 20, 70000)
    assert pod.agent.client.status(container_id).resources.linux.cpu_quota == 70000


def test_update_below_use_is_refused_and_changes_nothing(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "dd if=/dev/zero of=/dev/shm/held bs=1M count=20; exec sleep 1000")
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    container_id = pod.start(config)
    size = ("stat", "-c", "%s", "/dev/shm/held")
    wait_for(lambda: pod.agent.client.exec(container_id, *size).stdout == b"20971520\n", what="the memory in use")
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "memory"):
        _update(pod, container_id, Limits(memory_limit_in_bytes=8 << 20, cpu_quota=30000, cpu_period=100000))
    assert _kernel(pod, container_id) == (64 << 20, -1)
    assert pod.agent.client.status(container_id).resources.linux.cpu_quota == 0


def test_quota_is_lifted(pod: Pod) -> None:
    config = container_config("main", *SLEEP)
    config.linux.resources.CopyFrom(Limits(cpu_period=100000, cpu_quota=-1))
    container_id = pod.start(config)
    _update(pod, container_id, Limits(cpu_period=100000, cpu_quota=30000))
    assert _kernel(pod, container_id)[1] == 30000
    _update(pod, container_id, Limits(cpu_period=100000, cpu_quota=-1))
    assert _kernel(pod, container_id)[1] == -1
    assert pod.agent.client.status(container_id).resources.linux.cpu_quota == -1


def test_update_that_fails_halfway_changes_nothing(pod: Pod) -> None:
    container_id = pod.sleeping()
    change = Limits(cpu_period=100000, cpu_quota=30000, cpu_shares=256, cpuset_cpus="9999")
    change.memory_limit_in_bytes = 64 << 20
    before = _kernel(pod, container_id)
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "cpuset"):
        _update(pod, container_id, change)
    assert _kernel(pod, container_id) == before
    assert not pod.agent.client.status(container_id).resources.linux.ListFields()


def test_update_in_the_wrong_state(pod: Pod) -> None:
    status = pod.finished(container_config("main", "true"))
    with refused(grpc.StatusCode.FAILED_PRECONDITION, "exited"):
        _update(pod, status.id, Limits(cpu_shares=100))
    with refused(grpc.StatusCode.NOT_FOUND, UNKNOWN_ID):
        _update(pod, UNKNOWN_ID, Limits(cpu_shares=100))


def test_updated_memory_limit_kills(pod: Pod) -> None:
    config = container_config("main", "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exec tail /dev/zero")
    config.linux.resources.memory_limit_in_bytes = 512 << 20
    container_id = pod.start(config)
    _update(pod, container_id, Limits(memory_limit_in_bytes=16 << 20))
    pod.agent.client.output(container_id, "touch", "/tmp/go")
    wait_for(lambda: pod.agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED, 20, "the end")
    assert pod.agent.client.status(container_id).reason == "OOMKilled"
