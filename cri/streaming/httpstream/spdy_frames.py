"""SPDY/3.1 on the wire: frames in both directions and their compressed header blocks, without any I/O.

Follows the SPDY protocol draft 3 with the session-wide flow control of 3.1.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

VERSION = 3
FLAG_FIN = 0x01
FLAG_UNIDIRECTIONAL = 0x02

SYN_STREAM = 1
SYN_REPLY = 2
RST_STREAM = 3
SETTINGS = 4
PING = 6
GOAWAY = 7
HEADERS = 8
WINDOW_UPDATE = 9

# Status codes of RST_STREAM.
PROTOCOL_ERROR = 1
INVALID_STREAM = 2
REFUSED_STREAM = 3
CANCEL = 5
FLOW_CONTROL_ERROR = 7
STREAM_IN_USE = 8
STREAM_ALREADY_CLOSED = 9

# Status codes of GOAWAY.
GOAWAY_OK = 0
GOAWAY_PROTOCOL_ERROR = 1

SETTINGS_INITIAL_WINDOW_SIZE = 7

HEADER_SIZE = 8
MAX_STREAM_ID = 0x7FFFFFFF
MAX_FRAME_LENGTH = 0xFFFFFF

# The order of the words is the draft's; both sides must seed their zlib streams with exactly these bytes.
_HEADER_NAMES = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status"
)
_DICTIONARY_NAMES = (
    *_HEADER_NAMES.split(),
    *("200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin"),
)
_DICTIONARY_TAIL = (
    b"100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    b"203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    b"403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    b"Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    b"chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    b"text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(name)) + name.encode() for name in _DICTIONARY_NAMES) + _DICTIONARY_TAIL

_WORDS = struct.Struct(">II")
_WORD = struct.Struct(">I")


class SpdyError(Exception):
    """The peer broke the protocol in a way that ends the whole session."""


@dataclass(frozen=True, slots=True)
class ControlFrame:
    """A whole control frame: its type, flags and payload."""

    version: int
    kind: int
    flags: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class DataChunk:
    """Bytes of a data frame as far as they arrived; the last ones of a frame that ends its stream have ``fin``."""

    stream_id: int
    data: bytes
    fin: bool


class FrameParser:
    """Cuts a byte stream into control frames and pieces of data frames; never holds back data bytes."""

    def __init__(self, max_control_length: int) -> None:
        self._max_control_length = max_control_length
        self._partial = bytearray()
        self._stream_id = 0
        self._data_left = 0
        self._fin = False

    def feed(self, data: bytes) -> Iterator[ControlFrame | DataChunk]:
        """The frames that ``data`` completes, in order; raises SpdyError for a control frame over the limit."""
        view = memoryview(data)
        position = 0
        while position < len(view):
            if self._data_left:
                end = min(position + self._data_left, len(view))
                self._data_left -= end - position
                yield DataChunk(self._stream_id, bytes(view[position:end]), self._fin and not self._data_left)
                position = end
                continue
            wanted = self._frame_size() - len(self._partial)
            self._partial += view[position : position + wanted]
            position += wanted
            if len(self._partial) == self._frame_size():
                frame = self._complete()
                if frame is not None:
                    yield frame

    def _frame_size(self) -> int:
        """Bytes of the frame being gathered: all of a control frame, only the header of a data frame."""
        if len(self._partial) < HEADER_SIZE:
            return HEADER_SIZE
        first, second = _WORDS.unpack_from(self._partial)
        length = int(second & MAX_FRAME_LENGTH)
        if not first >> 31:
            return HEADER_SIZE
        if length > self._max_control_length:
            raise SpdyError(f"control frame of {length} bytes is over the limit of {self._max_control_length}")
        return HEADER_SIZE + length

    def _complete(self) -> ControlFrame | DataChunk | None:
        first, second = _WORDS.unpack_from(self._partial)
        payload = bytes(self._partial[HEADER_SIZE:])
        self._partial.clear()
        if first >> 31:
            return ControlFrame((first >> 16) & 0x7FFF, first & 0xFFFF, second >> 24, payload)
        self._stream_id = first
        self._data_left = second & MAX_FRAME_LENGTH
        self._fin = bool(second >> 24 & FLAG_FIN)
        return None if self._data_left else DataChunk(first, b"", self._fin)


class FrameQueue:
    """Bytes of a peer whose frames are taken one by one; true while any may be left."""

    def __init__(self, max_control_length: int) -> None:
        self._parser = FrameParser(max_control_length)
        self._waiting: deque[Iterator[ControlFrame | DataChunk]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, data: bytes) -> None:
        """Bytes behind all others."""
        self._waiting.append(self._parser.feed(data))

    def next(self) -> ControlFrame | DataChunk | None:
        """The next frame, None if all are taken; raises SpdyError for a control frame over the limit."""
        while self._waiting:
            frame = next(self._waiting[0], None)
            if frame is not None:
                return frame
            self._waiting.popleft()
        return None

    def clear(self) -> None:
        """Drop what is left."""
        self._waiting.clear()


class HeaderCompressor:
    """The zlib stream of one direction, compressing; one per session, used for every header block in order."""

    def __init__(self) -> None:
        # A small window is enough for these short blocks and keeps a session a few KiB instead of 256 KiB.
        self._zlib = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, 11, 1, zdict=DICTIONARY)

    def compress(self, headers: Mapping[str, str]) -> bytes:
        """One header block; names are written in lower case."""
        block = bytearray(_WORD.pack(len(headers)))
        for name, value in headers.items():
            for text in (name.lower().encode("latin-1"), value.encode("latin-1")):
                block += _WORD.pack(len(text)) + text
        return self._zlib.compress(bytes(block)) + self._zlib.flush(zlib.Z_SYNC_FLUSH)


class HeaderDecompressor:
    """The zlib stream of one direction, decompressing; blocks over ``max_length`` bytes end the session."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._zlib = zlib.decompressobj(zdict=DICTIONARY)

    def decompress(self, block: bytes) -> dict[str, str] | None:
        """The headers of one block, names in lower case, the values of a repeated header joined by commas.

        None when the names in it are empty or repeated, which is an error of its stream alone.
        Raises SpdyError when the zlib stream is broken or the block malformed or too large.
        """
        try:
            text = self._zlib.decompress(block, self._max_length + 1)
        except zlib.error as error:
            raise SpdyError(f"header block does not decompress: {error}") from error
        if self._zlib.eof:
            raise SpdyError("header block ends the zlib stream that the next ones need")
        if len(text) > self._max_length or self._zlib.unconsumed_tail:
            raise SpdyError(f"header block is over the limit of {self._max_length} bytes")
        return _parse_header_block(text)


