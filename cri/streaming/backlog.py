"""Output of a container that an attached client has not read yet. Its size is limited, and how long it may be full."""

from __future__ import annotations

import asyncio
from collections import deque

LIMIT = 4 * 1024 * 1024
PATIENCE_SECONDS = 5.0
_PIECE = 64 * 1024
# Bytes counted for each piece beside its content, so that many tiny pieces cannot exceed the limit.
_OVERHEAD = 256


class Backlog:
    """Pieces of numbered streams in the order of their arrival.

    While it is full, the writer waits in ``room``, and so does the container. The client must read half of it within
    ``patience`` seconds; otherwise it is disconnected.
    """

    def __init__(self, limit: int = LIMIT, patience: float = PATIENCE_SECONDS) -> None:
        self._limit = limit
        self._patience = patience
        self._pieces: deque[tuple[int, bytearray]] = deque()
        self.size = 0
        """Bytes held, with what holding them costs."""
        self._ended = False
        self._filled = asyncio.Event()
        self._half_empty = asyncio.Event()

    def add(self, stream: int, data: bytes | memoryview) -> None:
        """Append to the stream's last piece or as a new one."""
        if self._pieces and self._pieces[-1][0] == stream and len(self._pieces[-1][1]) < _PIECE:
            self._pieces[-1][1].extend(data)
        else:
            self._pieces.append((stream, bytearray(data)))
            self.size += _OVERHEAD
        self.size += len(data)
        self._filled.set()

    async def room(self) -> bool:
        """Wait while it is full; False if the client reads too slowly."""
        if self.size < self._limit:
            return True
        self._half_empty.clear()
        try:
            async with asyncio.timeout(self._patience):
                await self._half_empty.wait()
        except TimeoutError:
            return False
        return True

    def end(self) -> None:
        """Mark the end: no piece is added any more."""
        self._ended = True
        self._filled.set()

    async def take(self) -> tuple[int, bytearray] | None:
        """The next piece with its stream, as soon as there is one; None at the end."""
        while not self._pieces:
            if self._ended:
                return None
            self._filled.clear()
            await self._filled.wait()
        stream, data = self._pieces.popleft()
        self.size -= len(data) + _OVERHEAD
        if self.size <= self._limit // 2:
            self._half_empty.set()
        return stream, data
