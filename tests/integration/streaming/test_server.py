"""The clients that may connect, for how long, and the answers to others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

from cri.streaming.limits import StreamLimits
from cri.streaming.server import StreamingServer
from host.errors import InvalidArgumentError, UnavailableError
from tests.integration.streaming.conftest import Connect
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.spdy_client import COMMAND_PROTOCOLS, request, spdy_request
from tests.support.agent import SOON
from tests.support.waiting import until


def true_url(server: StreamingServer) -> str:
    return server.exec_url("c", ["true"], tty=False, stdin=False, stdout=True, stderr=False)


async def answer(url: str, data: bytes) -> str:
    _, writer, head = await request(url, data)
    writer.close()
    return head


async def test_tokens_work_once(server: StreamingServer, connect: Connect) -> None:
    url = true_url(server)
    await connect(url)
    assert (await answer(url, spdy_request(url, COMMAND_PROTOCOLS))).startswith("HTTP/1.1 404 ")


@pytest.mark.parametrize("change", ["wrong token", "other kind", "no token"])
async def test_wrong_urls_are_not_found(server: StreamingServer, change: str) -> None:
    url = true_url(server)
    wrong = {
        "wrong token": url[:-1] + ("A" if url[-1] != "A" else "B"),
        "other kind": url.replace("/exec/", "/attach/"),
        "no token": url.rpartition("/")[0],
    }[change]
    assert (await answer(wrong, spdy_request(wrong, COMMAND_PROTOCOLS))).startswith("HTTP/1.1 404 ")


async def test_without_an_upgrade_is_a_bad_request_and_the_token_stays_good(
    server: StreamingServer, connect: Connect
) -> None:
    url = true_url(server)
    path = url.split("/", 3)[3]
    for method in ("GET", "POST"):
        head = await answer(url, f"{method} /{path} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode())
        assert head.startswith("HTTP/1.1 400 ")
    ids = await (client := await connect(url)).open_command("stdout")
    assert (await client.status(ids["error"]))["status"] == "Success"


async def test_unsupported_protocols_are_forbidden(server: StreamingServer) -> None:
    url = true_url(server)
    assert (await answer(url, spdy_request(url, ["v9.channel.k8s.io"]))).startswith("HTTP/1.1 403 ")


async def test_a_client_that_opens_no_streams_gets_an_error(backend: LocalBackend, connect: Connect) -> None:
    server = StreamingServer(backend, StreamLimits(creation_timeout=1.0))
    await server.start()
    client = await connect(true_url(server))
    error = await client.open(streamtype="error")
    assert "did not open the streams stdout in time" in (await client.status(error))["message"]
    await asyncio.wait_for(client.went_away.wait(), SOON)
    assert backend.started == 0
    await client.close()
    await server.close()


async def test_a_client_that_sends_no_request_is_cut_off(backend: LocalBackend) -> None:
    server = StreamingServer(backend, StreamLimits(request_timeout=0.1))
    await server.start()
    host, port = true_url(server).split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /exec/")
    assert await asyncio.wait_for(reader.read(), SOON) == b""
    writer.close()
    await server.close()


@pytest.mark.parametrize("sent", [b"", b"GET /exec/x HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"])
async def test_clients_without_a_token_have_a_few_seconds(backend: LocalBackend, sent: bytes) -> None:
    server = StreamingServer(backend, StreamLimits(request_timeout=0.3))
    await server.start()
    host, port = true_url(server).split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(sent)
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), SOON)  # an answer, and the end of it
    await until(lambda: not established(int(port)))  # though this client does not close
    writer.close()
    await server.close()


async def test_the_oldest_client_without_a_token_is_closed_first(backend: LocalBackend, connect: Connect) -> None:
    server = StreamingServer(backend, StreamLimits(max_pending=8))
    await server.start()
    first = true_url(server)
    client = await connect(first)
    host, port = first.split("/")[2].split(":")
    silent = [await asyncio.open_connection(host, port) for _ in range(30)]
    for reader, _ in silent[:22]:
        assert await asyncio.wait_for(reader.read(), SOON) == b""
    assert not any(reader.at_eof() for reader, _ in silent[22:])
    ids = await (second := await connect(true_url(server))).open_command("stdout")
    assert (await second.status(ids["error"]))["status"] == "Success"
    ids = await client.open_command("stdout")  # who has shown a token stays
    assert (await client.status(ids["error"]))["status"] == "Success"
    for _, writer in silent:
        writer.close()
    await server.close()


async def test_small_messages_are_sent_at_once(server: StreamingServer, connect: Connect) -> None:
    client = await connect(true_url(server))
    address = client.writer.get_extra_info("sockname")
    with other_end(address) as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def other_end(address: tuple[str, int]) -> socket.socket:
    """The socket of this process that is connected to ``address``."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found = socket.socket(fileno=os.dup(int(descriptor.name)))
            with contextlib.suppress(OSError):
                if found.getpeername() == address:
                    return found
            found.close()
    raise AssertionError(f"no socket is connected to {address}")


