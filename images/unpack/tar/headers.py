"""Decodes tar headers: ustar, GNU, pax and star formats (POSIX pax; GNU tar's manual, "Basic Tar Format").

Runs in the unpack worker, so it imports almost nothing.
"""

from __future__ import annotations

import struct
from zlib import adler32

BLOCK = 512

REGULAR = b"0"
HARD_LINK = b"1"
SYMBOLIC_LINK = b"2"
CHARACTER_DEVICE = b"3"
BLOCK_DEVICE = b"4"
FOLDER = b"5"
FIFO = b"6"
_CONTIGUOUS = b"7"
GNU_SPARSE = b"S"
_HEADER_ONLY = frozenset((HARD_LINK, SYMBOLIC_LINK, CHARACTER_DEVICE, BLOCK_DEVICE, FOLDER, FIFO))
_OLD_REGULAR = b"\0"
_KNOWN = _HEADER_ONLY | {REGULAR, _OLD_REGULAR, _CONTIGUOUS, GNU_SPARSE}

HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12s")
_GNU_MAGIC = (b"ustar ", b" \0")
_STAR_PREFIX = 131
_HIGH_BYTES = bytes(range(128, 256))
_XATTR = b"SCHILY.xattr."


_SPARSE = b"GNU.sparse."
_KEPT_RECORDS = frozenset((b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"))
_NO_ID = (1 << 32) - 1  # for chown(2) it means "do not change"
_MAJORS, _MINORS = 1 << 12, 1 << 20
_NANOSECONDS = (1 << 63) * 1_000_000_000


class TarError(Exception):
    """The stream is not a valid tar archive. The text says what is wrong and at which entry."""


class LimitError(Exception):
    """The stream exceeds a limit."""


class Entry:
    """One entry: names as bytes, ``mtime`` in nanoseconds, ``regions`` of a sparse file as (offset, size) pairs."""

    __slots__ = (
        "device",
        "gid",
        "kind",
        "link",
        "mode",
        "mtime",
        "name",
        "real_size",
        "regions",
        "size",
        "uid",
        "xattrs",
    )

    def __init__(self, kind: bytes, name: bytes, link: bytes, size: int) -> None:
        self.kind = kind
        self.name = name
        self.link = link
        self.size = size
        self.real_size = size
        self.mode = 0
        self.uid = 0
        self.gid = 0
        self.mtime = 0
        self.device = (0, 0)
        self.xattrs: dict[bytes, bytes] | None = None
        self.regions: list[tuple[int, int]] | None = None


class Records:
    """The used records of an extended header: ``values`` by keyword, extended attributes, regions of a sparse file."""

    __slots__ = ("regions", "sparse", "values", "xattrs")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.xattrs: dict[bytes, bytes] | None = None
        self.regions: list[tuple[int, int]] = []
        self.sparse = False


def header_name(fields: tuple[bytes, ...]) -> bytes:
    """The name in the header itself. Only ustar has a prefix; GNU tar has two times and other fields in its place.

    Go before 1.8 wrote a prefix in GNU headers too, so what is no time is a prefix, as in Go since.
    """
    name = fields[0].partition(b"\0")[0]
    prefix = fields[15]
    ustar = fields[9] == b"ustar\0"
    if not ustar and (fields[9:11] != _GNU_MAGIC or (_is_time(prefix[:12]) and _is_time(prefix[12:24]))):
        return name
    if fields[16][8:] == b"tar\0":  # star stores times at the end of the prefix
        prefix = prefix[:_STAR_PREFIX]
    prefix = prefix.partition(b"\0")[0]
    if not ustar and not prefix.isascii():
        return name
    return prefix + b"/" + name if prefix else name


def _is_time(field: bytes) -> bool:
    if field[0]:
        try:
            number_in(field, signed=True)
        except TarError:
            return False
    return True


def fill_in(entry: Entry, fields: tuple[bytes, ...]) -> None:
    """Copy kind, size, owner, mode, time and device from the header."""
    kind = entry.kind
    if kind not in _KNOWN:
        raise TarError(f"it is of an unknown kind {kind!r}")
    if kind == _OLD_REGULAR and entry.name.endswith(b"/"):
        entry.kind = FOLDER  # in old archives, without a kind for folders
    elif kind in (_OLD_REGULAR, _CONTIGUOUS):
        entry.kind = REGULAR
    if entry.kind not in _HEADER_ONLY:
        entry.size = entry.real_size = number_in(fields[4])
    entry.mode = number_in(fields[1]) & 0o7777
    entry.uid = number_in(fields[2])
    entry.gid = number_in(fields[3])
    entry.mtime = number_in(fields[5], signed=True) * 1_000_000_000
    if kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
        entry.device = (number_in(fields[13]), number_in(fields[14]))


def check_ranges(entry: Entry) -> None:
    """Raise TarError for numbers that no file of this system can have."""
    if entry.uid >= _NO_ID or entry.gid >= _NO_ID:
        what, number = ("user", entry.uid) if entry.uid >= _NO_ID else ("group", entry.gid)
        raise TarError(f"its {what} {number} is out of range, the last is {_NO_ID - 1}")
    if not -_NANOSECONDS <= entry.mtime < _NANOSECONDS:
        raise TarError(f"its time of {entry.mtime // 1_000_000_000} seconds is out of range")
    major, minor = entry.device
    if major >= _MAJORS or minor >= _MINORS:
        raise TarError(f"its device {major}:{minor} is out of range, the last is {_MAJORS - 1}:{_MINORS - 1}")


def check_sum(block: bytes, field: bytes) -> None:
    """Raise TarError unless the checksum in ``field`` is that of ``block``."""
    # The checksum counts its own field as eight spaces. Half of Adler-32 is the sum of bytes up to 65520, and fast.
    total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - (adler32(field) & 0xFFFF) - 1
    try:
        wanted = number_in(field)
    except TarError:
        wanted = -1
    if wanted == total + 256:
        return
    # Some old programs add signed bytes.
    others = block[:148] + block[156:]
    high = len(others) - len(others.translate(None, _HIGH_BYTES))
    if not high or wanted != total + 256 - 256 * high:
        raise TarError("a header has a wrong checksum: it is not a tar archive, or it is damaged")


def number_in(field: bytes, *, signed: bool = False) -> int:
    """The number in a header's field: octal digits, or GNU tar's base 256. Raises TarError."""
    if field[0] & 0x80:  # base 256; the second bit is the sign
        half = 1 << (8 * len(field) - 1)
        value = int.from_bytes(field, "big") & (half - 1)
        if field[0] & 0x40:
            value -= half
    else:
        digits = field.strip(b" \0")
        if not digits.isdigit():
            digits = digits.partition(b"\0")[0].strip()
        try:
            value = int(digits, 8) if digits else 0
        except ValueError:
            value = -1
        if value < 0 or (digits and not digits.isdigit()):
            raise TarError(f"a header holds {bytes(field)!r} where a number belongs")
    if value < 0 and not signed:
        raise TarError("a header holds a negative number")
    return value


def decimal(text: bytes) -> int:
    """A decimal number in an extended header. Raises TarError."""
    if not text.isdigit() or len(text) > 20:
        raise TarError(f"an extended header holds {text[:40]!r} where a number belongs")
    return int(text)


def parse_records(data: bytes) -> Records:
    """Decode the records of an extended header. Raises TarError."""
    found = Records()
    offsets: list[int] = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0:
            if not data[position:].strip(b"\0"):
                break
            raise TarError("an extended header is damaged")
        end = position + decimal(data[position:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space or not equals or data[end - 1 : end] != b"\n":
            raise TarError("an extended header is damaged")
        position = end
        if key.startswith(_XATTR):
            if found.xattrs is None:
                found.xattrs = {}
            found.xattrs[key[len(_XATTR) :]] = value
        elif key == b"GNU.sparse.offset":
            offsets.append(decimal(value))
        elif key == b"GNU.sparse.numbytes" and offsets:
            found.regions.append((offsets[-1], decimal(value)))
            found.sparse = True
        elif key in _KEPT_RECORDS or key.startswith(_SPARSE):
            found.values[key] = value
            found.sparse = found.sparse or key.startswith(_SPARSE)
    return found


def merged_records(first: Records, second: Records) -> Records:
    """Both merged; ``second`` has precedence. A record without a value selects the header's own field (POSIX)."""
    merged = Records()
    merged.values = {key: value for key, value in {**first.values, **second.values}.items() if value}
    merged.xattrs = first.xattrs or second.xattrs
    if first.xattrs and second.xattrs:
        merged.xattrs = {**first.xattrs, **second.xattrs}
    merged.regions = second.regions
    merged.sparse = second.sparse
    return merged


def apply_records(entry: Entry, records: Records) -> None:
    """Set size, owner, time and extended attributes from the extended header. Raises TarError."""
    values = records.values
    entry.xattrs = records.xattrs
    if not values:
        return
    if b"size" in values and entry.kind not in _HEADER_ONLY:
        entry.size = entry.real_size = decimal(values[b"size"])
    if b"uid" in values:
        entry.uid = decimal(values[b"uid"])
    if b"gid" in values:
        entry.gid = decimal(values[b"gid"])
    if b"mtime" in values:
        entry.mtime = _time(values[b"mtime"])


def _time(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    sign = -1 if whole.startswith(b"-") else 1
    nanoseconds = decimal((fraction + b"000000000")[:9])
    return sign * (decimal(whole.removeprefix(b"-")) * 1_000_000_000 + nanoseconds)


def shown(name: bytes) -> str:
    """A name from an archive, shortened for a message."""
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 200 else text[:200] + "…")


def old_regions(table: bytes, count: int) -> list[tuple[int, int]]:
    """The regions in an old GNU sparse header, as (offset, size) pairs. Raises TarError."""
    regions = []
    for index in range(count):
        offset, size = table[index * 24 : index * 24 + 12], table[index * 24 + 12 : index * 24 + 24]
        if not offset[0]:
            break
        regions.append((number_in(offset), number_in(size)))
    return regions
