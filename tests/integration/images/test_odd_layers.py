"""Layers of unusual tar programs, byte by byte. The result is that of containerd, or an error that names the entry."""

from __future__ import annotations

import gzip
import io
import os
import resource
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from host.errors import InvalidArgumentError, LimitError
from tests.integration.images.conftest import Node
from tests.integration.images.test_unpacking import install, refused, unpacked
from tests.support.image_builder import BuiltImage, entry, folder, make_tar
from tests.support.raw_tar import Header, archive, base256, file, pax, record

# 99 bytes, a slash, and more: the part that fits into the header ends with the slash.
LONG = "nix/store/" + "a" * 89 + "/bin/tool"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("content", ["", "x" * 1000])
async def test_names_cut_at_a_slash_are_still_files(node: Node, form: int, content: str) -> None:
    root = await unpacked(node, make_tar([entry(LONG, content), entry("after", "it")], form=form))
    assert (root / LONG).read_text() == content
    assert (root / "after").read_text() == "it"


async def test_a_slash_at_the_end_makes_a_folder_only_of_the_oldest_kind(node: Node) -> None:
    layer = archive(file(b"old/", kind=b"\0", mode=b"0000755\0"), file(b"new/", b"content"))
    root = await unpacked(node, layer)
    assert (root / "old").is_dir()
    assert (root / "new").read_text() == "content"


async def test_records_without_a_value_select_the_header_s_field(node: Node) -> None:
    layer = archive(
        pax(record(b"path", b""), record(b"uid", b""), record(b"mtime", b"")),
        file(b"own", b"x", uid=b"0000007\0", mtime=b"00000000011\0"),
        pax(record(b"linkpath", b"")),
        Header(b"link", b"2", link=b"own").encode(),
    )
    root = await unpacked(node, layer)
    assert ((root / "own").stat().st_uid, (root / "own").stat().st_mtime) == (7, 9)
    assert (root / "link").readlink() == Path("own")


async def test_empty_long_names_select_the_header_s_name(node: Node) -> None:
    empty = [Header(b"././@LongLink", kind).encode() for kind in (b"L", b"K")]
    layer = archive(empty[0], file(b"own", b"x"), *empty, Header(b"link", b"2", link=b"own").encode())
    root = await unpacked(node, layer)
    assert ((root / "own").read_text(), (root / "link").readlink()) == ("x", Path("own"))


async def test_the_prefix_is_used_with_every_version_field(node: Node) -> None:
    star = bytearray(Header(b"name", prefix=b"star" + bytes(127) + b"00000000000\0" * 2, signed=False).encode())
    star[508:512] = b"tar\0"
    star[148:156] = b" " * 8
    star[148:156] = b"%06o\0 " % sum(star)
    layer = archive(
        file(b"name", b"1", magic=b"ustar\0\0\0", prefix=b"some/where"),
        file(b"name", b"2", magic=b"ustar\0  ", prefix=b"else/where"),
        file(b"name", b"3", magic=b"ustar  \0", prefix=b"of/gnu"),
        file(b"name", b"4", magic=b"ustar  \0", prefix=b"00000000001\0" + b"00000000002\0"),
        file(b"other", b"5", magic=b"ustar  \0", prefix=b"of\xe9"),
        file(b"old", b"6", magic=bytes(8), prefix=b"of/old"),
        bytes(star),
    )
    root = await unpacked(node, layer)
    assert (root / "some/where/name").read_text() == "1"
    assert (root / "else/where/name").read_text() == "2"
    assert (root / "of/gnu/name").read_text() == "3", "Go before 1.8 wrote such headers"
    assert [(root / name).read_text() for name in ("name", "other", "old")] == ["4", "5", "6"]
    assert (root / "star/name").read_text() == ""


