"""A SPDY client as kubectl and crictl are, or, with ``keeps_windows``, one that keeps to the draft's flow control."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.spdy_events import DataReceived, StreamReplied, StreamReset, WentAway
from cri.streaming.httpstream.spdy_session import SpdySession
from tests.support.agent import SOON

COMMAND_PROTOCOLS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
)


class ClientStream:
    """What came on one stream."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.size = 0
        self.ended = asyncio.Event()
        self.replied = asyncio.Event()
        self.reset_status: int | None = None
        self.arrived = asyncio.Event()
        self.keep = True

    async def text(self) -> str:
        """All of it, once it ended."""
        await asyncio.wait_for(self.ended.wait(), SOON)
        return self.data.decode()


class SpdyClient:
    """One upgraded connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str, *, keeps_windows: bool = False
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.head = head
        self.session = SpdySession(client=True)
        self.keeps_windows = keeps_windows
        self.streams: dict[int, ClientStream] = {}
        self.went_away = asyncio.Event()
        self.closed = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls, url: str, protocols: Sequence[str] = COMMAND_PROTOCOLS, *, keeps_windows: bool = False, **options: Any
    ) -> SpdyClient:
        reader, writer, head = await request(url, spdy_request(url, protocols), **options)
        assert head.startswith("HTTP/1.1 101 "), head
        client = cls(reader, writer, head, keeps_windows=keeps_windows)
        if keeps_windows:
            client.session.send_settings({frames.SETTINGS_INITIAL_WINDOW_SIZE: 64 * 1024})
            client.flush()
        return client

    async def open(self, **headers: str) -> int:
        """Open a stream and wait until it is accepted or reset."""
        stream_id = self.session.open_stream(headers)
        self.streams[stream_id] = ClientStream()
        self.flush()
        stream = self.streams[stream_id]
        replied = asyncio.ensure_future(stream.replied.wait())
        ended = asyncio.ensure_future(stream.ended.wait())
        await asyncio.wait({replied, ended}, timeout=SOON, return_when=asyncio.FIRST_COMPLETED)
        replied.cancel()
        ended.cancel()
        return stream_id

    async def open_command(self, *names: str) -> dict[str, int]:
        """The streams of a remote command, by purpose."""
        return {name: await self.open(streamtype=name) for name in ("error", *names)}

    def send_now(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Write data regardless of the windows."""
        self.writer.write(b"".join(self.session.data(stream_id, data, fin=fin)))

    async def send(self, stream_id: int, data: bytes, *, fin: bool = False) -> None:
        """Write data, keeping the server's windows if this client does."""
        view = memoryview(data)
        while view:
            allowed = len(view)
            if self.keeps_windows:
                allowed = min(self.session.reserve(stream_id, len(view)), len(view))
                if not allowed:
                    await asyncio.sleep(0.001)
                    continue
            self.writer.write(b"".join(self.session.data(stream_id, view[:allowed])))
            await self.writer.drain()
            view = view[allowed:]
        if fin:
            self.send_now(stream_id, b"", fin=True)

    def flush(self) -> None:
        """Write what the session has to say."""
        output = self.session.take_output()
        if output:
            self.writer.write(output)

    async def status(self, stream_id: int) -> dict[str, Any]:
        """The JSON that ends the error stream."""
        return dict(json.loads(await self.streams[stream_id].text()))

    async def close(self) -> None:
        self._task.cancel()
        await close_or_abort(self.writer)

    async def _read(self) -> None:
        while True:
            await self.reading.wait()
            try:
                data = await self.reader.read(256 * 1024)
            except (ConnectionError, ssl.SSLError):  # the latter when the server wrote after it had closed
                data = b""
            if not data:
                break
            self._handle(data)
            self.flush()
        self.closed.set()
        for stream in self.streams.values():
            stream.ended.set()

    def _handle(self, data: bytes) -> None:
        for event in self.session.receive(data):
            if isinstance(event, DataReceived):
                stream = self.streams[event.stream_id]
                stream.size += len(event.data)
                if stream.keep:
                    stream.data += event.data
                stream.arrived.set()
                if event.fin:
                    stream.ended.set()
                if self.keeps_windows:
                    self.session.consumed(event.stream_id, len(event.data))
            elif isinstance(event, StreamReplied):
                self.streams[event.stream_id].replied.set()
            elif isinstance(event, StreamReset):
                self.streams[event.stream_id].reset_status = event.status
                self.streams[event.stream_id].ended.set()
            elif isinstance(event, WentAway):
                self.went_away.set()


def spdy_request(url: str, protocols: Sequence[str], method: str = "POST") -> bytes:
    """The bytes of an upgrade request as Go's client writes them."""
    parts = urlsplit(url)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "User-Agent: Go-http-client/1.1"]
    lines += ["Content-Length: 0", "Connection: Upgrade", "Upgrade: SPDY/3.1"]
    lines += [f"X-Stream-Protocol-Version: {protocol}" for protocol in protocols]
    return "\r\n".join([*lines, "", ""]).encode()


async def close_or_abort(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and drop what its other end does not read."""
    if not writer.is_closing() and writer.transport.get_write_buffer_size():
        writer.transport.abort()
    writer.close()
    await asyncio.sleep(0)  # the loop closes the socket in its next turn


async def request(url: str, data: bytes, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, str]:
    """Send a request; its answer's head."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20, **options)
    try:
        writer.write(data)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer, head.decode()
