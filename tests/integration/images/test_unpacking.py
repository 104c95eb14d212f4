"""The result of unpacking valid and hostile layers, on disk and through the overlay."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

from host import libc
from host.errors import InvalidArgumentError, LimitError
from host.files import mounts
from host.processes import run
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, folder, make_tar
from tests.support.raw_tar import Header, archive, file

CAPABILITY = bytes.fromhex("0100000202040000000000000000000000000000")


async def install(node: Node, *layers: bytes) -> Path:
    """Import an image of these layers and mount it. Returns the mounted root."""
    archive = node.root / "archive.tar"
    BuiltImage(layers).write_docker(archive, "test:latest")
    (image,) = await node.puller.import_archive(archive)
    await node.snapshots.prepare("c1", image, target=node.target("c1"))
    return node.target("c1")


async def unpacked(node: Node, *layers: bytes) -> Path:
    """As ``install``, but returns the folder of the topmost layer."""
    await install(node, *layers)
    return max((node.data / "layers").iterdir(), key=lambda path: int(path.name)) / "fs"


async def refused(node: Node, *layers: bytes) -> str:
    """The error message for these layers. Nothing of them must stay."""
    with pytest.raises((InvalidArgumentError, LimitError)) as caught:
        await install(node, *layers)
    assert await node.leftovers() == {}
    return caught.value.message


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All attributes of every file below ``root``."""
    found: dict[str, tuple[object, ...]] = {}
    first_names: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(root))
        kind = stat.S_IFMT(status.st_mode)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        twin = first_names.setdefault(status.st_ino, name)
        found[name] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
        found[name] += (status.st_rdev, content, xattrs, twin)
    return found


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar"])
async def test_a_layer_is_unpacked_as_gnu_tar_does(node: Node, tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "setuid").write_text("x" * 10_000)
    os.chown(source / "setuid", 1234, 4321)
    (source / "setuid").chmod(0o6755)
    (source / "capable").write_text("cap")
    if form == "posix":
        os.setxattr(source / "capable", "security.capability", CAPABILITY)
        os.setxattr(source / "capable", "user.mark", b"\0binary\xff")
        (source / ("long" * 50)).write_text("long name")
        (source / "long link").symlink_to("target/" * 30)
        os.utime(source / "capable", ns=(1, 1_234_567_890_123_456_789))
    if form == "gnu":
        (source / ("very-long-name-" * 12)).write_text("long name")
        os.chown(source / "capable", 3_000_000, 3_000_000)
        (source / "huge id").symlink_to("q" * 200)
    os.link(source / "setuid", source / "deep" / "twin")
    os.mkfifo(source / "fifo", 0o640)
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(source / "block", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    (source / "link").symlink_to("../café")
    os.chown(source / "link", 5, 6, follow_symlinks=False)
    (source / "deep").chmod(0o2775)
    os.chown(source / "deep", 0, 33)
    (source / "sticky").mkdir()
    (source / "sticky").chmod(0o1777)
    with (source / "sparse").open("wb") as sparse:
        sparse.seek(1 << 20)
        sparse.write(b"middle")
        sparse.truncate(5 << 20)
    for path in (source / "sticky", source / "deep/er", source / "deep", source):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    archive, expected = tmp_path / "layer.tar", tmp_path / "expected"
    extra = ["--xattrs", "--xattrs-include=*"] if form == "posix" else []
    extra += [] if form == "ustar" else ["--sparse"]
    await run(["tar", f"--format={form}", *extra, "-cf", str(archive), "-C", str(source), "."])
    expected.mkdir()
    flags = ["--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-p"]
    await run(["tar", *flags, "-xf", str(archive), "-C", str(expected)])
    layer = await unpacked(node, archive.read_bytes())
    assert tree(layer) == tree(expected)
    sparse_status = (layer / "sparse").stat()
    if form != "ustar":
        assert sparse_status.st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
async def test_sparse_files_of_every_pax_version(node: Node, tmp_path: Path, version: str) -> None:
    with (tmp_path / "sparse").open("wb") as sparse:
        for index in range(30):
            sparse.seek(index << 20)
            sparse.write(b"%d" % index)
        sparse.truncate(40 << 20)
    options = ["--format=posix", "--sparse", f"--sparse-version={version}"]
    await run(["tar", *options, "-cf", str(tmp_path / "l.tar"), "-C", str(tmp_path), "sparse"])
    layer = await unpacked(node, (tmp_path / "l.tar").read_bytes())
    assert (layer / "sparse").read_bytes() == (tmp_path / "sparse").read_bytes()


async def test_whiteouts_and_opaque_folders_hide_lower_layers(node: Node) -> None:
    lower = make_tar(
        [folder("a"), entry("a/one", "1"), entry("a/two", "2"), folder("b"), entry("b/x", "x"), entry("c", "")]
    )
    upper = make_tar([entry("a/.wh.one"), folder("b"), entry("b/.wh..wh..opq"), entry("b/y", "y"), entry(".wh.c")])
    root = await install(node, lower, upper)
    assert sorted(path.name for path in root.iterdir()) == ["a", "b"]
    assert [path.name for path in (root / "a").iterdir()] == ["two"]
    assert [path.name for path in (root / "b").iterdir()] == ["y"]


async def test_a_folder_that_replaces_a_whiteout_is_opaque(node: Node) -> None:
    lower = make_tar(
        [folder("a"), entry("a/old", "1"), folder("b"), entry("b/old", ""), folder("c"), entry("c/old", "")]
    )
    upper = make_tar(
        [
            *[entry(".wh.a"), folder("a"), entry("a/new", "")],
            *[folder("b"), entry("b/new", ""), entry(".wh.b")],
            *[entry(".wh.c"), entry("c/new", "")],
        ]
    )
    root = await install(node, lower, upper)
    for name in "abc":
        assert [path.name for path in (root / name).iterdir()] == ["new"], name


async def test_a_layer_with_an_opaque_root_hides_all_lower_layers(node: Node) -> None:
    lower = make_tar([folder("a"), entry("a/one", "1"), entry("file", "1")])
    upper = make_tar([entry(".wh..wh..opq"), entry("new", "")])
    top = make_tar([entry("top", "")])
    root = await install(node, lower, upper, top)
    assert sorted(path.name for path in root.iterdir()) == ["new", "top"]
    by_name = await install_again(node, lower, make_tar([entry(".wh.a"), entry(".wh.file")]))
    assert list(by_name.iterdir()) == []


async def install_again(node: Node, *layers: bytes) -> Path:
    await node.snapshots.unmount("c1", node.target("c1"))
    await node.snapshots.remove("c1")
    return await install(node, *layers)


async def test_folders_without_an_entry_inherit_from_the_layer_below(node: Node) -> None:
    lower = make_tar(
        [folder("tmp", 0o1777), folder("srv", 0o750, uid=7, gid=8), folder("srv/in", 0o700), entry("gone", "")]
    )
    upper = make_tar([entry("tmp/x", ""), entry("srv/in/y", ""), entry("fresh/z", ""), entry("gone/w", "")])
    root = await install(node, lower, upper)
    status = {name: (root / name).stat() for name in ("tmp", "srv", "srv/in", "fresh", "gone")}
    assert {name: oct(stat.S_IMODE(s.st_mode)) for name, s in status.items()} == {
        "tmp": "0o1777",
        "srv": "0o750",
        "srv/in": "0o700",
        "fresh": "0o755",
        "gone": "0o755",
    }
    assert (status["srv"].st_uid, status["srv"].st_gid) == (7, 8)


async def test_the_root_folder_has_the_image_s_attributes(node: Node) -> None:
    root = await install(
        node, make_tar([folder("./", 0o751, uid=3, gid=4), entry("x", "")]), make_tar([entry("y", "")])
    )
    status = root.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o751, 3, 4)


