"""Messages and channels of a WebSocket, against wsproto's client and frames by hand."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from wsproto.connection import CLIENT, Connection
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from cri.streaming.httpstream.http_upgrade import HttpError, UpgradeRequest
from cri.streaming.httpstream.websocket_link import ChannelSocket, TunnelLink, WebSocketLink

# The example of RFC 6455, section 1.3.
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


class MemoryLink:
    """Keeps what is written, and who holds it."""

    def __init__(self) -> None:
        self.written = b""
        self.holders: list[object] = []

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None:
        return None

    def hold(self, holder: object) -> None:
        self.holders.append(holder)

    def release(self, holder: object) -> None:
        if holder in self.holders:
            self.holders.remove(holder)

    def touch(self) -> None:
        return None


def request(*extra: tuple[str, str]) -> UpgradeRequest:
    headers = (("host", "h"), ("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", KEY), *extra)
    return UpgradeRequest("GET", "/exec/x", "/exec/x", "websocket", headers)


VERSION = ("sec-websocket-version", "13")


def open_sockets(**options: Any) -> tuple[ChannelSocket, MemoryLink, list[str]]:
    link, closed = MemoryLink(), list[str]()
    sockets = ChannelSocket(link, closed.append, **options)
    sockets.accept(request(VERSION), None)
    link.written = b""
    return sockets, link, closed


def masked(*events: Any) -> bytes:
    client = Connection(CLIENT)
    return b"".join(client.send(event) for event in events)


def understood(link: MemoryLink) -> list[Any]:
    client = Connection(CLIENT)
    client.receive_data(link.written)
    return list(client.events())


def test_handshake() -> None:
    link = MemoryLink()
    WebSocketLink(link, lambda *message: None, lambda reason: None).accept(
        request(VERSION, ("sec-websocket-protocol", "v4.channel.k8s.io")), "v4.channel.k8s.io"
    )
    head = link.written.lower()
    assert head.startswith(b"http/1.1 101 ")
    assert ACCEPT.lower() in head
    assert b"sec-websocket-protocol: v4.channel.k8s.io\r\n" in head


@pytest.mark.parametrize("extra", [(), (("sec-websocket-version", "8"),)])
def test_a_bad_handshake_is_a_bad_request(extra: tuple[tuple[str, str], ...]) -> None:
    websocket = WebSocketLink(MemoryLink(), lambda *message: None, lambda reason: None)
    with pytest.raises(HttpError, match="WebSocket"):
        websocket.accept(request(*extra), None)


async def test_messages_by_hand() -> None:
    sockets, link, _ = open_sockets()
    stdin = sockets.open(0)
    sockets.receive(bytes.fromhex("82 83 01020304") + bytes((0 ^ 1, ord("h") ^ 2, ord("i") ^ 3)))
    assert await stdin.receive() == b"hi"
    await sockets.open(1).send(b"out")
    assert link.written == bytes.fromhex("82 04 01") + b"out"


@pytest.mark.parametrize("use_base64", [False, True])
async def test_any_split_of_messages(use_base64: bool) -> None:
    payload = bytes(range(256))
    if use_base64:
        wire = masked(TextMessage(data="0" + base64.b64encode(payload).decode()))
    else:
        wire = masked(BytesMessage(data=b"\0" + payload))
    wire += masked(TextMessage(data="/AA==") if use_base64 else BytesMessage(data=b"\xff\0"))
    for cut in range(len(wire)):
        sockets, _, closed = open_sockets(use_base64=use_base64, closes=True)
        stdin = sockets.open(0)
        sockets.receive(wire[:cut])
        sockets.receive(wire[cut:])
        received = b""
        while piece := await asyncio.wait_for(stdin.receive(), 1):
            received += piece
        assert received == payload
        assert not closed


async def test_fragmented_messages_have_one_channel() -> None:
    sockets, _, _ = open_sockets()
    stdin = sockets.open(0)
    sockets.receive(masked(BytesMessage(data=b"\0ab", message_finished=False), BytesMessage(data=b"cd")))
    assert await stdin.receive() == b"abcd"


async def test_base64_goes_out_as_text() -> None:
    sockets, link, _ = open_sockets(use_base64=True)
    await sockets.open(2).send(b"err")
    assert understood(link) == [TextMessage(data="2" + base64.b64encode(b"err").decode())]


async def test_close_of_a_channel_needs_version_five() -> None:
    sockets, _, _ = open_sockets(closes=False)
    stdin = sockets.open(0)
    sockets.receive(masked(BytesMessage(data=b"\xff\0")))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stdin.receive(), 0.01)


def test_pings_are_answered() -> None:
    sockets, link, _ = open_sockets()
    sockets.receive(masked(Ping(payload=b"abc")))
    assert understood(link) == [Pong(payload=b"abc")]


def test_close_is_answered_once() -> None:
    sockets, link, closed = open_sockets()
    sockets.receive(masked(CloseConnection(code=1000)))
    sockets.close(1001)
    assert closed == ["the client closed the WebSocket with code 1000"]
    assert link.written == bytes.fromhex("88 02 03e8")


def test_unmasked_frames_break_the_protocol() -> None:
    sockets, link, closed = open_sockets()
    sockets.receive(bytes.fromhex("82 01 00"))
    assert len(closed) == 1
    assert link.written[:1] == b"\x88"


def test_data_that_is_not_received_holds_the_connection() -> None:
    sockets, link, _ = open_sockets()
    sockets.open(0)
    for _ in range(6):
        sockets.receive(masked(BytesMessage(data=bytes(64 * 1024))))
    assert link.holders


def test_unknown_channels_and_empty_messages_are_dropped() -> None:
    sockets, _, closed = open_sockets()
    sockets.receive(masked(BytesMessage(data=b""), BytesMessage(data=b"\x09x"), TextMessage(data="")))
    assert not closed


def test_a_tunnel_wraps_bytes_in_binary_messages() -> None:
    link = MemoryLink()
    websocket = WebSocketLink(link, lambda *message: None, lambda reason: None)
    websocket.accept(request(VERSION), None)
    link.written = b""
    TunnelLink(websocket).write(b"spdy")
    assert link.written == bytes.fromhex("82 04") + b"spdy"
