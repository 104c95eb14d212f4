"""A lock that many readers or one writer can hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager


class RWLock:
    """Separates one writer, which replaces the whole, from many readers, which change parts."""

    def __init__(self) -> None:
        self._readers = 0
        self._unlocked = asyncio.Event()
        self._unlocked.set()
        self._no_readers = asyncio.Event()
        self._no_readers.set()
        self._writers = asyncio.Lock()

    def reading(self) -> AbstractAsyncContextManager[None]:
        """Wait until no writer holds the lock or waits for it, and hold it together with other readers."""
        return _Reading(self)

    async def enter(self) -> None:
        """Begin to read; ``leave`` ends it."""
        while not self._unlocked.is_set():
            await self._unlocked.wait()
        self._readers += 1
        self._no_readers.clear()

    def leave(self) -> None:
        """End the reading."""
        self._readers -= 1
        if not self._readers:
            self._no_readers.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Admit no more readers, wait until the present ones have left, and hold the lock alone."""
        async with self._writers:
            self._unlocked.clear()
            try:
                await self._no_readers.wait()
                yield
            finally:
                self._unlocked.set()


class _Reading(AbstractAsyncContextManager[None]):
    """A class instead of a generator, which would cost several times as much: each event of a pod uses it."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RWLock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        await self._lock.enter()

    async def __aexit__(self, *_error: object) -> None:
        self._lock.leave()
