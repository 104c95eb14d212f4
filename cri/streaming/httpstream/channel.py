"""One byte stream to and from a client, for every protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from asyncio import Future, get_running_loop
from collections import deque

# A client that follows SPDY's windows sends at most 64 KiB ahead. This limits other clients.
_HOLD_LIMIT = 256 * 1024


class ChannelResetError(Exception):
    """The client ended only this stream; the others stay open."""


class Channel(ABC):
    """Half-closable in both directions, with bounded buffers: a slow receiver makes the client wait."""

    def __init__(self) -> None:
        self._received: deque[bytes] = deque()
        self._received_size = 0
        self._ended = False
        self._waiter: Future[None] | None = None
        self.was_reset = False

    # ---- towards the client

    @abstractmethod
    async def send(self, data: bytes | memoryview) -> None:
        """Send bytes; waits until the client accepts them.

        Raises ChannelResetError when the client ended this stream, ConnectionResetError when it is gone.
        """

    @abstractmethod
    def send_last(self, data: bytes) -> None:
        """Send a short text without waiting for the client, then half-close. Used for statuses."""

    def finish(self) -> None:
        """Half-close: the client sees the end of this direction."""
        self.send_last(b"")

    @abstractmethod
    def reset(self) -> None:
        """End the stream in both directions."""

    # ---- from the client

    async def receive(self) -> bytes:
        """The bytes received since the last call, as soon as there are any; always b"" once the client half-closed."""
        while not self._received and not self._ended:
            self._waiter = get_running_loop().create_future()
            await self._waiter
        if not self._received:
            return b""
        data = self._received[0] if len(self._received) == 1 else b"".join(self._received)
        self._received.clear()
        self._received_size = 0
        self._on_consumed(len(data))
        return data

    def feed(self, data: bytes, *, fin: bool = False) -> None:
        """The protocol's side: bytes of the client arrived."""
        if data and not self._ended:
            self._received.append(data)
            self._received_size += len(data)
            if self._received_size > _HOLD_LIMIT:
                self._hold()
        self._ended = self._ended or fin
        self._wake()

    def fail(self) -> None:
        """The protocol's side: the client ended the stream in both directions."""
        self.was_reset = True
        self._ended = True
        self._wake()

    @abstractmethod
    def _on_consumed(self, count: int) -> None:
        """Allow the client to send as much again."""

    @abstractmethod
    def _hold(self) -> None:
        """Keep the client from sending more until ``_on_consumed``."""

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
