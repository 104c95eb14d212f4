"""A WebSocket client for channels, and a tunnel for a SPDY client."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)

from tests.integration.streaming.spdy_client import close_or_abort
from tests.support.agent import SOON


class WebSocketClient:
    """Collects what comes by channel; only counts output (``size``) unless ``keep``, reads only while ``reading``."""

    def __init__(self, *, use_base64: bool = False) -> None:
        self.use_base64 = use_base64
        self.channels: dict[int, bytearray] = {}
        self.messages: list[tuple[int, bytes]] = []
        self.keep = True
        self.size = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self.close_code: int | None = None
        self.subprotocol: str | None = None
        self.rejected: int | None = None
        self.changed = asyncio.Event()
        self.raw: asyncio.Queue[bytes] = asyncio.Queue()
        self.as_tunnel = False
        self._current = b""
        self._connection: WSConnection | Connection = WSConnection(ConnectionType.CLIENT)

    @classmethod
    async def connect(cls, url: str, *subprotocols: str, query: str = "") -> WebSocketClient:
        client = cls(use_base64=any("base64" in name for name in subprotocols))
        parts = urlsplit(url)
        client.reader, client.writer = await asyncio.open_connection(parts.hostname, parts.port)
        request = Request(host=parts.netloc, target=parts.path + query, subprotocols=list(subprotocols))
        client.writer.write(client._connection.send(request))
        client.task = asyncio.create_task(client._read())
        await client.until(lambda: client.subprotocol is not None or client.rejected is not None)
        return client

    @classmethod
    async def send_recorded(cls, address: tuple[str, int], handshake: bytes) -> WebSocketClient:
        """With the recorded handshake of another client."""
        client = cls()
        client.reader, client.writer = await asyncio.open_connection(*address)
        client.writer.write(handshake)
        head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), SOON)
        assert head.startswith(b"HTTP/1.1 101 "), head
        headers = dict(line.lower().split(": ", 1) for line in head.decode().splitlines()[1:] if line)
        client.subprotocol = headers.get("sec-websocket-protocol", "")
        client._connection = Connection(ConnectionType.CLIENT)
        client.task = asyncio.create_task(client._read())
        return client

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    task: asyncio.Task[None]

    def send(self, channel: int, data: bytes) -> None:
        if self.use_base64:
            text = chr((channel + ord("0")) & 0xFF) + base64.b64encode(data).decode()
            self.send_event(TextMessage(data=text))
        else:
            self.send_event(BytesMessage(data=bytes([channel]) + data))

    def send_event(self, event: Event) -> None:
        self.writer.write(self._connection.send(event))

    async def until(self, condition: Any, seconds: float | None = SOON) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def closed(self, seconds: float | None = SOON) -> None:
        await self.until(lambda: self.close_code is not None, seconds)

    async def status(self) -> dict[str, Any]:
        await self.closed()
        return dict(json.loads(self.channels[3]))

    def text(self, channel: int) -> str:
        return self.channels[channel].decode()

    async def close(self) -> None:
        self.task.cancel()
        await close_or_abort(self.writer)

    async def _read(self) -> None:
        while data := await self.reader.read(65536):
            await self.reading.wait()
            self._connection.receive_data(data)
            for event in self._connection.events():
                self._handle(event)
            self.changed.set()

    def _handle(self, event: Event) -> None:
        if isinstance(event, AcceptConnection):
            self.subprotocol = event.subprotocol or ""
        elif isinstance(event, RejectConnection):
            self.rejected = event.status_code
        elif isinstance(event, BytesMessage | TextMessage):
            data = event.data.encode() if isinstance(event, TextMessage) else bytes(event.data)
            self._current += data
            if event.message_finished:
                self._deliver(self._current)
                self._current = b""
        elif isinstance(event, Ping):
            self.send_event(event.response())
        elif isinstance(event, CloseConnection):
            self.close_code = event.code

    def _deliver(self, message: bytes) -> None:
        if self.as_tunnel:
            self.raw.put_nowait(message)
            return
        if self.use_base64:
            channel, data = message[0] - ord("0"), base64.b64decode(message[1:])
        else:
            channel, data = message[0], message[1:]
        self.size += len(data)
        if not self.keep and channel in (1, 2):
            return
        self.messages.append((channel, data))
        self.channels.setdefault(channel, bytearray()).extend(data)


class TunnelEnd:
    """Reads and writes the bytes inside of a tunnel, for a SPDY client on it."""

    def __init__(self, websocket: WebSocketClient) -> None:
        self._websocket = websocket
        websocket.as_tunnel = True

    async def read(self, size: int) -> bytes:
        """The bytes of the next message, however many; b"" once the tunnel is closed."""
        del size
        coming = asyncio.ensure_future(self._websocket.raw.get())
        closed = asyncio.ensure_future(self._websocket.closed(seconds=None))
        await asyncio.wait({coming, closed}, return_when=asyncio.FIRST_COMPLETED)
        closed.cancel()
        if coming.done():
            return coming.result()
        coming.cancel()
        return b""

    def write(self, data: bytes) -> None:
        """In messages whose boundaries mean nothing."""
        for start in range(0, len(data), 50_001):
            self._websocket.send_event(BytesMessage(data=data[start : start + 50_001]))

    async def drain(self) -> None:
        await self._websocket.writer.drain()

    @property
    def transport(self) -> asyncio.WriteTransport:
        return self._websocket.writer.transport

    def is_closing(self) -> bool:
        return self._websocket.writer.is_closing()

    def close(self) -> None:
        self._websocket.task.cancel()
        self._websocket.writer.close()
