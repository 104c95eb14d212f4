"""Decodes tar headers that differ from an earlier one only in name, size, time and checksum.

Runs in the unpack worker. Almost all headers of a layer are like this. Decoding every field of every header would take
longer than making the files.
"""

from __future__ import annotations

from zlib import adler32

from images.unpack.tar.headers import FOLDER, REGULAR, Entry

_MAX_CACHED = 4096  # cached headers, and cached times
_CHECKSUM_SPACES = 8 * 32  # the checksum counts its own field as eight spaces


class _Header:
    """The fields that headers share. ``rest_sum`` is the sum of the bytes after the checksum."""

    __slots__ = ("gid", "kind", "mode", "prefix", "rest_sum", "uid")

    def __init__(self, entry: Entry, prefix: bytes, rest_sum: int) -> None:
        self.kind = entry.kind
        self.mode = entry.mode
        self.uid = entry.uid
        self.gid = entry.gid
        self.prefix = prefix
        self.rest_sum = rest_sum


class RepeatedHeaders:
    """A cache of headers of regular files and folders without an extended header."""

    def __init__(self) -> None:
        self._headers: dict[bytes, _Header] = {}
        self._times: dict[bytes, int] = {}
        self._checksums: dict[int, bytes] = {}  # the field's text by sum; at most 130,560 entries

    def remember(self, block: bytes, entry: Entry) -> None:
        """Cache ``block``, which was decoded as ``entry`` without any extended header."""
        if block[156:157] not in (REGULAR, FOLDER) or entry.link:
            return
        name = block[:100].partition(b"\0")[0]
        for kept in (self._headers, self._times):
            if len(kept) >= _MAX_CACHED:
                kept.clear()
        # Half of Adler-32 is 1 and the sum of the bytes, up to 65520.
        rest_sum = (adler32(block[156:334]) & 0xFFFF) + (adler32(block[334:]) & 0xFFFF) - 3
        prefix = entry.name[: len(entry.name) - len(name)]
        self._headers[block[100:124] + block[156:]] = _Header(entry, prefix, rest_sum)
        self._times[block[136:148]] = entry.mtime

    def entry(self, block: bytes) -> Entry | None:
        """The entry of ``block`` if a similar header is cached; None if it must be decoded field by field."""
        header = self._headers.get(block[100:124] + block[156:])
        mtime = self._times.get(block[136:148])
        size = block[124:135]
        if header is None or mtime is None or not size.isdigit() or block[135] not in b"\0 ":
            return None
        total = (adler32(block[:148]) & 0xFFFF) + header.rest_sum
        checksum = self._checksums.get(total)
        if checksum is None:
            checksum = self._checksums[total] = b"%06o\0 " % (total + _CHECKSUM_SPACES)
        if block[148:156] != checksum:
            return None
        try:
            number = int(size, 8) if header.kind == REGULAR else 0
        except ValueError:
            return None
        entry = Entry(header.kind, block[:100].rstrip(b"\0"), b"", number)
        if b"\0" in entry.name:
            return None
        if header.prefix:
            entry.name = header.prefix + entry.name
        entry.mode = header.mode
        entry.uid = header.uid
        entry.gid = header.gid
        entry.mtime = mtime
        return entry