async def test_a_later_entry_replaces_an_earlier_one(node: Node) -> None:
    layer = make_tar(
        [
            *[entry("a", "first"), entry("a", "second", mode=0o600)],
            *[folder("d"), entry("d/x", ""), entry("d", "now a file")],
            *[entry("f", ""), folder("f"), entry("f/x", "")],
            *[entry("l", kind=tarfile.SYMTYPE, link="a"), entry("l", "no link")],
            *[entry("h", "h"), entry("h", kind=tarfile.LNKTYPE, link="h")],
            *[folder("same", 0o700), entry("same/kept", ""), folder("same", 0o711)],
        ]
    )
    root = await unpacked(node, layer)
    assert (root / "a").read_text() == "second"
    assert (root / "d").read_text() == "now a file"
    assert [path.name for path in (root / "f").iterdir()] == ["x"]
    assert not (root / "l").is_symlink()
    assert (root / "h").read_text() == "h"
    assert stat.S_IMODE((root / "same").stat().st_mode) == 0o711
    assert (root / "same/kept").exists()


async def test_absolute_names_and_links_stay_inside(node: Node, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    climb = "../" * 20
    layer = make_tar(
        [
            entry("/etc/passwd", "inside"),
            entry("abs", kind=tarfile.SYMTYPE, link=str(outside)),
            entry("abs/through", "1"),
            entry("rel", kind=tarfile.SYMTYPE, link=climb + str(outside).lstrip("/")),
            entry("rel/through", "2"),
            entry("hard", kind=tarfile.LNKTYPE, link="/etc/passwd"),
        ]
    )
    root = await unpacked(node, layer)
    assert list(outside.iterdir()) == []
    assert (root / str(outside).lstrip("/") / "through").read_text() == "2"
    assert (root / "hard").read_text() == "inside"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("../../escape", "x")], "leads out of the layer"),
        ([entry("a/../../../escape", "x")], "leads out of the layer"),
        ([entry("hard", kind=tarfile.LNKTYPE, link="../../../../etc/shadow")], "leads out of the layer"),
        ([entry("hard", kind=tarfile.LNKTYPE, link="/etc/shadow")], "not in this layer"),
        (
            [entry("up", kind=tarfile.SYMTYPE, link="/"), entry("h", kind=tarfile.LNKTYPE, link="up/etc/shadow")],
            "not in",
        ),
        ([entry("d", ""), entry("d/below", "x")], "could not be made"),
        ([entry("null", kind=tarfile.CHRTYPE, device=(1, 3)), entry("null/x", "x")], "could not be made"),
        ([entry(".wh...", "")], "whiteout of"),
        ([entry(".wh.x/y", "")], "below a whiteout"),
        ([entry(".", "root as a file")], "not a folder"),
        ([entry("x" * 300, "")], "too long"),
        ([entry("odd", kind=b"Z")], "unknown kind"),
    ],
)
async def test_hostile_entries_are_refused_by_name(
    node: Node, entries: list[tuple[tarfile.TarInfo, bytes]], words: str
) -> None:
    message = await refused(node, make_tar([entry("sound", "x"), *entries]))
    assert words in message
    assert "test:latest" in message
    assert "layer 1 of 1" in message


