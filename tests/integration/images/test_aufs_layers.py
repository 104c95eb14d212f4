"""Layers written by AUFS, which stores files with several names in a separate folder that is no part of the image."""

from __future__ import annotations

import tarfile

from tests.integration.images.conftest import Node
from tests.integration.images.test_unpacking import refused, unpacked
from tests.support.image_builder import entry, folder, make_tar

PLNK = ".wh..wh.plnk"


async def test_hard_links_to_aufs_linked_files_become_those_files(node: Node) -> None:
    layer = make_tar(
        [
            *[entry(".wh..wh.aufs", ""), folder(".wh..wh.orph", 0o700), folder(PLNK, 0o700)],
            entry(f"{PLNK}/123.456", "both", mode=0o4750, uid=7, gid=8),
            entry(f"{PLNK}/9.9", "without a name" * 1000),
            *[folder("usr"), entry("usr/one", kind=tarfile.LNKTYPE, link=f"/{PLNK}/123.456")],
            entry("two", kind=tarfile.LNKTYPE, link=f"{PLNK}/sub/../123.456"),
            *[entry("three", kind=tarfile.LNKTYPE, link="two"), entry("plain", "it")],
        ]
    )
    root = await unpacked(node, layer)
    assert sorted(path.name for path in root.iterdir()) == ["plain", "three", "two", "usr"]
    for name in ("usr/one", "two", "three"):
        status = (root / name).stat()
        assert ((root / name).read_text(), oct(status.st_mode), status.st_uid) == ("both", "0o104750", 7)
        assert status.st_nlink == 3, "copies would multiply a large file"
    (row,) = node.database.read("SELECT used_bytes, used_inodes FROM layers WHERE number = 1")
    assert row == (4 * 4096, 4), "the root, usr, and two files"


async def test_aufs_linked_files_are_removed_from_the_layer(node: Node) -> None:
    layer = make_tar(
        [
            entry(f"{PLNK}/1.1", "x"),
            *[entry("way", kind=tarfile.SYMTYPE, link=PLNK), entry("way/file", "y"), folder("way/folder")],
            *[entry("way/null", kind=tarfile.CHRTYPE), entry("way/folder/.wh.gone"), entry("way/folder/.wh..wh..opq")],
            *[
                entry("kept", kind=tarfile.LNKTYPE, link="way/file"),
                entry("late", kind=tarfile.LNKTYPE, link="way/1.1"),
            ],
            *[entry(PLNK, kind=tarfile.SYMTYPE, link="/"), entry(f"{PLNK}/2.2", kind=tarfile.SYMTYPE, link="/")],
        ]
    )
    root = await unpacked(node, layer)
    assert sorted(path.name for path in root.iterdir()) == ["kept", "late", "way"]
    assert ((root / "kept").read_text(), (root / "late").read_text()) == ("y", "x")


async def test_hard_links_to_linked_files_that_are_missing_are_refused(node: Node) -> None:
    message = await refused(node, make_tar([entry("b", kind=tarfile.LNKTYPE, link=f"{PLNK}/3.3")]))
    assert "'b' is a hard link to '.wh..wh.plnk/3.3', which is not in this layer" in message
