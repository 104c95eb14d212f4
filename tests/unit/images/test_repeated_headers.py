"""A header that is like an earlier one is read as it would be if it came first."""

from __future__ import annotations

import contextlib
import io
import random
import tarfile

import pytest

from images.unpack.tar.headers import Entry, TarError
from images.unpack.tar.reader import Stream, TarReader
from tests.support.raw_tar import file, pax, record

FIELDS = (
    "kind", "name", "link", "size", "real_size", "mode", "uid", "gid", "mtime", "device", "xattrs", "regions",
)  # fmt: skip
END = bytes(2 * tarfile.BLOCKSIZE)


def header(name: str, size: int = 0, mtime: int = 5, kind: bytes = tarfile.REGTYPE, *, gnu: bool = False) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.type = size, mtime, kind
    info.mode, info.uid, info.gid, info.uname = 0o4750, 1000, 100, "user"
    return info.tobuf(tarfile.GNU_FORMAT if gnu else tarfile.USTAR_FORMAT)


def entries(content: bytes) -> list[object]:
    """The fields of each entry, and at last the error if there is one."""
    source = io.BytesIO(content)
    found: list[object] = []
    try:
        for entry in TarReader(Stream(source.read, len, 1 << 30)):
            found.append(told(entry))
    except TarError as error:
        found.append(str(error))
    return found


def told(entry: Entry) -> tuple[object, ...]:
    return tuple(getattr(entry, field) for field in FIELDS)


EARLIER = b"".join(
    header(*values)
    for values in (("a", 0, 5), ("b" * 100, 0, 6), ("d/", 0, 5, tarfile.DIRTYPE), ("e" * 80 + "/" + "f" * 80, 0, 5))
)
LATER = [
    header("c", 0, 6),
    header("folder/", 0, 6, tarfile.DIRTYPE),
    header("x" * 100, 0, 5),
    header("e" * 80 + "/g", 0, 5),
    header("e" * 80 + "/" + "g" * 80, 0, 5),
    header("gnu", 0, 5, gnu=True),
    header("unknown time", 0, 7),
    header("ends in a slash/", 0, 5),
    header("", 0, 5),
]


@pytest.mark.parametrize("block", LATER)
def test_it_is_read_as_if_it_came_first(block: bytes) -> None:
    alone = entries(block + END)
    assert alone
    assert entries(EARLIER + block + END)[4:] == alone


def test_any_byte_of_it_may_differ() -> None:
    chance = random.Random(1)
    for number in range(6000):
        block = bytearray(chance.choice(LATER))
        for _ in range(chance.randint(1, 3)):
            place = chance.choice((chance.randrange(512), chance.randrange(100, 160), chance.randrange(257, 265)))
            block[place] = chance.choice((0, 32, 48, 55, 56, 95, 128, 255, chance.randrange(256)))
        if number % 3:  # with a checksum that is right
            total = sum(block[:148]) + 256 + sum(block[156:])
            block[148:156] = chance.choice((b"%06o\0 ", b"%07o\0", b" %06o\0", b"%06o \0")) % total
        assert entries(EARLIER + bytes(block) + END)[4:] == entries(bytes(block) + END), bytes(block)


def test_extended_headers_count_more() -> None:
    with contextlib.closing(io.BytesIO()) as buffer:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, records in (("a", {}), ("b", {"path": "c", "mtime": "7.5"}), ("d", {})):
                info = tarfile.TarInfo(name)
                info.mtime, info.pax_headers = 5, records
                archive.addfile(info)
        found = entries(buffer.getvalue())
    names_and_times = [(one[1], one[8]) for one in found if isinstance(one, tuple)]
    assert names_and_times == [(b"a", 5 * 10**9), (b"c", 7_500_000_000), (b"d", 5 * 10**9)]


def test_a_global_header_counts_for_those_after_it() -> None:
    records = b"14 mtime=9.25\n"
    extended = tarfile.TarInfo("global")
    extended.type, extended.size = tarfile.XGLTYPE, len(records)
    content = header("a") + extended.tobuf() + records.ljust(512, b"\0") + header("b") + END
    assert [one[8] for one in entries(content) if isinstance(one, tuple)] == [5 * 10**9, 9_250_000_000]


def test_a_global_header_counts_after_an_extended_one_too() -> None:
    """Headers like "a" are remembered from before the global one, and read again after an entry with its own."""
    content = file(b"a", uid=b"0000001\0") + pax(record(b"uid", b"7"), kind=b"g")
    content += pax(record(b"mtime", b"3")) + file(b"b", uid=b"0000001\0") + file(b"c", uid=b"0000001\0")
    owners = [(one[1], one[6]) for one in entries(content + END) if isinstance(one, tuple)]
    assert owners == [(b"a", 1), (b"b", 7), (b"c", 7)]
