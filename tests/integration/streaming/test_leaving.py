"""Clients leave in any order and at any moment: the server closes quietly, and nothing of them stays."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from cri.streaming.httpstream.connection import StreamConnection
from cri.streaming.limits import StreamLimits
from cri.streaming.server import StreamingServer
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.spdy_client import COMMAND_PROTOCOLS, SpdyClient, spdy_request
from tests.integration.streaming.test_server import make_certificates
from tests.support.agent import SOON
from tests.support.waiting import until

Leave = Callable[[asyncio.StreamWriter], None]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning and no error may be logged, by the server or for it by asyncio."""
    yield
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


def connection_of(writer: asyncio.StreamWriter) -> socket.socket:
    found = writer.get_extra_info("socket")
    assert found is not None
    return cast("socket.socket", found)


def reset(writer: asyncio.StreamWriter) -> None:
    connection_of(writer).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def half_close(writer: asyncio.StreamWriter) -> None:
    connection_of(writer).shutdown(socket.SHUT_WR)


def half_close_and_reset(writer: asyncio.StreamWriter) -> None:
    half_close(writer)
    reset(writer)


def vanish_within_a_frame(writer: asyncio.StreamWriter) -> None:
    writer.write(bytes.fromhex("00000001 00ffffff") + b"part")
    reset(writer)


def close_without_reading(writer: asyncio.StreamWriter) -> None:
    writer.close()


WAYS: list[Leave] = [reset, half_close, half_close_and_reset, vanish_within_a_frame, close_without_reading]


async def accepted_pair() -> tuple[StreamConnection, socket.socket]:
    """A connection of the server's, and the client's socket."""
    made: asyncio.Future[StreamConnection] = asyncio.get_running_loop().create_future()
    server = await asyncio.get_running_loop().create_server(lambda: StreamConnection(made.set_result), "127.0.0.1", 0)
    client = socket.create_connection(server.sockets[0].getsockname())
    connection = await made
    server.close()
    return connection, client


@pytest.mark.parametrize("queued", [0, 4 << 20])
async def test_a_close_after_the_client_disconnected(queued: int) -> None:
    connection, client = await accepted_pair()
    connection.write(bytes(queued))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # the kernel knows, the loop does not yet
    await asyncio.wait_for(connection.close(10 * SOON), SOON)


@pytest.mark.parametrize("queued", [0, 4 << 20])
async def test_a_client_that_goes_during_the_close(queued: int) -> None:
    connection, client = await accepted_pair()
    connection.write(bytes(queued))
    closing = asyncio.ensure_future(connection.close(10 * SOON))
    await asyncio.sleep(0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await asyncio.wait_for(closing, SOON)


async def test_a_client_that_reads_slowly_gets_all_until_the_end() -> None:
    connection, client = await accepted_pair()
    client.setblocking(False)
    connection.write(bytes(4 << 20))
    closing = asyncio.ensure_future(connection.close(10 * SOON))
    await asyncio.sleep(0.05)
    assert not closing.done()
    loop, size = asyncio.get_running_loop(), 0
    while data := await loop.sock_recv(client, 1 << 20):
        size += len(data)
    assert size == 4 << 20
    client.close()
    await asyncio.wait_for(closing, SOON)


@pytest.mark.parametrize("leave", WAYS)
@pytest.mark.parametrize("moment", ["before the request", "within the request", "after the upgrade", "in the output"])
@pytest.mark.parametrize("tls", [False, True])
async def test_clients_disconnect_in_every_way_at_every_moment(
    backend: LocalBackend, certificates: Path, leave: Leave, moment: str, tls: bool
) -> None:
    limits = StreamLimits(request_timeout=SOON, close_patience=1.0)
    options: dict[str, Any] = {}
    if tls:
        certificate, key = str(certificates / "server.pem"), str(certificates / "server.key")
        limits = StreamLimits(request_timeout=SOON, close_patience=1.0, tls_certificate=certificate, tls_key=key)
        options = {"ssl": ssl.create_default_context(cafile=str(certificates / "ca.pem"))}
    server = StreamingServer(backend, limits)
    await server.start()
    # It ends when half closed: then the server has more data than the client reads.
    url = server.exec_url("c", ["head", "-c", "3000000", "/dev/zero"], tty=False, stdin=True, stdout=True, stderr=False)
    host, port = url.split("/")[2].split(":")
    if moment in ("before the request", "within the request"):
        _, writer = await asyncio.open_connection(host, int(port), **options)
        if moment == "within the request":
            writer.write(spdy_request(url, COMMAND_PROTOCOLS)[:50])
            await asyncio.sleep(0.01)
        leave(writer)
    else:
        client = await SpdyClient.connect(url, **options)
        if moment == "in the output":
            ids = await client.open_command("stdin", "stdout")
            await until(lambda: client.streams[ids["stdout"]].size > 0)
            client.reading.clear()
        writer = client.writer
        leave(writer)
    await until(lambda: server.served == 0)
    assert not backend.running
    await server.close()
    writer.transport.abort()  # half closed is not closed
    await asyncio.sleep(0)


async def test_many_commands_whose_clients_reset_at_their_end(backend: LocalBackend, server: StreamingServer) -> None:
    async def one() -> None:
        url = server.exec_url("c", ["true"], tty=False, stdin=False, stdout=True, stderr=False)
        client = await SpdyClient.connect(url)
        ids = await client.open_command("stdout")
        await client.status(ids["error"])
        reset(client.writer)
        await client.close()

    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(20)))
    await until(lambda: server.served == 0)
