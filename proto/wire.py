"""Protobuf messages written by hand: fields of encoded parts, and encoded items in the messages of a stream.

Joined encodings of the parts of a message are an encoding of the message (protobuf's encoding guide), so a part that is
kept need not be encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.message import Message

STREAM_ITEMS = 64
STREAM_BYTES = 1024 * 1024  # clients take no message over 16 MiB, and the annotations of one pod may be 256 KiB

_BYTES = [bytes((number,)) for number in range(128)]


def in_messages(items: Iterable[bytes]) -> Iterator[bytes]:
    """Encoded items, a few in each message of a stream; one that is larger than a message should be has its own."""
    batch: list[bytes] = []
    size = 0
    for item in items:
        if batch and (len(batch) == STREAM_ITEMS or size + len(item) > STREAM_BYTES):
            yield b"".join(batch)
            batch.clear()
            size = 0
        batch.append(item)
        size += len(item)
    if batch:
        yield b"".join(batch)


def encode_item(message: Message) -> bytes:
    """``message`` as an element of a repeated field number 1, which every list's is."""
    return encode_field(1, message.SerializeToString())


def encode_field(number: int, body: bytes) -> bytes:
    """An encoded message, or a text, as field ``number`` (at most 15) of another one."""
    return _BYTES[number << 3 | 2] + _varint(len(body)) + body


def encode_number(number: int, value: int) -> bytes:
    """A number that is not negative as field ``number`` (at most 15) of a message; nothing for 0."""
    return _BYTES[number << 3] + _varint(value) if value else b""


def _varint(value: int) -> bytes:
    if value < 1 << 7:
        return _BYTES[value]
    if value < 1 << 14:
        return bytes((value & 0x7F | 0x80, value >> 7))
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