async def test_checksums_of_signed_bytes_are_accepted(node: Node) -> None:
    name = "né".encode("latin-1")
    assert "checksum" in await refused(node, archive(Header(name, signed=True).encode()[:-1] + b"x"))
    root = await unpacked(node, archive(Header(name, signed=True).encode()))
    assert [os.fsencode(path.name) for path in root.iterdir()] == [name]


async def test_the_padding_after_the_last_file_may_be_missing(node: Node) -> None:
    assert "cut off" in await refused(node, make_tar([entry("last", "x" * 700)])[: 512 + 699])
    root = await unpacked(node, make_tar([entry("last", "x" * 700)])[: 512 + 700])
    assert (root / "last").read_text() == "x" * 700


async def test_names_may_go_up_within_the_layer(node: Node) -> None:
    assert "leads out of the layer with '..'" in await refused(node, archive(file(b"x/../../y")))
    layer = archive(file(b"x/../y", b"1"), file(b"a/b/../../c/./d", b"2"), Header(b"h", b"1", link=b"q/../y").encode())
    root = await unpacked(node, layer)
    assert sorted(path.name for path in root.iterdir()) == ["c", "h", "y"]
    assert (root / "c/d").read_text() == "2"
    assert (root / "h").read_text() == "1"


async def as_compressed(node: Node, layer: bytes, compress: Callable[[bytes], bytes], suffix: str) -> Path:
    """The folder of a layer with a given compression and media type."""
    archive = node.root / "compressed.tar"
    BuiltImage((layer,), compress=compress, suffix=suffix).write_oci(archive, "test:latest")
    await node.puller.import_archive(archive)
    return node.data / "layers/1/fs"


@pytest.mark.parametrize("window", [27, 28, 31])
async def test_zstd_windows_up_to_2_gib(node: Node, window: int) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window, enable_ldm=True)

    def compress(data: bytes) -> bytes:
        output = io.BytesIO()
        with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(output, closefd=False) as writer:
            writer.write(data)
        return output.getvalue()

    layer = make_tar([entry("a", "content")])
    assert zstandard.get_frame_parameters(compress(layer)).window_size == 1 << window
    assert ((await as_compressed(node, layer, compress, "+zstd")) / "a").read_text() == "content"


async def test_a_larger_zstd_window_is_reported(node: Node) -> None:
    frame = b"\x28\xb5\x2f\xfd\0\xc8" + b"\x01\0\0"  # a window of 2 to the power of 35, and one empty block
    assert "2147483648 bytes" in await refused(node, frame)


async def test_files_behind_dangling_links_create_the_link_s_target(node: Node) -> None:
    layer = make_tar(
        [
            *[entry("a", kind=tarfile.SYMTYPE, link="b"), entry("a/f", "1")],
            *[entry("c", kind=tarfile.SYMTYPE, link="/d/e"), entry("c/deep/f", "2")],
            *[entry("x/y", kind=tarfile.SYMTYPE, link="../z"), entry("x/y/.wh.gone"), folder("x/y/kept", 0o700)],
            *[entry("round", kind=tarfile.SYMTYPE, link="round")],
        ]
    )
    circle = make_tar([entry("round", kind=tarfile.SYMTYPE, link="round"), entry("round/f", "")])
    assert "round" in await refused(node, circle)
    root = await unpacked(node, make_tar([folder("z"), entry("z/gone", "")]), layer)
    assert {name: (root / name).readlink() for name in ("a", "c", "x/y")} == {
        "a": Path("b"),
        "c": Path("/d/e"),
        "x/y": Path("../z"),
    }
    assert ((root / "b/f").read_text(), (root / "d/e/deep/f").read_text()) == ("1", "2")
    assert stat.S_ISCHR((root / "z/gone").lstat().st_mode)
    assert oct((root / "z/kept").stat().st_mode) == "0o40700"


async def test_folders_behind_links_inherit_from_the_layer_below(node: Node) -> None:
    lower = make_tar([folder("b", 0o711, uid=5)])
    root = await unpacked(node, lower, make_tar([entry("a", kind=tarfile.SYMTYPE, link="b"), entry("a/f", "1")]))
    assert ((root / "b").stat().st_uid, oct((root / "b").stat().st_mode)) == (5, "0o40711")


