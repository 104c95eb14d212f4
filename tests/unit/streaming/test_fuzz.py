"""Bytes of any kind into the protocol machines: errors are events, never exceptions, and nothing grows.

The seconds of ``PODKEEL_FUZZ_SECONDS`` (default 2) are shared by the targets.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.http_upgrade import HttpError, HttpUpgrade
from cri.streaming.httpstream.spdy_events import SessionFailed
from cri.streaming.httpstream.spdy_session import SpdyLimits, SpdySession
from cri.streaming.httpstream.websocket_link import ChannelSocket
from tests.support.fuzz import changed, seconds
from tests.unit.streaming.test_websocket import VERSION, MemoryLink, request

RECORDINGS = Path(__file__).parents[2] / "data" / "streams"
SECONDS = seconds(2)


def in_pieces(generator: random.Random, data: bytes) -> list[bytes]:
    pieces = []
    while data:
        size = generator.choice((1, 2, 7, 64, 1000, len(data)))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def spdy(generator: random.Random, data: bytes) -> None:
    session = SpdySession(client=bool(generator.randrange(2)), limits=SpdyLimits(streams=8))
    failed = False
    for piece in in_pieces(generator, data):
        for event in session.receive(piece):
            assert not failed, "nothing is understood after a failure"
            failed = isinstance(event, SessionFailed)
            stream_id = getattr(event, "stream_id", 0)
            action = generator.randrange(4)
            if action == 0:
                session.reply(stream_id)
            elif action == 1:
                session.data(stream_id, bytes(session.reserve(stream_id, 10)), fin=bool(generator.randrange(2)))
            elif action == 2:
                session.consumed(stream_id, 40_000)
        assert session.open_streams <= 8
    session.go_away()
    assert session.open_streams == 0
    list(frames.FrameParser(1 << 20).feed(session.take_output()))


def http(generator: random.Random, data: bytes) -> None:
    upgrade = HttpUpgrade()
    try:
        for piece in in_pieces(generator, data):
            if upgrade.receive(piece) is not None:
                return
    except HttpError as error:
        assert 400 <= error.status < 600
        upgrade.refuse(error)


def websocket(generator: random.Random, data: bytes) -> None:
    link = MemoryLink()
    closed: list[str] = []
    sockets = ChannelSocket(link, closed.append, use_base64=bool(generator.randrange(2)), closes=True)
    sockets.accept(request(VERSION), None)
    sockets.open(0)
    for piece in in_pieces(generator, data):
        sockets.receive(piece)
    assert len(closed) <= 1


def websocket_seeds() -> list[bytes]:
    from wsproto.connection import CLIENT, Connection
    from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage

    events: list[Event] = [
        BytesMessage(data=b"\0hello"),
        BytesMessage(data=b"\0" + bytes(300), message_finished=False),
        TextMessage(data="0aGVsbG8="),
        BytesMessage(data=b"\xff\0"),
        Ping(payload=b"p"),
    ]
    client = Connection(CLIENT)
    whole = b""
    for event in events:
        whole += Connection(CLIENT).send(event)
    return [whole, whole + client.send(CloseConnection(code=1000))]


def recorded(part: int) -> list[bytes]:
    paths = sorted(RECORDINGS.glob("*.c2s.bin"))
    parts = [path.read_bytes()[:4000].split(b"\r\n\r\n", 1) for path in paths]
    return [pieces[part] + (b"\r\n\r\n" if part == 0 else b"") for pieces in parts if pieces[part]]


@pytest.mark.parametrize(
    ("target", "seeds"),
    [(spdy, lambda: recorded(1)), (http, lambda: recorded(0)), (websocket, websocket_seeds)],
    ids=["spdy", "http", "websocket"],
)
async def test_mutated_bytes(target: Callable[[random.Random, bytes], None], seeds: Callable[[], list[bytes]]) -> None:
    corpus = seeds()
    for seed in corpus:
        target(random.Random(1), seed)
    end = time.monotonic() + SECONDS / 3
    number = random.SystemRandom().randrange(1 << 48)
    tries = 0
    while time.monotonic() < end:
        generator = random.Random(number + tries)
        data = changed(generator, generator.choice(corpus))
        try:
            target(generator, data)
        except Exception as error:
            raise AssertionError(f"random seed {number + tries}, bytes {data.hex()}") from error
        tries += 1
    print(f"{tries} inputs")  # shown by -rP
    assert tries > 10
