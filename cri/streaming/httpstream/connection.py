"""One accepted connection: passes bytes to its protocol, applies back-pressure in both directions, and closes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Protocol, cast

# Bytes that may wait in our buffers for a client that reads slowly, besides those in the kernel's buffers.
_WRITE_HIGH_WATER = 128 * 1024
# If this many bytes of answers wait for a client that does not read, nothing is read from it either.
_ANSWERS_LIMIT = 1024 * 1024


class Link(Protocol):
    """A byte stream in both directions: a connection, or a tunnel inside one."""

    def write(self, data: bytes) -> None:
        """Queue bytes; nothing once the peer is gone."""

    async def drain(self) -> None:
        """Wait until the peer takes more; raises ConnectionResetError once it is gone."""

    def hold(self, holder: object) -> None:
        """Read no more from the peer until ``holder`` releases."""

    def release(self, holder: object) -> None:
        """Undo ``hold``."""

    def touch(self) -> None:
        """Record that data has passed: the idle time starts again."""


class StreamConnection(asyncio.Protocol):
    """The transport's side of a connection; ``receiver`` gets its bytes and ``on_lost`` is called when the peer has
    left."""

    def __init__(self, on_made: Callable[[StreamConnection], None]) -> None:
        self._on_made = on_made
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._holders: set[object] = set()
        self._answers_hold = object()
        self._closed = self._loop.create_future()
        self.receiver: Callable[[bytes], None] = _discard
        self.on_lost: Callable[[], None] = _nothing
        self.alive = False
        self.last_data = self._loop.time()

    # ---- the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_WATER)
        self.alive = True
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self.receiver(data)

    def eof_received(self) -> bool:
        """Part of asyncio.Protocol: clients close when they leave, so a half-closed connection is a client gone."""
        self._lose()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self._lose()
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """Part of asyncio.Protocol."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Part of asyncio.Protocol."""
        self._writable.set()
        self.release(self._answers_hold)

    # ---- the protocol machines call

    def write(self, data: bytes) -> None:
        """Queue bytes; nothing once the peer is gone."""
        if self.alive and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)
            if self._transport.get_write_buffer_size() > _ANSWERS_LIMIT:
                self.hold(self._answers_hold)

    async def drain(self) -> None:
        """Wait until the peer takes more; raises ConnectionResetError once it is gone."""
        if not self._writable.is_set():
            await self._writable.wait()
        if not self.alive:
            raise ConnectionResetError("the client is gone")

    def hold(self, holder: object) -> None:
        """Read no more from the peer until ``holder`` releases."""
        if not self._holders and self.alive and self._transport is not None:
            self._transport.pause_reading()
        self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Undo ``hold``."""
        if holder in self._holders:
            self._holders.remove(holder)
            if not self._holders and self.alive and self._transport is not None:
                self._transport.resume_reading()

    def touch(self) -> None:
        """Record that data has passed: the idle time starts again."""
        self.last_data = self._loop.time()

    async def close(self, patience: float) -> None:
        """Send what is queued, then wait up to ``patience`` seconds for the client to close as well; raises nothing.

        A client may read slowly until the end. If a socket is closed with unread bytes, or gets some afterwards, the
        kernel drops what the client has not read yet. So incoming bytes are read and dropped until the client closes.
        """
        transport = self._transport
        if transport is None:
            return
        self.receiver = _discard
        self.on_lost = _nothing
        for holder in list(self._holders):
            self.release(holder)
        try:
            async with asyncio.timeout(patience):
                if self.alive and not transport.is_closing():
                    await self._half_close(transport)
                    await asyncio.wait([self._closed])
        except TimeoutError:
            pass
        finally:
            transport.abort()

    async def _half_close(self, transport: asyncio.Transport) -> None:
        """Half-close the connection once everything queued is sent."""
        if not transport.can_write_eof():  # TLS
            transport.close()
            return
        transport.set_write_buffer_limits(high=0)  # from now on "writable" means that all is written
        await self._writable.wait()
        # The transport's own write_eof does this later, in a callback, and fails there where the client has gone.
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").shutdown(socket.SHUT_WR)

    def _lose(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._writable.set()
        self.on_lost()


def _discard(data: bytes) -> None:
    del data


def _nothing() -> None:
    return None
