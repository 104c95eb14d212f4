"""Plugins that connect in the middle of something, and plugins that call the agent from inside an event."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config


def blocking_start(folder: Path) -> nri_pb2.CreateContainerResponse:
    """Has the OCI runtime's start wait until the file ``release`` is there; ``reached`` says that it waits."""
    script = f"touch {folder}/reached; while [ ! -e {folder}/release ]; do sleep 0.02; done"
    hook = nri_pb2.Hook(path="/bin/sh", args=["sh", "-c", script], env=["PATH=/usr/bin:/bin"])
    hooks = nri_pb2.Hooks(poststart=[hook])
    return nri_pb2.CreateContainerResponse(adjust=nri_pb2.ContainerAdjustment(hooks=hooks))


def test_a_plugin_that_connects_during_a_start_gets_the_running_state_once(agent: AgentProcess, tmp_path: Path) -> None:
    answer = blocking_start(tmp_path)
    first = Recorder(agent.nri_socket, "10", "first", {"CreateContainer": lambda _request: answer})
    with ThreadPoolExecutor() as pool, connected(first):
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
        starting = pool.submit(agent.client.start, container_id)
        wait_for((tmp_path / "reached").exists)
        with connected(Recorder(agent.nri_socket, "20", "late")) as late:
            (tmp_path / "release").touch()
            starting.result(20)
            assert [(one.id, one.state) for one in late.containers] == [(container_id, nri_pb2.CONTAINER_RUNNING)]
            assert late.containers[0].pid > 0
            agent.client.stop(container_id)
            assert late.events_of(container_id) == ["StopContainer"]
    assert first.events_of(container_id)[-3:] == ["StartContainer", "PostStartContainer", "StopContainer"]


def test_plugins_that_connect_during_creations_get_each_container_once_and_complete(
    agent: AgentProcess,
) -> None:
    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)

    def live(number: int) -> str:
        container_id = agent.client.create(sandbox_id, container_config(f"c{number}", "sleep", "1000"), sandbox)
        agent.client.start(container_id)
        agent.client.remove(container_id)
        return container_id

    plugins: list[Recorder] = []
    with ThreadPoolExecutor(6) as pool:
        made = [pool.submit(live, number) for number in range(36)]
        while not all(one.done() for one in made):
            with connected(Recorder(agent.nri_socket)) as plugin:
                there = len(plugin.told)
                wait_for(lambda plugin=plugin, there=there: len(plugin.told) > there + 3 or made[-1].done())
            plugins.append(plugin)
        ids = {one.result() for one in made}
    for plugin in plugins:
        listed = [container.id for container in plugin.containers]
        created = [request.container for event, request in plugin.requests if event == "CreateContainer"]
        known = [*listed, *(container.id for container in created)]
        assert len(known) == len(set(known))
        assert {object_id for _, object_id in plugin.told} - {sandbox_id} <= set(known) <= ids
        assert all(list(container.args) == ["sleep", "1000"] for container in (*plugin.containers, *created))
        for container_id in known:
            events = plugin.events_of(container_id)
            assert len(events) == len(set(events))
    assert "spec: cannot be read" not in agent.log.read_text()


def test_an_eviction_from_an_event_is_done_while_another_plugin_connects(agent: AgentProcess) -> None:
    _, victim = run_container(agent, "sleep", "1000")
    reached, release = threading.Event(), threading.Event()

    def create(_request: Any) -> nri_pb2.CreateContainerResponse:
        reached.set()
        release.wait(10)
        return nri_pb2.CreateContainerResponse(evict=[nri_pb2.ContainerEviction(container_id=victim, reason="room")])

    late = Recorder(agent.nri_socket, "20", "late")
    first = Recorder(agent.nri_socket, "10", "first", {"CreateContainer": create})
    with ThreadPoolExecutor() as pool, connected(first):
        making = pool.submit(run_container, agent, "sleep", "1000")
        assert reached.wait(10)
        thread = threading.Thread(target=late.run, daemon=True)
        thread.start()
        release.set()
        _, made = making.result(20)
        wait_for(late.synchronised.is_set)
    status = agent.client.status(victim)
    assert (status.state, status.reason) == (cri_pb2.CONTAINER_EXITED, "Evicted")
    wait_for(lambda: "StopContainer" in late.events_of(victim) or _state_of(late, victim) == nri_pb2.CONTAINER_STOPPED)
    assert agent.client.status(made).state == cri_pb2.CONTAINER_RUNNING
    late.close()
    thread.join(10)


def _state_of(plugin: Recorder, container_id: str) -> int:
    return next((one.state for one in plugin.containers if one.id == container_id), -1)


def test_an_update_from_inside_an_event_waits_for_no_longer_than_the_event(agent: AgentProcess) -> None:
    """The container is locked by its start, so the update can only be done after the event."""
    answers: list[nri_pb2.UpdateContainersResponse] = []
    helpers: list[threading.Thread] = []

    def update(container_id: str) -> None:
        request = nri_pb2.UpdateContainersRequest()
        request.update.add(container_id=container_id).linux.resources.cpu.shares.value = 300
        answers.append(plugin.update_containers(request))

    def start(request: Any) -> None:
        helpers.append(threading.Thread(target=update, args=(request.container.id,)))
        helpers[-1].start()

    plugin = Recorder(agent.nri_socket, acting={"StartContainer": start})
    with connected(plugin):
        _, container_id = run_container(agent, "sleep", "1000")
        helpers[0].join(10)
        assert [list(answer.failed) for answer in answers] == [[]]
    assert agent.client.status(container_id).resources.linux.cpu_shares == 300


def test_a_plugin_that_waits_inside_an_event_for_its_own_update_costs_its_time_once(agent: AgentProcess) -> None:
    def start(request: Any) -> None:
        own = nri_pb2.UpdateContainersRequest()
        own.update.add(container_id=request.container.id).linux.resources.cpu.shares.value = 300
        plugin.update_containers(own)

    plugin = Recorder(agent.nri_socket, acting={"StartContainer": start})
    with connected(plugin):
        begin = time.monotonic()
        _, container_id = run_container(agent, "sleep", "1000")
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        assert time.monotonic() - begin > 1.9  # nri.request_seconds
        other = plugin_that_sees(agent, container_id)
        assert other == nri_pb2.CONTAINER_RUNNING


def plugin_that_sees(agent: AgentProcess, container_id: str) -> int:
    """The state of a container that a new plugin gets."""
    with connected(Recorder(agent.nri_socket, name="other")) as plugin:
        return _state_of(plugin, container_id)
