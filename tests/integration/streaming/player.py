"""The recorded bytes of real clients, and a player that sends them to a server in the recorded order and pieces."""

from __future__ import annotations

import asyncio
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cri.streaming.httpstream import spdy_frames as frames
from tests.support.agent import SOON

RECORDINGS = Path(__file__).parents[2] / "data" / "streams"


@dataclass
class Answer:
    """What the server sent: the head, data by stream, resets, and whether it said goodbye."""

    head: bytes = b""
    data: dict[int, bytes] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    resets: dict[int, int] = field(default_factory=dict)
    replies: set[int] = field(default_factory=set)
    pings: list[int] = field(default_factory=list)
    last_good: int | None = None

    def status(self, stream_id: int = 1) -> dict[str, Any]:
        return dict(json.loads(self.data[stream_id]))


class Player:
    """Sends a recorded client's bytes in the recorded order and pieces, and understands the answer."""

    def __init__(self, name: str, url: str, *, changed: bytes | None = None) -> None:
        recorded = (RECORDINGS / f"{name}.c2s.bin").read_bytes() if changed is None else changed
        path = re.sub(rb"http://[^/]+", b"", url.encode())
        head, rest = recorded.split(b"\r\n\r\n", 1)
        self.head = re.sub(rb" /\S+ ", b" " + path + b" ", head, count=1) + b"\r\n\r\n"
        self.body, self.farewell = split_farewell(rest)
        lines = (RECORDINGS / f"{name}.jsonl").read_text().splitlines()
        self.pieces = [step["bytes"] for step in map(json.loads, lines) if step["side"] == "c2s"][1:]
        host, port = re.sub(r"^http://|/.*", "", url).split(":")
        self.address = (host, int(port))
        self.answer = Answer()
        self._parser = frames.FrameParser(1 << 20)

    async def play(self, *, until_stream: int | None = 1) -> Answer:
        """To the end of ``until_stream`` (None: until nothing comes for a moment), then say goodbye as recorded."""
        self.reader, self.writer = await asyncio.open_connection(*self.address)
        self.writer.write(self.head)
        self.answer.head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), SOON)
        position = 0
        for size in [*self.pieces, len(self.body)]:
            self.writer.write(self.body[position : position + size])
            position += size
            await self._take(0.005)
        async with asyncio.timeout(SOON):
            while until_stream is not None and not self._over(until_stream):
                await self._take(5)
        if until_stream is None:
            while await self._take(0.5):
                pass
        self.writer.write(self.farewell)
        while await self._take(5):
            pass
        self.writer.close()
        return self.answer

    def _over(self, stream_id: int) -> bool:
        return stream_id in self.answer.finished or stream_id in self.answer.resets

    async def _take(self, seconds: float) -> bool:
        try:
            data = await asyncio.wait_for(self.reader.read(1 << 20), seconds)
        except (TimeoutError, ConnectionError):
            return False
        for frame in self._parser.feed(data):
            self._understand(frame)
        return bool(data)

    def _understand(self, frame: frames.ControlFrame | frames.DataChunk) -> None:
        answer = self.answer
        if isinstance(frame, frames.DataChunk):
            assert frame.stream_id in answer.replies, "data before the reply is dropped by clients"
            answer.data[frame.stream_id] = answer.data.get(frame.stream_id, b"") + frame.data
            if frame.fin:
                answer.finished.add(frame.stream_id)
        elif frame.kind == frames.SYN_REPLY:
            answer.replies.add(struct.unpack_from(">I", frame.payload)[0])
        elif frame.kind == frames.RST_STREAM:
            stream_id, status = struct.unpack(">II", frame.payload)
            answer.resets[stream_id] = status
        elif frame.kind == frames.PING:
            answer.pings.append(struct.unpack(">I", frame.payload)[0])
        elif frame.kind == frames.GOAWAY:
            answer.last_good = struct.unpack(">II", frame.payload)[0]


def split_farewell(data: bytes) -> tuple[bytes, bytes]:
    """Everything up to the RST_STREAM and GOAWAY frames at the end, and these: clients send them once they are done."""
    position = farewell = 0
    while position + 8 <= len(data):
        first, second = struct.unpack_from(">II", data, position)
        position += 8 + (second & 0xFFFFFF)
        if not (first >> 31 and first & 0xFFFF in (frames.RST_STREAM, frames.GOAWAY)):
            farewell = min(position, len(data))
    return data[:farewell], data[farewell:]


def count_input(recorded: bytes, stream_id: int) -> tuple[int, int]:
    """Bytes of the stream in a cut recording, and how many its last frame still misses."""
    position = recorded.index(b"\r\n\r\n") + 4
    sent = missing = 0
    while position + 8 <= len(recorded):
        first, second = struct.unpack_from(">II", recorded, position)
        length = second & 0xFFFFFF
        there = min(length, len(recorded) - position - 8)
        if first == stream_id:
            sent += there
            missing = length - there
        position += 8 + length
    return sent, missing


def whole_input(name: str, stream_id: int, size: int) -> bytes:
    """A recording that was cut, with zero bytes added until the stream has had ``size`` bytes, and its end."""
    recorded = (RECORDINGS / f"{name}.c2s.bin").read_bytes()
    sent, missing = count_input(recorded, stream_id)
    rest = bytes(missing)
    for start in range(sent + missing, size, 32768):
        length = min(32768, size - start)
        rest += frames.data_header(stream_id, length, fin=False) + bytes(length)
    return recorded + rest + frames.data_header(stream_id, 0, fin=True)
