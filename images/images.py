"""The images room as one object, which opens, provides and closes its parts."""

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
    """The parts of the images room.

    ``store`` finds images, ``puller`` fetches them, ``exporter`` writes them to archives and registries, ``checker``
    finds broken ones, ``snapshots`` makes the root file systems of containers.
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
        """Read the store. Undo pulls that a crash interrupted, and finish interrupted removals."""
        self._trash.start()
        await self.layers.start()
        await self.snapshots.start()  # before the images: it may restore layers from their rows
        await self.store.load()
        await self.layers.sweep()

    async def close(self) -> None:
        """Cancel running pulls with their clean-up, and stop background work."""
        await self.puller.close()
        await self.snapshots.close()
        await self.layers.close()
        await self._trash.close()

    async def emptied(self) -> None:
        """Wait until everything that was removed is deleted from the disk."""
        await self._trash.emptied()

    async def disk_usage(self) -> DiskUsage:
        """The size of each image on disk, and how much of it is shared."""
        rows = await in_stats_thread(
            self._database.read, "SELECT image_id, count(DISTINCT container_id) FROM snapshots GROUP BY image_id"
        )
        used = self.snapshots.filesystem_usage().used_bytes
        return disk_usage(self.store.images(), self.layers, dict(rows), used)
