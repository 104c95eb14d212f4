"""Makes one layer: fetches, unpacks, adjusts it to the layers below, and publishes it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import in_image_thread, in_long_thread
from host.concurrency.undo import Undo
from host.database import Database
from host.errors import InvalidArgumentError, LimitError, PodkeelError
from images.content.disk_sync import DiskSync
from images.content.ingest import PartialBlobs, publish
from images.content.layer_source import LayerSource
from images.content.progress import Transfer
from images.content.trash import Trash
from images.layers import layer_rows
from images.layers.fetch import LayerFetcher
from images.layers.layer import Layer
from images.options import ImageOptions
from images.unpack.inheritance import inherit, remove_needless_whiteouts
from images.unpack.trees import inspect_trees
from images.unpack.worker_report import Unpacked
from images.unpack.writing.layer_writer import DISK_BLOCK

_BATCH = 2000  # folders between two checks whether the pull was cancelled


@dataclass(frozen=True, slots=True)
class LayerFolders:
    """The paths of layers and their blobs in the data folder."""

    data: Path

    @property
    def layers(self) -> Path:
        """The folder with one folder per layer, named by its number."""
        return self.data / "layers"

    @property
    def content(self) -> Path:
        """The folder of blobs, with one folder per digest algorithm."""
        return self.data / "content"

    @property
    def incoming(self) -> Path:
        """The folder for blobs of layers that are being made, named by layer number."""
        return self.content / "incoming"

    def files(self, number: int) -> Path:
        """The folder with the files of a layer."""
        return self.layers / str(number) / "fs"

    def blob(self, digest: str) -> Path:
        """The path of the blob with that digest."""
        algorithm, _, name = digest.partition(":")
        return self.content / algorithm / name


_log = logging.getLogger("podkeel.images")


class LayerIndex(Protocol):
    """The layers on this node."""

    def by_chain(self, chain_id: str) -> Layer | None:
        """The layer with that chain ID."""

    def uses_blob(self, digest: str) -> bool:
        """Whether a layer uses that blob."""

    def add(self, layer: Layer, *, new: bool) -> None:
        """Add a layer. ``new``: the pull that made it may still fail."""


class LayerMaker:
    """Makes layers and adds them to the ``index``. If that fails, deletes everything it made."""

    def __init__(
        self,
        options: ImageOptions,
        folders: LayerFolders,
        database: Database,
        *,
        trash: Trash,
        partials: PartialBlobs,
        fetcher: LayerFetcher,
        disk: DiskSync,
        index: LayerIndex,
    ) -> None:
        self._options = options
        self._folders = folders
        self._database = database
        self._trash = trash
        self._partials = partials
        self._fetcher = fetcher
        self._index = index
        self._disk = disk
        self._publishing = asyncio.Lock()
        self._unused_rows: set[int] = set()  # unused rows that could not be deleted because the disk was full

    async def make(self, transfer: Transfer, below: Sequence[asyncio.Future[Layer]]) -> Layer:
        """Make the layer of ``transfer``, or return the one that a pull from another registry has made since.

        ``below`` are the layers below it, lowest first, which the same pull obtains. Raises the errors of
        ``LayerFetcher.fetch``.
        """
        source = transfer.source
        async with Undo(source.subject) as undo:
            number = await uninterrupted(self._insert_row(source, undo))
            making, incoming, _ = self._paths(number)
            kept = self._folders.blob(source.descriptor.digest)
            unpacked = await self._fetcher.fetch(transfer, making / "fs", incoming, kept)
            if unpacked.diff_id != source.diff_id:
                raise InvalidArgumentError(
                    f"{source.subject} is broken: unpacked, its digest is {unpacked.diff_id}, expected {source.diff_id}"
                )
            if (unpacked.implied and below) or unpacked.hiding:
                unpacked = await self._adjust_to_lower_layers(source, making / "fs", below, unpacked)
            layer = Layer(
                number,
                source.chain_id,
                source.diff_id,
                unpacked.blob_digest if self._options.keep_blobs else "",
                unpacked.blob_bytes,
                unpacked.used_bytes,
                unpacked.used_inodes,
                unpacked.opaque,
                await self._tree_digest(source, making / "fs"),
            )
            await self._disk.flush()
            async with self._publishing:
                made = self._index.by_chain(source.chain_id)
                if made is None:
                    undo.push("its blob", lambda: self._unpublish(source, layer))
                    await self._publish(source, layer, making, incoming)
                    self._index.add(layer, new=source.resumable)
            if made is not None:
                await undo.run()
        await self._partials.drop([layer.blob_digest])
        return made or layer

    async def _insert_row(self, source: LayerSource, undo: Undo) -> int:
        number = await self._database.write(lambda connection: layer_rows.insert(connection, source))
        undo.push("it", lambda: self._delete(number))
        return number

    def _paths(self, number: int) -> tuple[Path, Path, Path]:
        """The files of a layer that is being made, its blob, and the files of the complete layer."""
        layers = self._folders.layers
        return layers / f"{number}.new", self._folders.incoming / str(number), layers / str(number)

    async def _adjust_to_lower_layers(
        self, source: LayerSource, files: Path, below: Sequence[asyncio.Future[Layer]], unpacked: Unpacked
    ) -> Unpacked:
        """Wait for the layers below without holding a slot, as they may need one. Returns the new counts."""
        if below:
            await asyncio.wait(below)
        if any(layer.cancelled() or layer.exception() is not None for layer in below):
            raise PodkeelError(f"{source.subject}: a layer below it could not be unpacked")
        lower = [self._folders.files(layer.result().number) for layer in below]
        implied, hiding = unpacked.implied, unpacked.hiding
        all_implied = frozenset(implied)
        async with self._fetcher.slots.slot(source.origin, source.subject, source.wanted):
            for begin in range(0, len(hiding), _BATCH):
                shown = () if unpacked.opaque else lower
                part = hiding[begin : begin + _BATCH]
                gone, emptied = await in_long_thread(remove_needless_whiteouts, files, shown, part, all_implied)
                unpacked = msgspec.structs.replace(
                    unpacked,
                    used_inodes=unpacked.used_inodes - gone - emptied,
                    used_bytes=unpacked.used_bytes - emptied * DISK_BLOCK,
                )
            for begin in range(0, len(implied), _BATCH):
                await in_long_thread(inherit, files, lower, implied[begin : begin + _BATCH])
        return unpacked

    async def _tree_digest(self, source: LayerSource, files: Path) -> str:
        """The digest for later checks if blobs are not kept; otherwise empty."""
        if self._options.keep_blobs:
            return ""
        async with self._fetcher.slots.slot(source.origin, source.subject, source.wanted):
            return (await inspect_trees(files)).digest

    async def _publish(self, source: LayerSource, layer: Layer, making: Path, incoming: Path) -> None:
        """Rename the complete layer to its final names, after it was flushed to the disk."""
        await in_image_thread(making.rename, self._folders.layers / str(layer.number))
        if layer.blob_digest:
            await in_image_thread(publish, incoming, self._folders.blob(layer.blob_digest))
        await self._database.write(
            lambda connection: layer_rows.complete(connection, layer, resumable=source.resumable)
        )

    async def _unpublish(self, source: LayerSource, layer: Layer) -> None:
        if layer.blob_digest and not self._index.uses_blob(layer.blob_digest):
            path = self._folders.blob(layer.blob_digest)
            if source.resumable:
                await self._partials.keep(layer.blob_digest, path)
            else:
                await self.throw([path])

    async def _delete(self, number: int) -> None:
        """Undo ``make``: delete the files and the row of a layer.

        If the disk is too full to write to the database, this first waits until the files are deleted. If it is still
        full, the unused row is deleted later: with the rows of the next layers, or at the next start.
        """
        await self.throw(self._paths(number))
        try:
            await self._database.execute("DELETE FROM layers WHERE number = ?", (number,))
        except LimitError:
            await self._trash.emptied()
            await self.delete_rows([number])

    async def delete_rows(self, numbers: Iterable[int]) -> None:
        """Delete rows of layers, and those that a full disk kept before. On a full disk they stay for a later call."""
        self._unused_rows.update(numbers)
        doomed = sorted(self._unused_rows)
        try:
            await self._database.write(lambda connection: layer_rows.delete(connection, doomed))
        except LimitError as error:  # deleting the files frees space
            _log.warning("layers: rows of %d layers cannot be deleted yet: %s", len(doomed), error)
        else:
            self._unused_rows.difference_update(doomed)

    async def throw(self, paths: Iterable[Path]) -> None:
        """Delete the files; missing ones are no error."""
        await in_image_thread(lambda: [self._trash.throw(path) for path in paths])
        self._trash.wake()
