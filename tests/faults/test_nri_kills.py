"""kill -9 of plugins and of the agent during each of the fourteen events."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.nri import EVENTS, Recorder, connected
from tests.support.pods import container_config, sandbox_config

LIMITS = cri_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
LIFE = ["CreateContainer", "ValidateContainerAdjustment", "PostCreateContainer", "StartContainer", "PostStartContainer"]
CREATED, RUNNING, STOPPED = nri_pb2.CONTAINER_CREATED, nri_pb2.CONTAINER_RUNNING, nri_pb2.CONTAINER_STOPPED


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri-kills"), busybox) as made:
        yield made


class Life:
    """One pod with one container, from creation to removal. ``sandbox_id`` and ``container_id`` are set once known."""

    def __init__(self, agent: AgentProcess) -> None:
        self.agent = agent
        self.sandbox = sandbox_config(agent)
        self.container = container_config("main", "sleep", "1000")
        self.sandbox_id = self.container_id = ""

    def run(self) -> None:
        self.sandbox_id = self.agent.client.run_sandbox(self.sandbox)
        self.container_id = self.agent.client.create(self.sandbox_id, self.container, self.sandbox)
        self.agent.client.start(self.container_id)
        update = cri_pb2.UpdateContainerResourcesRequest(container_id=self.container_id, linux=LIMITS)
        self.agent.client.call("UpdateContainerResources", update)
        pod_update = cri_pb2.UpdatePodSandboxResourcesRequest(pod_sandbox_id=self.sandbox_id, resources=LIMITS)
        self.agent.client.call("UpdatePodSandboxResources", pod_update)
        self.agent.client.stop(self.container_id)
        self.agent.client.remove(self.container_id)
        self.agent.client.stop_sandbox(self.sandbox_id)
        self.agent.client.remove_sandbox(self.sandbox_id)


def test_plugins_killed_during_their_event_do_not_affect_pods(agent: AgentProcess) -> None:
    with ExitStack() as stack:
        victims = {}
        for number, event in enumerate(EVENTS):
            command = [sys.executable, "-m", "tests.support.nri_victim", str(agent.nri_socket), event, f"{number:02}"]
            victims[event] = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(victims[event].kill)
        for victim in victims.values():
            assert victim.stdout is not None
            assert victim.stdout.readline() == "synchronised\n"
        survivor = stack.enter_context(connected(Recorder(agent.nri_socket, "99", "survivor")))
        life = Life(agent)
        life.run()
        assert {event: victim.wait(10) for event, victim in victims.items()} == dict.fromkeys(EVENTS, -signal.SIGKILL)
    updates = ["UpdateContainer", "PostUpdateContainer"]
    assert survivor.events_of(life.container_id) == [*LIFE, *updates, "StopContainer", "RemoveContainer"]
    updates = ["UpdatePodSandbox", "PostUpdatePodSandbox"]
    assert survivor.events_of(life.sandbox_id) == ["RunPodSandbox", *updates, "StopPodSandbox", "RemovePodSandbox"]
    text = agent.log.read_text()
    gone = [f"nri: plugin {number:02}-{event}: gone: " for number, event in enumerate(EVENTS)]
    assert [line for line in gone if text.count(line) != 1] == []


# After the agent's restart: whether a plugin may get the pod, and the container in which states. An unfinished creation
# is undone. A change committed before the event stays. A removal is committed while its event is sent: None means that
# the pod may exist or not.
AFTER: dict[str, tuple[bool | None, tuple[int | None, ...]]] = {
    "RunPodSandbox": (False, (None,)),
    "CreateContainer": (True, (None,)),
    "ValidateContainerAdjustment": (True, (None,)),
    "PostCreateContainer": (True, (None, CREATED)),
    "StartContainer": (True, (CREATED,)),
    "PostStartContainer": (True, (RUNNING,)),
    "UpdateContainer": (True, (RUNNING,)),
    "PostUpdateContainer": (True, (RUNNING,)),
    "UpdatePodSandbox": (True, (RUNNING,)),
    "PostUpdatePodSandbox": (True, (RUNNING,)),
    "StopContainer": (True, (STOPPED,)),
    "RemoveContainer": (True, (None, STOPPED)),
    "StopPodSandbox": (True, (None,)),
    "RemovePodSandbox": (None, (None,)),
}


@pytest.mark.parametrize("event", AFTER)
def test_an_agent_killed_during_an_event_sends_the_right_states_later(agent: AgentProcess, event: str) -> None:
    assert set(AFTER) == set(EVENTS)
    life = Life(agent)
    with connected(Recorder(agent.nri_socket, acting={event: lambda _request: _kill(agent)})) as plugin:
        with pytest.raises(grpc.RpcError):
            life.run()
        wait_for(plugin.ended.is_set)
    sandbox_id = next(request.pod.id for name, request in plugin.requests if name == "RunPodSandbox")
    created = [request.container.id for name, request in plugin.requests if name == "CreateContainer"]
    agent.kill()
    agent.start()
    with connected(Recorder(agent.nri_socket)) as later:
        expected, states = AFTER[event]
        pod_stays = bool(later.pods) if expected is None else expected
        assert [pod.id for pod in later.pods] == ([sandbox_id] if pod_stays else [])
        listed = agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
        assert [pod.id for pod in listed] == [pod.id for pod in later.pods]
        found = {container.id: container.state for container in later.containers}
        assert set(found) <= set(created)
        assert next(iter(found.values()), None) in states
        _repeat_and_remove_all(
            agent, life, sandbox_id if pod_stays else "", next(iter(found), ""), next(iter(found.values()), None)
        )
        for container_id in found:
            told = later.events_of(container_id)
            assert len(told) == len(set(told))
            assert told[-1] == "RemoveContainer"
        assert later.events_of(sandbox_id)[-1:] == (["RemovePodSandbox"] if pod_stays else [])
    assert not agent.client.call("ListPodSandbox", cri_pb2.ListPodSandboxRequest()).items
    assert not agent.client.call("ListContainers", cri_pb2.ListContainersRequest()).containers


def _kill(agent: AgentProcess) -> Any:
    assert agent.process is not None
    agent.process.kill()
    agent.process.wait(10)


def _repeat_and_remove_all(
    agent: AgentProcess, life: Life, sandbox_id: str, container_id: str, state: int | None
) -> None:
    """Repeat the failed call as a client would, and then remove everything."""
    client = agent.client
    ready = sandbox_id and client.sandbox_status(sandbox_id).state == cri_pb2.SANDBOX_READY
    if not sandbox_id:
        sandbox_id = client.run_sandbox(life.sandbox)
        ready = True
    if ready and not container_id:
        container_id = client.create(sandbox_id, life.container, life.sandbox)
        state = CREATED
    if state == CREATED:
        client.start(container_id)
        assert client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
    if state in (CREATED, RUNNING):
        client.stop(container_id)
    client.stop_sandbox(sandbox_id)
    client.remove_sandbox(sandbox_id)
