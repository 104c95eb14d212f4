"""Writes tar archives byte by byte, for archives that no library writes."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 512


@dataclass(frozen=True)
class Header:
    """The fields of one header as written. ``signed`` computes the checksum of signed bytes."""

    name: bytes
    kind: bytes = b"0"
    size: int = 0
    mode: bytes = b"0000644\0"
    uid: bytes = b"0000000\0"
    gid: bytes = b"0000000\0"
    mtime: bytes = b"00000000000\0"
    link: bytes = b""
    magic: bytes = b"ustar\x0000"
    major: bytes = b"0000000\0"
    minor: bytes = b"0000000\0"
    prefix: bytes = b""
    signed: bool = False

    def encode(self) -> bytes:
        """The header's block."""
        block = self.name.ljust(100, b"\0") + self.mode + self.uid + self.gid + b"%011o\0" % self.size + self.mtime
        block += b" " * 8 + self.kind + self.link.ljust(100, b"\0") + self.magic + bytes(64) + self.major + self.minor
        block = (block + self.prefix).ljust(BLOCK, b"\0")
        total = sum(byte - 256 if self.signed and byte > 127 else byte for byte in block)
        return block[:148] + b"%06o\0 " % total + block[156:]


def padded(data: bytes) -> bytes:
    """``data``, padded to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, content: bytes = b"", **fields: bytes) -> bytes:
    """An entry of a regular file."""
    return Header(name, size=len(content), **fields).encode() + padded(content)  # type: ignore[arg-type]  # by name


def base256(number: int, size: int) -> bytes:
    """A number in GNU tar's base 256, for numbers that are negative or too large for octal digits."""
    encoded = number.to_bytes(size, "big", signed=True)
    return bytes([encoded[0] | 0x80]) + encoded[1:]


def record(key: bytes, value: bytes) -> bytes:
    """One record of an extended header."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return b"%d" % length + rest


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with these records, for the next entry, or with kind ``g`` for all later entries."""
    data = b"".join(records)
    return Header(b"PaxHeader", kind, len(data)).encode() + padded(data)


def archive(*entries: bytes) -> bytes:
    """The whole archive, with two empty blocks at the end."""
    return b"".join(entries) + bytes(2 * BLOCK)
