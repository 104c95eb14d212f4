"""Unknown ids, shortened ids, and repeated calls."""

from __future__ import annotations

from typing import Any

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.refusals import refused
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, run_container, sandbox_config

_ABSENT = "0123456789abcdef" * 4

_ENDING: list[tuple[str, Any]] = [
    ("StopContainer", cri_pb2.StopContainerRequest(container_id=_ABSENT)),
    ("RemoveContainer", cri_pb2.RemoveContainerRequest(container_id=_ABSENT)),
    ("StopPodSandbox", cri_pb2.StopPodSandboxRequest(pod_sandbox_id=_ABSENT)),
    ("RemovePodSandbox", cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=_ABSENT)),
    ("RemoveImage", cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image="example.org/never:was"))),
]
_NEEDING: list[tuple[str, Any]] = [
    ("PodSandboxStatus", cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=_ABSENT)),
    ("ContainerStatus", cri_pb2.ContainerStatusRequest(container_id=_ABSENT)),
    ("StartContainer", cri_pb2.StartContainerRequest(container_id=_ABSENT)),
    ("ExecSync", cri_pb2.ExecSyncRequest(container_id=_ABSENT, cmd=["true"])),
    ("UpdateContainerResources", cri_pb2.UpdateContainerResourcesRequest(container_id=_ABSENT)),
    ("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=_ABSENT)),
    ("UpdatePodSandboxResources", cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=_ABSENT)),
    (
        "CreateContainer",
        cri_pb2.CreateContainerRequest(pod_sandbox_id=_ABSENT, config=container_config("main", "true")),
    ),
]


@pytest.mark.parametrize(("call", "request_"), _ENDING, ids=[call for call, _ in _ENDING])
def test_stops_and_removals_of_unknown_ids_succeed(agent: AgentProcess, call: str, request_: Any) -> None:
    agent.client.call(call, request_)
    agent.client.call(call, request_)


@pytest.mark.parametrize(("call", "request_"), _NEEDING, ids=[call for call, _ in _NEEDING])
def test_unknown_ids_are_not_found(agent: AgentProcess, call: str, request_: Any) -> None:
    refused("NOT_FOUND", _ABSENT, call=lambda: agent.client.call(call, request_))


@pytest.mark.parametrize(("call", "request_"), _NEEDING, ids=[call for call, _ in _NEEDING])
def test_no_id_is_a_bad_request(agent: AgentProcess, call: str, request_: Any) -> None:
    empty = type(request_)()
    empty.CopyFrom(request_)
    empty.ClearField("pod_sandbox_id" if "pod_sandbox_id" in empty.DESCRIPTOR.fields_by_name else "container_id")
    refused("INVALID_ARGUMENT", "no", "id was given", call=lambda: agent.client.call(call, empty))


def test_stop_and_remove_repeated(agent: AgentProcess) -> None:
    client = agent.client
    sandbox_id, container_id = run_container(agent, "sleep", "1000")
    for _ in range(2):
        client.stop(container_id)
    assert client.status(container_id).exit_code == 137
    for _ in range(2):
        client.stop_sandbox(sandbox_id)
    for _ in range(2):
        client.remove(container_id)
    for _ in range(2):
        client.remove_sandbox(sandbox_id)
    refused("NOT_FOUND", sandbox_id, call=lambda: client.sandbox_status(sandbox_id))
    refused("NOT_FOUND", container_id, call=lambda: client.status(container_id))


def test_removal_stops_what_runs(agent: AgentProcess) -> None:
    client = agent.client
    sandbox_id, container_id = run_container(agent, "sleep", "1000")
    client.remove(container_id)
    refused("NOT_FOUND", call=lambda: client.status(container_id))
    sandbox = sandbox_config(agent)
    other_id = client.run_sandbox(sandbox)
    created = client.create(other_id, container_config("created", "sleep", "1000"), sandbox)
    client.remove(created)
    second_id, running = run_container(agent, "sleep", "1000")
    client.remove_sandbox(second_id)
    refused("NOT_FOUND", call=lambda: client.status(running))
    assert client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
    assert client.findings() == []


