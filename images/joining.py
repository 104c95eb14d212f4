"""One piece of work for all who ask for the same thing at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Work(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0
    abandoned: bool = False


class Joined(Generic[T]):
    """Runs work by key; callers with the key of running work wait for that. The last one to leave cancels it."""

    def __init__(self) -> None:
        self._running: dict[Hashable, _Work[T]] = {}

    def running(self, key: Hashable) -> bool:
        """Whether work under ``key`` is going on that can be joined."""
        return key in self._running and not self._running[key].abandoned

    async def run(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the running work under ``key``, which ``start`` begins if there is none."""
        while (work := self._running.get(key)) is not None and (work.abandoned or work.task.done()):
            await asyncio.wait((work.task,))  # its clean-up must be over before the same thing is begun again
        if work is None:
            work = _Work(asyncio.create_task(start()))
            work.task.add_done_callback(lambda _: self._running.pop(key))
            self._running[key] = work
        work.waiters += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.waiters -= 1
            if not work.waiters and not work.task.done():
                work.abandoned = True
                work.task.cancel()
                await _wait_out(work.task)

    async def close(self) -> None:
        """Cancel all work and wait for its clean-up."""
        tasks = [work.task for work in self._running.values()]
        for work in self._running.values():
            work.abandoned = True
            work.task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _wait_out(task: asyncio.Task[T]) -> None:
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
