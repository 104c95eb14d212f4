from __future__ import annotations

import asyncio

import pytest

from images.joining import Joined


async def test_callers_of_the_same_key_share_one_run() -> None:
    joined: Joined[int] = Joined()
    begun = 0
    go, both = asyncio.Event(), asyncio.Event()

    async def work() -> int:
        nonlocal begun
        begun += 1
        mine = begun
        if begun == 2:
            both.set()
        await go.wait()
        return mine

    calls = [asyncio.create_task(joined.run("a", work)) for _ in range(3)]
    other = asyncio.create_task(joined.run("b", work))
    await both.wait()
    assert joined.running("a")
    calls[0].cancel()
    go.set()
    assert await asyncio.gather(*calls[1:], other) == [1, 1, 2]
    assert begun == 2
    assert not joined.running("a")
    assert await joined.run("a", work) == 3


async def test_an_error_reaches_all() -> None:
    joined: Joined[None] = Joined()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    results = await asyncio.gather(*(joined.run("a", fail) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3


async def test_the_last_to_leave_waits_for_the_clean_up_and_a_new_caller_begins_after_it() -> None:
    joined: Joined[str] = Joined()
    cleaning, cleaned, clean = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await clean.wait()
            cleaned.set()
        raise AssertionError

    async def again() -> str:
        assert cleaned.is_set()
        return "again"

    first = asyncio.create_task(joined.run("a", work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    await cleaning.wait()
    second = asyncio.create_task(joined.run("a", again))
    await asyncio.sleep(0)
    assert not first.done()
    clean.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == "again"


async def test_a_task_cancelled_before_its_first_step_is_forgotten() -> None:
    joined: Joined[int] = Joined()

    async def work() -> int:
        return 1

    call = asyncio.create_task(joined.run("a", work))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait((call,))
    assert await joined.run("a", work) == 1