def established(port: int) -> list[str]:
    """The connections at a port of 127.0.0.1 that have an open descriptor: lines of /proc/net/tcp."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [words for words in lines if words[1] == f"0100007F:{port:04X}" and words[3] != "0A"]
    return [" ".join(words) for words in ours if words[9] != "0"]


async def test_idle_streams_end_and_pings_do_not_keep_them(backend: LocalBackend, connect: Connect) -> None:
    server = StreamingServer(backend, StreamLimits(idle_timeout=1.0))
    await server.start()
    client = await connect(server.exec_url("c", ["cat"], tty=False, stdin=True, stdout=True, stderr=False))
    ids = await client.open_command("stdin", "stdout")
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() < start + 1.2:
        client.send_now(ids["stdin"], b"data")
        await asyncio.sleep(0.1)
    pinging = asyncio.create_task(ping_for_ever(client.session.ping, client.flush))
    assert "no data passed" in (await client.status(ids["error"]))["message"]
    assert loop.time() - start > 1.5
    pinging.cancel()
    await client.close()
    await server.close()
    assert not backend.running


async def ping_for_ever(ping: object, flush: object) -> None:
    assert callable(ping)
    assert callable(flush)
    while True:
        ping()
        flush()
        await asyncio.sleep(0.05)


async def test_too_many_connections(backend: LocalBackend, connect: Connect) -> None:
    server = StreamingServer(backend, StreamLimits(max_connections=1))
    await server.start()
    first, second = true_url(server), true_url(server)
    client = await connect(first)
    assert (await answer(second, spdy_request(second, COMMAND_PROTOCOLS))).startswith("HTTP/1.1 503 ")
    await client.close()
    await server.close()


async def test_a_flood_of_pings_that_is_never_read_stays_bounded(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.exec_url("c", ["cat"], tty=False, stdin=True, stdout=True, stderr=False))
    await client.open_command("stdin", "stdout")
    client.reading.clear()
    before = resident()
    flood = b"".join(bytes.fromhex("80030006 00000004") + number.to_bytes(4, "big") for number in range(1, 100_000, 2))
    unsent = client.writer.transport.get_write_buffer_size
    sent = 0
    while unsent() < 32 << 20:
        client.writer.write(flood)
        sent += len(flood)
        assert sent < 256 << 20, "the server goes on reading"
        await asyncio.sleep(0)
    left = -1
    async with asyncio.timeout(SOON):
        while left != (left := unsent()):  # until the server reads no more  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    assert left > 0
    assert resident() - before - left < 64 << 20
    client.writer.transport.abort()  # a graceful end would have all of it answered first


async def test_urls_need_a_running_server(backend: LocalBackend) -> None:
    with pytest.raises(UnavailableError):
        true_url(StreamingServer(backend))


async def test_a_taken_port_is_named(server: StreamingServer, backend: LocalBackend) -> None:
    port = int(true_url(server).split("/")[2].split(":")[1])
    with pytest.raises(InvalidArgumentError, match=f"127.0.0.1:{port}"):
        await StreamingServer(backend, StreamLimits(port=port)).start()


async def test_ipv6_loopback(backend: LocalBackend, connect: Connect) -> None:
    server = StreamingServer(backend, StreamLimits(host="::1"))
    await server.start()
    url = true_url(server)
    assert url.startswith("http://[::1]:")
    ids = await (client := await connect(url)).open_command("stdout")
    assert (await client.status(ids["error"]))["status"] == "Success"
    await client.close()
    await server.close()


async def test_tls_with_client_certificates(backend: LocalBackend, connect: Connect, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    limits = StreamLimits(
        tls_certificate=str(tmp_path / "server.pem"),
        tls_key=str(tmp_path / "server.key"),
        tls_client_ca=str(tmp_path / "ca.pem"),
    )
    server = StreamingServer(backend, limits)
    await server.start()
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    url = server.exec_url(
        "c", ["head", "-c", "3000000", "/dev/zero"], tty=False, stdin=False, stdout=True, stderr=False
    )
    assert url.startswith("https://127.0.0.1:")
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await request(url, spdy_request(url, COMMAND_PROTOCOLS), ssl=context)
    context.load_cert_chain(str(tmp_path / "client.pem"), str(tmp_path / "client.key"))
    client = await connect(url, ssl=context)
    ids = await client.open_command("stdout")
    assert (await client.status(ids["error"]))["status"] == "Success"
    assert client.streams[ids["stdout"]].size == 3_000_000
    await client.close()
    await server.close()
    await until(lambda: not backend.running)


async def test_a_client_that_does_not_finish_its_handshake_is_cut_off(backend: LocalBackend, tmp_path: Path) -> None:
    make_certificates(tmp_path)
    certificate, key = str(tmp_path / "server.pem"), str(tmp_path / "server.key")
    limits = StreamLimits(request_timeout=0.2, tls_certificate=certificate, tls_key=key)
    server = StreamingServer(backend, limits)
    await server.start()
    host, port = true_url(server).split("/")[2].split(":")
    reader, writer = await asyncio.open_connection(host, port)
    assert await asyncio.wait_for(reader.read(), SOON) == b""
    writer.close()
    await server.close()


def make_certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]  # Python 3.13 requires this and the identifiers below
    openssl("req", "-x509", *key, *usage, "-subj", "/CN=ca", "-days", "1", "-keyout", "ca.key", "-out", "ca.pem")
    identifiers = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    (folder / "names").write_text(f"subjectAltName=IP:127.0.0.1\n{identifiers}")
    for name in ("server", "client"):
        openssl("req", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        ca = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "names"]
        openssl("x509", "-req", "-in", f"{name}.csr", *ca, "-out", f"{name}.pem")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