async def test_an_opaque_mark_behind_a_link_applies_to_the_target(node: Node) -> None:
    link = entry("a", kind=tarfile.SYMTYPE, link="b")
    for entries in ([link], [link, folder("b"), entry("b/own", "")]):
        root = await unpacked(node, make_tar([*entries, entry("a/.wh..wh..opq")]))
        assert (root / "a").readlink() == Path("b")
        assert os.getxattr(root / "b", "trusted.overlay.opaque") == b"y"
        assert (root / "b/own").exists() == (len(entries) > 1)
        await node.store.remove("test:latest")
        await node.snapshots.unmount("c1", node.target("c1"))
        await node.snapshots.remove("c1")


async def test_an_opaque_mark_below_a_file_is_refused(node: Node) -> None:
    message = await refused(node, make_tar([entry("a", "content"), entry("a/.wh..wh..opq")]))
    assert "'a/.wh..wh..opq' is below 'a', which is not a folder" in message


HUGE = b"9" * 19


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pax(record(b"path", b"bad\0name")) + file(b"bad"), "NUL"),
        (pax(record(b"linkpath", b"a\0b")) + Header(b"bad", b"2", link=b"x").encode(), "NUL"),
        (pax(record(b"GNU.sparse.name", b"bad\0"), record(b"GNU.sparse.map", b"")) + file(b"bad"), "NUL"),
        (pax(record(b"SCHILY.xattr.user.a\0b", b"x")) + file(b"bad"), "embedded null"),
        (file(b"bad", uid=base256(1 << 32, 8)), "user 4294967296 is out of range"),
        (file(b"bad", gid=base256((1 << 32) - 1, 8)), "group 4294967295 is out of range"),
        (file(b"bad", uid=base256(-1, 8)), "negative"),
        (pax(record(b"uid", b"4294967296")) + file(b"bad"), "user 4294967296"),
        (pax(record(b"gid", b"-5")) + file(b"bad"), "b'-5' where a number belongs"),
        (file(b"bad", mtime=base256(1 << 64, 12)), "time of 18446744073709551616 seconds"),
        (pax(record(b"mtime", b"1" + HUGE)) + file(b"bad"), "time of 1" + HUGE.decode()),
        (pax(record(b"mtime", b"--5")) + file(b"bad"), "where a number belongs"),
        (Header(b"bad", b"3", major=base256(1 << 33, 8)).encode(), "device 8589934592:0 is out of range"),
        (Header(b"bad", b"4", minor=base256(1 << 20, 8)).encode(), "device 0:1048576 is out of range"),
        (pax(record(b"size", b"1" + HUGE)) + file(b"bad"), "cut off"),
        (Header(b"bad", b"2", link=b"").encode(), "'bad' could not be made"),
        (pax(record(b"linkpath", b"l" * 5000)) + Header(b"bad", b"2", link=b"x").encode(), "File name too long"),
        (pax(record(b"path", b"d/" * 2000 + b"bad")) + file(b"bad"), "2001 folders deep"),
        (pax(record(b"path", b"d" * 40_000)) + file(b"bad"), "40000 bytes"),
        (
            pax(
                record(b"GNU.sparse.major", b"0"),
                record(b"GNU.sparse.map", b"99999999999999999999,1"),
                record(b"GNU.sparse.size", b"1"),
            )
            + file(b"bad", b"x"),
            "sparse map is invalid",
        ),
        (
            pax(
                record(b"GNU.sparse.map", b"0,1"),
                record(b"GNU.sparse.size", b"9000000000000000000"),
            )
            + file(b"bad", b"x"),
            "larger than images.max_layer_bytes",
        ),
    ],
    ids=range(21),
)
async def test_impossible_attributes_are_refused_with_the_entry(node: Node, bad: bytes, words: str) -> None:
    message = await refused(node, archive(file(b"sound", b"x"), bad))
    assert words in message
    assert "bad" in message or "d/d/d" in message or "dddd" in message or "cut off" in message
    assert "layer 1 of 1" in message


