"""Single-flight: work that several callers share. Also: waiting for work that must not be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from host.errors import WrongStateError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def wait_out(future: asyncio.Future[T]) -> T:
    """Wait for the end of ``future``, even if the caller is cancelled. The cancellation is raised after that."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            if future.cancelled():
                raise
            cancelled = error
        except BaseException:
            break
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # retrieved, so that asyncio does not report it
        raise cancelled
    return future.result()


async def uninterrupted(work: Awaitable[T]) -> T:
    """Run ``work`` to its end, even if the caller is cancelled. The cancellation is raised after that.

    For steps that belong together, such as a write to the database and the same change in memory.
    """
    return await wait_out(asyncio.ensure_future(work))


async def ended(task: asyncio.Task[T]) -> None:
    """Wait for the end of ``task``, even if the caller is cancelled.

    Raises neither the task's error nor the cancellation.
    """
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()


async def cancel_and_wait(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel ``tasks`` and wait until all have ended. Ignores what they raise. None means: not begun."""
    begun = [task for task in tasks if task is not None]
    for task in begun:
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    """Work in flight. ``over`` is done once the work has ended or its caller has left."""

    request: Any
    task: asyncio.Task[T]
    over: asyncio.Future[None]
    waiters: int = 0
    abandoned: bool = False

    def give_up(self) -> None:
        """Cancel the work, but only once: a second cancellation would interrupt its clean-up."""
        if not self.abandoned:
            self.abandoned = True
            self.task.cancel()

    def succeeded(self) -> bool:
        """Whether there is a result."""
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


class SingleFlight(Generic[K, T]):
    """Runs one piece of work per key for all callers at the same time, like Go's singleflight.

    The work is a task. With ``run`` all callers share the task, its result and its error. It continues if the caller
    that started it is cancelled, and is cancelled with the last caller. With ``by_turns`` the work uses resources of
    its caller, such as a connection and credentials: it ends with this caller, and only a result is shared.

    If ``cancel`` or ``close`` ends the work, its callers get a WrongStateError with the message ``given_up``.
    """

    def __init__(self, given_up: str) -> None:
        self._given_up = given_up
        self._flights: dict[K, _Flight[T]] = {}
        self._tasks: set[asyncio.Task[T]] = set()
        self._closed = False

    def __len__(self) -> int:
        """The number of keys with work in flight."""
        return len(self._flights)

    def running(self, key: K) -> bool:
        """Whether ``key`` has work in flight that a caller can join."""
        return key in self._flights and not self._flights[key].abandoned

    async def request_of(self, key: K) -> Any | None:
        """The ``request`` of the work in flight under ``key``; None if there is none.

        Cancelled work does not count as in flight. This waits for the end of its clean-up.
        """
        flight = await self._joinable(key)
        return None if flight is None else flight.request

    async def run(self, key: K, start: Callable[[], Coroutine[Any, Any, T]], request: Any = None) -> T:
        """Join the work in flight under ``key``, or ``start`` it. Returns its result or raises its error.

        ``request`` is what the work was asked for: see ``request_of``. Work whose callers have all left cannot be
        joined. A new caller waits for the end of its clean-up and starts new work.
        """
        flight = await self._joinable(key) or self._begin(key, start, request)
        flight.waiters += 1
        try:
            await asyncio.wait((flight.task,))
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                flight.give_up()
                await ended(flight.task)
        return self._result(flight)

    async def by_turns(self, key: K, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result under ``key`` of the first caller that succeeds.

        One caller at a time runs its own ``start``. If it fails, this caller gets the error, and the next one runs its
        own ``start``. If the caller is cancelled, the next one does not wait for the clean-up.
        """
        while (other := self._flights.get(key)) is not None:
            await asyncio.wait((other.over,))
            if other.succeeded():
                return other.task.result()
        flight = self._begin(key, start, None)
        try:
            await asyncio.wait((flight.task,))
        except asyncio.CancelledError:
            self._end(key, flight)
            flight.give_up()
            await ended(flight.task)
            raise
        return self._result(flight)

    async def cancel(self, wanted: Callable[[K], bool]) -> None:
        """Cancel the work in flight under the keys that are ``wanted``, and wait for the end of its clean-up."""
        flights = [flight for key, flight in self._flights.items() if wanted(key)]
        for flight in flights:
            flight.give_up()
        if flights:
            await asyncio.wait([flight.task for flight in flights])

    async def close(self) -> None:
        """Cancel all work, wait for the end of all clean-up, and refuse new work."""
        self._closed = True
        await self.cancel(lambda key: True)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _joinable(self, key: K) -> _Flight[T] | None:
        while (flight := self._flights.get(key)) is not None and (flight.abandoned or flight.task.done()):
            await asyncio.wait((flight.task,))
        return flight

    def _begin(self, key: K, start: Callable[[], Coroutine[Any, Any, T]], request: Any) -> _Flight[T]:
        if self._closed:
            raise WrongStateError(self._given_up)
        task = asyncio.create_task(start())
        flight = _Flight(request, task, asyncio.get_running_loop().create_future())
        self._flights[key] = flight
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._end(key, flight))
        task.add_done_callback(self._tasks.discard)
        return flight

    def _end(self, key: K, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.over.done():
            flight.over.set_result(None)

    def _result(self, flight: _Flight[T]) -> T:
        if flight.task.cancelled():
            raise WrongStateError(self._given_up)
        return flight.task.result()