def _parse_header_block(text: bytes) -> dict[str, str] | None:
    headers: dict[str, str] = {}
    valid = True
    try:
        count = int(_WORD.unpack_from(text)[0])
        position = _WORD.size
        for _ in range(count):
            name, position = _take_string(text, position)
            value, position = _take_string(text, position)
            key = name.decode("latin-1").lower()
            valid = valid and bool(key) and key not in headers
            headers[key] = value.replace(b"\0", b",").decode("latin-1")
    except struct.error as error:
        raise SpdyError("header block ends early") from error
    if position != len(text):
        raise SpdyError("header block has bytes after its last header")
    return headers if valid else None


def _take_string(text: bytes, position: int) -> tuple[bytes, int]:
    (length,) = _WORD.unpack_from(text, position)
    start = position + _WORD.size
    if start + length > len(text):
        raise SpdyError("header block ends early")
    return text[start : start + length], start + length


def control_frame(kind: int, flags: int, payload: bytes) -> bytes:
    """A control frame of this version."""
    return _WORDS.pack(0x80000000 | VERSION << 16 | kind, flags << 24 | len(payload)) + payload


def data_header(stream_id: int, length: int, *, fin: bool) -> bytes:
    """The header of a data frame whose payload of ``length`` bytes follows."""
    return _WORDS.pack(stream_id, (FLAG_FIN << 24 if fin else 0) | length)


def syn_stream(stream_id: int, block: bytes, *, fin: bool = False) -> bytes:
    """SYN_STREAM with no associated stream, priority and slot 0; ``block`` is its compressed headers."""
    return control_frame(SYN_STREAM, FLAG_FIN if fin else 0, struct.pack(">IIH", stream_id, 0, 0) + block)


def syn_reply(stream_id: int, block: bytes, *, fin: bool = False) -> bytes:
    """SYN_REPLY with compressed headers."""
    return control_frame(SYN_REPLY, FLAG_FIN if fin else 0, _WORD.pack(stream_id) + block)


def rst_stream(stream_id: int, status: int) -> bytes:
    """RST_STREAM with one of the status codes above."""
    return control_frame(RST_STREAM, 0, _WORDS.pack(stream_id, status))


def settings(entries: Mapping[int, int]) -> bytes:
    """SETTINGS with values by id, none of them to be persisted."""
    body = b"".join(_WORDS.pack(name, value) for name, value in entries.items())
    return control_frame(SETTINGS, 0, _WORD.pack(len(entries)) + body)


def ping(identifier: int) -> bytes:
    """PING, or the answer to one."""
    return control_frame(PING, 0, _WORD.pack(identifier))


def goaway(last_stream_id: int, status: int) -> bytes:
    """GOAWAY naming the last stream of the peer that was accepted."""
    return control_frame(GOAWAY, 0, _WORDS.pack(last_stream_id, status))


def window_update(stream_id: int, delta: int) -> bytes:
    """WINDOW_UPDATE for one stream, or for the session with stream id 0."""
    return control_frame(WINDOW_UPDATE, 0, _WORDS.pack(stream_id, delta))
