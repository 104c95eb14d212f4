"""Background work that runs after changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from host.concurrency.tasks import cancel_and_wait


class Follower:
    """Calls ``work`` some time after each change, one call at a time. For use on the loop.

    A change sets ``changed``. Changes within ``delay`` seconds after the first one lead to one call. ``work`` returns
    the number of seconds until it may be called again, and raises nothing.
    """

    def __init__(self, changed: asyncio.Event, delay: float, work: Callable[[], Awaitable[float]]) -> None:
        self._changed = changed
        self._delay = delay
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to wait for changes."""
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Call ``work`` if there was a change since its last call, and stop."""
        task, self._task = self._task, None
        await cancel_and_wait(task)
        if self._changed.is_set():
            await self._catch_up()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._delay)
            await asyncio.sleep(await self._catch_up())

    async def _catch_up(self) -> float:
        self._changed.clear()
        return await self._work()
