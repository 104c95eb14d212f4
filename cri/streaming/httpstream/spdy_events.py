"""The events that a SPDY session reports for the bytes of its peer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream; it waits for ``reply`` or ``reset``."""

    stream_id: int
    headers: dict[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReplied:
    """The peer accepted a stream of ours."""

    stream_id: int
    headers: dict[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of a stream; ``fin`` says that none will follow. To be answered by ``consumed`` once they are used."""

    stream_id: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """A stream ended at once, by the peer or because the peer broke the protocol on it."""

    stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class WindowGrown:
    """More may be sent on this stream, or on any with stream id 0."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """The answer to a ``ping`` of ours."""

    identifier: int


@dataclass(frozen=True, slots=True)
class WentAway:
    """The peer opens and accepts no more streams; open ones continue."""

    last_stream_id: int
    status: int


@dataclass(frozen=True, slots=True)
class SessionFailed:
    """The peer violated the protocol. The output has a GOAWAY, and further bytes are ignored."""

    message: str


Event = (
    StreamOpened | StreamReplied | DataReceived | StreamReset | WindowGrown | PingAnswered | WentAway | SessionFailed
)
