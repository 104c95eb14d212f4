"""An agent that systemd starts: it says that it is ready, and nothing of the service reaches containers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent
from tests.support.pods import container_config, sandbox_config

VARIABLES = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1", "LISTEN_FDS": "1", "LISTEN_PID": "1"}


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager, named in the environment of the agents that the test starts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for name, value in VARIABLES.items():
            monkeypatch.setenv(name, value)
        yield listening


def environment_of(pid: int) -> set[str]:
    return {entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}


def monitor_of(agent: AgentProcess, container_id: str) -> int:
    """The container's conmon, the parent of its first process."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    pid = json.loads(agent.client.call("ContainerStatus", request).info["info"])["pid"]
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("handler", ["crun", "runc"])
def test_containers_start_and_run_commands_where_the_agent_is_a_service(
    manager: socket.socket, tmp_path: Path, busybox: Path, handler: str
) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    with running_agent(folder, busybox) as agent:
        assert manager.recv(100) == b"READY=1"
        handlers = agent.client.call("Status", cri_pb2.StatusRequest()).runtime_handlers
        if handler not in [known.name for known in handlers]:
            pytest.skip(f"{handler} does not work here")
        sandbox = sandbox_config(agent)
        sandbox_id = agent.client.run_sandbox(sandbox, handler)
        container_id = agent.client.create(sandbox_id, container_config("main", "sleep", "1000"), sandbox)
        agent.client.start(container_id)
        told = agent.client.output(container_id, "env")
        assert not any(name in told for name in ("NOTIFY_SOCKET", *VARIABLES))
        assert environment_of(monitor_of(agent, container_id)).isdisjoint({"NOTIFY_SOCKET", *VARIABLES})
        agent.client.stop(container_id)
        checks = subprocess.run(
            agent.command("check", *agent.flags), capture_output=True, text=True, check=False
        ).stdout
        assert re.search(rf"[✓!] +runtime {handler} ", checks), checks