@pytest.mark.parametrize(
    "bad",
    [
        file(b".wh.gone") + Header(b"bad", b"1", link=b"gone").encode(),
        file(b"d/.wh.gone") + Header(b"bad", b"1", link=b"d/gone").encode(),
        Header(b"bad", b"1", link=b"bad").encode(),
        Header(b"bad", b"1", link=b"later").encode() + file(b"later", b"x"),
        Header(b"bad", b"1", link=b"").encode(),
    ],
)
async def test_hard_links_to_files_outside_of_the_layer_are_refused(node: Node, bad: bytes) -> None:
    message = await refused(node, archive(file(b"sound", b"x"), bad))
    assert "'bad' is a hard link to" in message
    assert "not in this layer" in message


async def test_times_out_of_range_are_set_as_by_containerd(node: Node) -> None:
    layer = archive(
        pax(record(b"mtime", b"99999999999.5")) + file(b"far"),
        pax(record(b"mtime", b"1.25")) + file(b"near"),
        file(b"before", mtime=base256(-5, 12)),
    )
    root = await unpacked(node, layer)
    times = {name: (root / name).stat().st_mtime for name in ("far", "near", "before")}
    assert times == {"far": 0, "near": 1.25, "before": -5}


async def test_a_plain_layer_declared_as_gzip_is_accepted(node: Node) -> None:
    plain = make_tar([entry("big", os.urandom(100_000))])
    root = await as_compressed(node, plain, lambda data: data, "+gzip")
    assert (root / "big").stat().st_size == 100_000


async def test_damage_of_a_stream_is_not_reported_for_a_file(node: Node) -> None:
    layer = make_tar([entry("big", os.urandom(3_000_000))])
    for broken, words in (
        (gzip.compress(layer[:1_000_000]) + layer[1_000_000:], "its compressed stream is"),
        (gzip.compress(layer)[:1_500_000], "its compressed stream is cut off"),
        (zstandard.compress(bytes(100_000))[:15] + b"nonsense" * 100, "its compressed stream is damaged"),
    ):
        message = await refused(node, broken)
        assert words in message
        assert "'big'" not in message


async def test_repeated_extended_headers_have_a_limit(node: Node) -> None:
    """Each has a mebibyte of small records. Decoding one took 25 ms, for each copy of it."""
    big = pax(*([record(b"k", b"")] * 200_000))
    assert len(big) > 1_000_000
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    message = await refused(node, archive(*[big + file(b"%d" % number) for number in range(100)]))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "extended headers" in message
    assert after.ru_utime - before.ru_utime < 2
    once = pax(*([record(b"k", b"")] * 150_000), record(b"uid", b"9"), kind=b"g")
    root = await unpacked(node, archive(once, *[file(b"%d" % number) for number in range(3000)]))
    assert (root / "2999").stat().st_uid == 9
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - after.ru_utime < 3


def opened(root: Path, name: bytes) -> int:
    """Open the deep folder ``name`` step by step. The caller closes it."""
    descriptor = os.open(root, os.O_PATH)
    for part in name.split(b"/"):
        below = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    return descriptor


