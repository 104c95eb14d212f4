"""Divides a blob into segments, as its table of contents describes it. Runs in the planner.

The table of contents is not trusted: it says which bytes are probably equal to kept ones. Whether the result is the
layer is checked afterwards, by its digests.

References: "zstd:chunked file format" of containers/storage; "eStargz" of containerd's stargz-snapshotter; tar-split's
package storage.
"""

from __future__ import annotations

import _json  # the scanner of the module json, which itself takes longer to import than a plan to make
import binascii
import hashlib
import zlib

from images.chunked.records import ASSEMBLED, ESTARGZ, HEADER, INDEX_ENTRY, ZSTD_CHUNKED
from images.unpack.tar.headers import BLOCK, LimitError, TarError

TYPE_CHECKING = False  # type checkers treat this name as true; importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Protocol

    class Output(Protocol):
        """A file to write."""

        def write(self, data: bytes, /) -> object:
            """Append ``data``."""

        def tell(self) -> int:
            """The size so far."""


_DESCRIBING = (
    *("type", "name", "linkName", "mode", "size", "uid", "gid", "userName", "groupName", "modtime", "accesstime"),
    *("changetime", "devMajor", "devMinor", "xattrs"),
)
_SEGMENT_ENTRY, _FILE_ENTRY = 2, 1  # of tar-split
_SPACES = (" ", "\n", "\r", "\t")


