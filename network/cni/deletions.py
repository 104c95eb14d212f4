"""Calls DEL until it succeeds: in attempts that callers wait for, then in the background with growing pauses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from host.concurrency.tasks import cancel_and_wait
from host.errors import PodkeelError, WrongStateError

FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 60.0

_log = logging.getLogger("podkeel.network")


class Deletions:
    """Makes one attempt per sandbox at a time. A failed attempt is repeated automatically, or at once on request.

    ``delete`` makes an attempt. ``finished`` is called for each sandbox whose deletion succeeded in the background.
    """

    def __init__(self, delete: Callable[[str], Awaitable[None]], finished: Callable[[str], Awaitable[None]]) -> None:
        self._delete = delete
        self._finished = finished
        self._attempts: dict[str, asyncio.Task[None]] = {}
        self._pauses: dict[str, asyncio.TimerHandle] = {}
        self._failures: dict[str, int] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.errors: dict[str, str] = {}

    async def run(self, sandbox_id: str) -> None:
        """Make an attempt, or join the one that is running.

        If it fails, its error is raised and attempts continue in the background. If the caller is cancelled, the
        attempt continues. Raises WrongStateError when another call ends it.
        """
        attempt = self._attempt(sandbox_id)
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if attempt.cancelled() and task is not None and not task.cancelling():
                raise WrongStateError(
                    f"sandbox {sandbox_id}: DEL was stopped: the network is released by force"
                ) from None
            raise

    def schedule(self, sandbox_id: str) -> None:
        """Make an attempt in the background."""
        task = asyncio.ensure_future(self._in_background(sandbox_id))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def forget(self, sandbox_id: str) -> None:
        """Cancel the attempt for a sandbox and make no further one. Its last error is kept."""
        pause = self._pauses.pop(sandbox_id, None)
        if pause is not None:
            pause.cancel()
        self._failures.pop(sandbox_id, None)
        await cancel_and_wait(self._attempts.get(sandbox_id))

    async def close(self) -> None:
        """Cancel all attempts. Attachments that are not deleted stay in the store for the next start."""
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        await cancel_and_wait(*self._attempts.values(), *self._background)

    def _attempt(self, sandbox_id: str) -> asyncio.Task[None]:
        task = self._attempts.get(sandbox_id)
        if task is None:
            pause = self._pauses.pop(sandbox_id, None)
            if pause is not None:
                pause.cancel()
            task = asyncio.ensure_future(self._delete_once(sandbox_id))
            task.add_done_callback(_retrieve)
            self._attempts[sandbox_id] = task
        return task

    async def _delete_once(self, sandbox_id: str) -> None:
        try:
            await self._delete(sandbox_id)
        except (PodkeelError, OSError) as error:
            known = self.errors.get(sandbox_id) == str(error)
            self.errors[sandbox_id] = str(error)
            failures = self._failures.get(sandbox_id, 0)
            self._failures[sandbox_id] = failures + 1
            seconds = min(FIRST_PAUSE_SECONDS * 2**failures, MAX_PAUSE_SECONDS)
            loop = asyncio.get_running_loop()
            self._pauses[sandbox_id] = loop.call_later(seconds, self._retry, sandbox_id)
            level = logging.DEBUG if known else logging.WARNING  # the same problem is logged once
            _log.log(level, "sandbox %s: %s; DEL is called again in %g s", sandbox_id[:13], error, seconds)
            raise
        else:
            self.errors.pop(sandbox_id, None)
            self._failures.pop(sandbox_id, None)
        finally:
            del self._attempts[sandbox_id]

    def _retry(self, sandbox_id: str) -> None:
        self._pauses.pop(sandbox_id, None)
        self.schedule(sandbox_id)

    async def _in_background(self, sandbox_id: str) -> None:
        try:
            await asyncio.shield(self._attempt(sandbox_id))
            await self._finished(sandbox_id)
        except (PodkeelError, OSError) as error:
            _log.debug("sandbox %s: network not released yet: %s", sandbox_id[:13], error)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Mark an attempt's error as retrieved: it was logged, and its callers may have been cancelled."""
    if not task.cancelled():
        task.exception()
