"""Tables of contents of layers, and the plans that are made of them."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import msgspec
import pytest
import zstandard

from host.errors import InvalidArgumentError
from images.chunked.places import TocPlace, announced, estargz_place, kept_place
from images.chunked.plan import KeptBlob, Plan
from images.chunked.records import FETCHED, KEPT, MADE, MADE_FILE, PLAN_FILE, RECORD, TAIL, ZSTD_CHUNKED
from images.chunked.toc import Place, Segments, chunk_key, entries, segments_of
from images.oci.digests import digest_of
from images.oci.manifests import Descriptor
from images.unpack.tar.headers import TarError
from tests.support.chunked import CHUNK, estargz
from tests.support.image_builder import entry, folder, make_tar

# Written by skopeo 1.18.0 of Debian 13, which has the same library for it as buildah.
RECORDED = Path(__file__).parents[2] / "data/chunked/debian13.tar.zst"
PREFIX = "io.github.containers.zstd-chunked."


def unpacked(data: bytes, size: int) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data) if size else b""


def recorded() -> tuple[bytes, Descriptor]:
    return RECORDED.read_bytes(), msgspec.json.decode(RECORDED.with_name("debian13.json").read_bytes(), type=Descriptor)


def recorded_segments() -> tuple[bytes, Segments, io.BytesIO]:
    blob, descriptor = recorded()
    place = announced(descriptor)
    assert place is not None
    gaps = io.BytesIO()
    return blob, segments_of(Place(place.header()), blob[place.tail :], unpacked, gaps), gaps


def test_each_segment_of_a_blob_of_debian_13_has_the_content_that_its_key_says() -> None:
    blob, segments, gaps = recorded_segments()
    tar = unpacked(blob, 1)
    found = []
    for number, (begin, end) in enumerate(zip(segments.begins, segments.ends, strict=True)):
        assert begin == (segments.ends[number - 1] if number else 0)
        content = unpacked(blob[begin:end], 1)
        if segments.is_chunk[number]:
            assert segments.keys[number] == chunk_key(bytes.fromhex(digest_of(content)[7:]), len(content))
        else:
            place, size = segments.gaps[number]
            assert gaps.getvalue()[place : place + size] == content
        found.append(content)
    assert b"".join(found) == tar
    assert segments.is_chunk.count(True) > 3  # the file with zeros in it has several chunks


def test_each_segment_of_an_estargz_blob_begins_with_the_content_that_its_key_says() -> None:
    tar = make_tar([folder("usr/"), entry("usr/text", b"text"), entry("usr/no"), entry("usr/large", bytes(CHUNK + 9))])
    packed = estargz(tar)
    digest = packed.annotations["containerd.io/snapshot/stargz/toc.digest"]
    place = estargz_place(packed.blob[-64:], len(packed.blob), digest)
    assert place is not None
    tail = packed.blob[place.tail :]
    segments = segments_of(Place(place.header()), tail, unpacked, io.BytesIO(), bytes.fromhex(digest[7:]))
    parts = zip(segments.begins, segments.ends, segments.keys, strict=True)
    members = [(gzip.decompress(packed.blob[begin:end]), key) for begin, end, key in parts]
    assert b"".join(content for content, _ in members) + gzip.decompress(tail) == gzip.decompress(packed.blob)
    assert len(members) == 4
    for (content, key), size in zip(members[1:], (4, CHUNK, 9), strict=True):
        assert key.startswith(chunk_key(bytes.fromhex(digest_of(content[:size])[7:]), size))
    with pytest.raises(TarError):
        segments_of(Place(place.header()), tail, unpacked, io.BytesIO(), bytes(32))


def test_the_footer_of_a_kept_blob_says_what_the_annotations_say() -> None:
    _, descriptor = recorded()
    file = os.open(RECORDED, os.O_RDONLY)
    try:
        place = kept_place(file)
    finally:
        os.close(file)
    known = announced(descriptor)
    assert place is not None and known is not None
    assert (place.format, place.size, place.tail, place.toc, place.split) == (
        *(known.format, known.size, known.tail, known.toc, known.split),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("manifest-position", ""),
        ("manifest-position", "100:50:200"),
        ("manifest-position", "100:50:200:2"),
        ("manifest-position", "-1:50:200:1"),
        ("manifest-position", "9000:1500:200:1"),
        ("manifest-position", "100:50:999999999999:1"),
        ("manifest-position", "4:50:200:1"),
        ("manifest-position", "99999999999999999999:50:200:1"),
        ("manifest-position", "\uff1100:50:200:1"),
        ("manifest-checksum", "sha256:00"),
        ("tarsplit-position", "9990:50:200"),
        ("tarsplit-position", "50:10:200"),
    ],
)
def test_annotations_that_cannot_be_true_count_as_none(name: str, value: str) -> None:
    good = {
        f"{PREFIX}manifest-position": "100:50:200:1",
        f"{PREFIX}manifest-checksum": digest_of(b""),
        f"{PREFIX}tarsplit-position": "158:20:100",
    }
    assert announced(Descriptor("", digest_of(b"x"), 10_000, annotations=good)) is not None
    wrong = good | {f"{PREFIX}{name}": value}
    assert announced(Descriptor("", digest_of(b"x"), 10_000, annotations=wrong)) is None


def table(*changes: dict[str, object]) -> bytes:
    one = {"type": "reg", "name": "a", "size": 5, "digest": digest_of(b"a"), "offset": 10, "endOffset": 20}
    two = {"type": "reg", "name": "b", "size": 6, "digest": digest_of(b"b"), "offset": 30, "endOffset": 40}
    return json.dumps({"version": 1, "entries": [one | changes[0], two | changes[1], *changes[2:]]}).encode()


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"{}",
        b'{"entries":',
        b'{"entries": {}}',
        b'{"entries": [1]}',
        table({"offset": 15}, {"offset": 16}),
        table({"endOffset": 35}, {}),
        table({"endOffset": 9}, {}),
        table({}, {"endOffset": 2000}),
        table({"offset": -1}, {}),
        table({"offset": "10"}, {}),
        table({"offset": 1 << 70}, {}),
        table({"digest": "sha256:" + "z" * 64}, {}),
        table({"digest": 5}, {}),
        table({}, {}, {"type": "chunk", "name": "b", "offset": 35, "chunkOffset": 4, "chunkSize": 7}),
        table({"type": "chunk"}, {}),
        table({"innerOffset": 5}, {}),
    ],
)
def test_a_table_of_contents_that_cannot_be_true_is_refused(plain: bytes) -> None:
    place = TocPlace(ZSTD_CHUNKED, 1000 + len(plain), 1000, (1000, len(plain), len(plain)))
    with pytest.raises((TarError, ValueError)):
        segments_of(Place(place.header()), plain, lambda data, size: data, io.BytesIO())


def test_entries_are_found_behind_other_members() -> None:
    assert list(entries(' { "version" : 1 , "more" : [ {} ] , "entries" : [ {"a": 1} , {"b": 2} ] } ')) == [
        {"a": 1},
        {"b": 2},
    ]


PLACE = TocPlace(ZSTD_CHUNKED, 1000, 900, (908, 20, 30))


def opened(folder: Path, records: list[tuple[int, int, int, int]]) -> Plan:
    folder.mkdir(exist_ok=True)
    (folder / PLAN_FILE).write_bytes(b"".join(RECORD.pack(*record) for record in records))
    (folder / MADE_FILE).write_bytes(bytes(50))
    (folder / "input").write_bytes(bytes(300))
    kept = KeptBlob(0, TocPlace(ZSTD_CHUNKED, 500, 400, (408, 20, 30)))
    return Plan(folder, folder / "input", PLACE, [kept], sum(record[3] for record in records))


@pytest.mark.parametrize(
    "records",
    [
        [(FETCHED, 0, 850, 51)],
        [(FETCHED, 0, 100, 50), (FETCHED, 0, 149, 10)],
        [(FETCHED, 0, 100, 50), (FETCHED, 0, 0, 10)],
        [(FETCHED, 0, 1 << 63, 1 << 63)],
        [(FETCHED, 0, 10, 0)],
        [(KEPT, 1, 0, 10)],
        [(KEPT, 0, 400, 101)],
        [(TAIL, 0, 90, 11)],
        [(MADE, 0, 0, 51)],
        [(4, 0, 0, 10)],
        [(KEPT, 0, 0, 500)] * 200_000,
        [(FETCHED, 0, number, 1) for number in range(900)] + [(FETCHED, 0, 899, 1)],
    ],
)
def test_a_plan_with_an_impossible_record_is_refused(tmp_path: Path, records: list[tuple[int, int, int, int]]) -> None:
    plan = opened(tmp_path, records)
    with pytest.raises(InvalidArgumentError):
        plan.checked_ranges()
    plan.close()


def test_a_plan_that_is_no_file_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, []).close()
    (tmp_path / MADE_FILE).unlink()
    os.mkfifo(tmp_path / MADE_FILE)
    with pytest.raises(InvalidArgumentError):
        Plan(tmp_path, tmp_path / "input", PLACE, [], 0)
