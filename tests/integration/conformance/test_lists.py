"""Lists, their filters and their streams."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import SLEEP, UNKNOWN_ID, Pod, refused
from tests.support.agent import PATIENCE, AgentProcess
from tests.support.pods import container_config, sandbox_config


@pytest.fixture
def pods(agent: AgentProcess) -> list[Pod]:
    """Three pods with labels; the last one is stopped. Each has a running and a created container."""
    made = []
    for number, labels in enumerate(({"app": "a", "tier": "x"}, {"app": "b", "tier": "x"}, {"app": "a"})):
        pod = Pod.run(agent, sandbox_config(agent, labels=labels))
        pod.start(container_config("runs", *SLEEP, labels={**labels, "number": str(number)}))
        pod.create(container_config("waits", *SLEEP, labels=labels))
        made.append(pod)
    agent.client.stop_sandbox(made[2].id)
    return made


def _sandboxes(agent: AgentProcess, **wanted: object) -> list[str]:
    given = cri_pb2.PodSandboxFilter(**wanted)  # type: ignore[arg-type]  # by keyword
    listed = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest(filter=given)).items
    request = cri_pb2.StreamPodSandboxesRequest(filter=given)
    streamed = [item for part in agent.client.stream("StreamPodSandboxes", request) for item in _items(part)]
    assert list(listed) == streamed
    return [item.id for item in listed]


def _containers(agent: AgentProcess, **wanted: object) -> list[tuple[str, str]]:
    given = cri_pb2.ContainerFilter(**wanted)  # type: ignore[arg-type]  # by keyword
    listed = agent.client.call("ListContainers", cri_pb2.ListContainersRequest(filter=given)).containers
    request = cri_pb2.StreamContainersRequest(filter=given)
    streamed = [item for part in agent.client.stream("StreamContainers", request) for item in _items(part)]
    assert list(listed) == streamed
    return [(item.pod_sandbox_id, item.metadata.name) for item in listed]


def _items(part: Message) -> Iterator[Any]:
    """The items of any message with one repeated field."""
    for field, value in part.ListFields():
        assert field.number == 1
        yield from value


def test_sandbox_filters(agent: AgentProcess, pods: list[Pod]) -> None:
    one, two, three = (pod.id for pod in pods)
    ready = cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_READY)
    stopped = cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_NOTREADY)
    assert set(_sandboxes(agent)) == {one, two, three}
    assert _sandboxes(agent, id=two) == [two]
    assert _sandboxes(agent, id=two[:13]) == [two]
    assert _sandboxes(agent, id=UNKNOWN_ID) == []
    assert set(_sandboxes(agent, state=ready)) == {one, two}
    assert _sandboxes(agent, state=stopped) == [three]
    assert set(_sandboxes(agent, label_selector={"app": "a"})) == {one, three}
    assert _sandboxes(agent, label_selector={"app": "a", "tier": "x"}) == [one]
    assert _sandboxes(agent, label_selector={"app": ""}) == []
    assert _sandboxes(agent, label_selector={"app": "a"}, state=stopped, id=three) == [three]
    assert _sandboxes(agent, label_selector={"app": "b"}, id=three) == []


def test_container_filters(agent: AgentProcess, pods: list[Pod]) -> None:
    one, two, three = (pod.id for pod in pods)
    running = cri_pb2.ContainerStateValue(state=cri_pb2.CONTAINER_RUNNING)
    created = cri_pb2.ContainerStateValue(state=cri_pb2.CONTAINER_CREATED)
    ended = cri_pb2.ContainerStateValue(state=cri_pb2.CONTAINER_EXITED)
    assert len(_containers(agent)) == 6
    assert set(_containers(agent, pod_sandbox_id=one)) == {(one, "runs"), (one, "waits")}
    assert set(_containers(agent, pod_sandbox_id=one[:12])) == {(one, "runs"), (one, "waits")}
    assert _containers(agent, pod_sandbox_id=UNKNOWN_ID) == []
    assert set(_containers(agent, state=running)) == {(one, "runs"), (two, "runs")}
    assert set(_containers(agent, state=created)) == {(one, "waits"), (two, "waits")}
    assert set(_containers(agent, state=ended)) == {(three, "runs"), (three, "waits")}
    assert _containers(agent, label_selector={"number": "1"}) == [(two, "runs")]
    assert _containers(agent, label_selector={"number": "1"}, pod_sandbox_id=one) == []
    (item,) = agent.client.call(
        "ListContainers",
        cri_pb2.ListContainersRequest(filter=cri_pb2.ContainerFilter(label_selector={"number": "1"})),
    ).containers
    assert _containers(agent, id=item.id[:14], state=running) == [(two, "runs")]
    assert _containers(agent, id=UNKNOWN_ID) == []


def test_items_agree_with_statuses(agent: AgentProcess, pods: list[Pod]) -> None:
    for item in agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers:
        status = agent.client.status(item.id)
        for field in ("id", "metadata", "image", "image_ref", "image_id", "state", "created_at"):
            assert getattr(item, field) == getattr(status, field), field
        assert dict(item.labels) == dict(status.labels)
        assert dict(item.annotations) == dict(status.annotations)


def test_prefixes_work_wherever_an_id_is_taken(agent: AgentProcess, pods: list[Pod]) -> None:
    client, pod = agent.client, pods[0]
    assert client.sandbox_status(pod.id[:13]).id == pod.id
    container_id = client.create(pod.id[:13], container_config("more", *SLEEP), pod.config)
    short = container_id[:13]
    client.start(short)
    assert client.output(short, "echo", "hi") == "hi\n"
    client.stop(short)
    assert client.status(short).id == container_id
    client.remove(short)
    client.stop_sandbox(pod.id[:13])
    client.remove_sandbox(pod.id[:13])
    assert pod.id not in _sandboxes(agent)


def test_ambiguous_prefix_is_refused(agent: AgentProcess) -> None:
    first: dict[str, str] = {}
    pod = Pod.run(agent, sandbox_config(agent))
    for number in range(17):  # two of seventeen begin with the same digit
        container_id = pod.create(container_config(f"c{number}", *SLEEP))
        if container_id[0] in first:
            break
        first[container_id[0]] = container_id
    for call in (agent.client.status, agent.client.start, agent.client.stop, agent.client.remove):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "ambiguous"):
            call(container_id[0])


def test_lists_do_not_wait_for_writers(agent: AgentProcess) -> None:
    pod = Pod.run(agent, sandbox_config(agent))
    pending = [
        agent.client.future(
            "CreateContainer",
            cri_pb2.CreateContainerRequest(
                pod_sandbox_id=pod.id, config=container_config(f"c{number}", *SLEEP), sandbox_config=pod.config
            ),
        )
        for number in range(8)
    ]
    longest = 0.0
    while not all(call.done() for call in pending):
        begin = time.monotonic()
        agent.client.call("ListContainers", cri_pb2.ListContainersRequest())
        longest = max(longest, time.monotonic() - begin)
    assert all(call.exception() is None for call in pending)
    assert longest < 0.5 * PATIENCE


def test_stream_comes_in_several_messages(agent: AgentProcess) -> None:
    pods = [Pod.run(agent, _host_pod(agent)) for _ in range(70)]
    parts = list(agent.client.stream("StreamPodSandboxes", cri_pb2.StreamPodSandboxesRequest()))
    assert len(parts) > 1
    assert sorted(item.id for part in parts for item in _items(part)) == sorted(pod.id for pod in pods)


def _host_pod(agent: AgentProcess) -> cri_pb2.PodSandboxConfig:
    config = sandbox_config(agent)
    config.linux.security_context.namespace_options.network = cri_pb2.NODE
    return config
