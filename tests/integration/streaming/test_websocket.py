"""Remote command and port forward over WebSocket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from wsproto.events import BytesMessage, CloseConnection

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.spdy_events import DataReceived, Event
from cri.streaming.httpstream.spdy_session import SpdySession
from cri.streaming.server import StreamingServer
from tests.integration.streaming.local_backend import LocalBackend
from tests.integration.streaming.test_port_forward import close_then_read, echo, listening
from tests.integration.streaming.websocket_client import WebSocketClient
from tests.support.agent import SOON
from tests.support.waiting import until

Open = Callable[..., Awaitable[WebSocketClient]]
V5, V4, V4_BASE64 = "v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"


@pytest.fixture
async def open_websocket() -> AsyncIterator[Open]:
    clients: list[WebSocketClient] = []

    async def connect(url: str, *subprotocols: str, query: str = "") -> WebSocketClient:
        clients.append(await WebSocketClient.connect(url, *subprotocols, query=query))
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()


def exec_url(server: StreamingServer, *command: str, streams: str = "stdout stderr", tty: bool = False) -> str:
    asked = streams.split()
    return server.exec_url(
        "c1", command, tty=tty, stdin="stdin" in asked, stdout="stdout" in asked, stderr="stderr" in asked
    )


@pytest.mark.parametrize("protocol", [V5, V4, "v5.base64.channel.k8s.io", V4_BASE64])
async def test_output_and_exit_code(server: StreamingServer, open_websocket: Open, protocol: str) -> None:
    client = await open_websocket(exec_url(server, "sh", "-c", "echo out; echo err >&2; exit 7"), protocol)
    assert client.subprotocol == protocol
    status = await client.status()
    assert status["reason"] == "NonZeroExitCode"
    assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "7"}]
    assert client.messages[0] == (1, b""), "the sign that the connection is up"
    assert (client.text(1), client.text(2)) == ("out\n", "err\n")
    assert client.messages[-1][0] == 3
    assert client.close_code == 1000


@pytest.mark.parametrize("protocol", ["channel.k8s.io", "base64.channel.k8s.io", None])
async def test_the_first_version_has_plain_errors(
    server: StreamingServer, open_websocket: Open, protocol: str | None
) -> None:
    client = await open_websocket(exec_url(server, "sh", "-c", "exit 2"), *([protocol] if protocol else []))
    assert client.subprotocol == (protocol or "")
    await client.closed()
    assert client.text(3).endswith("error executing command [sh -c exit 2], exit code 2")


async def test_success_in_the_first_version_is_silence(server: StreamingServer, open_websocket: Open) -> None:
    client = await open_websocket(exec_url(server, "true"), "channel.k8s.io")
    await client.closed()
    assert 3 not in client.channels


@pytest.mark.parametrize("protocol", [V5, "v5.base64.channel.k8s.io"])
async def test_version_five_closes_stdin(server: StreamingServer, open_websocket: Open, protocol: str) -> None:
    client = await open_websocket(exec_url(server, "cat", streams="stdin stdout"), protocol)
    client.send(0, b"first ")
    client.send(0, b"second")
    client.send(255, b"\0")
    assert (await client.status()) == {"status": "Success"}
    assert client.text(1) == "first second"


async def test_the_clients_order_decides(server: StreamingServer, open_websocket: Open) -> None:
    client = await open_websocket(exec_url(server, "true"), "v9.channel.k8s.io", V4, V5)
    assert client.subprotocol == V4


async def test_unknown_protocols_are_forbidden(server: StreamingServer, open_websocket: Open) -> None:
    client = await open_websocket(exec_url(server, "true"), "v9.channel.k8s.io")
    assert client.rejected == 403


async def test_terminal_and_resize(server: StreamingServer, open_websocket: Open) -> None:
    command = ("sh", "-c", "stty size; read x; stty size")
    client = await open_websocket(exec_url(server, *command, streams="stdin stdout", tty=True), V4)
    client.send(4, b'{"Width":80,"Height":24}')
    await client.until(lambda: b"24 80" in client.channels.get(1, b""))
    client.send(4, b'{"Width":100,"Height":30}')
    client.send(0, b"\n")
    assert (await client.status()) == {"status": "Success"}
    assert client.text(1).endswith("30 100\r\n")


async def test_much_in_both_directions(server: StreamingServer, open_websocket: Open) -> None:
    client = await open_websocket(exec_url(server, "cat", streams="stdin stdout"), V5)
    payload = os.urandom(8 << 20)
    for start in range(0, len(payload), 300_000):
        client.send(0, payload[start : start + 300_000])
        await client.writer.drain()
    client.send(255, b"\0")
    assert (await client.status()) == {"status": "Success"}
    assert bytes(client.channels[1]) == payload


@pytest.mark.parametrize("politely", [True, False])
async def test_a_client_that_leaves_ends_the_process(
    server: StreamingServer, open_websocket: Open, backend: LocalBackend, politely: bool
) -> None:
    client = await open_websocket(exec_url(server, "sleep", "1000"), V5)
    await until(lambda: bool(backend.running))
    if politely:
        client.send_event(CloseConnection(code=1000))
        await client.closed()
    else:
        client.writer.transport.abort()
    await until(lambda: not backend.running)


async def test_a_stopping_server_says_why(server: StreamingServer, open_websocket: Open, backend: LocalBackend) -> None:
    client = await open_websocket(exec_url(server, "sleep", "1000"), V5)
    await until(lambda: bool(backend.running))
    await server.close()
    assert "stopping" in (await client.status())["message"]
    assert client.close_code == 1001


# ---- port forward


@pytest.mark.parametrize("protocol", [V4, V4_BASE64, None])
async def test_ports_are_pairs_of_channels(server: StreamingServer, open_websocket: Open, protocol: str | None) -> None:
    async with listening(echo) as first, listening(close_then_read) as second:
        url = server.port_forward_url("pod", [])
        query = f"?port={first}&port={second}"
        client = await open_websocket(url, *([protocol] if protocol else []), query=query)
        await client.until(lambda: len(client.messages) >= 4)
        beginnings = {channel: int.from_bytes(data, "little") for channel, data in client.messages[:4]}
        assert beginnings == {0: first, 1: first, 2: second, 3: second}
        client.send(0, b"ping")
        await client.until(lambda: client.channels[0][2:] == b"ping" and client.channels[2][2:] == b"bye")


async def test_ports_of_the_request_are_the_default(server: StreamingServer, open_websocket: Open) -> None:
    async with listening(echo) as port:
        client = await open_websocket(server.port_forward_url("pod", [port]), V4)
        client.send(0, b"x")
        await client.until(lambda: client.channels.get(0, b"")[2:] == b"x")


@pytest.mark.parametrize("query", ["", "?port=0", "?port=x", "?port=70000"])
async def test_bad_ports_are_refused(server: StreamingServer, open_websocket: Open, query: str) -> None:
    client = await open_websocket(server.port_forward_url("pod", []), V4, query=query)
    assert client.rejected == 400


async def test_an_error_is_text_on_its_channel(server: StreamingServer, open_websocket: Open) -> None:
    async with listening(echo) as good:
        async with listening(echo) as closed:
            pass
        client = await open_websocket(server.port_forward_url("pod", [closed, good]), V4)
        await client.until(lambda: b"Connection refused" in client.channels.get(1, b""))
        client.send(2, b"works")
        await client.until(lambda: client.channels[2][2:] == b"works")


async def test_the_tunnel_carries_spdy_in_messages_of_any_size(server: StreamingServer, open_websocket: Open) -> None:
    client = await open_websocket(server.port_forward_url("pod", []), "SPDY/3.1+portforward.k8s.io")
    assert client.subprotocol == "SPDY/3.1+portforward.k8s.io"
    client.as_tunnel = True
    session = SpdySession(client=True)
    async with listening(echo) as port:
        ids = [
            session.open_stream({"streamtype": kind, "port": str(port), "requestid": "0"}) for kind in ("error", "data")
        ]
        payload = os.urandom(500_000)
        wire = session.take_output()
        events: list[Event] = []
        for start in range(0, len(wire), 7):
            client.send_event(BytesMessage(data=wire[start : start + 7]))
        while len(events) < 2:
            events += session.receive(await asyncio.wait_for(client.raw.get(), SOON))
        client.send_event(BytesMessage(data=b"".join(session.data(ids[1], payload, fin=True)) + frames.ping(1)))
        received = b""
        ended = False
        while not ended:
            for event in session.receive(await asyncio.wait_for(client.raw.get(), SOON)):
                if isinstance(event, DataReceived) and event.stream_id == ids[1]:
                    received += event.data
                    ended = ended or event.fin
            if output := session.take_output():
                client.send_event(BytesMessage(data=output))
        assert received == payload
        session.go_away()
        client.send_event(BytesMessage(data=session.take_output()))
        await client.closed()
        assert client.close_code == 1000