async def test_xattrs_of_the_host_are_not_set_from_images(node: Node) -> None:
    names = ["trusted.overlay.redirect", "trusted.overlay.opaque", "user.overlay.opaque", "user.fine"]
    pax = {f"SCHILY.xattr.{name}": "y" for name in names}
    info, _ = folder("d")
    info.pax_headers = pax
    layer = await unpacked(node, make_tar([(info, b"")]))
    assert os.listxattr(layer / "d") == ["user.fine"]


async def test_device_nodes_are_made_but_never_opened(node: Node) -> None:
    layer = await unpacked(
        node,
        make_tar(
            [
                entry("dev/full", kind=tarfile.CHRTYPE, device=(1, 7), mode=0o666),
                entry("dev/full", "written over, not into"),
                entry("dev/mem", kind=tarfile.CHRTYPE, device=(1, 1), mode=0o600),
            ]
        ),
    )
    assert (layer / "dev/full").read_text() == "written over, not into"
    assert stat.S_ISCHR((layer / "dev/mem").lstat().st_mode)


async def test_damaged_archives_are_refused(node: Node) -> None:
    sound = make_tar([entry("a", os.urandom(10_000)), entry("b", os.urandom(10_000))])
    for layer, words in (
        (sound[:5_000], "cut off"),
        (sound[: 10_752 + 300], "cut off"),
        (b"not a tar" * 200, "checksum"),
        (sound[:600] + b"\xff" * 100 + sound[700:10_760] + b"?" + sound[10_761:], "checksum"),
        (gzip.compress(sound)[:-300], "cut off"),
        (b"\x28\xb5\x2f\xfd" + b"nonsense" * 100, "damaged"),
    ):
        assert words in await refused(node, layer)
    packed = bytearray(gzip.compress(sound))
    packed[-6] ^= 0xFF
    assert "damaged" in await refused(node, bytes(packed))


