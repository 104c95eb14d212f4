"""Starting threads without waiting for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

_Start = tuple[threading.Thread, Callable[[RuntimeError], object]]


class _Starter:
    """A thread that starts others."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[_Start] = SimpleQueue()
        self._lock = threading.Lock()
        self._running = False

    def start(self, thread: threading.Thread, failed: Callable[[RuntimeError], object]) -> None:
        with self._lock:
            if not self._running:
                threading.Thread(target=self._serve, name="starter", daemon=True).start()
                self._running = True
        self._wanted.put((thread, failed))

    def _serve(self) -> None:
        while True:
            thread, failed = self._wanted.get()
            try:
                thread.start()
            except RuntimeError as error:
                failed(error)
            del thread, failed


_STARTER = _Starter()


def start_aside(body: Callable[[], None], *, name: str, failed: Callable[[RuntimeError], object]) -> None:
    """Run ``body`` in a new daemon thread; ``failed`` is called, in another thread, if none can be started.

    ``Thread.start`` waits until the thread runs: on a busy machine that would hold the event loop for milliseconds.
    """
    _STARTER.start(threading.Thread(target=body, name=name, daemon=True), failed)
