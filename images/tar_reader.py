"""Reading a tar stream entry by entry: ustar, GNU and pax forms (POSIX pax; GNU tar's manual, "Basic Tar Format").

Runs in the unpack worker, so it imports next to nothing. It differs from ``tarfile`` in what layers need: it never
seeks, keeps names as bytes, hashes the stream as it passes, and takes 15,000 small files in well under a second.
"""

from __future__ import annotations

import struct
from zlib import adler32

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 512
CHUNK = 1 << 20
LONGEST_HEADER = 1 << 20

REGULAR = b"0"
HARD_LINK = b"1"
SYMBOLIC_LINK = b"2"
CHARACTER_DEVICE = b"3"
BLOCK_DEVICE = b"4"
FOLDER = b"5"
FIFO = b"6"
_CONTIGUOUS = b"7"
_GNU_SPARSE = b"S"
_HEADER_ONLY = frozenset((HARD_LINK, SYMBOLIC_LINK, CHARACTER_DEVICE, BLOCK_DEVICE, FOLDER, FIFO))
_KNOWN = _HEADER_ONLY | {REGULAR, b"\0", _CONTIGUOUS, _GNU_SPARSE}

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12x")
_EMPTY = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."


class TarError(Exception):
    """The stream is not a sound tar archive; the text says what is wrong and at which entry."""


class LimitError(Exception):
    """The stream holds more than its limits allow."""


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


class Stream:
    """Bytes that pass once: ``read`` gives up to so many, ``seen`` is shown every one of them."""

    def __init__(self, read: Callable[[int], bytes], seen: Callable[[bytes], object], limit: int) -> None:
        self._read = read
        self._seen = seen
        self._limit = limit
        self._buffer = b""
        self._position = 0
        self.total = 0

    def _more(self) -> bool:
        chunk = self._read(CHUNK)
        if not chunk:
            return False
        self._seen(chunk)
        self.total += len(chunk)
        if self.total > self._limit:
            raise LimitError(f"it unpacks to more than {self._limit} bytes (images.max_layer_bytes)")
        rest = self._buffer[self._position :] if self._position < len(self._buffer) else b""
        self._buffer = rest + chunk if rest else chunk
        self._position = 0
        return True

    def take(self, size: int) -> bytes:
        """Exactly ``size`` bytes (few, as they are copied), or fewer at the end of the stream."""
        while len(self._buffer) - self._position < size:
            if not self._more():
                break
        start = self._position
        data = self._buffer[start : start + size]
        self._position = start + len(data)
        return data

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next ``size`` bytes without copying; TarError if the stream ends before."""
        while size:
            available = len(self._buffer) - self._position
            if not available:
                if not self._more():
                    raise TarError("it is cut off in the middle of a file")
                continue
            step = min(size, available)
            start = self._position
            self._position = start + step
            size -= step
            yield memoryview(self._buffer)[start : start + step]

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes; TarError if the stream ends before."""
        available = len(self._buffer) - self._position
        if size <= available:
            self._position += size
            return
        for _ in self.pieces(size):
            pass

    def drain(self) -> None:
        """Pass over all that is left."""
        self._position = len(self._buffer)
        while self._more():
            self._position = len(self._buffer)


