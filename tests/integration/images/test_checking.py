"""The checker finds damaged files and removes only those images; a pull fetches them again."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from images.checker import ImageFinding
from images.image import Image
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, folder, make_tar
from tests.support.registry import Registry

NewNode = Callable[..., Awaitable[Node]]


@pytest.fixture(scope="module")
def built() -> BuiltImage:
    base = [
        folder("etc", 0o750, uid=7),
        entry("etc/passwd", "root"),
        entry("bin/tool", "tool", mode=0o4755, uid=1, gid=2, mtime=1000),
        entry("bin/same", kind=tarfile.LNKTYPE, link="bin/tool"),
        entry("bin/link", kind=tarfile.SYMTYPE, link="tool"),
        entry("bin/capable", "c", pax={"SCHILY.xattr.user.note": "kept"}),
        entry("dev/null", kind=tarfile.CHRTYPE, device=(1, 3)),
        entry("dev/pipe", kind=tarfile.FIFOTYPE),
        entry("a/" + "deep/" * 60 + "file", "deep"),
    ]
    upper = [entry("etc/.wh.passwd"), entry("implied/.wh..wh..opq"), entry("etc/more", os.urandom(3 << 20))]
    return BuiltImage((make_tar(base), make_tar(upper)))


def path(node: Node, image: Image, layer: int, name: str) -> Path:
    return node.data / "layers" / str(image.layers[layer]) / "fs" / name


async def findings(node: Node, *, repair: bool = False) -> tuple[ImageFinding, ...]:
    return (await node.checker.check(repair=repair)).findings


async def test_undamaged_images_have_no_findings(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    await node.puller.pull(registry.push(built, "check/whole"))
    built.write_docker(tmp_path / "docker.tar", "localhost/other:1")
    await node.puller.import_archive(tmp_path / "docker.tar")
    shared = dataclasses.replace(built, layers=(built.layers[0], make_tar([entry("x", "x")])))
    await node.puller.pull(registry.push(shared, "check/shared"))
    # Whiteouts of what no layer below has are not kept.
    await node.puller.pull(registry.push(BuiltImage((built.layers[1],)), "check/whiteouts"))
    report = await node.checker.check(repair=True)
    assert (report.images, report.layers, report.findings) == (3, 4, ())
    await node.images.emptied()
    assert list((node.data / "content/incoming").iterdir()) == []


def set_owner(file: Path) -> None:
    status = file.lstat()
    os.chown(file, 5, 5)
    file.chmod(status.st_mode & 0o7777)


def rewrite(file: Path) -> None:
    status = file.stat()
    file.write_text("TOOL")
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))


def replace_link(file: Path) -> None:
    status = file.lstat()
    file.unlink()
    file.symlink_to("elsewhere")
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns), follow_symlinks=False)


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "content": ("bin/tool", rewrite, "/bin/same has another content; /bin/tool has another content"),
    "mode": ("bin/tool", lambda file: file.chmod(0o755), "/bin/same has mode 755 instead of 4755"),
    "owner": ("bin/tool", set_owner, "belongs to 5:5 instead of 1:2"),
    "time": ("bin/tool", lambda file: os.utime(file, ns=(5, 5)), "has another modification time"),
    "xattr": ("bin/capable", lambda file: os.removexattr(file, "user.note"), "other extended attributes"),
    "link": ("bin/link", replace_link, "has another target"),
    "missing": ("etc/passwd", Path.unlink, "/etc/passwd is missing"),
    "more": ("etc/new", lambda file: file.write_text(""), "/etc/new is not in the layer"),
    "type": ("dev/pipe", become_a_folder, "/dev/pipe is of another type"),
    "folder": ("etc", lambda file: file.chmod(0o755), "/etc has mode 755 instead of 750"),
    "deep": ("a/" + "deep/" * 60 + "file", Path.unlink, "deep/file is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_broken_layers(node: Node, registry: Registry, built: BuiltImage, damage: str) -> None:
    name = registry.push(built, "check/broken")
    other = await node.puller.pull(registry.push(BuiltImage((make_tar([entry("o", "other")]),)), "check/other"))
    image = await node.puller.pull(name)
    await node.snapshots.prepare("running", image, target=node.target("running"))
    file, hurt, words = DAMAGE[damage]
    hurt(path(node, image, 0, file))
    (found,) = await findings(node)
    assert words in found.problem
    assert found.images == (name,)
    assert found.repair == ""
    assert node.store.find(name) == image, "nothing is dropped unasked"
    (repaired,) = await findings(node, repair=True)
    assert repaired.repair == "removed with its images: pull them again"
    assert node.store.images() == (other,)
    assert (node.target("running") / "etc/more").stat().st_size == 3 << 20, "containers keep running"
    again = await node.puller.pull(name)
    assert again.layers[0] != image.layers[0]
    assert again.layers[1] == image.layers[1], "what is whole is not fetched again"
    assert await findings(node) == ()
    await node.restart()
    assert await findings(node) == ()
    await node.snapshots.unmount("running", node.target("running"))
    await node.snapshots.remove("running")
    await node.store.remove(name)
    await node.store.remove(other.id)
    assert await node.leftovers() == {}
    assert node.store.filesystem_usage().used_bytes == node.store.filesystem_usage().inodes_used == 0


async def test_a_broken_blob_is_removed_without_its_image(
    node: Node, registry: Registry, built: BuiltImage, tmp_path: Path
) -> None:
    name = registry.push(built, "check/blob")
    image = await node.puller.pull(name)
    blobs = sorted((node.data / "content/sha256").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(blobs[1].read_bytes())
    content[len(content) // 2] ^= 1
    blobs[1].write_bytes(content)
    used = node.store.filesystem_usage()
    (found,) = await findings(node)
    assert found.digest == f"sha256:{blobs[1].name}"
    assert "broken" in found.problem
    (repaired,) = await findings(node, repair=True)
    assert repaired.repair == "the compressed layer was removed"
    assert node.store.find(name) == image
    assert used.used_bytes - node.store.filesystem_usage().used_bytes == len(content)
    await node.restart()
    assert await findings(node) == ()
    path(node, image, 1, "etc/more").unlink()
    (counted,) = await findings(node, repair=True)
    assert "files, and" in counted.problem
    assert (await node.puller.pull(name)).id == image.id
    assert await findings(node) == ()


async def test_layers_without_blobs_are_compared_with_their_tree_digest(
    new_node: NewNode, registry: Registry, built: BuiltImage
) -> None:
    node = await new_node(keep_blobs=False)
    name = registry.push(built, "check/unkept")
    image = await node.puller.pull(name)
    await node.restart()
    assert await findings(node) == ()
    path(node, image, 0, "bin/capable").unlink()
    (found,) = await findings(node)
    assert found.problem.startswith("it has ")
    shutil.rmtree(path(node, image, 0, ""))
    (found,) = await findings(node, repair=True)
    assert found.problem == "its folder is missing"
    assert (await node.puller.pull(name)).id == image.id
    assert await findings(node) == ()


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("missing", "more", "deep")])
async def test_changed_files_are_found_without_a_blob(
    new_node: NewNode, registry: Registry, built: BuiltImage, damage: str
) -> None:
    node = await new_node(keep_blobs=False)
    image = await node.puller.pull(registry.push(built, "check/unkept"))
    file, hurt, _ = DAMAGE[damage]
    hurt(path(node, image, 0, file))
    (found,) = await findings(node)
    assert found.problem == "its files have changed since they were unpacked"


async def test_broken_rows(node: Node, registry: Registry, built: BuiltImage) -> None:
    name = registry.push(built, "check/rows")
    image = await node.puller.pull(name)
    await node.database.execute("UPDATE images SET manifest = CAST('{}' AS BLOB)")
    (found,) = await findings(node)
    assert (found.digest, found.problem) == (image.id, "its manifest has another digest")
    await node.database.execute(
        "UPDATE images SET config = CAST(replace(CAST(config AS TEXT), 'linux', 'LINUX') AS BLOB)"
    )
    (found,) = await findings(node, repair=True)
    assert found.problem == "its configuration has another digest"
    assert node.store.images() == ()
    assert (await node.puller.pull(name)).id == image.id
