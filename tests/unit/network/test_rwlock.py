from __future__ import annotations

import asyncio

import pytest

from network.rwlock import RWLock


async def test_readers_share_the_lock_and_a_writer_is_alone() -> None:
    lock = RWLock()
    inside, most, alone = 0, 0, []

    async def part() -> None:
        nonlocal inside, most
        async with lock.reading():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            inside -= 1

    async def whole() -> None:
        async with lock.writing():
            alone.append(inside)
            await asyncio.sleep(0)
            alone.append(inside)

    await asyncio.gather(*(part() if number % 5 else whole() for number in range(50)))
    assert most > 1
    assert len(alone) == 20
    assert set(alone) == {0}


async def test_readers_continue_after_a_writer_is_cancelled() -> None:
    lock = RWLock()
    async with lock.reading():
        closer = asyncio.create_task(lock.writing().__aenter__())
        await asyncio.sleep(0)
        closer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closer
    async with asyncio.timeout(60), lock.reading():
        pass
    async with asyncio.timeout(60), lock.writing():
        pass
