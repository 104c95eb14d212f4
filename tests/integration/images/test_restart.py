"""A process is killed at each stage of a pull, an import and a removal; then the store is opened again."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from host.errors import PodkeelError
from host.processes import run
from images.content.disk_sync import sync_file_system
from tests.integration.images.conftest import Node
from tests.support.image_builder import BuiltImage, entry, make_tar
from tests.support.registry import Registry

PROGRAM = """
import asyncio, sys
from pathlib import Path
from host import stages
from host.database import Database
from images.options import ImageOptions
from images.schema import MIGRATIONS
from images.images import Images

from tests.support.faults import Faults

async def main(root, what, argument):
    database = Database(root / "data" / "podkeel.db", {"images": MIGRATIONS})
    images = Images(ImageOptions(registry_config_dir=str(root)), root / "data", database)
    await images.start()
    if what == "import":
        await images.puller.import_archive(Path(argument))
    elif what == "prepare":
        image = images.store.find(argument)
        await images.snapshots.prepare("c1", image, target=root / "run/containers/c1/rootfs")
    else:
        await getattr(images.puller if what == "pull" else images.store, what)(argument)
    print("done")

with stages.faults_of(Faults(sys.argv[4])):
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


async def run_and_kill(node: Node, fault: str, what: str, argument: str) -> None:
    await node.stop()
    completed = await run(
        [sys.executable, "-c", PROGRAM, str(node.root), what, argument, f"{fault}:kill"],
        environment={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    await node.start()
    assert completed.status == -signal.SIGKILL, completed.stderr.decode()


@pytest.fixture
def built() -> BuiltImage:
    return BuiltImage((make_tar([entry("base", "x" * 100_000)]), make_tar([entry("top", os.urandom(100_000))])))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("stage", ["resolve", "manifest", "layers", "commit"])
async def test_a_killed_pull_leaves_partial_blobs_or_the_image(
    node: Node, registry: Registry, built: BuiltImage, stage: str, moment: str
) -> None:
    name = registry.push(built, "killed")
    await run_and_kill(node, f"PullImage.{stage}:{moment}", "pull", name)
    if (stage, moment) == ("commit", "after"):
        assert [image.id for image in node.store.images()] == [built.id]
        await node.store.remove(name)
    assert node.store.images() == ()
    fetched = (stage, moment) in (("layers", "after"), ("commit", "before"))
    assert len(await node.forget_partials()) == (2 if fetched else 0)
    assert await node.leftovers() == {}
    assert node.store.filesystem_usage().used_bytes == 0
    assert (await node.puller.pull(name)).id == built.id


async def test_a_layer_that_another_image_has_survives_a_killed_pull(
    node: Node, registry: Registry, built: BuiltImage
) -> None:
    first = await node.puller.pull(registry.push(built, "kept"))
    more = BuiltImage((*built.layers, make_tar([entry("more", "m")])))
    await run_and_kill(node, "PullImage.commit:before", "pull", registry.push(more, "more"))
    assert node.store.images() == (first,)
    assert sorted(path.name for path in (node.data / "layers").iterdir()) == ["0", *map(str, first.layers)]
    assert (node.data / f"layers/{first.layers[0]}/fs/base").stat().st_size == 100_000


@pytest.mark.parametrize("fault", ["forget:before", "forget:after", "layers:before", "layers:after"])
async def test_a_killed_removal_is_completed_or_has_no_effect(
    node: Node, registry: Registry, built: BuiltImage, fault: str
) -> None:
    image = await node.puller.pull(registry.push(built, "removed"))
    await run_and_kill(node, f"RemoveImage.{fault}", "remove", image.id)
    if fault == "forget:before":
        assert node.store.images() == (image,)
        await node.store.remove(image.id)
    assert await node.leftovers() == {}


@pytest.mark.parametrize("moment", ["layers:after", "commit:before"])
async def test_a_killed_import_leaves_nothing(node: Node, built: BuiltImage, moment: str, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    built.write_oci(archive, "named:1")
    await run_and_kill(node, f"ImportImage.{moment}", "import", str(archive))
    assert await node.leftovers() == {}


async def test_layers_are_synced_before_they_are_renamed(
    node: Node, registry: Registry, built: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], list[str], int]] = []

    def watched(folder: Path) -> None:
        assert folder == node.data / "layers"
        names = sorted(path.name for path in folder.iterdir())
        blobs = [path.name for path in (node.data / "content/sha256").iterdir()]
        (ready,) = node.database.read("SELECT count(*) FROM layers WHERE ready")
        seen.append((names, blobs, ready[0]))
        sync_file_system(folder)

    monkeypatch.setattr("images.content.disk_sync.sync_file_system", watched)
    image = await node.puller.pull(registry.push(built, "synced"))
    assert seen[0] == (["0", *(f"{number}.new" for number in image.layers)], [], 0)
    for names, blobs, ready in seen:
        assert sum(name.isdigit() for name in names) - 1 == len(blobs) == ready
    assert sorted(path.name for path in (node.data / "layers").iterdir()) == ["0", *map(str, image.layers)]


async def test_an_unwritable_disk_fails_the_pull(
    node: Node, registry: Registry, built: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    name = registry.push(built, "unsynced")
    with monkeypatch.context() as patch:
        patch.setattr("images.content.disk_sync.sync_file_system", broken)
        with pytest.raises(PodkeelError, match="could not be written to the disk"):
            await node.puller.pull(name)
    await node.forget_partials()
    assert await node.leftovers() == {}
    assert (await node.puller.pull(name)).id == built.id


async def test_a_missing_layer_folder_removes_the_image(node: Node, registry: Registry, built: BuiltImage) -> None:
    name = registry.push(built, "vanished")
    image = await node.puller.pull(name)
    await node.stop()
    await run(["rm", "-rf", str(node.data / "layers" / str(image.layers[1]))])
    await node.start()
    assert node.store.images() == ()
    again = await node.puller.pull(name)
    assert again.id == image.id
    assert node.puller.fetched_bytes < 10_000, "its blob was still there"
    assert not set(again.layers) & set(image.layers)


NewNode = Callable[..., Awaitable[Node]]


async def test_several_nodes_side_by_side(new_node: NewNode, registry: Registry, built: BuiltImage) -> None:
    name = registry.push(built, "side-by-side")
    first, second = await new_node(), await new_node()
    await first.puller.pull(name)
    await second.puller.pull(name)
    await first.store.remove(name)
    assert second.store.find(name) is not None
