"""The room of images as one object: it opens the parts, hands them out and closes them."""

from __future__ import annotations

from pathlib import Path

from host.concurrency.threads import in_stats_thread
from host.database import Database
from images.checker import ImageChecker
from images.content.trash import Trash
from images.disk_usage import DiskUsage, disk_usage
from images.exporter import Exporter
from images.layers.store import LayerStore
from images.options import ImageOptions
from images.puller import ImagePuller
from images.snapshots.store import SnapshotStore
from images.store import ImageStore


class Images:
    """Everything about images.

    ``store`` knows which there are, ``puller`` gets them, ``exporter`` writes them to archives and registries,
    ``checker`` looks for what is broken, ``snapshots`` makes containers' root file systems out of them.
    """

    def __init__(self, options: ImageOptions, data_dir: Path, database: Database) -> None:
        self._database = database
        self._trash = Trash(data_dir / "trash")
        self.layers = LayerStore(options, data_dir, database, self._trash)
        self.store = ImageStore(options, data_dir, database, self.layers)
        self.snapshots = SnapshotStore(options, data_dir, database, self.layers, self._trash)
        self.puller = ImagePuller(self.store, options, data_dir, self.layers)
        self.exporter = Exporter(self.store, options, self.layers, database)
        self.checker = ImageChecker(self.store, self.snapshots, self.layers, database)

    async def start(self) -> None:
        """Read the store; undo pulls and finish removals that a crash cut off."""
        self._trash.start()
        await self.layers.start()
        await self.snapshots.start()  # before images, of whose rows it may have to learn layers
        await self.store.load()
        await self.layers.sweep()

    async def close(self) -> None:
        """Cancel running pulls with their clean-up, and stop background work."""
        await self.puller.close()
        await self.snapshots.close()
        await self.layers.close()
        await self._trash.close()

    async def emptied(self) -> None:
        """Wait until what was removed has left the disk."""
        await self._trash.emptied()

    async def disk_usage(self) -> DiskUsage:
        """The size of each image on disk, and what they share."""
        rows = await in_stats_thread(
            self._database.read, "SELECT image_id, count(DISTINCT container_id) FROM snapshots GROUP BY image_id"
        )
        used = self.snapshots.filesystem_usage().used_bytes
        return disk_usage(self.store.images(), self.layers, dict(rows), used)
