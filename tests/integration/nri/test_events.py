"""The events that plugins get, their order, and what clients see meanwhile."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config

LIFE = [
    "CreateContainer",
    "ValidateContainerAdjustment",
    "PostCreateContainer",
    "StartContainer",
    "PostStartContainer",
    "StopContainer",
    "RemoveContainer",
]


def test_all_events_of_a_pod_come_in_order(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket)) as plugin:
        sandbox_id, container_id = run_container(agent, "sleep", "1000")
        limits = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
        request = cri_pb2.UpdateContainerResourcesRequest(container_id=container_id, linux=limits)
        agent.client.call("UpdateContainerResources", request)
        pod_request = cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=sandbox_id, resources=limits)
        agent.client.call("UpdatePodSandboxResources", pod_request)
        agent.client.stop(container_id)
        agent.client.remove(container_id)
        agent.client.stop_sandbox(sandbox_id)
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
    assert plugin.events_of(container_id) == [*LIFE[:5], "UpdateContainer", "PostUpdateContainer", *LIFE[5:]]
    assert plugin.events_of(sandbox_id) == [
        "RunPodSandbox",
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
    ]
    assert plugin.last("UpdateContainer").linux_resources.memory.limit.value == 64 << 20
    assert plugin.last("UpdatePodSandbox").linux_resources.memory.limit.value == 64 << 20
    stop = plugin.last("StopContainer")
    assert (stop.container.state, stop.container.exit_code) == (nri_pb2.CONTAINER_STOPPED, 137)
    started = plugin.last("PostStartContainer").container
    assert started.state == nri_pb2.CONTAINER_RUNNING
    assert started.pid > 0
    assert list(started.args) == ["sleep", "1000"]


def test_a_container_that_ends_by_itself_is_stopped_once(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket)) as plugin:
        sandbox_id, container_id = run_container(agent, "sh", "-c", "exit 7")
        wait_for(lambda: "StopContainer" in plugin.events_of(container_id))
        agent.client.stop(container_id)
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
    assert plugin.events_of(container_id) == LIFE
    assert plugin.last("StopContainer").container.exit_code == 7


def test_a_container_whose_program_is_missing_is_stopped_once(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket)) as plugin:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        container_id = agent.client.create(sandbox_id, container_config("main", "/missing"), sandbox)
        with pytest.raises(grpc.RpcError):
            agent.client.start(container_id)
        agent.client.remove_sandbox(sandbox_id)
    events = plugin.events_of(container_id)
    assert [event for event in events if event != "PostStartContainer"] == [*LIFE[:4], *LIFE[5:]]


class Held:
    """The action of a plugin in an event: it waits until the test releases it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.release = threading.Event()
        self.object_id = ""

    def __call__(self, request: Any) -> None:
        has_container = "container" in request.DESCRIPTOR.fields_by_name
        self.object_id = request.container.id if has_container else request.pod.id
        self.reached.set()
        self.release.wait(10)


def seen(agent: AgentProcess) -> set[str]:
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    sandboxes = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    return {item.id for item in (*containers, *sandboxes)}


def test_clients_do_not_see_an_object_before_its_hooks_are_over(agent: AgentProcess) -> None:
    held = {event: Held() for event in ("RunPodSandbox", "CreateContainer", "PostCreateContainer")}
    sandbox = sandbox_config(agent)
    with ThreadPoolExecutor() as pool, connected(Recorder(agent.nri_socket, acting=held)):
        running = pool.submit(agent.client.run_sandbox, sandbox)
        assert held["RunPodSandbox"].reached.wait(10)
        assert held["RunPodSandbox"].object_id not in seen(agent)
        with pytest.raises(grpc.RpcError, match="not found"):
            agent.client.create(held["RunPodSandbox"].object_id, container_config("main", "sleep", "9"), sandbox)
        held["RunPodSandbox"].release.set()
        sandbox_id = running.result(10)
        creating = pool.submit(agent.client.create, sandbox_id, container_config("main", "sleep", "9"), sandbox)
        for event in ("CreateContainer", "PostCreateContainer"):
            assert held[event].reached.wait(10)
            assert held[event].object_id not in seen(agent)
            with pytest.raises(grpc.RpcError, match="not found"):
                agent.client.status(held[event].object_id)
            held[event].release.set()
        assert creating.result(10) in seen(agent)


class Refusing:
    """Refuses the first time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _request: Any) -> None:
        self.calls += 1
        if self.calls == 1:
            raise ValueError("not today")


@pytest.mark.parametrize("event", ["RunPodSandbox", "CreateContainer", "StartContainer", "ValidateContainerAdjustment"])
def test_a_refusal_undoes_everything_and_a_retry_succeeds(agent: AgentProcess, event: str) -> None:
    sandbox, container = sandbox_config(agent), container_config("main", "sleep", "1000")

    def make() -> str:
        sandbox_id = agent.client.run_sandbox(sandbox)
        container_id = agent.client.create(sandbox_id, container, sandbox)
        agent.client.start(container_id)
        return container_id

    with connected(Recorder(agent.nri_socket, acting={event: Refusing()})) as plugin:
        with pytest.raises(grpc.RpcError, match=r"plugin 10-recorder: .*not today"):
            make()
        refused = next(object_id for name, object_id in plugin.told if name == event)
        if event != "StartContainer":
            assert refused not in seen(agent)
            assert plugin.events_of(refused)[-2:] in (
                ["StopPodSandbox", "RemovePodSandbox"],
                ["StopContainer", "RemoveContainer"],
            )
        assert agent.client.status(make()).state == cri_pb2.CONTAINER_RUNNING


@pytest.mark.parametrize("event", ["PostCreateContainer", "PostStartContainer", "StopContainer", "StopPodSandbox"])
def test_an_error_after_the_fact_changes_nothing(agent: AgentProcess, event: str) -> None:
    with connected(Recorder(agent.nri_socket, acting={event: Refusing()})) as plugin:
        sandbox_id, container_id = run_container(agent, "sleep", "1000")
        agent.client.stop_sandbox(sandbox_id)
        agent.client.remove_sandbox(sandbox_id)
    assert plugin.events_of(container_id) == LIFE
    wait_for(lambda: "plugin 10-recorder: " + event in agent.log.read_text())


def test_all_containers_are_stopped_and_the_network_is_there_when_a_pod_is_stopped(agent: AgentProcess) -> None:
    held = Held()
    with ThreadPoolExecutor() as pool, connected(Recorder(agent.nri_socket, acting={"StopPodSandbox": held})):
        sandbox_id, container_id = run_container(agent, "sleep", "1000")
        address = agent.client.sandbox_status(sandbox_id).network.ip
        stopping = pool.submit(agent.client.stop_sandbox, sandbox_id)
        assert held.reached.wait(10)
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_EXITED
        assert agent.client.sandbox_status(sandbox_id).network.ip == address
        held.release.set()
        stopping.result(10)


def test_the_order_is_strict_for_every_container_under_parallel_clients(agent: AgentProcess) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)

    def live(number: int) -> str:
        config = container_config(f"c{number}", "sh", "-c", "exit 0" if number % 2 else "sleep 1000")
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        agent.client.stop(container_id)
        agent.client.remove(container_id)
        return container_id

    with connected(Recorder(agent.nri_socket)) as plugin, ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(live, range(40)))
    assert [plugin.events_of(container_id) for container_id in ids] == [LIFE] * 40
