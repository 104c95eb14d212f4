"""What waits for an attached client: its order, its bounds, and how long a full one is waited for."""

from __future__ import annotations

import asyncio

from cri.streaming.backlog import Backlog


async def test_pieces_keep_their_order_and_those_of_one_stream_are_joined() -> None:
    backlog = Backlog()
    for stream, data in ((2, b"a"), (2, b"b"), (3, b"c"), (2, b"d")):
        backlog.add(stream, data)
    backlog.end()
    assert [await backlog.take() for _ in range(5)] == [
        (2, bytearray(b"ab")),
        (3, bytearray(b"c")),
        (2, bytearray(b"d")),
        None,
        None,
    ]


async def test_a_piece_stays_small() -> None:
    backlog = Backlog()
    for _ in range(100):
        backlog.add(2, bytes(8192))
    piece = await backlog.take()
    assert piece is not None
    assert len(piece[1]) == 64 * 1024


async def test_taking_waits_for_what_comes() -> None:
    backlog = Backlog()
    taking = asyncio.create_task(backlog.take())
    await asyncio.sleep(0)
    backlog.add(3, b"x")
    assert await taking == (3, bytearray(b"x"))


async def test_a_full_one_has_room_again_once_half_of_it_is_taken() -> None:
    backlog = Backlog(limit=200_000, patience=30)
    while backlog.size < 200_000:
        assert await backlog.room()
        backlog.add(2, bytes(10_000))
    waiting = asyncio.create_task(backlog.room())
    await asyncio.sleep(0)
    await backlog.take()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    await backlog.take()
    assert await waiting


async def test_clients_that_read_too_slowly_are_disconnected() -> None:
    backlog = Backlog(limit=200_000, patience=0.05)
    for _ in range(4):
        backlog.add(2, bytes(65_536))
    waiting = asyncio.create_task(backlog.room())
    await asyncio.sleep(0)
    await backlog.take()
    assert not await waiting


async def test_tiny_pieces_fill_it_too() -> None:
    backlog = Backlog(limit=100_000, patience=0.01)
    for number in range(500):
        backlog.add(2 + number % 2, b"x")
    assert not await backlog.room()
