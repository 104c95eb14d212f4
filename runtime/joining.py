"""Calls that ask for the same thing at once share one operation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Shared(Generic[T]):
    request: Any
    task: asyncio.Task[T]
    waiters: int = 0


class Joining(Generic[K, T]):
    """Operations in flight by key. One whose callers have all gone away is cancelled, which undoes it."""

    def __init__(self) -> None:
        self._running: dict[K, _Shared[T]] = {}

    def request_of(self, key: K) -> Any | None:
        """What the operation in flight for ``key`` was asked to do; None if there is none."""
        shared = self._running.get(key)
        return None if shared is None else shared.request

    async def run(self, key: K, request: Any, start: Callable[[], Awaitable[T]]) -> T:
        """Join the operation in flight for ``key``, or start one; returns or raises what it does."""
        shared = self._running.get(key)
        if shared is None:
            shared = _Shared(request, asyncio.ensure_future(self._run(key, start)))
            self._running[key] = shared
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        except asyncio.CancelledError:
            if shared.waiters == 1 and not shared.task.done():
                shared.task.cancel()
                await asyncio.wait([shared.task])
            raise
        finally:
            shared.waiters -= 1

    async def _run(self, key: K, start: Callable[[], Awaitable[T]]) -> T:
        try:
            return await start()
        finally:
            del self._running[key]

    async def cancel(self, wanted: Callable[[K], bool]) -> None:
        """Cancel what is in flight for the keys that are ``wanted`` and wait until it is undone."""
        tasks = [shared.task for key, shared in self._running.items() if wanted(key)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def drain(self) -> None:
        """Cancel everything in flight and wait until it is undone; for the agent's end."""
        await self.cancel(lambda key: True)
