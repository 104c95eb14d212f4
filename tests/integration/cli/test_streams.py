"""``podkeel exec``, ``attach`` and ``port-forward`` as a person uses them: with pipes, files and a terminal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest

from proto.runtime.v1 import cri_pb2
from tests.integration.agent.streams import Running, listens, run
from tests.integration.cli.terminals import Start, Terminal
from tests.support.agent import SOON, AgentProcess, wait_for
from tests.support.pods import sandbox_config

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)

SHELL = ("sh", "-c")


@pytest.fixture
def container(agent: AgentProcess) -> Running:
    return run(agent)


# ---- exec with pipes and files


def test_output_comes_as_it_is_made_and_the_exit_code_is_ours(container: Running, start: Start) -> None:
    process = start(
        "exec", container.id, *SHELL, "echo first; sleep 0.5; echo second >&2; exit 7", stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    assert process.poll() is None
    out, err = process.communicate(timeout=SOON)
    assert (out, err) == (b"", b"second\n")
    assert process.returncode == 7


@pytest.mark.parametrize(("script", "code"), [("kill -9 $$", 137), ("true", 0)])
def test_exit_codes(container: Running, start: Start, script: str, code: int) -> None:
    assert start("exec", container.id, *SHELL, script).wait(10) == code


def test_input_through_a_pipe(container: Running, start: Start) -> None:
    process = start("exec", "-i", container.id, "cat", stdin=PIPE, stdout=PIPE)
    payload = os.urandom(8 << 20)
    assert process.communicate(payload, timeout=SOON)[0] == payload
    assert process.returncode == 0


def test_input_from_a_file_and_output_to_one(container: Running, start: Start, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(os.urandom(3_000_001))
    with source.open("rb") as stdin, target.open("wb") as stdout:
        assert start("exec", "--stdin", container.id, "cat", stdin=stdin, stdout=stdout).wait(20) == 0
    assert target.read_bytes() == source.read_bytes()


def test_without_i_nothing_of_our_input_is_taken(container: Running, start: Start) -> None:
    process = start("exec", container.id, "wc", "-c", stdin=PIPE, stdout=PIPE)
    assert process.communicate(b"ignored", timeout=SOON)[0] == b"0\n"


def test_a_reader_that_leaves_ends_the_command(container: Running, start: Start) -> None:
    process = start("exec", container.id, "yes", stdout=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(10) == 141
    wait_for(lambda: list(container.processes().values()) == ["sleep 1000"])


def test_a_program_that_does_not_exist(container: Running, start: Start) -> None:
    process = start("exec", container.id, "/no/such", stdout=PIPE, stderr=PIPE)
    out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out) == (1, b"")
    assert b"/no/such" in err
    assert b"Traceback" not in err


def test_too_late_and_interrupted_commands_are_ended(container: Running, start: Start) -> None:
    process = start("exec", "--timeout", "1", container.id, "sleep", "998", stderr=PIPE)
    assert process.wait(10) == 1
    assert b"did not finish within 1 s" in process.communicate()[1]
    process = start("exec", container.id, *SHELL, "echo ready; sleep 999", stdout=PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    wait_for(lambda: list(container.processes().values()) == ["sleep 1000"])


def test_a_terminal_is_asked_for_without_one(container: Running, start: Start) -> None:
    process = start("exec", "-it", container.id, "sh", stdin=PIPE, stderr=PIPE)
    assert b"no terminal" in process.communicate(timeout=SOON)[1]
    assert process.returncode == 1


# ---- exec on a terminal


def test_a_shell_on_our_terminal(container: Running, terminal: Callable[..., Terminal]) -> None:
    screen = terminal("exec", "-it", container.id, "sh", lines=33, columns=99)
    screen.wait_for(b"# ")
    assert screen.is_raw
    screen.type(b"stty size\n")
    screen.wait_for(b"33 99")
    screen.resize(44, 111)
    screen.type(b"sleep 0.2; stty size\n")
    screen.wait_for(b"44 111")
    screen.type(b"sleep 999\n")
    wait_for(lambda: "sleep 999" in container.processes().values())
    screen.type(b"\x03")
    wait_for(lambda: "sleep 999" not in container.processes().values())
    screen.type(b"exit 5\n")
    assert screen.ended() == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_the_terminal_is_put_back_when_a_signal_ends_us(
    container: Running, terminal: Callable[..., Terminal], number: signal.Signals
) -> None:
    screen = terminal("exec", "-i", "-t", container.id, "sh")
    screen.wait_for(b"# ")
    assert screen.is_raw
    os.kill(screen.pid(), number)
    assert screen.ended() == 128 + number
    wait_for(lambda: list(container.processes().values()) == ["sleep 1000"])


def test_the_terminal_is_put_back_when_the_command_fails(container: Running, terminal: Callable[..., Terminal]) -> None:
    screen = terminal("exec", "-it", container.id, "/no/such")
    assert screen.ended() == 1
    screen.wait_for(b"/no/such")


def test_the_terminal_is_put_back_when_the_agent_dies(
    own_agent: AgentProcess, terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    container = run(own_agent)
    screen = terminal("exec", "--socket", own_agent.address, "-it", container.id, "sh")
    screen.wait_for(b"# ")
    assert screen.is_raw
    own_agent.kill()
    assert screen.ended() == 1
    screen.wait_for(b"connection to the agent was lost")
    own_agent.start()


# ---- attach


def test_attach_and_leave(agent: AgentProcess, start: Start) -> None:
    container = run(agent, *SHELL, "while read line; do echo got $line; done", stdin=True)
    process = start("attach", "-i", container.id, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"word\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"got word\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert agent.client.status(container.id).state == cri_pb2.CONTAINER_RUNNING


def test_attach_to_a_terminal_until_the_container_ends(agent: AgentProcess, terminal: Callable[..., Terminal]) -> None:
    container = run(agent, "sh", stdin=True, tty=True)
    screen = terminal("attach", "-it", container.id, lines=40, columns=90)
    screen.type(b"stty size\n")
    screen.wait_for(b"40 90")
    screen.type(b"exit 0\n")
    assert screen.ended() == 0


def test_keys_leave_a_terminal_and_its_container(agent: AgentProcess, terminal: Callable[..., Terminal]) -> None:
    container = run(agent, "sh", stdin=True, tty=True)
    screen = terminal("attach", "-it", container.id)
    screen.type(b"echo $((6 * 7))\n")
    screen.wait_for(b"42")
    # The first of the keys alone is sent to the container, with what follows.
    screen.type(b"echo $((100 * 11))")
    screen.type(b"\x10")
    screen.type(b"\n")
    screen.wait_for(b"42", after=b"echo $((100 * 11))")
    screen.type(b"\x10")
    screen.type(b"\x11")
    assert screen.ended() == 0
    screen.wait_for(b"it keeps running")
    again = terminal("attach", "-it", "--detach-keys", "ctrl-],q", container.id)
    again.type(b"echo $((43 + 1))\n")
    again.wait_for(b"44")
    again.type(b"\x1dq")
    assert again.ended() == 0
    assert agent.client.status(container.id).state == cri_pb2.CONTAINER_RUNNING


def test_keys_leave_a_command_which_ends(container: Running, terminal: Callable[..., Terminal]) -> None:
    screen = terminal("exec", "-it", container.id, *SHELL, "trap '' INT; echo ready; while :; do sleep 1; done")
    screen.wait_for(b"ready")
    screen.type(b"\x03\x10\x11")
    assert screen.ended() == 137
    screen.wait_for(b"left main: sh is ended")
    wait_for(lambda: list(container.processes().values()) == ["sleep 1000"])


def test_without_keys_all_that_is_typed_is_passed_on(container: Running, terminal: Callable[..., Terminal]) -> None:
    screen = terminal(
        "exec", "--detach-keys", "", "-it", container.id, *SHELL, "stty raw -echo; echo on; od -An -tx1 -N3"
    )
    screen.wait_for(b"on")
    screen.type(b"\x10\x11x")
    screen.wait_for(b"10 11 78")
    assert screen.ended() == 0


def test_unknown_detach_keys_are_refused(container: Running, start: Start) -> None:
    process = start("attach", "--detach-keys", "ctrl-p,F1", container.id, stderr=PIPE)
    assert b"'F1' is no key to detach by" in process.communicate(timeout=SOON)[1]
    assert process.returncode == 1


# ---- port-forward


@pytest.fixture
def web(agent: AgentProcess) -> Running:
    """A pod with an echo server on port 7000 that says goodbye at the end of its input."""
    server = "while :; do nc -l -p 7000 -e sh -c 'cat; echo bye'; done"
    container = run(agent, *SHELL, server)
    wait_for(lambda: listens(container))
    return container


def pod_name(container: Running) -> str:
    return container.agent.client.sandbox_status(container.sandbox_id).metadata.name


def port_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    line = process.stdout.readline().decode()
    found = re.fullmatch(r"Forwarding from 127\.0\.0\.1:(\d+) -> \d+\n", line)
    assert found is not None, line
    return int(found[1])


def test_connections_are_carried_with_their_half_closes(web: Running, start: Start) -> None:
    process = start("port-forward", pod_name(web), ":7000", stdout=PIPE, stderr=PIPE)
    port = port_of(process)
    payload = os.urandom(200_000)
    for host in ("127.0.0.1", "::1"):
        wait_for(lambda: listens(web))  # the process of the connection before may still be there
        with socket.create_connection((host, port), 10) as connection:
            connection.sendall(payload)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while data := connection.recv(65536):
                received += data
        assert received == payload + b"bye\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_closed_port_of_the_pod_is_reported_and_other_ports_continue(agent: AgentProcess, start: Start) -> None:
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent))
    process = start("port-forward", sandbox_id[:12], ":81", stdout=PIPE, stderr=PIPE)
    port = port_of(process)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        assert process.stderr is not None
        assert b"Connection refused" in process.stderr.readline()
    assert process.poll() is None


def test_ports_that_cannot_be_used(agent: AgentProcess, start: Start) -> None:
    sandbox_id = agent.client.run_sandbox(sandbox_config(agent))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("port-forward", sandbox_id, f"{port}:80", stderr=PIPE)
        assert b"Address already in use" in process.communicate(timeout=SOON)[1]
        assert process.returncode == 1
    process = start("port-forward", sandbox_id, "http", stderr=PIPE)
    assert b"does not name ports" in process.communicate(timeout=SOON)[1]


def test_an_agent_that_stops_ends_the_forwarding(own_agent: AgentProcess, start: Start) -> None:
    sandbox_id = own_agent.client.run_sandbox(sandbox_config(own_agent))
    process = start("port-forward", "--socket", own_agent.address, sandbox_id, ":80", stdout=PIPE, stderr=PIPE)
    port_of(process)
    own_agent.stop()
    assert b"connection to the agent was lost" in process.communicate(timeout=SOON)[1]
    own_agent.start()
