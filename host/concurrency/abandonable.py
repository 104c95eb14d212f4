"""Threads that can be abandoned, for work that may hang in the kernel, such as on a volume whose server is down."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import TypeVar

from host.concurrency.tasks import uninterrupted
from host.concurrency.thread_starting import start_thread
from host.errors import LimitError, PodkeelError, UnavailableError

T = TypeVar("T")
Body = Callable[[], None]
Begin = Callable[[Body, Callable[[LimitError], object]], None]
"""Runs a body in a thread. If no thread can be started, the second argument is called in another thread."""

PATIENCE_SECONDS = 1.0

_log = logging.getLogger("podkeel.threads")


class GivenUpError(PodkeelError):
    """The caller no longer waits for this work."""


class Permission:
    """What work checks before it continues. Any thread may use it."""

    def __init__(self, on_step_end: Callable[[], object]) -> None:
        self._lock = threading.Lock()
        self._on_step_end = on_step_end
        self._given_up = False
        self._stepping = False

    def check(self) -> None:
        """Raise GivenUpError if the caller no longer waits."""
        if self._given_up:
            raise GivenUpError("the call was cancelled")

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for each change that the work makes.

        It does not begin once the work is given up. A cancelled caller waits for its end, so a step must never hang. A
        long step calls ``check`` from time to time.
        """
        with self._lock:
            self.check()
            self._stepping = True
        try:
            yield
        finally:
            with self._lock:
                self._stepping = False
                given_up = self._given_up
            if given_up:
                self._on_step_end()

    def withdraw(self) -> bool:
        """Prevent further steps. Return whether a step is running."""
        with self._lock:
            self._given_up = True
            return self._stepping


def in_new_thread(body: Body, failed: Callable[[LimitError], object]) -> None:
    """Run ``body`` in a new thread."""
    start_thread(body, name="abandonable", failed=failed)


class AbandonableThreads:
    """Runs each piece of work in its own thread. At most ``most`` abandoned threads may hang in the kernel."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hanging = 0

    async def run(self, subject: str, work: Callable[[Permission], T], begin: Begin = in_new_thread) -> T:
        """Run ``work`` and wait for it. ``begin`` has the thread.

        A cancelled caller waits for the end of a running step, and then one second at most. After that the thread is
        abandoned. If the kernel returns to it, it makes no further step, and its result is dropped. Raises
        UnavailableError when too many threads hang.
        """
        if self._hanging >= self._most:
            raise UnavailableError(
                f"{subject}: {self._hanging} earlier calls hang on volumes that do not answer: bring their servers "
                "back, or unmount the volumes"
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        step_ended = asyncio.Event()
        permission = Permission(lambda: loop.call_soon_threadsafe(step_ended.set))

        def body() -> None:
            try:
                outcome = _Outcome(work(permission))
            except BaseException as error:
                outcome = _Outcome(None, error)
            with suppress(RuntimeError):  # the loop is closed: the agent has ended
                loop.call_soon_threadsafe(outcome.settle, future)

        def failed(error: LimitError) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_Outcome(None, error).settle, future)

        begin(body, failed)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await uninterrupted(self._give_up(subject, future, permission, step_ended))
            raise

    async def _give_up(
        self, subject: str, future: asyncio.Future[T], permission: Permission, step_ended: asyncio.Event
    ) -> None:
        if permission.withdraw():
            await step_ended.wait()
        await asyncio.wait({future}, timeout=PATIENCE_SECONDS)
        if future.done():
            future.exception()  # retrieved, so that asyncio does not report it
            return
        self._hanging += 1
        _log.warning("%s: thread abandoned: a volume does not answer", subject)
        future.add_done_callback(self._returned)

    def _returned(self, future: asyncio.Future[T]) -> None:
        self._hanging -= 1
        future.exception()


class OneThread:
    """A thread for several pieces of work, one after the other, so that the later ones need not wait for a thread.

    Pass ``begin`` to ``AbandonableThreads.run`` inside of ``with``. The thread ends after the block, or once the kernel
    returns to it.
    """

    def __init__(self) -> None:
        self._bodies: SimpleQueue[Body | None] = SimpleQueue()
        self._started = False

    def __enter__(self) -> OneThread:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bodies.put(None)

    def begin(self, body: Body, failed: Callable[[LimitError], object]) -> None:
        """Run ``body`` once the work before it has ended."""
        self._bodies.put(body)
        if not self._started:
            self._started = True
            in_new_thread(self._serve, failed)

    def _serve(self) -> None:
        while (body := self._bodies.get()) is not None:
            body()
            del body


class _Outcome:
    """The result or the error of work."""

    def __init__(self, value: object, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error

    def settle(self, future: asyncio.Future[T]) -> None:
        if future.done():
            return
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(self._value)  # type: ignore[arg-type]  # the T that the work returned
