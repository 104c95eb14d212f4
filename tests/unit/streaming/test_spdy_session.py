"""The rules of a session: streams, windows, limits and goodbyes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.spdy_events import (
    DataReceived,
    Event,
    PingAnswered,
    SessionFailed,
    StreamOpened,
    StreamReplied,
    StreamReset,
    WentAway,
    WindowGrown,
)
from cri.streaming.httpstream.spdy_session import DEFAULT_WINDOW, SpdyLimits, SpdySession


class Server:
    """A server session, and frames as a client would write them."""

    def __init__(self, limits: SpdyLimits | None = None) -> None:
        self.session = SpdySession(client=False, limits=limits)
        self.compressor = frames.HeaderCompressor()

    def open(self, stream_id: int, *, fin: bool = False) -> list[Event]:
        return self.receive(frames.syn_stream(stream_id, self.compressor.compress({"streamtype": "data"}), fin=fin))

    def receive(self, *parts: bytes) -> list[Event]:
        return self.session.receive(b"".join(parts))

    def data(self, stream_id: int, data: bytes, *, fin: bool = False) -> list[Event]:
        return self.receive(frames.data_header(stream_id, len(data), fin=fin), data)

    def output(self) -> bytes:
        return self.session.take_output()


@pytest.fixture
def server() -> Server:
    return Server()


def ready(server: Server, stream_id: int = 1) -> None:
    server.open(stream_id)
    server.session.reply(stream_id)
    server.output()


def test_a_stream_from_opening_to_both_ends(server: Server) -> None:
    assert server.open(1) == [StreamOpened(1, {"streamtype": "data"}, False)]
    server.session.reply(1)
    reply = server.output()
    assert reply[:4] == bytes.fromhex("80030002")
    assert frames.HeaderDecompressor(100).decompress(reply[12:]) == {}
    assert server.data(1, b"abc") == [DataReceived(1, b"abc", False)]
    assert server.data(1, b"d", fin=True) == [DataReceived(1, b"d", True)]
    assert b"".join(server.session.data(1, b"xyz", fin=True)) == bytes.fromhex("00000001 01000003") + b"xyz"
    assert server.session.open_streams == 0
    assert server.output() == b""


def test_ping_is_answered_and_answers_are_not(server: Server) -> None:
    assert server.receive(frames.ping(1)) == []
    assert server.output() == frames.ping(1)
    assert server.session.ping() == 2
    assert server.output() == frames.ping(2)
    assert server.receive(frames.ping(2)) == [PingAnswered(2)]
    assert server.output() == b""


@pytest.mark.parametrize("stream_id", [2, 0])
def test_streams_with_our_numbers_end_the_session(server: Server, stream_id: int) -> None:
    (event,) = server.open(stream_id)
    assert isinstance(event, SessionFailed)
    assert server.output() == frames.goaway(0, frames.GOAWAY_PROTOCOL_ERROR)
    assert server.open(5) == []


def test_numbers_that_do_not_rise_end_the_session(server: Server) -> None:
    server.open(5)
    (event,) = server.open(3)
    assert isinstance(event, SessionFailed)


def test_a_number_used_twice_ends_its_stream(server: Server) -> None:
    ready(server)
    assert server.open(1) == [StreamReset(1, frames.PROTOCOL_ERROR)]
    assert server.output() == frames.rst_stream(1, frames.PROTOCOL_ERROR)


def test_too_many_streams_are_refused_and_headers_stay_in_step() -> None:
    server = Server(SpdyLimits(streams=2))
    server.open(1)
    server.open(3)
    assert server.open(5) == []
    assert server.output() == frames.rst_stream(5, frames.REFUSED_STREAM)
    server.session.reset(1)
    assert server.open(7) == [StreamOpened(7, {"streamtype": "data"}, False)]


def test_data_for_streams_that_never_were(server: Server) -> None:
    assert server.data(9, b"x") == []
    assert server.output() == frames.rst_stream(9, frames.INVALID_STREAM)


def test_data_for_streams_that_are_gone_is_dropped(server: Server) -> None:
    ready(server)
    server.session.reset(1)
    assert server.output() == frames.rst_stream(1, frames.CANCEL)
    assert server.data(1, b"x") == []
    assert server.output() == b""


def test_data_after_fin_resets_the_stream(server: Server) -> None:
    ready(server)
    server.data(1, b"", fin=True)
    assert server.data(1, b"x") == [StreamReset(1, frames.STREAM_ALREADY_CLOSED)]
    assert server.output() == frames.rst_stream(1, frames.STREAM_ALREADY_CLOSED)


def test_reset_of_the_client(server: Server) -> None:
    ready(server)
    assert server.receive(frames.rst_stream(1, frames.CANCEL)) == [StreamReset(1, frames.CANCEL)]
    assert server.session.data(1, b"late") == []
    assert not server.session.is_open(1)
    assert server.receive(frames.rst_stream(1, frames.CANCEL)) == []


def test_a_one_way_stream_cannot_be_written_to(server: Server) -> None:
    block = server.compressor.compress({})
    payload = bytes.fromhex("00000001 00000000 0000") + block
    server.receive(frames.control_frame(frames.SYN_STREAM, frames.FLAG_UNIDIRECTIONAL, payload))
    assert not server.session.is_open(1)


def test_headers_with_fin_end_the_clients_half(server: Server) -> None:
    ready(server)
    payload = bytes.fromhex("00000001") + server.compressor.compress({"a": "b"})
    events = server.receive(frames.control_frame(frames.HEADERS, frames.FLAG_FIN, payload))
    assert events == [DataReceived(1, b"", True)]


@pytest.mark.parametrize("kind", [5, 10, 11, 4000])
def test_unknown_control_frames_are_ignored(server: Server, kind: int) -> None:
    assert server.receive(frames.control_frame(kind, 0, b"whatever")) == []
    assert server.open(1) == [StreamOpened(1, {"streamtype": "data"}, False)]


def test_another_version_ends_the_session(server: Server) -> None:
    (event,) = server.receive(bytes.fromhex("80020006 00000004 00000001"))
    assert isinstance(event, SessionFailed)


@pytest.mark.parametrize(
    "frame",
    [
        frames.control_frame(frames.PING, 0, b"123"),
        frames.control_frame(frames.RST_STREAM, 0, b"1234"),
        frames.control_frame(frames.GOAWAY, 0, b""),
        frames.control_frame(frames.WINDOW_UPDATE, 0, b"1234"),
        frames.control_frame(frames.SETTINGS, 0, bytes.fromhex("00000002 00000007 00000001")),
        frames.control_frame(frames.SYN_STREAM, 0, b"1234"),
        frames.control_frame(frames.SYN_REPLY, 0, b"12"),
        frames.settings({7: 0xFFFFFFFF}),
        frames.window_update(0, 0),
        frames.window_update(0, 0x7FFFFFFF),
    ],
)
def test_malformed_frames_end_the_session(server: Server, frame: bytes) -> None:
    ready(server)
    events = server.receive(frame)
    assert isinstance(events[-1], SessionFailed)
    assert server.output().endswith(frames.goaway(1, frames.GOAWAY_PROTOCOL_ERROR))


def test_goaway_from_the_client(server: Server) -> None:
    assert server.receive(frames.goaway(0, 0)) == [WentAway(0, 0)]


def test_goaway_of_ours_resets_and_accepts_no_more(server: Server) -> None:
    ready(server)
    ready(server, 3)
    server.session.go_away()
    assert server.output() == frames.rst_stream(1, 5) + frames.rst_stream(3, 5) + frames.goaway(3, 0)
    assert server.open(5) == []
    server.session.go_away()
    assert server.output() == b""


# ---- windows


def test_received_data_is_granted_again_once_it_is_used(server: Server) -> None:
    ready(server)
    server.data(1, bytes(40_000))
    assert server.output() == frames.window_update(0, 40_000), "the session's window follows what arrived"
    server.session.consumed(1, 10_000)
    assert server.output() == b""
    server.session.consumed(1, 30_000)
    assert server.output() == frames.window_update(1, 40_000)


def test_a_client_that_grants_is_kept_to(server: Server) -> None:
    ready(server)
    server.receive(frames.settings({frames.SETTINGS_INITIAL_WINDOW_SIZE: 1000}), frames.window_update(0, 100))
    assert server.session.reserve(1, 5000) == 1000
    server.session.data(1, bytes(1000))
    assert server.session.reserve(1, 5000) == 0
    assert server.output() == b"", "nothing to find out"
    assert server.receive(frames.window_update(1, 300)) == [WindowGrown(1)]
    assert server.session.reserve(1, 5000) == 300


def test_the_sessions_window_is_shared(server: Server) -> None:
    ready(server)
    ready(server, 3)
    server.receive(frames.window_update(0, 1), frames.window_update(1, 1 << 20), frames.window_update(3, 1 << 20))
    server.session.data(1, bytes(DEFAULT_WINDOW))
    assert server.session.reserve(3, 100) == 1
    server.session.data(3, b"x")
    assert server.session.reserve(3, 100) == 0
    assert server.receive(frames.window_update(0, 50)) == [WindowGrown(0)]
    assert server.session.reserve(3, 100) == 50


def test_a_smaller_initial_window_may_leave_a_debt(server: Server) -> None:
    ready(server)
    server.session.data(1, bytes(60_000))
    server.receive(frames.settings({frames.SETTINGS_INITIAL_WINDOW_SIZE: 10_000}))
    assert server.session.reserve(1, 100) == 0
    server.receive(frames.window_update(1, 50_001))
    assert server.session.reserve(1, 100) == 1


def test_windows_over_the_maximum_reset_the_stream(server: Server) -> None:
    ready(server)
    assert server.receive(frames.window_update(1, 0x7FFFFFFF)) == [StreamReset(1, frames.FLOW_CONTROL_ERROR)]
    assert server.output() == frames.rst_stream(1, frames.FLOW_CONTROL_ERROR)


def test_a_client_that_answers_a_ping_but_grants_nothing_keeps_no_windows(server: Server) -> None:
    ready(server)
    assert server.session.reserve(1, 1 << 20) == DEFAULT_WINDOW
    server.session.data(1, bytes(DEFAULT_WINDOW))
    assert server.session.reserve(1, 1 << 20) == 0
    assert server.session.reserve(1, 1 << 20) == 0
    assert server.output() == frames.ping(2), "asked once"
    assert server.receive(frames.ping(2)) == [WindowGrown(0), PingAnswered(2)]
    assert server.session.reserve(1, 1 << 20) == 1 << 20


def test_a_grant_before_the_answer_means_that_windows_are_kept(server: Server) -> None:
    ready(server)
    server.session.data(1, bytes(DEFAULT_WINDOW))
    server.session.reserve(1, 1)
    server.receive(frames.window_update(1, 10), frames.window_update(0, 7), frames.ping(2))
    assert server.session.reserve(1, 1 << 20) == 7


def test_data_frames_stay_small(server: Server) -> None:
    ready(server)
    buffers = server.session.data(1, bytes(150_000), fin=True)
    sizes = [len(payload) for payload in buffers[1::2]]
    assert sizes == [65536, 65536, 18928]
    assert [bytes(header)[4] for header in buffers[::2]] == [0, 0, 1]


# ---- both ends


def test_a_client_hears_the_reply(server: Server) -> None:
    client = SpdySession(client=True)
    stream_id = client.open_stream({"streamType": "stdin"})
    assert server.session.receive(client.take_output()) == [StreamOpened(1, {"streamtype": "stdin"}, False)]
    server.session.reply(stream_id, {"ok": "yes"})
    assert client.receive(server.output()) == [StreamReplied(1, {"ok": "yes"}, False)]


def test_data_before_the_reply_is_an_error() -> None:
    client = SpdySession(client=True)
    client.open_stream({})
    assert client.receive(frames.data_header(1, 1, fin=False) + b"x") == [StreamReset(1, frames.PROTOCOL_ERROR)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=8), st.lists(st.integers(1, 977), min_size=1, max_size=20))
def test_round_trip_in_any_pieces(payloads: list[bytes], sizes: list[int]) -> None:
    client, server = SpdySession(client=True), SpdySession(client=False)
    stream_id = client.open_stream({"streamtype": "data", "port": "80"})
    wire = client.take_output()
    for payload in payloads:
        wire += b"".join(client.data(stream_id, payload))
    wire += b"".join(client.data(stream_id, b"", fin=True))
    events: list[Event] = []
    position = turn = 0
    while position < len(wire):
        size = sizes[turn % len(sizes)]
        events += server.receive(wire[position : position + size])
        position += size
        turn += 1
    assert events[0] == StreamOpened(1, {"streamtype": "data", "port": "80"}, False)
    received = [event for event in events[1:] if isinstance(event, DataReceived)]
    assert len(received) == len(events) - 1
    assert b"".join(event.data for event in received) == b"".join(payloads)
    assert [event.fin for event in received].count(True) == 1
    assert received[-1].fin