@pytest.mark.parametrize("parts", [17, 100])
async def test_names_longer_than_path_max(node: Node, parts: int) -> None:
    deep = b"/".join([b"%03d" % number + b"n" * 247 for number in range(parts)])
    assert len(deep) > 4200

    def named(name: bytes) -> bytes:
        return pax(record(b"path", deep + b"/" + name))

    layer = archive(
        named(b"file") + file(b"f", b"content", uid=b"0000005\0"),
        named(b"folder") + Header(b"d", b"5", mode=b"0000711\0").encode(),
        named(b"link") + Header(b"l", b"2", link=b"file").encode(),
        pax(record(b"path", deep + b"/hard"), record(b"linkpath", deep + b"/file")) + Header(b"h", b"1").encode(),
        pax(record(b"path", b"short"), record(b"linkpath", deep + b"/file")) + Header(b"h", b"1").encode(),
        named(b".wh.gone") + file(b"w"),
        named(b"folder/.wh..wh..opq") + file(b"w"),
        named(b"null") + Header(b"n", b"3", major=b"0000001\0", minor=b"0000003\0").encode(),
        named(b"twice/below") + file(b"t"),
        named(b"twice") + file(b"t", b"a file"),
        pax(record(b"SCHILY.xattr.user.note", b"y"), record(b"path", deep + b"/noted")) + file(b"f"),
    )
    root = await unpacked(node, archive(named(b"gone") + file(b"g")), layer)
    folder_there = opened(root, deep)
    try:
        below = f"/proc/self/fd/{folder_there}"
        names = [path.name for path in Path(below).iterdir()]
        assert sorted(names) == ["file", "folder", "gone", "hard", "link", "noted", "null", "twice"]
        at = Path(below)
        assert ((at / "file").read_text(), (at / "file").stat().st_uid) == ("content", 5)
        assert (at / "hard").samefile(at / "file")
        assert (root / "short").samefile(at / "file")
        assert (at / "link").readlink() == Path("file")
        assert os.getxattr(at / "folder", "trusted.overlay.opaque") == b"y"
        assert (at / "null").lstat().st_rdev == os.makedev(1, 3)
        assert (at / "gone").lstat().st_rdev == 0
        assert (at / "twice").read_text() == "a file"
        assert os.getxattr(at / "noted", "user.note") == b"y"
    finally:
        os.close(folder_there)
    report = await node.checker.check(repair=False)
    assert report.findings == ()
    await node.store.remove("test:latest")
    await node.snapshots.unmount("c1", node.target("c1"))
    await node.snapshots.remove("c1")
    assert await node.leftovers() == {}


async def test_errors_name_the_layer(node: Node) -> None:
    with pytest.raises((InvalidArgumentError, LimitError)):
        await install(node, archive(pax(b"damaged"), file(b"x")))


def replaced_on_the_way(*inside: tuple[tarfile.TarInfo, bytes], to: str) -> bytes:
    """A layer whose entries are behind a link that is changed later."""
    link = entry("way", kind=tarfile.SYMTYPE, link="real")
    return make_tar([folder("real"), link, *inside, entry("way", kind=tarfile.SYMTYPE, link=to), entry("after", "it")])


@pytest.mark.parametrize("to", ["way", "nothing", "after"])
async def test_links_that_are_replaced_after_entries_behind_them(node: Node, to: str) -> None:
    opaque = entry("way/opaque/.wh..wh..opq")
    inside = (folder("way/folder", mode=0o700), entry("way/folder/file", "content"), folder("way/opaque"), opaque)
    root = await unpacked(node, replaced_on_the_way(*inside, to=to))
    assert (root / "real/folder/file").read_text() == "content"
    assert stat.S_IMODE((root / "real/folder").stat().st_mode) == 0o700
    assert (root / "way").readlink() == Path(to)
    assert (root / "after").read_text() == "it"


async def test_devices_behind_links_that_later_form_a_loop(node: Node) -> None:
    device = entry("way/null", kind=tarfile.CHRTYPE, device=(1, 3))
    linked = entry("way/same", kind=tarfile.LNKTYPE, link="way/null")
    root = await unpacked(node, replaced_on_the_way(device, linked, to="way"))
    assert (root / "real/same").samefile(root / "real/null")
    assert stat.S_ISCHR((root / "real/null").lstat().st_mode)
    assert (root / "way").readlink() == Path("way")
    assert (root / "after").read_text() == "it"
