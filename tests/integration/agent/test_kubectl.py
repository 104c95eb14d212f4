"""kubectl itself with the streams of a real agent, over SPDY and WebSocket if its version supports both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, run
from tests.integration.cli.terminals import Start, Terminal, starting
from tests.support.agent import AgentProcess, wait_for
from tests.support.api_server import Query, api_server
from tests.support.ports import free_port

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)
KUBECTL = shutil.which(os.environ.get("KUBECTL", "kubectl"))
if KUBECTL is None:
    pytest.skip("kubectl is not installed", allow_module_level=True)

SECONDS = 60.0
_MINOR_WITH_WEBSOCKETS = 30


class Streams:
    """Asks the agent for the streams that kubectl wants, of containers by name and of their pod."""

    def __init__(self, agent: AgentProcess, containers: dict[str, Running]) -> None:
        self._agent = agent
        self._containers = containers

    def __call__(self, subresource: str, query: Query) -> str:
        call = self._agent.client.call
        if subresource == "portforward":
            sandbox_id = next(iter(self._containers.values())).sandbox_id
            return str(call("PortForward", cri_pb2.PortForwardRequest(pod_sandbox_id=sandbox_id)).url)
        wanted = {name: query.get(name) == ["true"] for name in ("stdin", "stdout", "stderr", "tty")}
        container_id = self._containers[query["container"][0]].id
        if subresource == "attach":
            return str(call("Attach", cri_pb2.AttachRequest(container_id=container_id, **wanted)).url)
        command = query["command"]
        return str(call("Exec", cri_pb2.ExecRequest(container_id=container_id, cmd=command, **wanted)).url)


@pytest.fixture
def container(agent: AgentProcess) -> Running:
    return run(agent)


@pytest.fixture
def reader(agent: AgentProcess) -> Running:
    """It says what it reads."""
    return run(agent, "sh", "-c", 'while read -r line; do echo "heard $line"; done; echo over', stdin=True)


def _minor_version() -> int:
    command = [str(KUBECTL), "version", "--client", "--output=json"]
    version = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["clientVersion"]
    return int(re.sub(r"\D", "", version["minor"]))


@pytest.fixture(params=["spdy", "websocket"])
def kubectl(request: pytest.FixtureRequest, agent: AgentProcess, tmp_path: Path) -> Iterator[Start]:
    """Starts kubectl, for the containers of the test's other fixtures; what still runs at the end is killed."""
    if request.param == "websocket" and _minor_version() < _MINOR_WITH_WEBSOCKETS:
        pytest.skip(f"kubectl supports WebSocket since 1.{_MINOR_WITH_WEBSOCKETS}")
    names = {"container": "main", "reader": "reader"}
    containers = {names[n]: request.getfixturevalue(n) for n in names if n in request.fixturenames}
    websocket = str(request.param == "websocket").lower()
    choice = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": websocket, "KUBECTL_PORT_FORWARD_WEBSOCKETS": websocket}
    configuration = tmp_path / "kubeconfig"
    configuration.touch()
    environment = {**os.environ, **choice, "HOME": str(tmp_path), "KUBECONFIG": str(configuration)}
    described: dict[str, dict[str, Any]] = {"main": {}, "reader": {"stdin": True}}
    pod = {name: described[name] for name in containers}
    with api_server("pod", pod, Streams(agent, containers)) as server:
        with starting([str(KUBECTL), f"--server={server.url}"], environment) as start:
            yield start
        assert {upgrade.partition("/")[0] for upgrade in server.upgrades} == {request.param}


def output(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
    """Exit status, output and complaints once it has ended."""
    out, complaints = process.communicate(stdin, timeout=SECONDS)
    return process.returncode, out, complaints


def test_kubectl_exec_passes_both_streams_and_the_exit_code(container: Running, kubectl: Start) -> None:
    script = "echo out; echo complaint >&2; exit 3"
    status, out, complaints = output(kubectl("exec", "pod", "--", "sh", "-c", script, stdout=PIPE, stderr=PIPE))
    assert (status, out) == (3, b"out\n")
    assert complaints.splitlines() == [b"complaint", b"command terminated with exit code 3"]


def test_a_missing_program_is_named(container: Running, kubectl: Start) -> None:
    status, out, complaints = output(kubectl("exec", "pod", "--", "/no/such", stdout=PIPE, stderr=PIPE))
    assert status != 0
    assert out == b""
    assert b"/no/such" in complaints


def test_much_input_comes_back_whole(container: Running, kubectl: Start) -> None:
    content = os.urandom(8 << 20)
    process = kubectl("exec", "-i", "pod", "--", "cat", stdin=PIPE, stdout=PIPE)
    assert output(process, content)[:2] == (0, content)


def test_a_terminal_has_the_size_of_ours_and_follows_it(container: Running, kubectl: Start) -> None:
    terminal = Terminal(kubectl, "exec", "-it", "pod", "--", "sh", lines=31, columns=97)
    try:
        terminal.wait_for(b"# ")
        terminal.type(b"stty size\n")
        terminal.wait_for(b"31 97")
        terminal.resize(40, 120)
        terminal.type(b"until stty size | grep '40 120'; do sleep 0.1; done; stty size | tr ' ' x\n")
        terminal.wait_for(b"40x120", SECONDS)
        terminal.type(b"exit 5\n")
        assert terminal.ended() == 5
    finally:
        terminal.close()


def test_interrupting_at_a_terminal_reaches_the_command(container: Running, kubectl: Start) -> None:
    terminal = Terminal(
        kubectl,
        "exec",
        "-it",
        "pod",
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 4' INT; echo begun; while :; do sleep 0.1; done",
    )
    try:
        terminal.wait_for(b"begun")
        terminal.type(b"\x03")
        terminal.wait_for(b"caught")
        assert terminal.ended() == 4
    finally:
        terminal.close()


def test_files_are_copied_in_and_out(container: Running, kubectl: Start, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(3_000_001))
    assert output(kubectl("cp", str(source), "pod:/tmp/copied", stdout=PIPE, stderr=PIPE))[0] == 0
    assert output(kubectl("cp", "pod:/tmp/copied", str(back), stdout=PIPE, stderr=PIPE))[0] == 0
    assert back.read_bytes() == source.read_bytes()


def test_kubectl_attach_passes_input_and_output(reader: Running, kubectl: Start) -> None:
    process = kubectl("attach", "-i", "pod", "-c", "reader", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"heard one\n"
    process.stdin.write(b"two\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"heard two\n"


def test_a_client_that_is_killed_takes_its_command_along(container: Running, kubectl: Start) -> None:
    process = kubectl("exec", "-it", "pod", "--", "sleep", "500", stdin=PIPE, stdout=PIPE, stderr=PIPE)
    wait_for(lambda: "sleep 500" in container.processes().values())
    process.kill()
    wait_for(lambda: list(container.processes().values()) == ["sleep 1000"])


def test_a_port_is_forwarded_to_many_at_once(container: Running, kubectl: Start) -> None:
    container_page = "hello from inside"
    script = f"echo '{container_page}' > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"
    server = kubectl("exec", "pod", "--", "sh", "-c", script)
    wait_for(lambda: any("httpd" in command for command in container.processes().values()))
    port = free_port()
    process = kubectl("port-forward", "pod/pod", f"{port}:8080", stdout=PIPE, stderr=PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"Forwarding from 127.0.0.1")

    def fetch(_number: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SECONDS) as answer:
            return str(answer.read().decode())

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(fetch, range(50))) == {f"{container_page}\n"}
    assert process.poll() is None
    server.kill()
