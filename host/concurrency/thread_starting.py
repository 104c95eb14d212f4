"""Starts threads without waiting for them, and threads for one piece of work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from host.errors import LimitError

T = TypeVar("T")
_Start = tuple[threading.Thread, Callable[[LimitError], object]]


def no_thread(error: RuntimeError) -> LimitError:
    """The error for a thread that could not be started."""
    return LimitError(
        f"no thread can be started ({error}): the node has no process ids left, or the agent's cgroup is at its limit: "
        "end processes, or raise kernel.pid_max, kernel.threads-max or TasksMax= of the systemd unit"
    )


class _Starter:
    """A thread that starts others."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[_Start] = SimpleQueue()
        self._lock = threading.Lock()
        self._running = False

    def start(self, thread: threading.Thread, failed: Callable[[LimitError], object]) -> None:
        with self._lock:
            if not self._running:
                try:
                    threading.Thread(target=self._serve, name="starter", daemon=True).start()
                except RuntimeError as error:
                    raise no_thread(error) from error
                self._running = True
        self._wanted.put((thread, failed))

    def _serve(self) -> None:
        while True:
            thread, failed = self._wanted.get()
            try:
                thread.start()
            except RuntimeError as error:
                failed(no_thread(error))
            del thread, failed


_STARTER = _Starter()


def start_thread(body: Callable[[], None], *, name: str, failed: Callable[[LimitError], object]) -> None:
    """Run ``body`` in a new daemon thread. If none can be started, ``failed`` is called in another thread.

    ``Thread.start`` waits until the thread runs: on a busy machine that would block the loop for milliseconds.
    """
    _STARTER.start(threading.Thread(target=body, name=name, daemon=True), failed)


def run_in_new_thread(work: Callable[[], T], *, name: str) -> T:
    """Run ``work`` in a new thread that ends with it. Returns its result or raises its error. Blocks.

    ``work`` may leave that thread in other namespaces, or with another root or working folder. Raises LimitError if no
    thread can be started.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name=name)
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(error) from error
    thread.join()
    return outcome.result()
