"""Port forward over SPDY, WebSocket channels and the tunnel, into this machine and into a network namespace."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.server import StreamingServer
from host.errors import UnavailableError
from tests.integration.streaming.conftest import Connect
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.spdy_client import SpdyClient
from tests.support.agent import SOON
from tests.support.ports import free_port
from tests.support.waiting import until

PROTOCOL = ("portforward.k8s.io",)
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, host, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def say_after_eof(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read()
    writer.write(b"got %d" % len(data))
    writer.close()


async def close_then_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"bye")
    writer.write_eof()
    data = await reader.read()
    LATE.append(data)
    writer.close()


LATE: list[bytes] = []


async def open_pair(client: SpdyClient, port: int, number: int | None = 0) -> tuple[int, int]:
    headers = {} if number is None else {"requestID": str(number)}
    error = await client.open(streamtype="error", port=str(port), **headers)
    data = await client.open(streamtype="data", port=str(port), **headers)
    client.send_now(error, b"", fin=True)
    return data, error


async def test_many_pairs_at_once(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)

    async def one(port: int, number: int) -> None:
        data, error = await open_pair(client, port, number)
        payload = os.urandom(1000 + number)
        client.send_now(data, payload, fin=True)
        await asyncio.wait_for(client.streams[data].ended.wait(), SOON)
        assert client.streams[data].data == payload
        assert await client.streams[error].text() == ""

    async with listening(echo) as port:
        await asyncio.gather(*(one(port, number) for number in range(300)))
    assert client.session.open_streams == 0


async def test_half_close_of_the_client_reaches_the_pod(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    async with listening(say_after_eof) as port:
        data, _ = await open_pair(client, port)
        client.send_now(data, bytes(100_000), fin=True)
        assert await client.streams[data].text() == "got 100000"


async def test_half_close_of_the_pod_reaches_the_client_and_the_rest_still_goes_in(
    server: StreamingServer, connect: Connect
) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    LATE.clear()
    async with listening(close_then_read) as port:
        data, error = await open_pair(client, port)
        assert await client.streams[data].text() == "bye"
        # Clients wait for the end of the errors before they end their own direction.
        assert await client.streams[error].text() == ""
        client.send_now(data, b"late words", fin=True)
        await until(lambda: LATE)
    assert LATE == [b"late words"]


async def test_an_error_concerns_its_pair_only(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    closed = free_port()
    async with listening(echo) as port:
        first, _ = await open_pair(client, port, 0)
        client.send_now(first, b"before")
        await asyncio.wait_for(client.streams[first].arrived.wait(), SOON)
        broken, error = await open_pair(client, closed, 1)
        text = await client.streams[error].text()
        assert text.startswith(f"error forwarding port {closed} to pod pod: ")
        assert "127.0.0.1: Connection refused, ::1: Connection refused" in text
        await asyncio.wait_for(client.streams[broken].ended.wait(), SOON)
        client.send_now(first, b" and after", fin=True)
        assert await client.streams[first].text() == "before and after"


async def test_ipv6_only_listeners_are_reached(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    async with listening(echo, "::1") as port:
        data, _ = await open_pair(client, port)
        client.send_now(data, b"six", fin=True)
        assert await client.streams[data].text() == "six"


async def test_clients_without_request_ids(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    async with listening(echo) as port:
        for _ in range(2):
            data, _ = await open_pair(client, port, None)
            client.send_now(data, b"old", fin=True)
            assert await client.streams[data].text() == "old"


async def test_a_reset_of_the_client_closes_the_pods_connection(server: StreamingServer, connect: Connect) -> None:
    ended = asyncio.Event()

    async def wait_for_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        await reader.read()
        ended.set()
        writer.close()

    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    async with listening(wait_for_end) as port:
        data, error = await open_pair(client, port)
        await asyncio.wait_for(client.streams[data].arrived.wait(), SOON)
        client.session.reset(data)
        client.flush()
        await asyncio.wait_for(ended.wait(), SOON)
        assert await client.streams[error].text() == ""


@pytest.mark.parametrize(
    "headers",
    [{"streamtype": "data"}, {"streamtype": "data", "port": "0"}, {"streamtype": "other", "port": "80"}],
)
async def test_streams_without_a_port_are_refused(
    server: StreamingServer, connect: Connect, headers: dict[str, str]
) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    stream_id = await client.open(**headers)
    assert client.streams[stream_id].reset_status == frames.REFUSED_STREAM


async def test_a_pair_that_leaves_goodbye_ends_the_connection(server: StreamingServer, connect: Connect) -> None:
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    async with listening(echo) as port:
        data, _ = await open_pair(client, port)
        client.session.go_away()
        client.flush()
        await asyncio.wait_for(client.went_away.wait(), SOON)
        await asyncio.wait_for(client.closed.wait(), SOON)
    assert data in client.streams


# ---- in a network namespace


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"pkt{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


async def test_the_connection_is_made_in_the_pods_namespace(
    server: StreamingServer, connect: Connect, backend: LocalBackend, namespace: str
) -> None:
    backend.namespace = Path("/run/netns") / namespace
    command = ["ip", "netns", "exec", namespace, "python3", "-c", INSIDE]
    inside = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert inside.stdout is not None
    port = int(await inside.stdout.readline())
    client = await connect(server.port_forward_url("pod", []), PROTOCOL)
    data, _ = await open_pair(client, port)
    assert await client.streams[data].text() == "from inside"
    await inside.wait()
    backend.namespace = None
    with pytest.raises(UnavailableError, match="Connection refused"):
        await backend.connect("pod", port)


INSIDE = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
connection.sendall(b"from inside")
"""
