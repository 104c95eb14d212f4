from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from host.concurrency.threads import acquired, in_fresh_thread, in_image_thread


async def test_the_caller_gets_what_was_made() -> None:
    released: list[int] = []
    assert await acquired(in_image_thread, lambda: 7, released.append) == 7
    assert released == []


@pytest.mark.parametrize("run", [in_image_thread, in_fresh_thread])
async def test_what_a_cancelled_caller_never_gets_is_released(run: Callable[..., Awaitable[int]]) -> None:
    begun, go_on = threading.Event(), threading.Event()
    released: list[int] = []

    def work() -> int:
        begun.set()
        go_on.wait(10)
        return 7

    call = asyncio.create_task(acquired(run, work, released.append))
    await asyncio.to_thread(begun.wait, 10)
    call.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert released == [7]


async def test_an_error_of_the_work_releases_nothing() -> None:
    released: list[int] = []
    with pytest.raises(ZeroDivisionError):
        await acquired(in_image_thread, lambda: 1 // 0, released.append)
    assert released == []
