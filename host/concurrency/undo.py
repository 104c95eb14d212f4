"""Undo: if an operation fails, its steps are undone in reverse order."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from host.concurrency.tasks import uninterrupted

STEP_SECONDS = 30.0

_log = logging.getLogger("podkeel.undo")


class Undo:
    """A stack of undo steps for ``async with``. They run if the block fails or is cancelled.

    Each step has its own deadline, also runs while the caller is being cancelled, and must be idempotent. A step that
    fails is logged. The recovery at the next start repeats it.
    """

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._steps: list[tuple[str, Callable[[], Awaitable[None] | None]]] = []

    def push(self, what: str, step: Callable[[], Awaitable[None] | None]) -> None:
        """Register how to undo ``what``.

        Call this before the object is created: a partly made one is then undone too.
        """
        self._steps.append((what, step))

    async def run(self) -> None:
        """Undo everything now, newest first. Returns when all steps ran, even if the caller is cancelled."""
        await uninterrupted(self._run_steps())

    async def _run_steps(self) -> None:
        while self._steps:
            what, step = self._steps.pop()
            try:
                async with asyncio.timeout(STEP_SECONDS):
                    result = step()
                    if inspect.isawaitable(result):
                        await result
            except Exception as error:
                _log.error("%s: could not undo %s: %s", self._subject, what, error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            await self.run()
        self._steps.clear()
