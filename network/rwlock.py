"""A lock that many readers or one writer may hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager


class RWLock:
    """Keeps what replaces a whole (a writer) apart from the many that change parts of it (readers)."""

    def __init__(self) -> None:
        self._readers = 0
        self._unlocked = asyncio.Event()
        self._unlocked.set()
        self._no_readers = asyncio.Event()
        self._no_readers.set()
        self._writers = asyncio.Lock()

    def reading(self) -> AbstractAsyncContextManager[None]:
        """Wait until no writer holds or awaits the lock, and hold it beside other readers."""
        return _Reading(self)

    async def enter(self) -> None:
        """Begin to read; ``leave`` ends it."""
        while not self._unlocked.is_set():
            await self._unlocked.wait()
        self._readers += 1
        self._no_readers.clear()

    def leave(self) -> None:
        """End to read."""
        self._readers -= 1
        if not self._readers:
            self._no_readers.set()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Admit no more readers, wait until those that hold the lock have left, and hold it alone."""
        async with self._writers:
            self._unlocked.clear()
            try:
                await self._no_readers.wait()
                yield
            finally:
                self._unlocked.set()


class _Reading(AbstractAsyncContextManager[None]):
    """A class, as a generator would cost several times as much, and each event of a pod passes here."""

    __slots__ = ("_lock",)

    def __init__(self, lock: RWLock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        await self._lock.enter()

    async def __aexit__(self, *_error: object) -> None:
        self._lock.leave()
