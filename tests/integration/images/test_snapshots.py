from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.errors import LimitError, NotFoundError
from host.files import mounts
from images.image import Image
from images.snapshots.overlay import mount_overlay
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, busybox_layer, entry, make_tar


@pytest.fixture
async def image(node: Node, tmp_path: Path) -> Image:
    archive = tmp_path / "image.tar"
    built = BuiltImage((busybox_layer(), make_tar([entry("etc/motd", "hello")])), {"Volumes": {"/data": {}}})
    built.write_docker(archive, "shell:1")
    (imported,) = await node.puller.import_archive(archive)
    return imported


async def test_containers_share_layers_and_have_separate_writable_layers(node: Node, image: Image) -> None:
    first, second = [await node.snapshots.prepare(name, image, target=node.target(name)) for name in ("c1", "c2")]
    (first.target / "etc/motd").write_text("changed")
    (first.target / "new").write_text("n")
    assert (second.target / "etc/motd").read_text() == "hello"
    assert not (second.target / "new").exists()
    assert sorted(path.name for path in first.upper.iterdir()) == ["etc", "new"]
    assert (second.target / "bin/sh").readlink() == Path("busybox")
    assert node.snapshots.ids() == {"c1", "c2"}
    assert node.snapshots.filesystem_usage().inodes_used > 0


async def test_removal_is_complete_and_repeatable(node: Node, image: Image) -> None:
    for _ in range(2):
        await node.snapshots.prepare("c1", image, target=node.target("c1"))
        for _ in range(2):
            await node.snapshots.unmount("c1", node.target("c1"))
            await node.snapshots.remove("c1")
        assert not node.target("c1").exists()
        assert node.snapshots.ids() == frozenset()
    await node.store.remove("shell:1")
    assert await node.leftovers() == {}
    assert node.snapshots.filesystem_usage().used_bytes == 0


async def test_layers_of_a_removed_image_stay_until_the_last_container(node: Node, image: Image) -> None:
    await node.snapshots.prepare("c1", image, target=node.target("c1"))
    await node.store.remove(image.id)
    assert node.store.images() == ()
    assert node.store.filesystem_usage().used_bytes > 0
    await node.restart()
    assert (node.target("c1") / "etc/motd").read_text() == "hello"
    await node.snapshots.unmount("c1", node.target("c1"))
    await node.snapshots.remove("c1")
    assert node.store.filesystem_usage().used_bytes == 0
    assert await node.leftovers() == {}


async def test_no_snapshot_is_made_of_a_removed_image(node: Node, image: Image) -> None:
    await node.store.remove(image.id)
    with pytest.raises(NotFoundError, match="was removed"):
        await node.snapshots.prepare("c1", image, target=node.target("c1"))
    assert await node.leftovers() == {}


async def test_a_failed_mount_leaves_nothing(node: Node, image: Image) -> None:
    node.target("c1").parent.mkdir(parents=True)
    node.target("c1").write_text("in the way")
    with pytest.raises(OSError, match="File exists"):
        await node.snapshots.prepare("c1", image, target=node.target("c1"))
    assert node.snapshots.ids() == frozenset()
    await node.store.remove(image.id)
    assert await node.leftovers() == {}


async def test_an_image_is_mounted_read_only_as_a_volume(node: Node, image: Image) -> None:
    target = node.run / "containers/c1/volumes/0"
    await node.snapshots.mount_image("c1", image, target=target)
    assert (target / "etc/motd").read_text() == "hello"
    with pytest.raises(OSError, match="Read-only"):
        (target / "x").write_text("")
    await node.store.remove(image.id)
    await node.restart()
    assert node.snapshots.ids() == {"c1"}
    await node.snapshots.unmount("c1", target)
    assert node.snapshots.ids() == frozenset()
    assert await node.leftovers() == {}


async def test_an_image_without_layers(node: Node, tmp_path: Path) -> None:
    archive = tmp_path / "empty.tar"
    BuiltImage(()).write_docker(archive, "empty:1")
    (image,) = await node.puller.import_archive(archive)
    snapshot = await node.snapshots.prepare("c1", image, target=node.target("c1"))
    assert list(snapshot.target.iterdir()) == []
    (snapshot.target / "x").write_text("")
    volume = node.run / "volume"
    await node.snapshots.mount_image("c1", image, target=volume)
    assert list(volume.iterdir()) == []


async def test_more_layers_than_a_page_of_options_holds(node: Node, tmp_path: Path) -> None:
    archive = tmp_path / "deep.tar"
    layers = tuple(make_tar([entry(f"f{number}", str(number)), entry("same", str(number))]) for number in range(60))
    BuiltImage(layers).write_docker(archive, "deep:1")
    (image,) = await node.puller.import_archive(archive)
    assert sum(len(str(node.images.layers.path(number))) for number in image.layers) > 4096
    snapshot = await node.snapshots.prepare("c1", image, target=node.target("c1"))
    await node.snapshots.mount_image("c1", image, target=node.run / "volume")
    for root in (snapshot.target, node.run / "volume"):
        assert [(root / f"f{number}").read_text() for number in range(60)] == [str(number) for number in range(60)]
        assert (root / "same").read_text() == "59"
    (snapshot.target / "written").touch()
    assert (snapshot.upper / "written").exists()
    assert Path.cwd() != snapshot.target.parent  # only one thread changes its working folder
    await node.snapshots.unmount("c1", node.run / "volume")
    await node.snapshots.unmount("c1", node.target("c1"))
    await node.snapshots.remove("c1")
    assert [path.name for path in node.run.rglob("*")] == ["containers", "c1"]
    await node.store.remove(image.id)
    assert await node.leftovers() == {}


def test_more_layers_than_the_kernel_supports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LimitError, match="501 layers is over the kernel's limit of 500"):
        mount_overlay(tmp_path, [tmp_path] * 501, None, "")
    lower = [tmp_path / str(number) for number in range(501)]
    for folder in lower:
        folder.mkdir()
    (tmp_path / "target").mkdir()
    mount_overlay(tmp_path / "target", lower[:500], None, "", mounts.MS_RDONLY)
    mounts.unmount(tmp_path / "target")
    monkeypatch.setattr("images.snapshots.overlay.MAX_LAYERS", 501)
    with pytest.raises(OSError, match="Invalid argument"):
        mount_overlay(tmp_path / "target", lower, None, "", mounts.MS_RDONLY)


async def test_many_containers_at_once(node: Node, image: Image) -> None:
    names = [f"c{number}" for number in range(40)]
    prepare = node.snapshots.prepare
    await asyncio.gather(*(prepare(name, image, target=node.target(name)) for name in names))
    assert len(mounts.mounts_below(node.run)) == 40
    await asyncio.gather(*(node.snapshots.unmount(name, node.target(name)) for name in names))
    await asyncio.gather(*(node.snapshots.remove(name) for name in names), node.store.remove(image.id))
    assert await node.leftovers() == {}
