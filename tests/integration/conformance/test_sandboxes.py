"""The sandbox calls."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import UNKNOWN_ID, Pod, exited, refused
from tests.support.agent import SOON, AgentProcess
from tests.support.pods import container_config, sandbox_config

ODD = {"a": "", "": "b", "tab\t": "\u0000\u0001\u001f\u007f", "\U0001f6a2": "ünï\ncode", "json": '{"a":[1,"\\""]}'}


def test_status_returns_the_configuration(agent: AgentProcess) -> None:
    before = time.time_ns()
    config = sandbox_config(agent, labels=ODD, annotations={**ODD, "long": "x" * 200_000})
    config.metadata.attempt = 7
    pod = Pod.run(agent, config)
    status = agent.client.sandbox_status(pod.id)
    assert status.id == pod.id
    assert status.metadata == config.metadata
    assert dict(status.labels) == dict(config.labels)
    assert dict(status.annotations) == dict(config.annotations)
    assert before <= status.created_at <= time.time_ns()
    assert status.state == cri_pb2.SANDBOX_READY
    assert status.linux.namespaces.options == config.linux.security_context.namespace_options
    assert status.runtime_handler == ""
    (item,) = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert (item.id, item.metadata, item.state, item.created_at) == (
        status.id,
        status.metadata,
        status.state,
        status.created_at,
    )
    assert (dict(item.labels), dict(item.annotations)) == (dict(status.labels), dict(status.annotations))


def _container_information(pod: Pod, container_id: str) -> Any:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    return json.loads(pod.agent.client.call("ContainerStatus", request).info["info"])


def test_verbose_status_is_json_and_shows_containers(pod: Pod) -> None:
    container_id = pod.sleeping()
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    answer = pod.agent.client.call("PodSandboxStatus", request)
    assert [status.id for status in answer.containers_statuses] == [container_id]
    assert answer.timestamp > 0
    information = json.loads(answer.info["info"])
    assert information["networkNamespace"].endswith("/ns/net")
    # crictl inspectp reads these.
    assert {"runtimeHandler", "cgroupParent"} <= information.keys()
    own = _container_information(pod, container_id)
    assert information["pid"] == own["pid"] > 1
    namespaces = {entry["type"]: entry["path"] for entry in information["runtimeSpec"]["linux"]["namespaces"]}
    assert {"network", "ipc", "uts"} <= namespaces.keys()
    for kind, name in (("network", "net"), ("ipc", "ipc"), ("uts", "uts")):
        shown = pod.agent.client.output(container_id, "readlink", f"/proc/self/ns/{name}").strip()
        assert shown == f"{name}:[{Path(namespaces[kind]).stat().st_ino}]"


def test_stop_and_remove_are_repeatable(pod: Pod) -> None:
    client = pod.agent.client
    container_id = pod.sleeping()
    for _ in range(2):
        client.stop_sandbox(pod.id)
    status = client.sandbox_status(pod.id)
    assert (status.state, status.network.ip) == (cri_pb2.SANDBOX_NOTREADY, "")
    stopped = client.status(container_id)
    assert (stopped.state, stopped.exit_code, stopped.reason) == (cri_pb2.CONTAINER_EXITED, 137, "Error")
    for _ in range(2):
        client.remove_sandbox(pod.id)
    with refused(grpc.StatusCode.NOT_FOUND, pod.id):
        client.sandbox_status(pod.id)
    with refused(grpc.StatusCode.NOT_FOUND, container_id):
        client.status(container_id)
    for unknown in (UNKNOWN_ID, "no such thing"):
        client.stop_sandbox(unknown)
        client.remove_sandbox(unknown)
        client.stop(unknown)
        client.remove(unknown)


def test_ready_sandbox_is_removed_with_its_containers(pod: Pod) -> None:
    pod.sleeping("one")
    pod.create(container_config("two", "true"))
    pod.agent.client.remove_sandbox(pod.id)
    assert not pod.agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers


def test_same_identity_same_sandbox(agent: AgentProcess) -> None:
    client, config = agent.client, sandbox_config(agent)
    with ThreadPoolExecutor(4) as threads:
        ids = set(threads.map(lambda _: client.run_sandbox(config), range(4)))
    assert len(ids) == 1
    assert ids == {client.run_sandbox(config)}
    other = sandbox_config(agent, config.metadata.name, labels={"a": "b"})
    with refused(grpc.StatusCode.ALREADY_EXISTS, config.metadata.name):
        client.run_sandbox(other)
    client.stop_sandbox(*ids)
    with refused(grpc.StatusCode.ALREADY_EXISTS, "attempt"):
        client.run_sandbox(config)
    config.metadata.attempt = 1
    assert client.run_sandbox(config) not in ids
    client.remove_sandbox(*ids)
    config.metadata.attempt = 0
    assert client.run_sandbox(config) not in ids


def test_unknown_runtime_handler_is_refused(agent: AgentProcess) -> None:
    with refused(grpc.StatusCode.NOT_FOUND, "nohandler"):
        agent.client.run_sandbox(sandbox_config(agent), handler="nohandler")
    assert not agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items


def test_every_named_handler_runs_pods(agent: AgentProcess) -> None:
    status = agent.client.call("Status", cri_pb2.StatusRequest())
    for name in (handler.name for handler in status.runtime_handlers):
        config = sandbox_config(agent)
        pod = Pod(agent, config, agent.client.run_sandbox(config, handler=name))
        assert agent.client.sandbox_status(pod.id).runtime_handler == name
        assert pod.printed(container_config("main", "echo", "hello")) == "hello\n"


def test_failure_says_which_step_failed_and_leaves_nothing(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    config.linux.sysctls["net.ipv4.no_such_setting"] = "1"
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "net.ipv4.no_such_setting"):
        agent.client.run_sandbox(config)
    del config.linux.sysctls["net.ipv4.no_such_setting"]
    agent.client.run_sandbox(config)


@pytest.mark.parametrize("user", [cri_pb2.CONTAINER, cri_pb2.TARGET])
def test_invalid_user_namespace_modes_are_refused(agent: AgentProcess, user: cri_pb2.NamespaceMode) -> None:
    config = sandbox_config(agent)
    config.linux.security_context.namespace_options.userns_options.mode = user
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "user namespace"):
        agent.client.run_sandbox(config)


def test_client_that_goes_away_leaves_no_sandbox(agent: AgentProcess) -> None:
    config = sandbox_config(agent)
    call = agent.client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=config))
    call.cancel()
    pod = Pod.run(agent, config)
    (item,) = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert item.id == pod.id


def test_stop_waits_for_no_grace_of_containers(pod: Pod) -> None:
    deaf = pod.start(container_config("deaf", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"))
    begin = time.monotonic()
    pod.agent.client.stop_sandbox(pod.id)
    assert time.monotonic() - begin < SOON  # a grace period would take longer
    assert exited(pod.agent, deaf).exit_code == 137


def test_pod_with_and_without_cgroup_parent_side_by_side(agent: AgentProcess) -> None:
    plain = Pod.run(agent, sandbox_config(agent))
    config = sandbox_config(agent)
    config.linux.cgroup_parent = agent.parent_for_pods("pod1")
    placed = Pod.run(agent, config)
    groups = []
    for pod in (plain, placed):
        request = cri_pb2.ContainerStatusRequest(container_id=pod.sleeping(), verbose=True)
        groups.append(Path(json.loads(agent.client.call("ContainerStatus", request).info["info"])["cgroup"]))
    name = Path(config.linux.cgroup_parent).name
    assert [name in {folder.name for folder in group.parents} for group in groups] == [False, True]


def test_resources_of_the_pod_are_recorded(pod: Pod) -> None:
    resources = cri_pb2.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=64 << 20)
    request = cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, resources=resources)
    for _ in range(2):
        pod.agent.client.call("UpdatePodSandboxResources", request)
    with refused(grpc.StatusCode.NOT_FOUND):
        pod.agent.client.call(
            "UpdatePodSandboxResources", cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=UNKNOWN_ID)
        )
