"""Fetches ranges of a blob, some at once and in order of their use."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Self, TypeAlias

PARALLEL = 6
_MOST_WAITING = 4  # chunks of one range that wait for their use; a chunk has up to 256 KiB

OpenRange: TypeAlias = Callable[[int, int], AsyncGenerator[bytes, None]]


class RangeFetcher:
    """Fetches ``ranges`` (begin, end), for ``async with``. They are taken with ``chunks``, in their order.

    ``open_range`` requests one. At most ``PARALLEL`` requests run at once.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], open_range: OpenRange) -> None:
        self._open_range = open_range
        self._ranges = deque(ranges)
        self._running: deque[tuple[asyncio.Queue[bytes], asyncio.Task[None]]] = deque()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [task for _, task in self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The bytes of all ranges. Raises what ``open_range`` raises."""
        while self._ranges or self._running:
            self._start()
            queue, task = self._running[0]
            while chunk := await queue.get():
                yield chunk
            await task
            self._running.popleft()

    def _start(self) -> None:
        while self._ranges and len(self._running) < PARALLEL:
            begin, end = self._ranges.popleft()
            queue: asyncio.Queue[bytes] = asyncio.Queue(_MOST_WAITING)
            self._running.append((queue, asyncio.create_task(self._fetch(begin, end, queue))))

    async def _fetch(self, begin: int, end: int, queue: asyncio.Queue[bytes]) -> None:
        try:
            async with contextlib.aclosing(self._open_range(begin, end)) as chunks:
                async for chunk in chunks:
                    await queue.put(chunk)
        except Exception:
            await queue.put(b"")
            raise
        await queue.put(b"")
