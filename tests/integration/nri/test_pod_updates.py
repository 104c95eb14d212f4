"""What critest, the CRI validation suite, expects of NRI when the resources of a pod are updated."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.integration.nri.test_events import Refusing
from tests.integration.nri.test_validation_suite import SuitePlugin
from tests.support.agent import AgentProcess
from tests.support.nri import Recorder, connected
from tests.support.pods import sandbox_config


def limits(shares: int, quota: int, mebibytes: int) -> cri_pb2.LinuxContainerResources:
    return cri_pb2.LinuxContainerResources(
        cpu_shares=shares, cpu_quota=quota, cpu_period=100_000, memory_limit_in_bytes=mebibytes << 20
    )


INITIAL = (limits(10, 5000, 64), limits(256, 25_000, 512))  # overhead and resources
UPDATED = (limits(20, 10_000, 128), limits(512, 50_000, 1024))
RETRIED = (limits(30, 15_000, 192), limits(768, 75_000, 1536))
UPDATES = ("UpdatePodSandbox", "PostUpdatePodSandbox")


def updating(agent: AgentProcess, index: str = "00", **acting: Any) -> AbstractContextManager[Recorder]:
    return connected(SuitePlugin(agent, "cri-test-nri-update-pod", index, acting, UPDATES))


def limited_pod(agent: AgentProcess) -> str:
    sandbox = sandbox_config(agent)
    sandbox.linux.overhead.CopyFrom(INITIAL[0])
    sandbox.linux.resources.CopyFrom(INITIAL[1])
    return agent.client.run_sandbox(sandbox)


def update(agent: AgentProcess, sandbox_id: str, wanted: tuple[Any, Any]) -> None:
    given = {"overhead": wanted[0], "resources": wanted[1]}
    agent.client.call(
        "UpdatePodSandboxResources", cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox_id, **given)
    )


def applied(agent: AgentProcess, sandbox_id: str) -> tuple[Any, Any]:
    """Overhead and resources as the verbose status has them, for a client that reads JSON by the names of Go's tags."""
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
    info = json.loads(agent.client.call("PodSandboxStatus", request).info["info"])
    overhead, resources = (cri_pb2.LinuxContainerResources(**info[name]["linux"]) for name in ("overhead", "resources"))
    return overhead, resources


def numbers(given: nri_pb2.LinuxResources) -> cri_pb2.LinuxContainerResources:
    return cri_pb2.LinuxContainerResources(
        cpu_shares=given.cpu.shares.value,
        cpu_quota=given.cpu.quota.value,
        cpu_period=given.cpu.period.value,
        memory_limit_in_bytes=given.memory.limit.value,
    )


def told_with(agent: AgentProcess, sandbox_id: str) -> tuple[Any, Any]:
    """Overhead and resources of a pod as a new plugin gets them."""
    with updating(agent, "10") as plugin:
        linux = next(pod.linux for pod in plugin.pods if pod.id == sandbox_id)
        return numbers(linux.pod_overhead), numbers(linux.pod_resources)


def test_an_update_of_a_pod_of_no_such_id_is_no_unknown_call(agent: AgentProcess) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        update(agent, "nri-update-pod-probe", INITIAL)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_plugins_get_one_event_before_and_one_after_a_pod_update(agent: AgentProcess) -> None:
    with updating(agent) as plugin:
        sandbox_id = limited_pod(agent)
        update(agent, sandbox_id, UPDATED)
        assert plugin.told == [(name, sandbox_id) for name in UPDATES]
        request = plugin.last("UpdatePodSandbox")
        assert (numbers(request.overhead_linux_resources), numbers(request.linux_resources)) == UPDATED
        assert request.pod.uid.startswith("uid-")
        assert request.pod.name


def test_an_update_of_a_pod_that_a_plugin_rejects_changes_nothing(agent: AgentProcess) -> None:
    with updating(agent, UpdatePodSandbox=Refusing()) as plugin:
        sandbox_id = limited_pod(agent)
        with pytest.raises(grpc.RpcError, match="not today"):
            update(agent, sandbox_id, RETRIED)
        assert plugin.told == [("UpdatePodSandbox", sandbox_id)]
        assert agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
        assert applied(agent, sandbox_id) == INITIAL
        assert told_with(agent, sandbox_id) == INITIAL
        update(agent, sandbox_id, UPDATED)
        assert [event for event, _ in plugin.told] == ["UpdatePodSandbox", *UPDATES]
        assert applied(agent, sandbox_id) == UPDATED
        assert told_with(agent, sandbox_id) == UPDATED


def test_an_error_of_a_plugin_after_the_update_of_a_pod_changes_nothing(agent: AgentProcess) -> None:
    with updating(agent, PostUpdatePodSandbox=Refusing()) as plugin:
        sandbox_id = limited_pod(agent)
        update(agent, sandbox_id, UPDATED)
        assert agent.client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
        assert applied(agent, sandbox_id) == UPDATED
        update(agent, sandbox_id, RETRIED)
        assert [event for event, _ in plugin.told] == [*UPDATES, *UPDATES]
        assert applied(agent, sandbox_id) == RETRIED
