"""A peer that sends many small frames at once leaves the event loop to others in between."""

from __future__ import annotations

import asyncio
import struct

import pytest

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.http_upgrade import UpgradeRequest
from cri.streaming.httpstream.spdy_link import SpdyLink
from cri.streaming.httpstream.websocket_link import WebSocketLink

PINGS = 256 * 1024 // 12


class RecordingLink:
    """A link that keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.holders: set[object] = set()

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None:
        pass

    def hold(self, holder: object) -> None:
        self.holders.add(holder)

    def release(self, holder: object) -> None:
        self.holders.discard(holder)

    def touch(self) -> None:
        pass


async def _turns_until_released(link: RecordingLink) -> int:
    turns = 0
    async with asyncio.timeout(60):
        while link.holders:
            turns += 1
            await asyncio.sleep(0)
    return turns


async def test_spdy_pings_are_answered_in_many_turns_and_in_order() -> None:
    link = RecordingLink()
    spdy = SpdyLink(link, lambda channel: False, pytest.fail, 10)
    spdy.receive(b"".join(frames.ping(2 * number + 1) for number in range(PINGS)))
    assert link.holders
    assert len(link.written) < PINGS * 12 // 2
    spdy.receive(frames.ping(0x7FFFFFFF))  # handled behind those that wait
    assert await _turns_until_released(link) > 2
    answers = [struct.unpack_from(">I", link.written, start + 8)[0] for start in range(0, len(link.written), 12)]
    assert answers == [*(2 * number + 1 for number in range(PINGS)), 0x7FFFFFFF]


async def test_a_goodbye_drops_what_waits() -> None:
    link = RecordingLink()
    spdy = SpdyLink(link, lambda channel: False, pytest.fail, 10)
    spdy.receive(b"".join(frames.ping(2 * number + 1) for number in range(PINGS)))
    spdy.go_away()
    await _turns_until_released(link)
    assert len(link.written) < PINGS * 12 // 2


async def test_websocket_pings_are_answered_in_many_turns() -> None:
    link = RecordingLink()
    websocket = WebSocketLink(link, lambda data, begins, ends: None, pytest.fail)
    headers = (
        ("Host", "node"),
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    )
    websocket.accept(UpgradeRequest("GET", "/exec/token", "/exec/token", "websocket", headers), None)
    link.written.clear()
    websocket.receive(bytes.fromhex("89 80 00000000") * PINGS)
    assert link.holders
    assert len(link.written) < PINGS * 2 // 2
    assert await _turns_until_released(link) > 2
    assert link.written == bytes.fromhex("8a 00") * PINGS
