"""Work that follows changes: how often it is called, and what is still done at the end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from host.concurrency.follower import Follower
from host.concurrency.thread_starting import run_in_new_thread


class Work:
    """Counts its calls, and waits in each of them for the test."""

    def __init__(self, rest: float = 0.0) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.rest = rest

    async def __call__(self) -> float:
        self.calls += 1
        self.called.set()
        await self.goes_on.wait()
        return self.rest


async def test_changes_that_come_together_are_one() -> None:
    work, changed = Work(), asyncio.Event()
    follower = Follower(changed, 0.01, work)
    follower.start()
    for _ in range(3):
        changed.set()
        await asyncio.sleep(0)
    await work.called.wait()
    await follower.close()
    assert work.calls == 1


async def test_a_change_during_the_work_is_followed_too() -> None:
    work, changed = Work(), asyncio.Event()
    work.goes_on.clear()
    follower = Follower(changed, 0.0, work)
    follower.start()
    changed.set()
    await work.called.wait()
    work.called.clear()
    changed.set()
    work.goes_on.set()
    await work.called.wait()
    await follower.close()
    assert work.calls == 2


async def test_what_changed_last_is_followed_at_the_end_also_during_a_rest() -> None:
    work, changed = Work(rest=3600.0), asyncio.Event()
    follower = Follower(changed, 0.0, work)
    follower.start()
    changed.set()
    await work.called.wait()
    changed.set()
    await follower.close()
    assert work.calls == 2


async def test_without_a_change_nothing_is_done() -> None:
    work = Work()
    follower = Follower(asyncio.Event(), 0.0, work)
    follower.start()
    await follower.close()
    assert work.calls == 0


def test_a_separate_thread_passes_on_results_and_exceptions() -> None:
    assert run_in_new_thread(lambda: threading.current_thread().name, name="mine") == "mine"

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_in_new_thread(fail, name="mine")
