"""Frames byte for byte, as the SPDY draft draws them and as real clients send them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.streaming.httpstream import spdy_frames as frames
from cri.streaming.httpstream.spdy_frames import ControlFrame, DataChunk, FrameParser, SpdyError

RECORDINGS = Path(__file__).parents[2] / "data" / "streams"

# One header block by hand: a zlib header that asks for the dictionary, its checksum, one stored block, a sync flush.
PLAIN_BLOCK = bytes.fromhex("00000001 0000000a") + b"streamtype" + bytes.fromhex("00000005") + b"error"
STORED_BLOCK = (
    bytes.fromhex("78f9 e3c6a7c2 00")
    + struct.pack("<HH", len(PLAIN_BLOCK), 0xFFFF ^ len(PLAIN_BLOCK))
    + PLAIN_BLOCK
    + bytes.fromhex("00 0000 ffff")
)


def parse(data: bytes, limit: int = 1 << 16) -> list[ControlFrame | DataChunk]:
    return list(FrameParser(limit).feed(data))


def test_dictionary_is_the_drafts() -> None:
    assert len(frames.DICTIONARY) == 1423
    assert zlib.adler32(frames.DICTIONARY) == 0xE3C6A7C2
    assert frames.DICTIONARY.startswith(b"\0\0\0\x07options\0\0\0\x04head")
    assert frames.DICTIONARY.endswith(b"charset=iso-8859-1,utf-,*,enq=0.")


@pytest.mark.parametrize(
    ("built", "by_hand"),
    [
        (frames.syn_stream(1, b"BLOCK"), "80030001 0000000f 00000001 00000000 0000 424c4f434b"),
        (frames.syn_stream(3, b"", fin=True), "80030001 0100000a 00000003 00000000 0000"),
        (frames.syn_reply(1, b"BLOCK"), "80030002 00000009 00000001 424c4f434b"),
        (frames.syn_reply(5, b"", fin=True), "80030002 01000004 00000005"),
        (frames.rst_stream(7, frames.CANCEL), "80030003 00000008 00000007 00000005"),
        (frames.rst_stream(7, frames.FLOW_CONTROL_ERROR), "80030003 00000008 00000007 00000007"),
        (frames.settings({7: 65536}), "80030004 0000000c 00000001 00000007 00010000"),
        (frames.settings({4: 100, 7: 1}), "80030004 00000014 00000002 00000004 00000064 00000007 00000001"),
        (frames.ping(0x01020304), "80030006 00000004 01020304"),
        (frames.goaway(9, frames.GOAWAY_OK), "80030007 00000008 00000009 00000000"),
        (frames.goaway(0, frames.GOAWAY_PROTOCOL_ERROR), "80030007 00000008 00000000 00000001"),
        (frames.window_update(3, 0x8000), "80030009 00000008 00000003 00008000"),
        (frames.data_header(3, 5, fin=False) + b"hello", "00000003 00000005 68656c6c6f"),
        (frames.data_header(3, 0, fin=True), "00000003 01000000"),
        (frames.data_header(0x7FFFFFFF, 0xFFFFFF, fin=True), "7fffffff 01ffffff"),
    ],
)
def test_frames_by_hand(built: bytes, by_hand: str) -> None:
    assert built == bytes.fromhex(by_hand)


def test_header_block_by_hand() -> None:
    assert frames.HeaderDecompressor(1000).decompress(STORED_BLOCK) == {"streamtype": "error"}


def test_compressed_blocks_share_one_stream() -> None:
    compressor, decompressor = frames.HeaderCompressor(), frames.HeaderDecompressor(1000)
    first = compressor.compress({"StreamType": "error", "port": "8080"})
    assert first[2:6] == bytes.fromhex("e3c6a7c2")
    assert first.endswith(b"\x00\x00\xff\xff")
    assert decompressor.decompress(first) == {"streamtype": "error", "port": "8080"}
    second = compressor.compress({"streamtype": "data", "port": "8080"})
    assert len(second) < len(first)
    assert decompressor.decompress(second) == {"streamtype": "data", "port": "8080"}


@pytest.mark.parametrize(
    "block",
    [
        b"nonsense",
        STORED_BLOCK[:6] + b"\x07",
    ],
)
def test_broken_zlib_ends_the_session(block: bytes) -> None:
    with pytest.raises(SpdyError, match="does not decompress"):
        frames.HeaderDecompressor(1000).decompress(block)


def pack(plain: bytes) -> bytes:
    compressor = zlib.compressobj(zdict=frames.DICTIONARY)
    return compressor.compress(plain) + compressor.flush(zlib.Z_SYNC_FLUSH)


def test_a_zlib_stream_that_ends_cannot_be_gone_on_with() -> None:
    with pytest.raises(SpdyError, match="ends the zlib stream"):
        frames.HeaderDecompressor(1000).decompress(zlib.compress(bytes(4)))


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        bytes.fromhex("00000001"),
        bytes.fromhex("00000001 00000004 6161"),
        bytes.fromhex("00000000 00"),
        bytes.fromhex("ffffffff"),
        bytes.fromhex("00000001 ffffffff"),
    ],
)
def test_malformed_blocks_end_the_session(plain: bytes) -> None:
    with pytest.raises(SpdyError, match="header block"):
        frames.HeaderDecompressor(1000).decompress(pack(plain))


@pytest.mark.parametrize(
    "plain",
    [
        bytes.fromhex("00000001 00000000 00000001 61"),
        bytes.fromhex("00000002 00000001 61 00000000 00000001 41 00000000"),
    ],
)
def test_empty_and_repeated_names_are_an_error_of_the_stream(plain: bytes) -> None:
    assert frames.HeaderDecompressor(1000).decompress(pack(plain)) is None


def test_several_values_of_a_header() -> None:
    block = pack(bytes.fromhex("00000001 00000001 61 00000003 62 00 63"))
    assert frames.HeaderDecompressor(1000).decompress(block) == {"a": "b,c"}


def test_a_small_block_that_unpacks_to_much_is_refused() -> None:
    with pytest.raises(SpdyError, match="over the limit"):
        frames.HeaderDecompressor(64 * 1024).decompress(pack(bytes(100_000_000)))


def test_control_frames_over_the_limit_are_refused_by_their_header() -> None:
    with pytest.raises(SpdyError, match="over the limit"):
        parse(bytes.fromhex("80030001 00010001"), limit=65536)


def test_data_is_handed_on_before_its_frame_is_whole() -> None:
    parser = FrameParser(100)
    assert list(parser.feed(bytes.fromhex("00000003 01ffffff") + b"abc")) == [DataChunk(3, b"abc", False)]
    *_, last = parser.feed(bytes(0xFFFFFF - 3))
    assert isinstance(last, DataChunk)
    assert last.fin


def test_every_split_of_recorded_bytes() -> None:
    for name in ("001.exec.c2s", "002.exec.c2s", "005.exec.c2s", "009.portforward.c2s", "009.portforward.s2c"):
        data = (RECORDINGS / f"{name}.bin").read_bytes().split(b"\r\n\r\n", 1)[1]
        whole = join(parse(data))
        for cut in range(len(data) + 1):
            parser = FrameParser(1 << 16)
            assert join([*parser.feed(data[:cut]), *parser.feed(data[cut:])]) == whole
        single = FrameParser(1 << 16)
        assert join([frame for byte in data for frame in single.feed(bytes([byte]))]) == whole


CONTROL = st.builds(frames.control_frame, st.integers(1, 12), st.integers(0, 255), st.binary(max_size=40))
DATA = st.builds(
    lambda stream_id, data, fin: frames.data_header(stream_id, len(data), fin=fin) + data,
    st.integers(1, frames.MAX_STREAM_ID),
    st.binary(max_size=40),
    st.booleans(),
)


@given(st.lists(st.one_of(CONTROL, DATA), max_size=10), st.data())
def test_any_frames_in_any_pieces(sent: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    parser = FrameParser(1 << 16)
    got: list[ControlFrame | DataChunk] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += parser.feed(stream[start:end])
    assert join(got) == join(parse(stream))
    assert b"".join(rebuild(frame) for frame in parse(stream)) == stream


def rebuild(frame: ControlFrame | DataChunk) -> bytes:
    if isinstance(frame, ControlFrame):
        return frames.control_frame(frame.kind, frame.flags, frame.payload)
    return frames.data_header(frame.stream_id, len(frame.data), fin=frame.fin) + frame.data


def join(parsed: list[ControlFrame | DataChunk]) -> list[ControlFrame | DataChunk]:
    """Pieces of one stream's data in a row made one."""
    joined: list[ControlFrame | DataChunk] = []
    for frame in parsed:
        last = joined[-1] if joined else None
        if _continues(last, frame):
            assert isinstance(last, DataChunk)
            assert isinstance(frame, DataChunk)
            joined[-1] = DataChunk(frame.stream_id, last.data + frame.data, frame.fin)
        else:
            joined.append(frame)
    return joined


def _continues(last: ControlFrame | DataChunk | None, frame: ControlFrame | DataChunk) -> bool:
    if not isinstance(last, DataChunk) or not isinstance(frame, DataChunk):
        return False
    return last.stream_id == frame.stream_id and not last.fin