class _Rules:
    """How numbers and objects of JSON are read."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}


_scanner: Callable[[str, int], tuple[Any, int]] = _json.make_scanner(_Rules())  # type: ignore[arg-type]


def _scan(text: str, position: int) -> tuple[Any, int]:
    """The value at this place, and the place behind it."""
    try:
        return _scanner(text, position)
    except StopIteration:
        raise TarError(f"its table of contents is not valid at character {position}") from None


class Place:
    """Where a blob has its table of contents. See ``records.HEADER``."""

    def __init__(self, header: bytes) -> None:
        self.format, self.size, self.tail, self.toc, self.toc_size, self.toc_plain, *split = HEADER.unpack(header)
        self.split, self.split_size, self.split_plain = split


class Segments:
    """The segments of a blob: ``begins`` and ``ends`` in the blob, and a ``key`` each. Equal keys mean equal content.

    ``is_chunk`` says of each whether it is (a part of) one file. The others hold what is between the files in the tar.
    ``gaps`` has the place of their content in a file, by segment.
    """

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.keys: list[bytes] = []
        self.is_chunk: list[bool] = []
        self.gaps: dict[int, tuple[int, int]] = {}

    def add(self, begin: int, end: int, key: bytes, *, is_chunk: bool) -> None:
        """Add the next segment."""
        self.begins.append(begin)
        self.ends.append(end)
        self.keys.append(key)
        self.is_chunk.append(is_chunk)


class _File:
    """A regular file with content: its size, the end of it in the blob, and (offset, size, digest) of its chunks."""

    __slots__ = ("chunks", "end", "size")

    def __init__(self, size: int, end: int) -> None:
        self.size = size
        self.end = end
        self.chunks: list[tuple[int, int, bytes]] = []


def chunk_key(digest: bytes, size: int) -> bytes:
    """The key of a chunk of a file."""
    return b"c%b%d" % (digest, size)


def segments_of(
    place: Place, tail: bytes, unpack: Callable[[bytes, int], bytes], gaps: Output, digest: bytes = b""
) -> Segments:
    """The segments of the blob with that ``tail``. ``unpack`` decompresses zstd to at most that size.

    What is between the files is appended to the file ``gaps``, if tar-split describes it. ``digest`` is what the table
    of contents of an eStargz blob must have. Raises TarError.
    """

    def part(offset: int, size: int) -> bytes:
        return tail[offset - place.tail : offset - place.tail + size]

    if place.format == ESTARGZ:
        text = _member_of_tar(part(place.toc, place.toc_size), place.toc_plain)
        if digest and hashlib.sha256(text).digest() != digest:
            raise TarError("its table of contents has another digest")
        files, descriptions = _files(text.decode())
        return _estargz(files, descriptions, place.tail)
    plain = unpack(part(place.toc, place.toc_size), place.toc_plain)
    if place.format == ASSEMBLED:
        return _assembled(plain, place.tail)
    if place.format != ZSTD_CHUNKED:
        raise TarError(f"its table of contents has the unknown format {place.format}")
    files, descriptions = _files(plain.decode())
    places = None
    if place.split:
        split = unpack(part(place.split, place.split_size), place.split_plain)
        descriptions, places = _tar_split(split, [file.size for file in files], gaps)
    return _zstd_chunked(files, descriptions, places, place.tail)


def _member_of_tar(data: bytes, most: int) -> bytes:
    """The first file of a tar in gzip, of which only headers of one block are known."""
    machine = zlib.decompressobj(31)
    try:
        plain = machine.decompress(data, most)
    except zlib.error as error:
        raise TarError("its table of contents is damaged") from error
    if machine.unconsumed_tail:
        raise LimitError(f"its table of contents has more than {most} bytes")
    size = int(plain[124:135], 8)
    if plain[:20] != b"stargz.index.json\0\0\0" or len(plain) < BLOCK + size:
        raise TarError("its table of contents is not where it should be")
    return plain[BLOCK : BLOCK + size]


def entries(text: str) -> Iterator[dict[str, object]]:
    """Each entry of a table of contents, one at a time, as all together would take much memory."""
    position = _skip(text, 0, "{")
    while True:
        name, position = _scan(text, _skip(text, position))
        position = _skip(text, position, ":")
        if name != "entries":
            _, position = _scan(text, position)
        elif text[position : position + 1] == "[":
            position = _skip(text, position, "[")
            while text[position : position + 1] != "]":
                entry, position = _scan(text, position)
                if not isinstance(entry, dict):
                    raise TarError("its table of contents has an entry that is no object")
                yield entry
                position = _skip(text, position)
                if text[position : position + 1] == ",":
                    position = _skip(text, position, ",")
            return
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            raise TarError("its table of contents has no entries")
        position = _skip(text, position, ",")


def _skip(text: str, position: int, expected: str = "") -> int:
    """The place behind white space, behind ``expected``, and behind more white space."""
    while text[position : position + 1] in _SPACES:
        position += 1
    if not expected:
        return position
    if text[position : position + 1] != expected:
        raise TarError(f"its table of contents is not valid at character {position}")
    return _skip(text, position + 1)


def _files(text: str) -> tuple[list[_File], list[bytes]]:
    """The files by their place, and a digest of what is described before each and after the last one."""
    files: list[_File] = []
    descriptions = []
    described = hashlib.blake2b(digest_size=16)
    for entry in entries(text):
        kind = entry.get("type")
        if kind != "chunk":
            described.update(repr([entry.get(name) for name in _DESCRIBING]).encode())
            size = _number(entry, "size")
            if kind != "reg" or not size:
                continue
            descriptions.append(described.digest())
            described = hashlib.blake2b(b"%d" % size, digest_size=16)
            files.append(_File(size, _number(entry, "endOffset")))
        elif not files:
            raise TarError("its table of contents begins with a part of a file")
        if entry.get("innerOffset"):
            raise TarError("its table of contents has several files in one part")
        file = files[-1]
        chunk_size = _number(entry, "chunkSize") or file.size - _number(entry, "chunkOffset")
        file.chunks.append((_number(entry, "offset"), chunk_size, _digest(entry)))
    descriptions.append(described.digest())
    for file in files:
        if sum(size for _, size, _ in file.chunks) != file.size:
            raise TarError("its table of contents has a file whose chunks have another size")
    return files, descriptions


def _number(entry: dict[str, object], name: str) -> int:
    value = entry.get(name) or 0
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise TarError(f"its table of contents has an invalid {name}")
    return value


def _digest(entry: dict[str, object]) -> bytes:
    text = entry.get("chunkDigest") or entry.get("digest")
    if not isinstance(text, str) or not text.startswith("sha256:") or len(text) != 71:
        raise TarError("its table of contents has a file without a digest")
    return bytes.fromhex(text[7:])


def _tar_split(plain: bytes, sizes: list[int], gaps: Output) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Digest and place in ``gaps`` of what is before each file with content and after the last one."""
    digests = []
    places = []
    begin = gaps.tell()
    digest = hashlib.blake2b(digest_size=16)
    expected = iter(sizes)

    def end_gap() -> None:
        digests.append(digest.digest())
        places.append((begin, gaps.tell() - begin))

    at = 0
    while at < len(plain):
        end = plain.find(b"\n", at)
        line = plain[at : end if end >= 0 else len(plain)]
        at = end + 1 if end >= 0 else len(plain)
        if not line:
            continue
        entry, _ = _scan(line.decode(), 0)
        kind = entry.get("type")
        if kind == _SEGMENT_ENTRY:
            raw = binascii.a2b_base64(entry.get("payload") or "")
            digest.update(raw)
            gaps.write(raw)
        elif kind == _FILE_ENTRY and entry.get("size"):
            if entry["size"] != next(expected, None):
                raise TarError("its tar-split data describe other files than its table of contents")
            end_gap()
            begin = gaps.tell()
            digest = hashlib.blake2b(digest_size=16)
    end_gap()
    if len(digests) != len(sizes) + 1:
        raise TarError("its tar-split data describe fewer files than its table of contents")
    return digests, places


