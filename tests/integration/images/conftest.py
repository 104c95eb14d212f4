from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from host.database import Database
from host.files import mounts
from images.checker import ImageChecker
from images.exporter import Exporter
from images.images import Images
from images.options import ImageOptions
from images.puller import ImagePuller
from images.schema import MIGRATIONS
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from tests.support.image_builder import BuiltImage, busybox_layer
from tests.support.registry import Registry, run_registry

if os.geteuid() != 0:
    pytest.skip("needs root", allow_module_level=True)


@dataclass
class Node:
    """A data and a run folder with an image store. ``restart`` opens it again, as a new process would."""

    root: Path
    options: ImageOptions = field(default_factory=ImageOptions)
    database: Database = field(init=False)
    images: Images = field(init=False)

    @property
    def store(self) -> ImageStore:
        return self.images.store

    @property
    def puller(self) -> ImagePuller:
        return self.images.puller

    @property
    def exporter(self) -> Exporter:
        return self.images.exporter

    @property
    def checker(self) -> ImageChecker:
        return self.images.checker

    @property
    def snapshots(self) -> SnapshotStore:
        return self.images.snapshots

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def run(self) -> Path:
        return self.root / "run"

    async def start(self) -> None:
        self.data.mkdir(exist_ok=True, parents=True)
        self.run.mkdir(exist_ok=True)
        self.database = Database(self.data / "podkeel.db", {"images": MIGRATIONS})
        self.images = Images(self.options, self.data, self.database)
        await self.images.start()

    async def stop(self) -> None:
        await self.images.close()
        self.database.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def target(self, container_id: str) -> Path:
        return self.run / "containers" / container_id / "rootfs"

    async def leftovers(self) -> dict[str, list[str]]:
        """The layers and blobs on disk, and the rows of the store's tables."""
        await self.images.emptied()
        found = {
            name: sorted(path.name for path in (self.data / name).iterdir())
            for name in ("layers", "content/incoming", "content/partial", "content/sha256", "trash", "containers")
        }
        for table in ("images", "image_references", "image_layers", "layers", "snapshots"):
            found[table] = [str(row) for row in self.database.read(f"SELECT * FROM {table}")]
        found["mounts"] = mounts.mounts_below(self.root)
        return {name: items for name, items in found.items() if items and items != ["0"]}

    async def forget_partials(self) -> list[str]:
        """Drop the partial blobs that an interrupted pull may leave. Returns their names."""
        names = sorted(path.name for path in (self.data / "content/partial").iterdir())
        await self.images.layers.partials.drop_all()
        return names


@pytest.fixture
async def new_node(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Node]]]:
    """Makes nodes with the given options, each in a separate folder."""
    async with AsyncExitStack() as stack:
        count = 0

        async def make(**options: object) -> Node:
            nonlocal count
            count += 1
            options.setdefault("registry_config_dir", str(tmp_path / "certs.d"))
            node = Node(tmp_path / f"node{count}", ImageOptions(**options))  # type: ignore[arg-type]  # by keyword
            await node.start()
            stack.push_async_callback(node.stop)
            stack.callback(lambda: [mounts.unmount(target) for target in mounts.mounts_below(node.root)])
            return node

        yield make


@pytest.fixture
async def node(new_node: Callable[..., Awaitable[Node]]) -> Node:
    return await new_node()


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with run_registry() as running:
        yield running


@pytest.fixture(scope="session")
def busybox() -> BuiltImage:
    return BuiltImage((busybox_layer(),), {"Cmd": ["sh"], "User": "1000"})
