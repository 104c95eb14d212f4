"""Podkeel, umoci and containerd unpack the same images to trees of equal content, type, mode, owner and xattrs."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from host import processes
from host.files import mounts
from tests.integration.images.conftest import Node
from tests.support.containerd import run_containerd
from tests.support.image_builder import BuiltImage, busybox_layer, entry, folder, make_tar
from tests.support.raw_tar import Header, archive, base256, file, pax, record


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if shutil.which(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs the Debian packages {' and '.join(missing)}")


Facts = dict[str, tuple[object, ...]]


def facts(root: Path) -> Facts:
    """The attributes of each entry of a tree, by its path.

    Without the times of folders: umoci changes them when it adds entries later.
    """
    found: Facts = {}
    for path in sorted((root, *root.rglob("*"))):
        status = path.lstat()
        content: object = ""
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes()
        elif not path.is_dir():
            content = status.st_rdev
        xattrs = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        linked = status.st_nlink if not path.is_dir() else 1
        found[str(path.relative_to(root))] = (
            oct(status.st_mode), status.st_uid, status.st_gid, content, tuple(sorted(xattrs.items())),
            0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns, linked,
        )  # fmt: skip
    return found


def image() -> BuiltImage:
    capable = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    set_capability = {"SCHILY.xattr.security.capability": capable.decode("latin1")}
    base = [
        folder("etc", 0o755),
        folder("usr"),
        entry("etc/keep", "keep", mtime=1_000_000),
        entry("etc/drop", "drop"),
        folder("srv", 0o2775, gid=50),
        folder("srv/old"),
        entry("srv/old/file", "old"),
        entry("usr/bin/set", "s", mode=0o4755, uid=1, gid=2, mtime=5000),
        entry("usr/bin/group", "g", mode=0o2755, uid=3, gid=4, mtime=5000),
        # The time of its target: containerd sets that from the link's entry; GNU tar, umoci and Podkeel do not.
        entry("usr/bin/hard", mode=0o4755, uid=1, gid=2, mtime=5000, kind=tarfile.LNKTYPE, link="usr/bin/set"),
        entry("usr/bin/soft", kind=tarfile.SYMTYPE, link="../../etc/keep", mtime=7000),
        entry("usr/bin/away", kind=tarfile.SYMTYPE, link="/nowhere/at/all", mtime=7000),
        entry("usr/bin/able", "able", mode=0o755, pax=set_capability),
        entry("usr/share/noted", "n", pax={"SCHILY.xattr.user.note": "a note"}),
        entry("usr/share/" + "long-name-" * 20, "long"),
        entry("usr/share/twice", "first", mode=0o600),
        entry("usr/share/twice", "second", mode=0o640, mtime=42),
        folder("dev"),
        entry("dev/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3), mtime=9),
        entry("dev/block", kind=tarfile.BLKTYPE, mode=0o660, gid=6, device=(7, 0), mtime=9),
        entry("dev/pipe", kind=tarfile.FIFOTYPE, mode=0o622, mtime=9),
        folder("tmp", 0o1777),
        entry("turns", "a file that becomes a folder"),
        folder("back"),
        entry("back/file", "in a folder that becomes a file"),
    ]
    upper = [
        folder("etc", 0o751, uid=9, gid=9),
        entry("etc/.wh.drop"),
        folder("srv", 0o2775, gid=50),
        folder("srv/old", 0o700),
        entry("srv/old/.wh..wh..opq"),
        entry("srv/old/new", "new"),
        folder("turns"),
        entry("turns/inside", "inside"),
        entry("back", "now a file"),
    ]
    top = [folder("etc", 0o751, uid=9, gid=9), entry("etc/drop", "again", mode=0o600, mtime=77)]
    return BuiltImage((busybox_layer(), make_tar(base, form=tarfile.PAX_FORMAT), make_tar(upper), make_tar(top)))


@pytest.fixture
async def ours(node: Node, image_archive: Path, tmp_path: Path) -> AsyncIterator[Facts]:
    """The tree that Podkeel unpacks."""
    (image,) = await node.puller.import_archive(image_archive)
    await node.snapshots.mount_image("c", image, target=tmp_path / "ours")
    try:
        found = facts(tmp_path / "ours")
        assert len(found) > 250
        yield found
    finally:
        mounts.unmount(tmp_path / "ours")


@pytest.fixture
def image_archive(tmp_path: Path) -> Path:
    path = tmp_path / "image.tar"
    image().write_oci(path, "localhost/compared:1")
    return path


def compare(ours: Facts, theirs: Facts) -> None:
    assert sorted(ours) == sorted(theirs)
    assert {path: (ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]} == {}


@needs("umoci", "skopeo")
async def test_umoci_makes_the_same_tree(ours: Facts, image_archive: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    copy = ("skopeo", "--insecure-policy", "copy", f"oci-archive:{image_archive}", f"oci:{tmp_path}/layout:1")
    await processes.run(copy, environment=environment, timeout=60)
    unpack = ("umoci", "unpack", "--image", f"{tmp_path}/layout:1", f"{tmp_path}/theirs")
    await processes.run(unpack, environment=environment, timeout=60)
    compare(ours, facts(tmp_path / "theirs/rootfs"))


def odd_image() -> BuiltImage:
    """The layers of test_odd_layers.py that both Podkeel and containerd accept."""
    long = "nix/store/" + "a" * 89 + "/bin/"
    capable = pax(record(b"SCHILY.xattr.user.note", b"kept\0\xff"), record(b"SCHILY.xattr.user.more", b""))
    base = archive(
        capable,
        Header(b"noted", b"5", mode=b"0000750\0", uid=b"0000007\0").encode(),
        Header(b"b", b"5", mode=b"0000711\0").encode(),
        pax(record(b"path", b""), record(b"uid", b"")),
        file(b"own", b"x", uid=b"0000007\0", mtime=b"00000000011\0"),
        file(b"name", b"1", magic=b"ustar\0\0\0", prefix=b"some/where"),
        file(b"name", b"2", magic=b"ustar  \0", prefix=b"of/gnu"),
        file(b"timed", b"3", magic=b"ustar  \0", prefix=b"00000000001\0" + b"00000000002\0"),
        Header(b"signed \xe9", signed=True).encode(),
        file(b"x/../y", b"1"),
        file(b"a/b/../../c/./d", b"2"),
        file(b"slash/", b"content"),
        file(b"old/", kind=b"\0", mode=b"0000755\0"),
        pax(record(b"mtime", b"99999999999.5")) + file(b"far"),
        file(b"base", uid=base256(3_000_000_000, 8), mtime=base256(1 << 33, 12)),
    )
    links = make_tar(
        [
            *[entry("link", kind=tarfile.SYMTYPE, link="b"), entry("link/f", "1")],
            *[entry("lost", kind=tarfile.SYMTYPE, link="/d/e"), entry("lost/deep/f", "2")],
            *[entry("hidden", kind=tarfile.SYMTYPE, link="hiding"), entry("hidden/.wh..wh..opq"), entry("noted/f", "")],
        ]
    )
    names = [make_tar([entry(long + "1", "x"), entry(long + "2", "")], form=form) for form in (1, 2)]
    return BuiltImage((busybox_layer(), base, links, *names, make_tar([entry("last", "x" * 700)])[: 512 + 700]))


@needs("containerd")
async def test_containerd_makes_the_same_tree_of_odd_layers(node: Node, tmp_path: Path) -> None:
    odd_image().write_oci(tmp_path / "odd.tar", "localhost/odd:1")
    (taken,) = await node.puller.import_archive(tmp_path / "odd.tar")
    await node.snapshots.mount_image("c", taken, target=tmp_path / "ours")
    try:
        with (
            run_containerd(tmp_path / "containerd") as containerd,
            containerd.mounted(tmp_path / "odd.tar", "localhost/odd:1", tmp_path / "theirs") as theirs,
        ):
            compare(facts(tmp_path / "ours"), facts(theirs))
    finally:
        mounts.unmount(tmp_path / "ours")


@needs("containerd")
def test_containerd_makes_the_same_tree(ours: Facts, image_archive: Path, tmp_path: Path) -> None:
    with (
        run_containerd(tmp_path / "containerd") as containerd,
        containerd.mounted(image_archive, "localhost/compared:1", tmp_path / "theirs") as theirs,
    ):
        compare(ours, facts(theirs))
    assert mounts.mounts_below(tmp_path) == [str(tmp_path / "ours")]
