"""Calls that ask for the same thing at once share one operation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from host.errors import WrongStateError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Shared(Generic[T]):
    request: Any
    task: asyncio.Task[T]
    waiters: int = 0
    abandoned: bool = False


class Joining(Generic[K, T]):
    """Operations in flight by key. One whose callers have all gone away is cancelled, which undoes it."""

    def __init__(self) -> None:
        self._running: dict[K, _Shared[T]] = {}

    def __len__(self) -> int:
        """How many are in flight."""
        return len(self._running)

    async def request_of(self, key: K) -> Any | None:
        """What the operation in flight for ``key`` was asked to do; None if there is none.

        One that is being undone is no longer in flight: its end is waited for.
        """
        while (shared := self._running.get(key)) is not None and (shared.abandoned or shared.task.done()):
            await asyncio.wait([shared.task])
        return None if shared is None else shared.request

    async def run(self, key: K, request: Any, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Join the operation in flight for ``key``, or start one; returns or raises what it does.

        Raises WrongStateError when ``cancel`` ended it.
        """
        shared = self._running.get(key)
        if shared is None:
            shared = _Shared(request, asyncio.create_task(start()))
            shared.task.add_done_callback(lambda _: self._running.pop(key))
            self._running[key] = shared
        shared.waiters += 1
        try:
            await asyncio.wait([shared.task])
        except asyncio.CancelledError:
            if shared.waiters == 1:
                await _cancel(shared)
            raise
        finally:
            shared.waiters -= 1
        if shared.task.cancelled():
            raise WrongStateError("what was being made was given up, because its sandbox or the agent is being stopped")
        return shared.task.result()

    async def cancel(self, wanted: Callable[[K], bool]) -> None:
        """Cancel what is in flight for the keys that are ``wanted`` and wait until it is undone."""
        await asyncio.gather(*(_cancel(shared) for key, shared in list(self._running.items()) if wanted(key)))

    async def drain(self) -> None:
        """Cancel everything in flight and wait until it is undone; for the agent's end."""
        await self.cancel(lambda key: True)


async def _cancel(shared: _Shared[T]) -> None:
    """Cancel an operation, once, and wait until it is undone."""
    if not shared.abandoned:
        shared.abandoned = True
        shared.task.cancel()
    await asyncio.wait([shared.task])
    if not shared.task.cancelled():
        shared.task.exception()  # retrieved here, so that it is not reported as lost
