"""Fetches one layer, or resumes its ingest, and unpacks it while it arrives."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, NodeLimitError, NoSpaceError, PodkeelError
from images.chunked.partial import assembled, may_be_partial
from images.content.disk_sync import DiskSync
from images.content.free_space import FreeSpace
from images.content.ingest import PartialBlob, PartialBlobs, new_blob
from images.content.progress import Transfer, Transfers
from images.content.slots import Origin, Slot, Slots
from images.content.trash import Trash
from images.oci.manifests import Descriptor
from images.options import ImageOptions
from images.unpack.unpacker import Unpacker
from images.unpack.worker_report import Unpacked

_log = logging.getLogger("podkeel.images")


class LayerFetcher:
    """Fetches and unpacks layers, as many at the same time as ``slots`` allows."""

    def __init__(
        self,
        options: ImageOptions,
        partials: PartialBlobs,
        trash: Trash,
        disk: DiskSync,
        free_space: FreeSpace,
        *,
        blob_path: Callable[[str], Path],
    ) -> None:
        self._options = options
        self._blob_path = blob_path
        self._disk = disk
        self._partials = partials
        self._trash = trash
        self._free_space = free_space
        self.slots = Slots(options.max_parallel_downloads)
        self._unpacker: Unpacker | None = None
        self.transfers = Transfers()

    def close(self) -> None:
        """Stop the threads of the unpacker."""
        if self._unpacker is not None:
            self._unpacker.close()

    async def fetch(self, transfer: Transfer, folder: Path, incoming: Path, kept: Path) -> Unpacked:
        """Unpack the layer to ``folder``, which is created. Errors as ``Unpacker.unpack`` and ``Slots.slot``.

        Afterwards its blob is at ``incoming``, and also in the partial blobs if the source is resumable. Bytes on the
        disk are used first: the partial blob, or the blob at ``kept``, which another layer may have. If they are
        damaged, the whole layer is fetched. No file is opened before the layer has its slot. If there are none, and
        the layer can be put together from kept layers, only the rest is fetched.
        """
        source = transfer.source
        async with AsyncExitStack() as stack:
            alone = False
            if self._options.keep_blobs and source.resumable:
                lock = self._partials.locked(source.descriptor.digest, source.origin.registry)
                alone = await stack.enter_async_context(lock)
            slot = await stack.enter_async_context(self.slots.slot(source.origin, source.subject, source.wanted))
            keep = None
            if alone:
                keep = await stack.enter_async_context(self._partials.opened(source.descriptor.digest, kept))
                if not keep.size and (made := await self._partial(transfer, slot, folder, incoming)) is not None:
                    return made
            elif self._options.keep_blobs:
                keep = await stack.enter_async_context(new_blob(incoming))
            unpacked = await self._fetch_again_if_damaged(transfer, slot, folder, keep)
            if keep is not None and alone:
                # A separate hard link, because other pulls may now resume or delete the partial blob.
                await in_image_thread(incoming.hardlink_to, keep.path)
        return unpacked

    async def _partial(self, transfer: Transfer, slot: Slot, folder: Path, incoming: Path) -> Unpacked | None:
        """Put the layer together, as ``fetch``; None, and nothing is left, if it has to be fetched whole."""
        source = transfer.source
        if not self._options.partial_pulls or not may_be_partial(source):
            return None
        parts = incoming.with_name(f"{incoming.name}.parts")
        try:
            async with assembled(self._options, transfer, slot, parts, self._blob_path) as layer:
                if layer is None:
                    return None
                await in_image_thread(folder.mkdir, mode=0o755, parents=True)
                async with new_blob(incoming) as keep:
                    chunks = self._free_space.watched(layer.chunks(), source.subject)
                    with self._disk.ahead():
                        unpacked = await self._worker().unpack(chunks, layer.descriptor, folder, keep, source.subject)
            if unpacked.diff_id == source.diff_id:
                return unpacked
            _log.warning("%s: partial pull: unpacked, its digest is %s", source.subject, unpacked.diff_id)
        except (NoSpaceError, NodeLimitError):
            raise
        except (PodkeelError, OSError) as error:
            _log.warning("%s: partial pull: failed, fetching the whole layer: %s", source.subject, error)
        finally:
            await self._throw(parts)
        await self._throw(folder, incoming)
        return None

    async def _throw(self, *paths: Path) -> None:
        if any(await in_image_thread(lambda: [self._trash.throw(path) for path in paths])):
            self._trash.wake()

    async def _fetch_again_if_damaged(
        self, transfer: Transfer, slot: Slot, folder: Path, keep: PartialBlob | None
    ) -> Unpacked:
        source = transfer.source
        if keep is not None and keep.size > source.descriptor.size >= 0:
            await in_image_thread(keep.restart)
        await in_image_thread(folder.mkdir, mode=0o755, parents=True)
        try:
            return await self._fetch(transfer, slot, folder, keep)
        except InvalidArgumentError as error:
            if keep is None or not keep.size:
                raise
            _log.warning("%s: partial blob cannot be used, fetching it from the start: %s", source.subject, error)
        await in_image_thread(keep.restart)
        await in_image_thread(self._trash.throw, folder)
        self._trash.wake()
        await in_image_thread(folder.mkdir, mode=0o755)
        return await self._fetch(transfer, slot, folder, keep)

    async def _fetch(self, transfer: Transfer, slot: Slot, folder: Path, keep: PartialBlob | None) -> Unpacked:
        source = transfer.source
        chunks = self._free_space.watched(transfer.chunks(keep, slot), source.subject)
        with self._disk.ahead():
            return await self._worker().unpack(chunks, source.descriptor, folder, keep, source.subject)

    async def unpack(
        self, chunks: AsyncGenerator[bytes, None], descriptor: Descriptor, folder: Path, subject: str
    ) -> Unpacked:
        """Unpack a layer to ``folder`` outside of the store. Raises the errors of ``Unpacker.unpack``."""
        async with self.slots.slot(Origin(), subject):
            return await self._worker().unpack(chunks, descriptor, folder, None, subject)

    def _worker(self) -> Unpacker:
        if self._unpacker is None:
            self._unpacker = Unpacker(
                max_bytes=self._options.max_layer_bytes,
                max_entries=self._options.max_layer_entries,
                max_seconds=self._options.max_layer_seconds,
                parallel=self.slots.limit,
            )
        return self._unpacker
