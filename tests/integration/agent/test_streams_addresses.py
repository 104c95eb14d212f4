"""The addresses where a real agent listens for streams, and the clients that it accepts there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest

from tests.integration.agent.streams import exit_code, run, spdy
from tests.integration.streaming.spdy_client import COMMAND_PROTOCOLS, request, spdy_request
from tests.integration.streaming.test_server import make_certificates
from tests.support.agent import AgentProcess, running_agent

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses (in the kernel's hexadecimal) and ports on which a process listens for TCP."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def test_it_listens_on_loopback_alone(agent: AgentProcess) -> None:
    container = run(agent)
    port = urlsplit(container.exec_url("true")).port
    assert listening(agent.pid()) == {("0100007F", port)}


@pytest.mark.parametrize(
    ("tls", "complaint"),
    [
        ((), "streaming address 0.0.0.0 is not loopback: set a TLS certificate, key and client CA"),
        (("certificate", "key"), "streaming address 0.0.0.0 is not loopback: set a TLS certificate, key and client CA"),
        (("certificate",), "needs a certificate and its key"),
        (("client_ca",), "only of use with a certificate and a key"),
    ],
)
def test_it_does_not_listen_on_other_addresses_without_tls(
    tmp_path: Path, tls: tuple[str, ...], complaint: str
) -> None:
    make_certificates(tmp_path)
    files = {"certificate": "server.pem", "key": "server.key", "client_ca": "ca.pem"}
    lines = [f'tls_{name} = "{tmp_path / files[name]}"' for name in tls]
    agent = AgentProcess(tmp_path, options="\n".join(["[streaming]", 'address = "0.0.0.0:0"', *lines]))
    try:
        agent.launch()
        assert agent.process is not None
        assert agent.process.wait(20) == 1
        assert complaint in agent.tail()
    finally:
        agent.reset()


async def test_clients_without_a_valid_certificate_are_refused(tmp_path: Path, busybox: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "others").mkdir()
    make_certificates(tmp_path / "others")
    options = f"""
    [streaming]
    address = "127.0.0.1:0"
    tls_certificate = "{tmp_path}/server.pem"
    tls_key = "{tmp_path}/server.key"
    tls_client_ca = "{tmp_path}/ca.pem"
    """
    with running_agent(tmp_path, busybox, options=options) as agent:
        container = run(agent)
        url = container.exec_url("true")
        assert url.startswith("https://127.0.0.1:")
        for certificate in (None, tmp_path / "others" / "client.pem"):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await request(url, spdy_request(url, COMMAND_PROTOCOLS), ssl=context(tmp_path, certificate))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await request(url, spdy_request(url, COMMAND_PROTOCOLS))
        good = context(tmp_path, tmp_path / "client.pem")
        async with spdy(url, "stdout", "stderr", ssl=good) as (client, ids):
            assert exit_code(await client.status(ids["error"])) == 0


def context(folder: Path, certificate: Path | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if certificate is not None:
        made.load_cert_chain(str(certificate), str(certificate.with_suffix(".key")))
    return made


def test_unused_urls_are_bounded_in_number(own_agent: AgentProcess) -> None:
    container = run(own_agent)
    for _ in range(1000):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/exec/[\w-]{22}", container.exec_url("true"))
    with pytest.raises(grpc.RpcError) as refused:
        container.exec_url("true")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1000 streams wait for their clients to connect; try again in a minute" in str(refused.value.details())
