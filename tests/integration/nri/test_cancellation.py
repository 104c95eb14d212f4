"""Clients that leave, and an agent that is killed, while a plugin is in an event."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from manifests.nri import stub
from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config


class Held:
    """The action of a plugin in an event: the first time it waits until the test releases it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.release = threading.Event()

    def __call__(self, _request: Any) -> None:
        self.reached.set()
        self.release.wait(10)


def states(agent: AgentProcess) -> dict[str, int]:
    """All that clients see, by id."""
    containers = agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers
    sandboxes = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    return {item.id: item.state for item in (*containers, *sandboxes)}


@pytest.mark.parametrize("event", ["RunPodSandbox", "CreateContainer", "PostCreateContainer"])
def test_a_client_that_leaves_in_an_event_leaves_nothing_and_a_retry_works(agent: AgentProcess, event: str) -> None:
    held, sandbox = Held(), sandbox_config(agent)
    run = cri_pb2.RunPodSandboxRequest(config=sandbox)
    with connected(Recorder(agent.nri_socket, acting={event: held})) as plugin:
        if event == "RunPodSandbox":
            call = agent.client.future("RunPodSandbox", run)
        else:
            sandbox_id = agent.client.run_sandbox(sandbox)
            config = container_config("main", "sleep", "1000")
            create = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
            call = agent.client.future("CreateContainer", create)
        assert held.reached.wait(10)
        gone = plugin.told[-1][1]
        before = states(agent)
        call.cancel()
        assert states(agent) == before  # and the agent knows that the client has left, which it learnt earlier
        held.release.set()
        if event == "RunPodSandbox":
            made = agent.client.run_sandbox(sandbox)  # waits until the first is undone
            undone = ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
        else:
            made = agent.client.create(sandbox_id, config, sandbox)
            undone = ["StopContainer", "RemoveContainer"]
        assert made != gone
        assert set(states(agent)) == {*before, made}
        assert plugin.events_of(gone)[-len(undone) :] == undone
        assert plugin.events_of(gone).count(undone[-1]) == 1
        if event != "RunPodSandbox":
            agent.client.start(made)
            assert agent.client.status(made).state == cri_pb2.CONTAINER_RUNNING


def test_a_start_whose_client_leaves_in_the_event_is_carried_to_its_end(agent: AgentProcess) -> None:
    held, sandbox = Held(), sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
    with connected(Recorder(agent.nri_socket, acting={"StartContainer": held})) as plugin:
        call = agent.client.future("StartContainer", cri_pb2.StartContainerRequest(container_id=container_id))
        assert held.reached.wait(10)
        call.cancel()
        assert states(agent)[container_id] == cri_pb2.CONTAINER_CREATED
        held.release.set()
        wait_for(lambda: states(agent)[container_id] == cri_pb2.CONTAINER_RUNNING)
        wait_for(lambda: plugin.events_of(container_id) == ["StartContainer", "PostStartContainer"])
        agent.client.stop(container_id)
        assert plugin.events_of(container_id)[2:] == ["StopContainer"]


@pytest.mark.parametrize("event", ["RunPodSandbox", "CreateContainer", "PostCreateContainer", "StartContainer"])
def test_an_agent_killed_in_an_event_starts_consistent_and_synchronises_true_states(
    agent: AgentProcess, event: str
) -> None:
    _, kept = run_container(agent, "sleep", "1000")
    held, sandbox = Held(), sandbox_config(agent)
    config = container_config("main", "sleep", "1000")
    sandbox_id = "" if event == "RunPodSandbox" else agent.client.run_sandbox(sandbox)
    container_id = agent.client.create(sandbox_id, config, sandbox) if event == "StartContainer" else ""
    before = states(agent)
    plugin = Recorder(agent.nri_socket, acting={event: held})
    with connected(plugin):
        if event == "RunPodSandbox":
            call = agent.client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=sandbox))
        elif event == "StartContainer":
            call = agent.client.future("StartContainer", cri_pb2.StartContainerRequest(container_id=container_id))
        else:
            create = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
            call = agent.client.future("CreateContainer", create)
        assert held.reached.wait(10)
        agent.kill()
        held.release.set()
    with pytest.raises(grpc.RpcError):
        call.result(10)
    agent.start()
    assert states(agent) == before
    assert agent.client.findings() == []
    with connected(Recorder(agent.nri_socket)) as again:
        listed = {container.id: container.state for container in again.containers}
        assert listed == {
            kept: nri_pb2.CONTAINER_RUNNING,
            **({container_id: nri_pb2.CONTAINER_CREATED} if container_id else {}),
        }
        assert {pod.id for pod in again.pods} == set(before) - set(listed)
        sandbox_id = sandbox_id or agent.client.run_sandbox(sandbox)
        container_id = container_id or agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING


class AfterTheFact(stub.Plugin):
    """Knows containers from PostCreateContainer alone."""

    def __init__(self, path: Path, index: str, held: Held) -> None:
        super().__init__("after", index, str(path))
        self.told: list[str] = []
        self.held = held
        self.synchronised = threading.Event()

    def Synchronize(self, request: nri_pb2.SynchronizeRequest) -> nri_pb2.SynchronizeResponse:
        self.synchronised.set()
        return nri_pb2.SynchronizeResponse(more=request.more)

    def PostCreateContainer(self, request: Any) -> None:
        self.told.append("PostCreateContainer")
        self.held(request)

    def StopContainer(self, _request: Any) -> None:
        self.told.append("StopContainer")

    def RemoveContainer(self, _request: Any) -> None:
        self.told.append("RemoveContainer")


@pytest.mark.parametrize("fails", [False, True])
def test_plugins_that_know_an_undone_container_get_its_end(agent: AgentProcess, fails: bool) -> None:
    held, sandbox = Held(), sandbox_config(agent)
    plugin = AfterTheFact(agent.nri_socket, "10", held)
    thread = threading.Thread(target=plugin.run, daemon=True)
    thread.start()
    assert plugin.synchronised.wait(10)
    sandbox_id = agent.client.run_sandbox(sandbox)
    config = container_config("main", "sleep", "1000")
    if fails:  # before any event of it
        config.mounts.add(host_path="/missing/socket", container_path="/proc")
    create = cri_pb2.CreateContainerRequest(pod_sandbox_id=sandbox_id, config=config, sandbox_config=sandbox)
    call = agent.client.future("CreateContainer", create)
    if not fails:
        assert held.reached.wait(10)
        call.cancel()
        assert len(states(agent)) == 1
        held.release.set()
        wait_for(lambda: plugin.told == ["PostCreateContainer", "StopContainer", "RemoveContainer"])
    else:
        with pytest.raises(grpc.RpcError):
            call.result(10)
        assert plugin.told == []
    plugin.close()
    thread.join(10)
