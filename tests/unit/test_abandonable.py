"""Work that may hang is given up without it, and changes nothing afterwards."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from host.concurrency.abandonable import AbandonableThreads, GivenUpError, OneThread, Permission
from host.errors import UnavailableError


async def test_results_and_errors_come_back() -> None:
    threads = AbandonableThreads(1)
    assert await threads.run("test", lambda permission: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await threads.run("test", lambda permission: 1 // 0)


async def test_one_thread_does_several_pieces_of_work_and_ends() -> None:
    threads = AbandonableThreads(1)
    with OneThread() as thread:
        first = await threads.run("test", lambda permission: threading.current_thread(), thread.begin)
        with pytest.raises(ZeroDivisionError):
            await threads.run("test", lambda permission: 1 // 0, thread.begin)
        assert await threads.run("test", lambda permission: threading.current_thread(), thread.begin) is first
    await asyncio.to_thread(first.join, 60)
    assert not first.is_alive()


async def test_hanging_work_is_left_behind_and_does_no_further_step() -> None:
    threads = AbandonableThreads(1)
    answers, began = threading.Event(), threading.Event()
    done: list[str] = []

    def work(permission: Permission) -> None:
        with permission.step():
            done.append("first")
        began.set()
        answers.wait()
        try:
            with permission.step():
                done.append("second")
        except GivenUpError:
            done.append("given up")

    task = asyncio.create_task(threads.run("container x", work))
    await asyncio.to_thread(began.wait)
    task.cancel()
    begin = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begin < 60  # the abandoned work never ends
    with pytest.raises(UnavailableError, match="container y: 1 earlier calls hang"):
        await threads.run("container y", lambda permission: None)
    answers.set()
    async with asyncio.timeout(60):
        while True:
            try:
                assert await threads.run("container y", lambda permission: 3) == 3
                break
            except UnavailableError:
                await asyncio.sleep(0.01)
    assert done == ["first", "given up"]


async def test_a_step_that_began_is_waited_for() -> None:
    threads = AbandonableThreads(1)
    goes_on, began = threading.Event(), threading.Event()
    done: list[str] = []

    def work(permission: Permission) -> None:
        with permission.step():
            began.set()
            goes_on.wait()
            done.append("made")

    task = asyncio.create_task(threads.run("test", work))
    await asyncio.to_thread(began.wait)
    task.cancel()
    await asyncio.wait({task}, timeout=1.5)
    assert not task.done()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["made"]