class TarReader:
    """Iterates over the entries of ``stream``; the data of an entry is read with ``data`` before the next one."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._left = 0  # bytes of the current entry's data and padding that nobody has read

    def data(self, size: int) -> Iterator[memoryview]:
        """The next ``size`` bytes of the current entry's data."""
        self._left -= size
        return self.stream.pieces(size)

    def __iter__(self) -> Iterator[Entry]:
        defaults: dict[bytes, bytes] = {}
        records: dict[bytes, bytes] | None = None
        sparse_list: list[tuple[int, int]] = []
        long_name = long_link = None
        while (block := self._next_block()) is not None:
            fields = _HEADER.unpack(block)
            _check_sum(block, fields[6])
            kind = fields[7]
            if kind in b"xXgLKV":
                size = _number(fields[4])
                if kind in b"xX":
                    records, sparse_list = _parse_records(self._header_data(size))
                elif kind == b"g":
                    defaults.update(_parse_records(self._header_data(size))[0])
                elif kind == b"L":
                    long_name = self._header_data(size).partition(b"\0")[0]
                elif kind == b"K":
                    long_link = self._header_data(size).partition(b"\0")[0]
                continue
            entry = _entry(fields)
            if long_name is not None:
                entry.name = long_name
            if long_link is not None:
                entry.link = long_link
            if defaults or records:
                _apply_records(entry, {**defaults, **records} if records else defaults)
            self._left = entry.size + (-entry.size % BLOCK)
            if kind == _GNU_SPARSE or (records and any(key.startswith(b"GNU.sparse.") for key in records)):
                self._sparse(entry, block, records or {}, sparse_list)
            records = long_name = long_link = None
            sparse_list = []
            yield entry

    def _next_block(self) -> bytes | None:
        self.stream.skip(self._left)
        self._left = 0
        block = self.stream.take(BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise TarError("it is cut off in the middle of a header")
        if block == _EMPTY:
            second = self.stream.take(BLOCK)
            if second and second != _EMPTY:
                raise TarError("an empty block stands in the middle of it")
            return None
        return block

    def _header_data(self, size: int) -> bytes:
        if size > LONGEST_HEADER:
            raise LimitError(f"an extended header has {size} bytes, more than {LONGEST_HEADER}")
        data = self.stream.take(size)
        if len(data) < size:
            raise TarError("it is cut off in the middle of an extended header")
        self.stream.skip(-size % BLOCK)
        return data

    def _sparse(
        self, entry: Entry, block: bytes, records: dict[bytes, bytes], sparse_list: list[tuple[int, int]]
    ) -> None:
        """Fill in ``regions`` and ``real_size`` (GNU tar's manual, "Storing Sparse Files")."""
        if entry.kind == _GNU_SPARSE:
            regions = _old_regions(block[386:482], 4)
            extended, entry.real_size = block[482], _number(block[483:495])
            while extended:
                more = self.stream.take(BLOCK)
                if len(more) < BLOCK:
                    raise TarError("it is cut off in the middle of a sparse file's map")
                regions += _old_regions(more, 21)
                extended = more[504]
            entry.kind = REGULAR
        elif records.get(b"GNU.sparse.major") == b"1":
            regions = self._map_in_data(entry)
            entry.real_size = _decimal(records.get(b"GNU.sparse.realsize", b"0"))
        else:
            numbers = [_decimal(item) for item in records.get(b"GNU.sparse.map", b"").split(b",") if item]
            regions = list(zip(numbers[::2], numbers[1::2], strict=False)) or sparse_list
            entry.real_size = _decimal(records.get(b"GNU.sparse.size", records.get(b"GNU.sparse.realsize", b"0")))
        entry.name = records.get(b"GNU.sparse.name", entry.name)
        entry.regions = [region for region in regions if region[1]]
        end = 0
        for offset, size in entry.regions:
            if offset < end or offset + size > entry.real_size:
                raise TarError(f"{entry.name!r} has an unsound sparse map")
            end = offset + size
        if sum(size for _, size in entry.regions) != entry.size:
            raise TarError(f"{entry.name!r} has a sparse map that does not match its size")

    def _map_in_data(self, entry: Entry) -> list[tuple[int, int]]:
        text = b""
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            newline = text.find(b"\n")
            if newline < 0:
                if entry.size < BLOCK or len(text) > 32:
                    raise TarError(f"{entry.name!r} has an unsound sparse map")
                text += self.stream.take(BLOCK)
                entry.size -= BLOCK
                self._left -= BLOCK
                continue
            numbers.append(_decimal(text[:newline]))
            text = text[newline + 1 :]
            if len(numbers) == 1:
                wanted = 1 + 2 * numbers[0]
        return list(zip(numbers[1::2], numbers[2::2], strict=True))


def _entry(fields: tuple[bytes, ...]) -> Entry:
    name, mode, uid, gid, size_field, mtime, _, kind, link, magic, _, _, major, minor, prefix = fields
    if kind not in _KNOWN:
        raise TarError(f"{name!r} is of an unknown kind {kind!r}")
    name = name.partition(b"\0")[0]
    if magic == b"ustar\x0000" and prefix[0]:
        name = prefix.partition(b"\0")[0] + b"/" + name
    if kind in (b"\0", REGULAR, _CONTIGUOUS):
        kind = FOLDER if name.endswith(b"/") else REGULAR
    entry = Entry(kind, name, link.partition(b"\0")[0], 0 if kind in _HEADER_ONLY else _number(size_field))
    entry.mode = _number(mode) & 0o7777
    entry.uid = _number(uid)
    entry.gid = _number(gid)
    entry.mtime = _number(mtime, signed=True) * 1_000_000_000
    if kind in (CHARACTER_DEVICE, BLOCK_DEVICE):
        entry.device = (_number(major), _number(minor))
    return entry


def _check_sum(block: bytes, field: bytes) -> None:
    digits = field.partition(b"\0")[0].strip()
    # The sum counts its own field as eight spaces. Half of Adler-32 is the sum of bytes, up to 65520, and quick.
    total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - (adler32(field) & 0xFFFF) - 1
    if not digits.isdigit() or total + 256 != _number(field):
        raise TarError("a header has a wrong checksum: it is not a tar archive, or it is damaged")


def _number(field: bytes, *, signed: bool = False) -> int:
    if field[0] & 0x80:  # base 256
        value = int.from_bytes(field, "big", signed=field[0] == 0xFF)
        if field[0] != 0xFF:
            value &= (1 << (8 * len(field) - 1)) - 1
    else:
        digits = field.partition(b"\0")[0].strip()
        try:
            value = int(digits, 8) if digits else 0
        except ValueError as error:
            raise TarError(f"a header holds {bytes(field)!r} where a number belongs") from error
    if value < 0 and not signed:
        raise TarError("a header holds a negative number")
    return value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise TarError(f"an extended header holds {text[:40]!r} where a number belongs")
    return int(text)


def _parse_records(data: bytes) -> tuple[dict[bytes, bytes], list[tuple[int, int]]]:
    records: dict[bytes, bytes] = {}
    offsets: list[int] = []
    regions: list[tuple[int, int]] = []
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0:
            if not data[position:].strip(b"\0"):
                break
            raise TarError("an extended header is damaged")
        end = position + _decimal(data[position:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space or not equals or data[end - 1 : end] != b"\n":
            raise TarError("an extended header is damaged")
        position = end
        if key == b"GNU.sparse.offset":
            offsets.append(_decimal(value))
        elif key == b"GNU.sparse.numbytes" and offsets:
            regions.append((offsets[-1], _decimal(value)))
        records[key] = value
    return records, regions


def _apply_records(entry: Entry, records: dict[bytes, bytes]) -> None:
    entry.name = records.get(b"path", entry.name)
    entry.link = records.get(b"linkpath", entry.link)
    if b"size" in records and entry.kind not in _HEADER_ONLY:
        entry.size = entry.real_size = _decimal(records[b"size"])
    if b"uid" in records:
        entry.uid = _decimal(records[b"uid"])
    if b"gid" in records:
        entry.gid = _decimal(records[b"gid"])
    if b"mtime" in records:
        entry.mtime = _time(records[b"mtime"])
    for key, value in records.items():
        if key.startswith(_XATTR):
            if entry.xattrs is None:
                entry.xattrs = {}
            entry.xattrs[key[len(_XATTR) :]] = value


def _time(text: bytes) -> int:
    whole, _, fraction = text.partition(b".")
    sign = -1 if whole.startswith(b"-") else 1
    nanoseconds = _decimal((fraction + b"000000000")[:9])
    return sign * (_decimal(whole.lstrip(b"-")) * 1_000_000_000 + nanoseconds)


def _old_regions(table: bytes, count: int) -> list[tuple[int, int]]:
    regions = []
    for index in range(count):
        offset, size = table[index * 24 : index * 24 + 12], table[index * 24 + 12 : index * 24 + 24]
        if not offset[0]:
            break
        regions.append((_number(offset), _number(size)))
    return regions