async def test_an_archive_without_its_end_mark_is_accepted(node: Node) -> None:
    layer = make_tar([entry("a", "x" * 512)])[:1024]
    assert ((await unpacked(node, layer)) / "a").read_text() == "x" * 512


async def test_limits_stop_bombs(new_node: object, node: Node) -> None:
    tight = await new_node(max_layer_bytes=1 << 20, max_layer_entries=100)  # type: ignore[operator]  # the fixture
    assert "max_layer_bytes" in await refused(tight, gzip.compress(make_tar([entry("zeros", bytes(8 << 20))])))
    assert "max_layer_entries" in await refused(tight, make_tar([entry(f"{n}", "") for n in range(200)]))
    info, _ = entry("x", "")
    info.pax_headers = {"comment": "c" * (2 << 20)}
    message = await refused(node, make_tar([(info, b"")]))
    assert "extended header" in message


async def test_a_hundred_thousand_entries(node: Node) -> None:
    block = make_tar([entry("placeholder", "")])[:512]
    info = tarfile.TarInfo("n")
    parts = io.BytesIO()
    for number in range(100_000):
        info.name = f"d{number % 100}/f{number}"
        parts.write(info.tobuf(tarfile.USTAR_FORMAT))
    assert len(block) == 512
    layer = await unpacked(node, parts.getvalue())
    assert sum(len(files) for _, _, files in os.walk(layer)) == 100_000
    assert node.store.filesystem_usage().inodes_used == 100_000 + 100 + 1 + 1


async def test_a_full_disk_is_reported_and_nothing_stays(node: Node, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    libc.mount("tmpfs", str(small), "tmpfs", 0, "size=4m")
    full = Node(small / "node", node.options)
    try:
        await full.start()
        archive = tmp_path / "big.tar"
        BuiltImage((make_tar([entry("big", os.urandom(8 << 20))]),)).write_docker(archive, "big:latest")
        with pytest.raises(LimitError, match=r"No space left|disk is full"):
            await full.puller.import_archive(archive)
        assert await full.leftovers() == {"mounts": [str(small)]} or await full.leftovers() == {}
        BuiltImage((make_tar([entry("small", "fits")]),)).write_docker(archive, "small:latest")
        (image,) = await full.puller.import_archive(archive)
        assert full.store.find("small") == image
    finally:
        await full.stop()
        mounts.unmount(small)


async def test_an_empty_name_means_the_root(node: Node) -> None:
    assert "names the layer's root but is not a folder" in await refused(node, archive(file(b"", b"x")))
    root = await unpacked(node, archive(Header(b"", b"5", mode=b"0000711\0").encode(), file(b"after", b"x")))
    assert (stat.S_IMODE(root.stat().st_mode), (root / "after").read_text()) == (0o711, "x")