def test_the_same_run_and_create_answer_the_same_id(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    container = container_config("main", "sleep", "1000")
    sandbox_id = client.run_sandbox(sandbox)
    assert client.run_sandbox(sandbox) == sandbox_id
    container_id = client.create(sandbox_id, container, sandbox)
    assert client.create(sandbox_id, container, sandbox) == container_id
    client.start(container_id)
    assert client.create(sandbox_id, container, sandbox) == container_id
    client.stop(container_id)
    refused("ALREADY_EXISTS", "attempt", call=lambda: client.create(sandbox_id, container, sandbox))
    client.stop_sandbox(sandbox_id)
    refused("ALREADY_EXISTS", "attempt", call=lambda: client.run_sandbox(sandbox))
    sandbox.metadata.attempt = 1
    assert client.run_sandbox(sandbox) != sandbox_id


def test_a_unique_prefix_works_wherever_an_id_does(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    short_sandbox = sandbox_id[:12]
    container_id = client.create(short_sandbox, container_config("main", "sleep", "1000"), sandbox)
    short = container_id[:12]
    client.start(short)
    assert client.output(short, "echo", "hello") == "hello\n"
    limits = cri_pb2.LinuxContainerResources(cpu_shares=512)
    client.call("UpdateContainerResources", cri_pb2.UpdateContainerResourcesRequest(container_id=short, linux=limits))
    client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=short))
    assert client.status(short).id == container_id
    assert client.sandbox_status(short_sandbox).id == sandbox_id
    wanted = cri_pb2.ContainerFilter(id=short, pod_sandbox_id=short_sandbox)
    found = client.call("ListContainers", cri_pb2.ListContainersRequest(filter=wanted)).containers
    assert [container.id for container in found] == [container_id]
    listing = cri_pb2.ListPodSandboxRequest(filter=cri_pb2.PodSandboxFilter(id=short_sandbox))
    assert [item.id for item in client.call("ListPodSandbox", listing).items] == [sandbox_id]
    client.stop(short)
    client.remove(short)
    client.stop_sandbox(short_sandbox)
    client.remove_sandbox(short_sandbox)


def test_an_ambiguous_prefix_is_refused(agent: AgentProcess) -> None:
    client = agent.client
    ids: list[str] = []
    sandbox = sandbox_config(agent)
    while len({sandbox_id[0] for sandbox_id in ids}) == len(
        ids
    ):  # at most 17 sandboxes until two ids begin with the same character
        sandbox.metadata.attempt = len(ids)
        ids.append(client.run_sandbox(sandbox))
    prefix = ids[-1][0]
    ambiguous = ("ambiguous", "give more characters")
    refused("INVALID_ARGUMENT", *ambiguous, call=lambda: client.sandbox_status(prefix))
    refused("INVALID_ARGUMENT", *ambiguous, call=lambda: client.stop_sandbox(prefix))
    refused("INVALID_ARGUMENT", *ambiguous, call=lambda: client.remove_sandbox(prefix))
    assert len(client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items) == len(ids)


def test_wrong_states(agent: AgentProcess) -> None:
    client = agent.client
    sandbox = sandbox_config(agent)
    sandbox_id = client.run_sandbox(sandbox)
    container_id = client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    refused("FAILED_PRECONDITION", "created, not running", call=lambda: client.exec(container_id, "true"))
    client.start(container_id)
    refused("FAILED_PRECONDITION", "only a created one", call=lambda: client.start(container_id))
    client.stop(container_id)
    wait_for(lambda: client.status(container_id).state == cri_pb2.CONTAINER_EXITED)
    refused("FAILED_PRECONDITION", "exited, not running", call=lambda: client.exec(container_id, "true"))
    refused("FAILED_PRECONDITION", "only a created one", call=lambda: client.start(container_id))
    reopen = cri_pb2.ReopenContainerLogRequest(container_id=container_id)
    refused("FAILED_PRECONDITION", "exited", call=lambda: client.call("ReopenContainerLog", reopen))
    update = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id)
    refused("FAILED_PRECONDITION", "exited", call=lambda: client.call("UpdateContainerResources", update))
    client.stop_sandbox(sandbox_id)
    other = container_config("other", "true")
    refused("FAILED_PRECONDITION", "not ready", call=lambda: client.create(sandbox_id, other, sandbox))
