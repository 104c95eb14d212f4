"""Names that clients choose are used exactly: no program on the node misinterprets them, and bad ones are refused."""

from __future__ import annotations

import os
from pathlib import Path

import grpc
import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.conformance.support import log_text, refused
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.pods import container_config, sandbox_config

NAMES = ["ö", "日本", "🚀", "a:b", "a\nb", "a b", "%s%n", "-x", "a'b\"c", "\x1b[31m", "\u202ereversed", "k8s-file:x"]


def reopen(agent: AgentProcess, container_id: str) -> None:
    agent.client.call("ReopenContainerLog", cri_pb2.ReopenContainerLogRequest(container_id=container_id))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_containers_pods_and_logs(quiet_log: AgentProcess, handler: str, name: str) -> None:
    client = quiet_log.client
    sandbox = sandbox_config(quiet_log)
    sandbox.metadata.name = sandbox.metadata.namespace = sandbox.metadata.uid = name
    sandbox.log_directory = str(quiet_log.logs / name)
    sandbox_id = client.run_sandbox(sandbox, handler)
    config = container_config(name, "sh", "-c", "echo out; read x; echo more", stdin=True)
    config.log_path = f"{name}/{name}.log"
    container_id = client.create(sandbox_id, config, sandbox)
    client.start(container_id)
    path = Path(client.status(container_id).log_path)
    assert path == quiet_log.logs / name / name / f"{name}.log"
    wait_for(lambda: "out" in path.read_text())
    rotated = path.rename(path.with_name("rotated"))
    reopen(quiet_log, container_id)
    assert client.status(container_id).metadata.name == name
    client.stop(container_id)
    assert log_text(str(rotated)) == "out\n"
    assert [file.name for file in sorted(path.parent.iterdir())] == sorted([path.name, "rotated"])
    client.remove_sandbox(sandbox_id)


@pytest.mark.parametrize(
    ("log_path", "text"),
    [
        ("fifo", "not a regular file|No such device"),
        ("folder", "Is a directory"),
        ("link", "link"),
        ("file/0.log", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "NUL"),
        (".", "inside"),
    ],
)
def test_invalid_log_paths_are_refused_at_once(
    quiet_log: AgentProcess, tmp_path: Path, log_path: str, text: str
) -> None:
    client = quiet_log.client
    sandbox = sandbox_config(quiet_log)
    sandbox_id = client.run_sandbox(sandbox)
    logs = Path(sandbox.log_directory)
    logs.mkdir(parents=True, exist_ok=True)
    os.mkfifo(logs / "fifo")
    (logs / "folder").mkdir()
    (logs / "file").touch()
    (logs / "link").symlink_to(tmp_path / "elsewhere")
    config = container_config("main", "true")
    config.log_path = log_path
    with refused(grpc.StatusCode.INVALID_ARGUMENT, text):
        client.create(sandbox_id, config, sandbox)
    assert not (tmp_path / "elsewhere").exists()
    config.log_path = "good.log"
    client.start(client.create(sandbox_id, config, sandbox))
    client.remove_sandbox(sandbox_id)


def test_folders_of_the_agent_with_names_outside_of_ascii(busybox: Path, tmp_path: Path) -> None:
    folder = tmp_path / "daten für 🚀"
    folder.mkdir()
    with running_agent(folder, busybox) as agent:
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox)
        config = container_config("main", "sh", "-c", "echo out; sleep 1000")
        container_id = agent.client.create(sandbox_id, config, sandbox)
        agent.client.start(container_id)
        path = Path(agent.client.status(container_id).log_path)
        wait_for(lambda: "out" in path.read_text())
        assert agent.client.output(container_id, "echo", "grüße") == "grüße\n"
