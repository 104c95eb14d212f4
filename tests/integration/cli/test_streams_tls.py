"""The client's commands against an agent whose streams are served over HTTPS to those who show a certificate."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.integration.agent.streams import Running, listens, run
from tests.integration.cli.terminals import Start
from tests.integration.streaming.test_server import make_certificates
from tests.support.agent import SOON, AgentProcess, running_agent, wait_for

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def secure_agent(tmp_path_factory: pytest.TempPathFactory, busybox: Path, certificates: Path) -> Iterator[AgentProcess]:
    options = f"""
    [streaming]
    address = "0.0.0.0:0"
    tls_certificate = "{certificates}/server.pem"
    tls_key = "{certificates}/server.key"
    tls_client_ca = "{certificates}/ca.pem"
    """
    with running_agent(tmp_path_factory.mktemp("agent"), busybox, options=options) as agent:
        yield agent


@pytest.fixture(scope="module")
def container(secure_agent: AgentProcess) -> Running:
    return run(secure_agent, "sh", "-c", "while :; do nc -l -p 7000 -e echo hello; done")


def tls(certificates: Path, *names: str) -> list[str]:
    files = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key"}
    return [word for name in names for word in (f"--tls-{name}", str(certificates / files[name]))]


def test_a_command(container: Running, certificates: Path, start: Start) -> None:
    words = ("--socket", container.agent.address, *tls(certificates, "ca", "cert", "key"))
    process = start("exec", "-i", *words, container.id, "cat", stdin=PIPE, stdout=PIPE)
    payload = os.urandom(3 << 20)
    assert process.communicate(payload, timeout=SOON)[0] == payload
    assert process.returncode == 0
    assert start("exec", *words, container.id, "sh", "-c", "exit 7").wait(10) == 7


def test_a_forwarded_port(container: Running, certificates: Path, start: Start) -> None:
    words = ("--socket", container.agent.address, *tls(certificates, "ca", "cert", "key"))
    process = start("port-forward", *words, container.sandbox_id, ":7000", stdout=PIPE)
    assert process.stdout is not None
    port = int(process.stdout.readline().split()[2].rpartition(b":")[2])
    wait_for(lambda: listens(container))
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        assert connection.recv(100) == b"hello\n"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ((), b"; name the authority that signed its certificate with --tls-ca"),
        (("ca",), b"if they ask clients for a certificate, give --tls-cert and --tls-key"),
        (("ca", "key"), b"give --tls-cert too"),
        (("ca", "cert"), b"client.pem: not to be used for TLS"),
    ],
)
def test_what_is_missing_is_named(
    container: Running, certificates: Path, start: Start, given: tuple[str, ...], complaint: bytes
) -> None:
    words = ("--socket", container.agent.address, *tls(certificates, *given))
    process = start("exec", *words, container.id, "true", stderr=PIPE)
    error = process.communicate(timeout=SOON)[1]
    assert complaint in error
    assert (process.returncode, error.count(b"\n")) == (1, 1)


def test_a_missing_file(container: Running, start: Start) -> None:
    words = ("--socket", container.agent.address, "--tls-ca", "/no/such.pem")
    process = start("exec", *words, container.id, "true", stderr=PIPE)
    assert b"/no/such.pem: not to be used for TLS: No such file" in process.communicate(timeout=SOON)[1]
    assert process.returncode == 1


def test_an_agent_with_an_unknown_certificate(
    container: Running, tmp_path: Path, certificates: Path, start: Start
) -> None:
    make_certificates(tmp_path)
    words = ("--socket", container.agent.address, "--tls-ca", str(tmp_path / "ca.pem"))
    process = start("exec", *words, *tls(certificates, "cert", "key"), container.id, "true", stderr=PIPE)
    assert b"cannot be trusted" in process.communicate(timeout=SOON)[1]
    assert process.returncode == 1
