"""An agent that systemd starts: what it reports, its socket, and that nothing of the service reaches containers."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.runtime.v1 import cri_pb2
from tests.support.agent import AgentProcess, running_agent, wait_for
from tests.support.cri import CriClient
from tests.support.pods import container_config, run_container, sandbox_config

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


def reports_until(manager: socket.socket, wanted: str) -> list[str]:
    """What the agent reports, up to an assignment that begins with ``wanted``."""
    reports: list[str] = []
    while not any(line.startswith(wanted) for line in reports):
        reports += manager.recv(4096).decode().splitlines()
    return reports


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
        assert "READY=1" in reports_until(manager, "READY=1")
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


def test_the_service_manager_is_notified_of_the_agent_s_state(
    manager: socket.socket, tmp_path: Path, busybox: Path
) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    with running_agent(folder, busybox) as agent:
        start = reports_until(manager, "READY=1")
        assert start[0] == "STATUS=starting: compares the store with the node"
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in start)
        assert start[-2:] == ["READY=1", "STATUS=pods: 0, running containers: 0, pulls: 0"]
        run_container(agent, "sleep", "1000")
        assert reports_until(manager, "STATUS=pods: 1, running containers: 1, pulls: 0")
        agent.stop()
        assert reports_until(manager, "STOPPING=1")
        agent.start()


def test_the_watchdog_is_notified_only_while_the_loop_runs(
    manager: socket.socket, tmp_path: Path, busybox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "")
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    folder = tmp_path / "agent"
    folder.mkdir()
    with running_agent(folder, busybox) as agent:
        for _ in range(3):
            reports_until(manager, "WATCHDOG=1")
        os.kill(agent.pid(), signal.SIGSTOP)
        try:
            manager.settimeout(1)  # what was sent before comes at once
            with pytest.raises(TimeoutError):
                for _ in range(1000):
                    manager.recv(4096)
        finally:
            os.kill(agent.pid(), signal.SIGCONT)
        manager.settimeout(30)
        reports_until(manager, "WATCHDOG=1")


class SocketUnit:
    """Listens as systemd does for a socket unit, and passes the socket to the agents that ``start`` starts."""

    def __init__(self, agent: AgentProcess) -> None:
        self.agent = agent
        agent.run.mkdir(mode=0o700)
        self.path = agent.run / "podkeel.sock"
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(self.path))
        self.listening.listen()

    def start(self) -> subprocess.Popen[bytes]:
        passed = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); "
            "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}; os.execv(sys.argv[2], sys.argv[2:])"
        )
        command = [sys.executable, "-S", "-c", passed, str(self.listening.fileno())]
        with self.agent.log.open("ab") as log:
            process = subprocess.Popen(
                [*command, *self.agent.command("serve", *self.agent.flags)],
                stdout=log,
                stderr=log,
                pass_fds=[self.listening.fileno()],
            )
        self.agent.process = process
        return process


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[SocketUnit]:
    agent = AgentProcess(tmp_path)
    made = SocketUnit(agent)
    try:
        yield made
    finally:
        made.listening.close()
        agent.reset()


def test_a_client_that_connected_before_the_start_is_served(unit: SocketUnit) -> None:
    early = CriClient(unit.agent.address)
    asked = early.future("Version", cri_pb2.VersionRequest(), timeout=60)
    wait_for(lambda: select.select([unit.listening], [], [], 0)[0], what="the early client")
    unit.start()
    assert asked.result().runtime_name == "podkeel"
    early.close()
    unit.agent.connect()  # clients of later talk to the agent itself
    unit.agent.stop()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_clients_wait_between_two_agents_on_the_same_socket(unit: SocketUnit, end: signal.Signals) -> None:
    for _ in range(2):
        process = unit.start()
        unit.agent.connect()
        process.send_signal(end)
        process.wait(30)
    if end is signal.SIGTERM:  # systemd's socket is where it was, and starts the next agent by its client
        waiting = CriClient(unit.agent.address)
        asked = waiting.future("Version", cri_pb2.VersionRequest(), timeout=60)
        wait_for(lambda: select.select([unit.listening], [], [], 0)[0], what="the client in between")
        unit.start()
        assert asked.result().runtime_name == "podkeel"
        waiting.close()
        unit.agent.connect()
        unit.agent.stop()
