"""Threads that are started without waiting for them."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from host.concurrency.thread_starting import start_thread

SECONDS = 60.0


def test_work_runs_in_a_separate_daemon_thread() -> None:
    names: SimpleQueue[tuple[str, bool]] = SimpleQueue()
    for number in range(3):
        start_thread(
            lambda: names.put((threading.current_thread().name, threading.current_thread().daemon)),
            name=f"aside-{number}",
            failed=lambda error: pytest.fail(str(error)),
        )
    assert sorted(names.get(timeout=SECONDS) for _ in range(3)) == [(f"aside-{n}", True) for n in range(3)]


def test_a_caller_gets_the_error_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    told: SimpleQueue[str] = SimpleQueue()
    start_thread(lambda: told.put("ran"), name="aside", failed=lambda error: told.put(str(error)))
    assert told.get(timeout=SECONDS) == "ran"

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        start_thread(lambda: told.put("ran"), name="aside", failed=lambda error: told.put(str(error)))
        assert "no thread can be started (can't start new thread)" in told.get(timeout=SECONDS)
    start_thread(lambda: told.put("ran again"), name="aside", failed=lambda error: told.put(str(error)))
    assert told.get(timeout=SECONDS) == "ran again"
