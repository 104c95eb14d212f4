"""NRI plugins that connect during a call or misbehave, and plugins whose agent is killed."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from proto.nri.v1alpha1 import nri_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.nri import Recorder, connected
from tests.support.pods import container_config, run_container, sandbox_config


@pytest.fixture(scope="module")
def shared_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    with running_agent(tmp_path_factory.mktemp("nri-faults"), busybox) as made:
        yield made


def test_a_container_made_while_a_plugin_is_synchronised_is_sent_once(agent: AgentProcess) -> None:
    reached, release = threading.Event(), threading.Event()

    def hold(_request: Any) -> None:
        reached.set()
        release.wait(4)

    sandbox = sandbox_config(agent)
    sandbox_id = agent.client.run_sandbox(sandbox)
    before = agent.client.create(sandbox_id, container_config("before", "sleep", "9"), sandbox)
    plugin = Recorder(agent.nri_socket, acting={"Synchronize": hold})
    thread = threading.Thread(target=plugin.run, daemon=True)
    with ThreadPoolExecutor() as pool:
        thread.start()
        assert reached.wait(10)
        configs = [container_config(f"during{number}", "sleep", "9") for number in range(3)]
        calls = [pool.submit(agent.client.create, sandbox_id, config, sandbox) for config in configs]
        wait_for(lambda: all(call.running() for call in calls))
        release.set()
        during = [call.result(20) for call in calls]
    listed = [container.id for container in plugin.containers]
    told = [object_id for event, object_id in plugin.told if event == "CreateContainer"]
    plugin.close()
    thread.join(10)
    assert before in listed
    assert sorted(listed + told) == sorted([before, *during])


def test_a_restarted_agent_synchronises_plugins_with_the_right_states(agent: AgentProcess) -> None:
    with connected(Recorder(agent.nri_socket)):
        _, running = run_container(agent, "sleep", "1000")
        _, ended = run_container(agent, "sh", "-c", "exit 3")
        wait_for(lambda: agent.client.status(ended).state == cri_pb2.CONTAINER_EXITED)
        agent.kill()
    agent.start()
    with connected(Recorder(agent.nri_socket)) as plugin:
        states = {container.id: container.state for container in plugin.containers}
        assert (states[running], states[ended]) == (nri_pb2.CONTAINER_RUNNING, nri_pb2.CONTAINER_STOPPED)
        args = next(list(container.args) for container in plugin.containers if container.id == running)
        assert args == ["sleep", "1000"]


def test_a_thousand_connections_and_garbage_leave_the_agent_serving(agent: AgentProcess) -> None:
    sockets = []
    for number in range(1000):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(agent.nri_socket))
        sockets.append(client)
        if number % 10 == 0:
            with contextlib.suppress(OSError):  # closed already
                client.sendall(b"\xff" * 4096)
    run_container(agent, "sleep", "1000")
    for client in sockets:
        client.close()
    wait_for(lambda: _admits(agent), 10)


def _admits(agent: AgentProcess) -> bool:
    plugin = Recorder(agent.nri_socket)
    threading.Thread(target=_run_quietly, args=(plugin,), daemon=True).start()
    admitted = plugin.synchronised.wait(1)
    if admitted:
        plugin.close()
    return admitted


def _run_quietly(plugin: Recorder) -> None:
    try:
        plugin.run()
    except (OSError, RuntimeError):
        return


def test_a_hanging_plugin_delays_only_one_call(agent: AgentProcess) -> None:
    release = threading.Event()

    def hang(_request: Any) -> None:
        release.wait(20)

    with connected(Recorder(agent.nri_socket, acting={"StartContainer": hang})) as plugin:
        _, container_id = run_container(agent, "sleep", "1000")
        assert agent.client.status(container_id).state == cri_pb2.CONTAINER_RUNNING
        release.set()
        wait_for(plugin.ended.is_set)
    wait_for(lambda: "StartContainer took longer than 2 s" in agent.log.read_text())