def _zstd_chunked(
    files: list[_File], descriptions: list[bytes], places: list[tuple[int, int]] | None, end: int
) -> Segments:
    found = Segments()
    position = 0

    def gap(until: int, number: int) -> None:
        if until < position or (until == position and places is not None and places[number][1]):
            raise TarError("its table of contents has overlapping files")
        if until > position:
            if places is not None:
                found.gaps[len(found.begins)] = places[number]
            found.add(position, until, b"g" + descriptions[number], is_chunk=False)

    for number, file in enumerate(files):
        gap(file.chunks[0][0], number)
        ends = [*(offset for offset, _, _ in file.chunks[1:]), file.end]
        for (begin, size, digest), until in zip(file.chunks, ends, strict=True):
            if not begin < until <= end:
                raise TarError("its table of contents has a file at an impossible place")
            found.add(begin, until, chunk_key(digest, size), is_chunk=True)
        position = file.end
    gap(end, len(files))
    return found


def _estargz(files: list[_File], descriptions: list[bytes], end: int) -> Segments:
    """A member of gzip has a chunk of a file, and what follows in the tar until the next file."""
    found = Segments()
    chunks = []
    for number, file in enumerate(files):
        for offset, size, digest in file.chunks:
            chunks.append((offset, chunk_key(digest, size)))
        offset, key = chunks.pop()
        chunks.append((offset, key + descriptions[number + 1]))
    begins = [0, *(offset for offset, _ in chunks)]
    keys = [b"g" + descriptions[0], *(key for _, key in chunks)]
    for begin, until, key in zip(begins, [*begins[1:], end], keys, strict=True):
        if not begin < until <= end:
            raise TarError("its table of contents has a file at an impossible place")
        found.add(begin, until, key, is_chunk=key[:1] == b"c")
    return found


def _assembled(plain: bytes, end: int) -> Segments:
    if len(plain) % INDEX_ENTRY.size:
        raise LimitError("its index is cut off")
    found = Segments()
    for digest, size, begin, length in INDEX_ENTRY.iter_unpack(plain):
        if begin + length > end:
            raise TarError("its index has a chunk at an impossible place")
        found.add(begin, begin + length, chunk_key(digest, size), is_chunk=True)
    return found
