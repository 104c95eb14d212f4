from __future__ import annotations

import asyncio

import pytest

from network.rwlock import Gate


async def test_many_pass_while_it_is_open_and_none_while_it_is_closed() -> None:
    gate = Gate()
    inside, most, alone = 0, 0, []

    async def part() -> None:
        nonlocal inside, most
        async with gate.passing():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            inside -= 1

    async def whole() -> None:
        async with gate.closed():
            alone.append(inside)
            await asyncio.sleep(0)
            alone.append(inside)

    await asyncio.gather(*(part() if number % 5 else whole() for number in range(50)))
    assert most > 1
    assert len(alone) == 20
    assert set(alone) == {0}


async def test_a_cancelled_closer_opens_it_again() -> None:
    gate = Gate()
    async with gate.passing():
        closer = asyncio.create_task(gate.closed().__aenter__())
        await asyncio.sleep(0)
        closer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closer
    async with asyncio.timeout(1), gate.passing():
        pass
    async with asyncio.timeout(1), gate.closed():
        pass
