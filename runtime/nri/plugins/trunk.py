"""The trunk to a plugin: one stream socket that carries several connections in frames.

A frame is a connection id and a length (4 bytes each, big-endian), then the payload. Opening a connection exchanges
no bytes. The trunk keeps no bytes: each connection gets them as they arrive.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import cast

from host.errors import UnavailableError

PAYLOAD_LIMIT = 10 + (4 << 20)
"""The largest payload of a frame in bytes: one ttrpc message with its header."""

_HEADER = struct.Struct(">II")
_WRITE_BUFFER = 1 << 20
_READ_BUFFER = 16 << 10  # reading more small frames at once would block the loop for milliseconds
_MAX_IDLE_FRAMES = 4096  # frames that are empty, or for connections that do not exist

Receive = Callable[[bytes], None]


class Trunk(asyncio.BufferedProtocol):
    """The agent's end of a trunk, for ``loop.create_unix_server`` and similar functions.

    ``connected`` is called once when the socket is connected, and ``ended`` once with the reason when it has ended.
    While the plugin does not read, the agent reads nothing from it. So a plugin cannot make the agent keep more than
    one buffer. A plugin that sends too many frames for unknown connections is closed.
    """

    def __init__(self, connected: Callable[[Trunk], None], ended: Callable[[str], None]) -> None:
        self._connected = connected
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._receivers: dict[int, Receive] = {}
        self._header = bytearray()
        self._receiver: Receive | None = None
        self._left = 0
        self._idle_frames = 0
        self._buffer = memoryview(bytearray(_READ_BUFFER))
        self._why = "the plugin closed the connection"
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed = False

    def receive_by(self, connection: int, receive: Receive) -> None:
        """Pass the bytes for ``connection`` to ``receive``. Bytes for other connections are dropped."""
        self._receivers[connection] = receive

    async def send(self, connection: int, payload: bytes) -> None:
        """Send ``payload`` and wait until the socket has room again. Raises UnavailableError when it has ended."""
        self.write(connection, payload)
        await self._writable.wait()

    def write(self, connection: int, payload: bytes) -> None:
        """Send ``payload``; bytes that are not read yet are kept. Raises UnavailableError when it has ended."""
        if self.closed or self._transport is None:
            raise UnavailableError(self._why)
        if len(payload) <= PAYLOAD_LIMIT:  # as nearly always
            self._transport.write(_HEADER.pack(connection, len(payload)) + payload)
            return
        for start in range(0, len(payload), PAYLOAD_LIMIT):
            part = payload[start : start + PAYLOAD_LIMIT]
            self._transport.write(_HEADER.pack(connection, len(part)) + part)

    def close(self, why: str) -> None:
        """Close the trunk at once. Calls that wait for an answer fail with ``why``."""
        if not self.closed:
            self.closed = True
            self._why = why
            if self._transport is not None:
                self._transport.abort()

    @property
    def paused(self) -> bool:
        """Whether the agent reads nothing from the plugin, because the plugin does not read."""
        return self._transport is not None and not self._transport.is_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls this when the socket is connected."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_WRITE_BUFFER)
        self._connected(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """asyncio calls this to get the buffer for the next bytes."""
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        """asyncio calls this when bytes have arrived."""
        data, at = bytes(self._buffer[:count]), 0
        while at < count and not self.closed:
            if self._left:
                part = data[at : at + self._left]
                at += len(part)
                self._left -= len(part)
                if self._receiver is not None:
                    self._receiver(part)
                continue
            if not self._header and count - at >= _HEADER.size:  # the usual case
                header = _HEADER.unpack_from(data, at)
                at += _HEADER.size
            else:
                part = data[at : at + _HEADER.size - len(self._header)]
                at += len(part)
                self._header += part
                if len(self._header) < _HEADER.size:
                    return
                header = _HEADER.unpack(self._header)
                self._header.clear()
            if not self._begin_frame(*header):
                return

    def _begin_frame(self, connection: int, length: int) -> bool:
        if length > PAYLOAD_LIMIT:
            self.close(f"it sent a frame of {length} bytes: the limit is {PAYLOAD_LIMIT}")
            return False
        self._receiver, self._left = self._receivers.get(connection), length
        if self._receiver is None or not length:
            self._idle_frames += 1
            if self._idle_frames > _MAX_IDLE_FRAMES:
                self.close(f"it sent more than {_MAX_IDLE_FRAMES} frames that are empty or for unknown connections")
                return False
        return True

    def pause_writing(self) -> None:
        """asyncio calls this when the plugin does not read."""
        self._writable.clear()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """asyncio calls this when the plugin reads again."""
        self._writable.set()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio calls this when the connection has ended."""
        if error is not None and not self.closed:
            self._why = f"the connection ended with an error: {error}"
        self.closed = True
        self._writable.set()
        self._ended(self._why)
