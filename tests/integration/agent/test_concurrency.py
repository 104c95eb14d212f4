"""Many clients at once, and the same request twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess
from tests.support.cri import CriClient
from tests.support.pods import container_config, run_container, sandbox_config

_PODS = 60
_CLIENTS = 20
_SAME = 8


def whole_life(agent: AgentProcess, client: CriClient, number: int) -> None:
    """A pod of two containers from nothing to nothing."""
    sandbox = sandbox_config(agent, f"many-{number}")
    sandbox_id = client.run_sandbox(sandbox)
    containers = []
    for name in ("first", "second"):
        containers.append(client.create(sandbox_id, container_config(name, "sleep", "1000"), sandbox))
        client.start(containers[-1])
    for container_id in containers:
        assert client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        client.stop(container_id)
        client.remove(container_id)
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)


def test_sixty_pods_from_twenty_clients(agent: AgentProcess) -> None:
    clients = [CriClient(agent.address) for _ in range(_CLIENTS)]
    with ThreadPoolExecutor(_CLIENTS) as pool:
        lives = [pool.submit(whole_life, agent, clients[n % _CLIENTS], n) for n in range(_PODS)]
        for life in lives:
            life.result()
    for client in clients:
        client.close()
    assert not agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    assert agent.client.findings() == []


def _all_at_once(agent: AgentProcess, call: str, requests: list[Any]) -> list[Any]:
    futures = [agent.client.future(call, request) for request in requests]
    return [future.exception() or future.result() for future in futures]


def test_identical_sandboxes_at_once_are_one(agent: AgentProcess) -> None:
    request = cri_pb2.RunPodSandboxRequest(config=sandbox_config(agent))
    answers = _all_at_once(agent, "RunPodSandbox", [request] * _SAME)
    ids = {answer.pod_sandbox_id for answer in answers}
    assert len(ids) == 1
    assert agent.client.run_sandbox(request.config) in ids
    assert len(agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items) == 1


def test_identical_containers_at_once_are_one(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    config = container_config("main", "sleep", "1000")
    request = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
    answers = _all_at_once(agent, "CreateContainer", [request] * _SAME)
    ids = {answer.container_id for answer in answers}
    assert len(ids) == 1
    assert agent.client.create(sandbox_id, config, sandbox) in ids
    assert len(agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers) == 1


def test_another_configuration_at_once_is_refused(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    other = sandbox_config(agent, sandbox.metadata.name, labels={"another": "configuration"})
    requests = [cri_pb2.RunPodSandboxRequest(config=config) for config in (sandbox, other)]
    made, refused = _all_at_once(agent, "RunPodSandbox", requests)
    assert made.pod_sandbox_id
    assert refused.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "raise" in refused.details()
    with pytest.raises(grpc.RpcError) as later:
        agent.client.run_sandbox(other)
    assert later.value.code() == grpc.StatusCode.ALREADY_EXISTS


def test_another_container_configuration_at_once_is_refused(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    configs = [container_config("main", "sleep", seconds) for seconds in ("1000", "2000")]
    requests = [cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config) for config in configs]
    made, refused = _all_at_once(agent, "CreateContainer", requests)
    assert made.container_id
    assert refused.code() == grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(grpc.RpcError) as later:
        agent.client.create(sandbox_id, configs[1], sandbox)
    assert later.value.code() == grpc.StatusCode.ALREADY_EXISTS


def test_a_pod_removed_from_many_clients_while_containers_are_made(agent: AgentProcess) -> None:
    for _ in range(3):
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        configs = [container_config(f"main-{number}", "sleep", "1000") for number in range(4)]
        creations = [
            agent.client.future(
                "CreateContainer",
                cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config),
            )
            for config in configs
        ]
        removals = [cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id)] * 4
        answers = _all_at_once(agent, "RemovePodSandbox", removals)
        assert all(isinstance(answer, cri_pb2.RemovePodSandboxResponse) for answer in answers), answers
        for creation in creations:
            error = creation.exception()
            codes = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND)
            assert error is None or error.code() in codes, error
        assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    assert agent.client.findings() == []


def test_stops_and_removals_of_one_container_at_once(agent: AgentProcess) -> None:
    _, container_id = run_container(agent, "sleep", "1000")
    stops = [agent.client.future("StopContainer", cri_pb2.StopContainerRequest(container_id=container_id, timeout=1))]
    removals = [cri_pb2.RemoveContainerRequest(container_id=container_id)] * _SAME
    answers = _all_at_once(agent, "RemoveContainer", removals)
    assert all(isinstance(answer, cri_pb2.RemoveContainerResponse) for answer in answers), answers
    assert all(stop.code() == grpc.StatusCode.OK for stop in stops)
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
