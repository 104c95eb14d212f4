"""One end of a SPDY/3.1 session as a protocol machine: bytes in, events and bytes out, no I/O and no clock."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

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
from cri.streaming.httpstream.spdy_frames import ControlFrame, DataChunk, SpdyError

DEFAULT_WINDOW = 64 * 1024
MAX_WINDOW = 0x7FFFFFFF
MAX_DATA_FRAME = 64 * 1024


@dataclass(frozen=True, slots=True)
class SpdyLimits:
    """Limits for a peer: open streams, bytes of a control frame, and bytes of an unpacked header block."""

    streams: int = 2000
    control_frame: int = 64 * 1024
    header_block: int = 64 * 1024


class _Keeping(Enum):
    """Whether the peer uses flow control windows: many clients never send a WINDOW_UPDATE."""

    UNKNOWN = auto()
    YES = auto()
    NO = auto()


class _Stream:
    __slots__ = ("local_open", "receive_debt", "remote_open", "replied", "send_window")

    def __init__(self, send_window: int, *, local_open: bool, remote_open: bool) -> None:
        self.send_window = send_window
        self.receive_debt = 0
        self.local_open = local_open
        self.remote_open = remote_open
        self.replied = False


class SpdySession:
    """Streams, windows and limits of one end.

    Send windows are kept for a peer that shows it keeps them, by a WINDOW_UPDATE or an initial window in SETTINGS. The
    clients of remote commands never do and would wait for ever, so when the first window is used up a PING is sent; a
    peer that answers it without having granted anything keeps no windows, and only the transport holds us back then.
    """

    def __init__(self, *, client: bool, limits: SpdyLimits | None = None) -> None:
        self._client = client
        self._limits = limits or SpdyLimits()
        self._waiting = frames.FrameQueue(self._limits.control_frame)
        self._compressor: frames.HeaderCompressor | None = None
        self._decompressor = frames.HeaderDecompressor(self._limits.header_block)
        self._streams: dict[int, _Stream] = {}
        self._output: list[bytes] = []
        self._events: list[Event] = []
        self._next_stream_id = 1 if client else 2
        self._last_peer_stream_id = 0
        self._next_ping = 1 if client else 2
        self._probe: int | None = None
        self._initial_send_window = DEFAULT_WINDOW
        self._session_send_window = DEFAULT_WINDOW
        self._session_receive_debt = 0
        self._stream_windows = _Keeping.UNKNOWN
        self._session_window = _Keeping.UNKNOWN
        self._going_away = False
        self._failed = False

    # ---- receiving

    def receive(self, data: bytes, most: int | None = None) -> list[Event]:
        """Take bytes of the peer in any pieces; returns what their first ``most`` frames mean, in order.

        ``has_more`` says whether bytes are left for the next call, which may bring no others.
        """
        if self._failed:
            return []
        if data:
            self._waiting.add(data)
        try:
            taken = 0
            while (most is None or taken < most) and (frame := self._waiting.next()) is not None:
                taken += 1
                if isinstance(frame, DataChunk):
                    self._on_data(frame)
                else:
                    self._on_control(frame)
        except (SpdyError, struct.error) as error:
            self._failed = True
            self._waiting.clear()
            self._output.append(frames.goaway(self._last_peer_stream_id, frames.GOAWAY_PROTOCOL_ERROR))
            self._events.append(SessionFailed(str(error)))
        events, self._events = self._events, []
        return events

    @property
    def has_more(self) -> bool:
        """Whether bytes that ``receive`` took are not processed yet."""
        return bool(self._waiting)

    def take_output(self) -> bytes:
        """The bytes that are to be sent now."""
        output, self._output = self._output, []
        return b"".join(output)

    def _on_data(self, chunk: DataChunk) -> None:
        self._session_receive_debt += len(chunk.data)
        if self._session_receive_debt >= DEFAULT_WINDOW // 2:
            # Streams bound what is held; the session's window only says that the bytes arrived.
            self._output.append(frames.window_update(0, self._session_receive_debt))
            self._session_receive_debt = 0
        stream = self._streams.get(chunk.stream_id)
        if stream is None:
            if not self._was_opened(chunk.stream_id):
                self._output.append(frames.rst_stream(chunk.stream_id, frames.INVALID_STREAM))
        elif not stream.remote_open:
            self._fail_stream(chunk.stream_id, frames.STREAM_ALREADY_CLOSED)
        elif not stream.replied and self._is_ours(chunk.stream_id):
            self._fail_stream(chunk.stream_id, frames.PROTOCOL_ERROR)
        else:
            self._events.append(DataReceived(chunk.stream_id, chunk.data, chunk.fin))
            if chunk.fin:
                self._close_remote(chunk.stream_id, stream)

    def _on_control(self, frame: ControlFrame) -> None:
        if frame.version != frames.VERSION:
            raise SpdyError(f"frame of SPDY version {frame.version}, not {frames.VERSION}")
        handler = {
            frames.SYN_STREAM: self._on_syn_stream,
            frames.SYN_REPLY: self._on_syn_reply,
            frames.RST_STREAM: self._on_rst_stream,
            frames.SETTINGS: self._on_settings,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.HEADERS: self._on_headers,
            frames.WINDOW_UPDATE: self._on_window_update,
        }.get(frame.kind)
        if handler is not None:  # the draft has unknown control frames ignored
            handler(frame)

    def _on_syn_stream(self, frame: ControlFrame) -> None:
        stream_id = struct.unpack_from(">IIH", frame.payload)[0] & frames.MAX_STREAM_ID
        headers = self._decompressor.decompress(frame.payload[10:])
        if self._is_ours(stream_id) or stream_id < self._last_peer_stream_id or stream_id == 0:
            raise SpdyError(f"stream {stream_id} opened after stream {self._last_peer_stream_id}")
        if stream_id == self._last_peer_stream_id:
            self._fail_stream(stream_id, frames.PROTOCOL_ERROR)
            return
        if self._going_away:
            return
        self._last_peer_stream_id = stream_id
        if headers is None:
            self._output.append(frames.rst_stream(stream_id, frames.PROTOCOL_ERROR))
        elif len(self._streams) >= self._limits.streams:
            self._output.append(frames.rst_stream(stream_id, frames.REFUSED_STREAM))
        else:
            fin = bool(frame.flags & frames.FLAG_FIN)
            one_way = bool(frame.flags & frames.FLAG_UNIDIRECTIONAL)
            self._streams[stream_id] = _Stream(self._initial_send_window, local_open=not one_way, remote_open=not fin)
            self._events.append(StreamOpened(stream_id, headers, fin))

    def _on_syn_reply(self, frame: ControlFrame) -> None:
        stream_id = struct.unpack_from(">I", frame.payload)[0] & frames.MAX_STREAM_ID
        headers = self._decompressor.decompress(frame.payload[4:])
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.replied or headers is None or not self._is_ours(stream_id):
            self._fail_stream(stream_id, frames.STREAM_IN_USE if stream.replied else frames.PROTOCOL_ERROR)
            return
        stream.replied = True
        fin = bool(frame.flags & frames.FLAG_FIN)
        self._events.append(StreamReplied(stream_id, headers, fin))
        if fin:
            self._close_remote(stream_id, stream)

    def _on_headers(self, frame: ControlFrame) -> None:
        stream_id = struct.unpack_from(">I", frame.payload)[0] & frames.MAX_STREAM_ID
        headers = self._decompressor.decompress(frame.payload[4:])
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if headers is None or not stream.remote_open:
            self._fail_stream(stream_id, frames.PROTOCOL_ERROR)
        elif frame.flags & frames.FLAG_FIN:
            self._events.append(DataReceived(stream_id, b"", True))
            self._close_remote(stream_id, stream)

    def _on_rst_stream(self, frame: ControlFrame) -> None:
        stream_id, status = struct.unpack(">II", frame.payload)
        if self._streams.pop(stream_id & frames.MAX_STREAM_ID, None) is not None:
            self._events.append(StreamReset(stream_id & frames.MAX_STREAM_ID, status))

    def _on_settings(self, frame: ControlFrame) -> None:
        (count,) = struct.unpack_from(">I", frame.payload)
        if len(frame.payload) != 4 + 8 * count:
            raise SpdyError(f"SETTINGS of {count} entries in {len(frame.payload)} bytes")
        for position in range(4, len(frame.payload), 8):
            name, value = struct.unpack_from(">II", frame.payload, position)
            if name & 0xFFFFFF == frames.SETTINGS_INITIAL_WINDOW_SIZE:
                self._set_initial_send_window(value)

    def _set_initial_send_window(self, value: int) -> None:
        if value > MAX_WINDOW:
            raise SpdyError(f"initial window of {value} bytes")
        if self._stream_windows is _Keeping.UNKNOWN:
            self._stream_windows = _Keeping.YES
        for stream in self._streams.values():
            stream.send_window += value - self._initial_send_window
        self._initial_send_window = value
        self._events.append(WindowGrown(0))

    def _on_ping(self, frame: ControlFrame) -> None:
        (identifier,) = struct.unpack(">I", frame.payload)
        if self._is_ours(identifier):
            if identifier == self._probe:
                self.stop_waiting_for_windows()
                self._events.append(WindowGrown(0))
            self._events.append(PingAnswered(identifier))
        else:
            self._output.append(frames.ping(identifier))

    def _on_goaway(self, frame: ControlFrame) -> None:
        last_stream_id, status = struct.unpack(">II", frame.payload)
        self._events.append(WentAway(last_stream_id & frames.MAX_STREAM_ID, status))

    def _on_window_update(self, frame: ControlFrame) -> None:
        stream_id, delta = struct.unpack(">II", frame.payload)
        stream_id &= frames.MAX_STREAM_ID
        delta &= MAX_WINDOW
        if stream_id == 0:
            if self._session_window is _Keeping.UNKNOWN:
                self._session_window = _Keeping.YES
            self._session_send_window += delta
            if delta == 0 or self._session_send_window > MAX_WINDOW:
                raise SpdyError(f"session window grown by {delta} to {self._session_send_window} bytes")
        else:
            if self._stream_windows is _Keeping.UNKNOWN:
                self._stream_windows = _Keeping.YES
            stream = self._streams.get(stream_id)
            if stream is None:
                return
            stream.send_window += delta
            if delta == 0 or stream.send_window > MAX_WINDOW:
                self._fail_stream(stream_id, frames.FLOW_CONTROL_ERROR)
                return
        self._events.append(WindowGrown(stream_id))

    # ---- sending

    def open_stream(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """Open a stream of ours and return its id."""
        stream_id = self._next_stream_id
        self._next_stream_id += 2
        self._streams[stream_id] = _Stream(self._initial_send_window, local_open=not fin, remote_open=True)
        self._output.append(frames.syn_stream(stream_id, self._compress(headers), fin=fin))
        return stream_id

    def reply(self, stream_id: int, headers: Mapping[str, str] | None = None) -> None:
        """Accept a stream of the peer; nothing when it is gone already."""
        if stream_id in self._streams:
            self._streams[stream_id].replied = True
            self._output.append(frames.syn_reply(stream_id, self._compress(headers or {})))

    def reserve(self, stream_id: int, wanted: int) -> int:
        """How many of ``wanted`` bytes may be sent on the stream now; 0 until a WindowGrown or its reset."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.local_open:
            return 0
        allowed = wanted
        unknown = False
        if self._stream_windows is not _Keeping.NO and stream.send_window < allowed:
            allowed, unknown = stream.send_window, self._stream_windows is _Keeping.UNKNOWN
        if self._session_window is not _Keeping.NO and self._session_send_window < allowed:
            allowed, unknown = self._session_send_window, self._session_window is _Keeping.UNKNOWN
        if allowed <= 0 and unknown and self._probe is None:
            self._probe = self.ping()
        return max(0, allowed)

    def data(self, stream_id: int, payload: bytes | memoryview, *, fin: bool = False) -> list[bytes | memoryview]:
        """The frames that carry ``payload``, charged to the windows; [] when our side of the stream is closed."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.local_open:
            return []
        stream.send_window -= len(payload)
        self._session_send_window -= len(payload)
        buffers: list[bytes | memoryview] = []
        view = memoryview(payload)
        for start in range(0, len(view), MAX_DATA_FRAME):
            piece = view[start : start + MAX_DATA_FRAME]
            last = start + MAX_DATA_FRAME >= len(view)
            buffers += (frames.data_header(stream_id, len(piece), fin=fin and last), piece)
        if fin:
            if not buffers:
                buffers.append(frames.data_header(stream_id, 0, fin=True))
            stream.local_open = False
            self._forget_if_closed(stream_id, stream)
        return buffers

    def consumed(self, stream_id: int, count: int) -> None:
        """Data of the peer was used: grant as much again, in steps of half a window."""
        stream = self._streams.get(stream_id)
        if stream is None or not stream.remote_open:
            return
        stream.receive_debt += count
        if stream.receive_debt >= DEFAULT_WINDOW // 2:
            self._output.append(frames.window_update(stream_id, stream.receive_debt))
            stream.receive_debt = 0

    def reset(self, stream_id: int, status: int = frames.CANCEL) -> None:
        """End a stream in both directions; nothing when it is gone already."""
        if self._streams.pop(stream_id, None) is not None:
            self._output.append(frames.rst_stream(stream_id, status))

    def ping(self) -> int:
        """Send a PING and return its id."""
        identifier = self._next_ping
        self._next_ping = self._next_ping + 2 & 0xFFFFFFFF
        self._output.append(frames.ping(identifier))
        return identifier

    def send_settings(self, entries: Mapping[int, int]) -> None:
        """Send settings to the peer, by id."""
        self._output.append(frames.settings(entries))

    def go_away(self, status: int = frames.GOAWAY_OK) -> None:
        """Reset open streams and send GOAWAY: no further stream is accepted."""
        for stream_id in list(self._streams):
            self.reset(stream_id)
        if not self._going_away and not self._failed:
            self._output.append(frames.goaway(self._last_peer_stream_id, status))
        self._going_away = True

    def stop_waiting_for_windows(self) -> None:
        """Treat a peer that has sent no WINDOW_UPDATE as one that uses no windows."""
        if self._stream_windows is _Keeping.UNKNOWN:
            self._stream_windows = _Keeping.NO
        if self._session_window is _Keeping.UNKNOWN:
            self._session_window = _Keeping.NO

    @property
    def open_streams(self) -> int:
        """Streams that are not closed in both directions."""
        return len(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """Whether we may still send on the stream."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.local_open

    # ---- bookkeeping

    def _compress(self, headers: Mapping[str, str]) -> bytes:
        if self._compressor is None:
            self._compressor = frames.HeaderCompressor()
        return self._compressor.compress(headers)

    def _is_ours(self, identifier: int) -> bool:
        return identifier % 2 == self._client

    def _was_opened(self, stream_id: int) -> bool:
        if self._is_ours(stream_id):
            return stream_id < self._next_stream_id
        return 0 < stream_id <= self._last_peer_stream_id

    def _fail_stream(self, stream_id: int, status: int) -> None:
        self._output.append(frames.rst_stream(stream_id, status))
        if self._streams.pop(stream_id, None) is not None:
            self._events.append(StreamReset(stream_id, status))

    def _close_remote(self, stream_id: int, stream: _Stream) -> None:
        stream.remote_open = False
        self._forget_if_closed(stream_id, stream)

    def _forget_if_closed(self, stream_id: int, stream: _Stream) -> None:
        if not stream.local_open and not stream.remote_open:
            self._streams.pop(stream_id, None)
