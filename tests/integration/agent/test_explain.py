"""The history of a pod: operations that run, that failed and whose objects no longer exist, in the terminal and as
JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, wait_for
from tests.support.pods import container_config, remove_all_pods, run_container, sandbox_config

Fault = Callable[[str], None]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("explain")
    (folder / "faults").write_text("")
    agent = AgentProcess(folder)
    try:
        agent.start(faults=f"@{folder / 'faults'}")
        agent.import_busybox(busybox)
        yield agent
    finally:
        agent.reset()


@pytest.fixture
def agent(served: AgentProcess) -> Iterator[AgentProcess]:
    yield served
    (served.folder / "faults").write_text("")
    remove_all_pods(served.client)


@pytest.fixture
def fault(served: AgentProcess) -> Fault:
    def plant(point: str) -> None:
        (served.folder / "faults").write_text(point)

    return plant


def explain(agent: AgentProcess, name: str) -> dict[str, dict[str, str]]:
    """What the terminal shows: by operation, the note behind each stage's bar."""
    command = agent.command("explain", "--socket", agent.address, name)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, dict[str, str]] = {}
    operation = ""
    for line in done.stdout.splitlines():
        words = line.split()
        if line.startswith("  "):
            found[operation][words[0]] = words[-1] if words[-1] in ("running", "failed") else ""
        elif words:
            operation = words[0]
            found[operation] = {}
    return found


def test_a_pod_in_the_making_shows_where_it_is_and_afterwards_where_it_failed(
    agent: AgentProcess, fault: Fault
) -> None:
    config = sandbox_config(agent, "slow")
    assert explain(agent, "slow") == {}
    fault("RunPodSandbox.network:before:hang")
    call = agent.client.future("RunPodSandbox", cri_pb2.RunPodSandboxRequest(config=config))
    wait_for(lambda: "network" in explain(agent, "slow").get("RunPodSandbox", {}), what="the stage")
    assert explain(agent, "default/slow")["RunPodSandbox"] == {"reserve": "", "namespaces": "", "network": "running"}
    call.cancel()
    wait_for(lambda: explain(agent, "slow")["RunPodSandbox"]["network"] == "failed", what="the end of the stage")
    assert explain(agent, "slo") == {}


def test_plugins_get_the_end_of_a_container_that_could_not_be_created(agent: AgentProcess, fault: Fault) -> None:
    config = sandbox_config(agent, "half")
    sandbox_id = agent.client.run_sandbox(config)
    fault("CreateContainer.spec:after:error")
    with pytest.raises(grpc.RpcError):
        agent.client.create(sandbox_id, container_config("web", "true"), config)
    for name in ("half", "default/half", sandbox_id[:12]):
        found = explain(agent, name)
        assert list(found) == ["RunPodSandbox", "CreateContainer"]
        assert found["CreateContainer"] == {"reserve": "", "snapshot": "", "spec": "failed"}
        assert set(found["RunPodSandbox"].values()) == {""}


def test_verbose_status_carries_the_same(agent: AgentProcess) -> None:
    sandbox_id, container_id = run_container(agent, "sleep", "1000")
    requests: dict[str, Any] = {
        "PodSandboxStatus": cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True),
        "ContainerStatus": cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True),
    }
    told = []
    for name, request in requests.items():
        for operation in json.loads(agent.client.call(name, request).info["info"])["operations"]:
            stages = [(s["name"], s["started"], s["seconds"], s["failed"]) for s in operation["stages"]]
            told.append((operation["name"], operation["started"], stages))
    explained = [
        (operation.name, operation.started, [(s.name, s.started, s.seconds, s.failed) for s in operation.stages])
        for operation in agent.client.call("Explain", agent_pb2.ExplainRequest(id=sandbox_id)).operations
    ]
    assert told == explained
    assert [name for name, _, _ in told] == ["RunPodSandbox", "CreateContainer", "StartContainer"]
