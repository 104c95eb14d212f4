"""The tar reader compared with the standard library's, which wrote its input."""

from __future__ import annotations

import contextlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images.unpack.tar.headers import LimitError, TarError
from images.unpack.tar.reader import Stream, TarReader

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=150).filter(
    lambda name: name.strip("/") == name
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])


def read(data: bytes, *, step: int = 1 << 20, limit: int = 1 << 30) -> list[tuple[object, ...]]:
    source = io.BytesIO(data)
    reader = TarReader(Stream(lambda size: source.read(min(size, step)), lambda chunk: None, limit))
    found: list[tuple[object, ...]] = []
    for entry in reader:
        content = b"".join(bytes(piece) for piece in reader.data(entry.size))
        found.append((entry.kind, entry.name, entry.link, entry.mode, entry.uid, entry.gid, entry.mtime, content))
    reader.stream.drain()
    assert reader.stream.total == len(data)
    return found


@st.composite
def members(draw: st.DrawFn) -> list[tuple[tarfile.TarInfo, bytes]]:
    made = []
    for name in draw(st.lists(NAMES, max_size=6)):
        info = tarfile.TarInfo(name)
        info.type = draw(KINDS)
        info.mode = draw(st.integers(0, 0o7777))
        info.uid, info.gid = draw(st.integers(0, (1 << 32) - 2)), draw(st.integers(0, 1 << 21))
        info.mtime = draw(st.integers(0, 1 << 40))
        info.linkname = draw(NAMES) if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        content = draw(st.binary(max_size=1500)) if info.type == tarfile.REGTYPE else b""
        info.size = len(content)
        made.append((info, content))
    return made


def write(entries: list[tuple[tarfile.TarInfo, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(members(), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.sampled_from([7, 512, 1000, 1 << 20]))
def test_every_entry_comes_back_as_it_was_written(
    entries: list[tuple[tarfile.TarInfo, bytes]], form: int, step: int
) -> None:
    found = read(write(entries, form), step=step)
    assert len(found) == len(entries)
    for (info, content), (kind, name, link, mode, uid, gid, mtime, data) in zip(entries, found, strict=True):
        assert kind == info.type
        assert isinstance(name, bytes)
        assert name.rstrip(b"/") == info.name.encode()
        assert link == info.linkname.encode()
        assert (mode, uid, gid, mtime) == (info.mode, info.uid, info.gid, int(info.mtime) * 1_000_000_000)
        assert data == content


@settings(max_examples=150, deadline=None)
@given(members(), st.data())
def test_damage_is_an_error_or_another_archive_but_nothing_worse(
    entries: list[tuple[tarfile.TarInfo, bytes]], data: st.DataObject
) -> None:
    archive = bytearray(write(entries, data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(archive)))
    with contextlib.suppress(TarError, LimitError):
        read(bytes(archive[:cut]))


def test_limits_and_truncation() -> None:
    info = tarfile.TarInfo("file")
    info.size = 5000
    archive = write([(info, b"x" * 5000)], tarfile.USTAR_FORMAT)
    with pytest.raises(LimitError, match="more than 4000 bytes"):
        read(archive, limit=4000)
    for length in (100, 600, 5000, 5511):
        with pytest.raises(TarError, match="cut off"):
            read(archive[:length])
    assert len(read(archive[:5632])) == 1
    with pytest.raises(TarError, match="empty block"):
        read(archive[:5632] + bytes(512) + archive[:512])


def test_global_headers_hold_for_what_follows() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"uid": "77"}) as archive:
        archive.addfile(tarfile.TarInfo("a"))
        archive.addfile(tarfile.TarInfo("b"))
    assert [entry[4] for entry in read(buffer.getvalue())] == [77, 77]


def test_times_with_fractions_and_before_the_epoch() -> None:
    for text, expected in (("1.5", 1_500_000_000), ("-1.5", -1_500_000_000), ("12", 12_000_000_000)):
        info = tarfile.TarInfo("a")
        info.pax_headers = {"mtime": text}
        assert read(write([(info, b"")], tarfile.PAX_FORMAT))[0][6] == expected
