"""The layers of this node: unpacked once, numbered, and shared by all images and containers that use them."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from host.concurrency.tasks import SingleFlight, uninterrupted
from host.concurrency.threads import in_image_thread, in_long_thread
from host.database import Database
from host.errors import LimitError, NoSpaceError, PodkeelError
from images.content.disk_sync import DiskSync
from images.content.free_space import FreeSpace
from images.content.ingest import PartialBlobs
from images.content.layer_source import LayerSource
from images.content.progress import LayerProgress
from images.content.trash import Trash
from images.layers import layer_rows
from images.layers.fetch import LayerFetcher
from images.layers.layer import Layer
from images.layers.layer_making import LayerFolders, LayerMaker
from images.oci.digests import is_digest
from images.options import ImageOptions

_log = logging.getLogger("podkeel.images")

EMPTY_LAYER = 0  # an empty folder, for images without layers


@dataclass(frozen=True, slots=True)
class _Dropped:
    """A layer without users, the digest of its blob if no other layer uses that, and whether it was new."""

    layer: Layer
    blob: str
    new: bool


class LayerStore:
    """Keeps each layer in ``layers/<number>/fs`` of the data folder. Deletes a layer when it has no users.

    Images and snapshots use layers as long as they exist, pulls while they run. ``retain`` and ``release`` count users.
    """

    def __init__(self, options: ImageOptions, data_dir: Path, database: Database, trash: Trash) -> None:
        self._options = options
        self._folders = LayerFolders(data_dir)
        self._database = database
        self._trash = trash
        self._layers: dict[int, Layer] = {}
        self._by_chain: dict[str, Layer] = {}
        self._users: Counter[int] = Counter()
        self._blob_users: Counter[str] = Counter()
        self._making: SingleFlight[tuple[str, str], Layer] = SingleFlight("the pull was ended: the agent is stopping")
        self._new: set[int] = set()  # layers whose pull may still fail; their blobs are then kept as partial ones
        self._scratches = itertools.count()
        self.partials = PartialBlobs(self._folders.content / "partial", trash, options.partial_hours * 3600)
        disk = DiskSync(self._folders.layers)
        self._free_space = FreeSpace(data_dir, options, trash)
        self.fetcher = LayerFetcher(options, self.partials, trash, disk, self._free_space, blob_path=self._folders.blob)
        self._maker = LayerMaker(
            options,
            self._folders,
            database,
            trash=trash,
            partials=self.partials,
            fetcher=self.fetcher,
            disk=disk,
            index=self,
        )
        self._used_bytes = 0
        self._used_inodes = 0

    @property
    def used_bytes(self) -> int:
        """The size of layers and compressed layers on disk, including partial ones."""
        return self._used_bytes + self.partials.used_bytes

    @property
    def used_inodes(self) -> int:
        """The inodes of layers and compressed layers, including partial ones."""
        return self._used_inodes + self.partials.used_inodes

    async def start(self) -> None:
        """Read the layers. Ignores those that a crash left incomplete."""
        folders = self._folders
        for folder in (folders.layers, folders.content):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # images hold set-user-id programs, which other users of the node must not run
        algorithms = [folders.content / name for name in ("sha256", "sha512")]
        for folder in (folders.files(EMPTY_LAYER), *algorithms, folders.incoming):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        await self.partials.start()
        rows = self._database.read(
            "SELECT number, chain_id, diff_id, blob_digest, blob_bytes, used_bytes, used_inodes, opaque, "
            "tree_digest, ready FROM layers WHERE ready AND number > 0"
        )
        lost = 0
        for row in rows:
            layer = Layer(row[0], row[1], row[2], row[3], row[4], row[5], row[6], bool(row[7]), row[8])
            if not self.path(layer.number).is_dir():
                lost += 1
                continue
            if layer.blob_digest and not (
                is_digest(layer.blob_digest) and self._folders.blob(layer.blob_digest).is_file()
            ):
                layer = replace(layer, blob_digest="")
            self.add(layer, new=row[9] == layer_rows.NEW)
        if lost:
            _log.warning("layers: files of %d layers are missing: images that use them are removed", lost)

    async def sweep(self) -> None:
        """Delete layers without users, and folders and blobs that have no layer. Call it when all users are known.

        The blobs of pulls that a crash interrupted are kept as partial blobs.
        """
        dropped = [self._forget(number) for number in tuple(self._layers) if not self._users[number]]
        await self._maker.throw(self._folders.blob(gone.blob) for gone in dropped if gone.blob and not gone.new)
        known = set(self._layers)
        await self._database.write(lambda connection: layer_rows.delete_others(connection, known))
        for digest in await in_long_thread(self._sweep_folders, known, set(self._blob_users)):
            await self.partials.keep(digest, self._folders.blob(digest))
        self._trash.wake()

    async def close(self) -> None:
        """Cancel running pulls of layers. The next start undoes what is left."""
        await self._making.close()
        await self.partials.close()
        self.fetcher.close()

    def path(self, number: int) -> Path:
        """The folder with the files of a layer."""
        return self._folders.files(number)

    def blob(self, digest: str) -> Path | None:
        """The path of the compressed layer; None if it was not kept."""
        return self._folders.blob(digest) if digest in self._blob_users else None

    def by_chain(self, chain_id: str) -> Layer | None:
        """The layer with that chain ID."""
        return self._by_chain.get(chain_id)

    def uses_blob(self, digest: str) -> bool:
        """Whether a layer uses that blob."""
        return digest in self._blob_users

    def get(self, number: int) -> Layer | None:
        """The layer with that number."""
        return self._layers.get(number)

    def all(self) -> Collection[Layer]:
        """All layers."""
        return self._layers.values()

    def has(self, numbers: Iterable[int]) -> bool:
        """Whether all these layers exist."""
        return all(number in self._layers or number == EMPTY_LAYER for number in numbers)

    def progress(self, source: LayerSource) -> LayerProgress:
        """The progress of a layer that a pull obtains."""
        return self.fetcher.transfers.progress(source, there=source.chain_id in self._by_chain)

    def retain(self, numbers: Iterable[int]) -> None:
        """Count one more user of each."""
        self._users.update(numbers)

    async def release(self, numbers: Iterable[int]) -> None:
        """Count one user less of each layer, and delete those that have none left."""
        unused = []
        for number in numbers:
            self._users[number] -= 1
            if self._users[number] <= 0:
                del self._users[number]
                if number in self._layers:
                    unused.append(self._forget(number))
        if unused:
            await uninterrupted(self._drop(unused))

    async def obtain(self, source: LayerSource, below: Sequence[asyncio.Future[Layer]]) -> Layer:
        """The layer, retained for the caller. If it does not exist, it is fetched and unpacked, once for all callers.

        Pulls that need it from the same registry take turns: if one fails or is cancelled, the next one continues at
        once with its own connection and credentials. No pull waits for another registry, or gets the error of another
        pull. ``below`` are the layers below, lowest first, which the same pull obtains.
        """
        while True:
            layer = self._by_chain.get(source.chain_id)
            if layer is None:
                try:
                    with self.fetcher.slots.want(source.wanted, source.origin):
                        layer = await self._making.by_turns(source.key, lambda: self._make(source, below))
                except asyncio.CancelledError:
                    await self._drop_if_unused(source.chain_id)
                    raise
            if (
                layer.number in self._layers
            ):  # otherwise another user retained and released it before this task continued
                self.retain((layer.number,))
                return layer

    async def obtain_all(self, sources: Sequence[LayerSource], subject: str) -> list[Layer]:
        """The layers of the image ``subject``, lowest first, each as from ``obtain``.

        Raises LimitError as soon as they have more than ``images.max_image_bytes``.
        """
        most = self._options.max_image_bytes
        used = sum(max(0, source.descriptor.size) for source in sources)
        if used > most:
            raise LimitError(f"{subject} is over the limits: its compressed layers have {used} bytes, {_limit(most)}")
        await self._free_space.require(self._least_bytes(sources), subject)
        used = 0

        async def counted(source: LayerSource, below: Sequence[asyncio.Future[Layer]]) -> Layer:
            nonlocal used
            layer = await self.obtain(source, below)
            used += layer.used_bytes
            if used > most:
                await self.release((layer.number,))
                raise LimitError(f"{subject} is over the limits: its layers take {used} bytes and more, {_limit(most)}")
            return layer

        tasks: list[asyncio.Task[Layer]] = []
        for source in sources:
            tasks.append(asyncio.create_task(counted(source, tuple(tasks))))
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            done = [task.result() for task in tasks if not task.cancelled() and task.exception() is None]
            await self.release([layer.number for layer in done])
            raise

    def _least_bytes(self, sources: Sequence[LayerSource]) -> int:
        """What the missing layers take on the disk, at least: files take no less than they do compressed."""
        missing = [source for source in sources if source.chain_id not in self._by_chain]
        files = sum(max(0, source.descriptor.size) for source in missing)
        if not self._options.keep_blobs:
            return files
        blobs = {source.descriptor.digest: max(0, source.descriptor.size) for source in missing}
        present = [self.partials.size(digest) for digest in blobs if digest not in self._blob_users]
        kept = sum(size for digest, size in blobs.items() if digest in self._blob_users)
        return files + sum(blobs.values()) - kept - sum(present)

    def mark_used(self, numbers: Iterable[int]) -> None:
        """Record that an image uses these layers, so that they do not depend on a pull any more."""
        self._new.difference_update(numbers)

    async def _make(self, source: LayerSource, below: Sequence[asyncio.Future[Layer]]) -> Layer:
        made = self._by_chain.get(source.chain_id)
        if made is not None:  # a pull from another registry made it while this one waited for its turn
            return made
        with self.fetcher.transfers.making(source) as transfer, self._trash.held():
            try:
                return await self._maker.make(transfer, below)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise NoSpaceError(f"{source.subject} could not be unpacked, the disk is full: {error}") from error

    def add(self, layer: Layer, *, new: bool) -> None:
        """Add a layer. ``new``: the pull that made it may still fail."""
        if new:
            self._new.add(layer.number)
        self._layers[layer.number] = layer
        self._by_chain[layer.chain_id] = layer
        self._used_bytes += layer.used_bytes
        self._used_inodes += layer.used_inodes
        if layer.blob_digest:
            self._blob_users[layer.blob_digest] += 1
            if self._blob_users[layer.blob_digest] == 1:
                self._used_bytes += layer.blob_bytes
                self._used_inodes += 1

    def _forget(self, number: int) -> _Dropped:
        """Remove the layer from memory."""
        layer = self._layers.pop(number)
        del self._by_chain[layer.chain_id]
        new = number in self._new
        self._new.discard(number)
        self._used_bytes -= layer.used_bytes
        self._used_inodes -= layer.used_inodes
        if not layer.blob_digest:
            return _Dropped(layer, "", new)
        self._blob_users[layer.blob_digest] -= 1
        if self._blob_users[layer.blob_digest]:
            return _Dropped(layer, "", new)
        del self._blob_users[layer.blob_digest]
        self._used_bytes -= layer.blob_bytes
        self._used_inodes -= 1
        return _Dropped(layer, layer.blob_digest, new)

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """Provide an empty folder on the layers' file system. It is deleted after the block or at the next start."""
        folder = self._folders.incoming / f"check-{next(self._scratches)}"
        await in_image_thread((folder / "fs").mkdir, mode=0o755, parents=True)
        try:
            yield folder / "fs"
        finally:
            await self._maker.throw((folder,))
            await self._trash.emptied()

    async def retire(self, number: int) -> None:
        """Stop giving the layer to new users. Success if it does not exist."""
        layer = self._layers.get(number)
        if layer is None or layer.retired:
            return
        retired = layer.retire()
        del self._by_chain[layer.chain_id]
        self._layers[number] = self._by_chain[retired.chain_id] = retired
        await self._database.write(lambda connection: layer_rows.retire(connection, retired))

    async def drop_blob(self, digest: str) -> None:
        """Delete the compressed layer. Success if it is not kept."""
        users = [layer for layer in self._layers.values() if layer.blob_digest == digest]
        if not digest or not users:
            return
        for layer in users:
            self._layers[layer.number] = self._by_chain[layer.chain_id] = replace(layer, blob_digest="")
        del self._blob_users[digest]
        self._used_bytes -= users[0].blob_bytes
        self._used_inodes -= 1
        await uninterrupted(self._delete_blob(digest))

    async def _delete_blob(self, digest: str) -> None:
        await self._database.write(lambda connection: layer_rows.forget_blob(connection, digest))
        await self._maker.throw([self._folders.blob(digest)])

    async def _drop_if_unused(self, chain_id: str) -> None:
        layer = self._by_chain.get(chain_id)
        if layer is not None and not self._users[layer.number]:
            await uninterrupted(self._drop([self._forget(layer.number)]))

    async def _drop(self, dropped: list[_Dropped]) -> None:
        await self._maker.delete_rows(gone.layer.number for gone in dropped)
        paths = [self._folders.layers / str(gone.layer.number) for gone in dropped]
        # A pull may have fetched the same blob again since.
        blobs = [gone for gone in dropped if gone.blob and gone.blob not in self._blob_users]
        for gone in blobs:
            if gone.new:
                await self.partials.keep(gone.blob, self._folders.blob(gone.blob))
            else:
                paths.append(self._folders.blob(gone.blob))
        await self._maker.throw(paths)

    async def drop_fetched(self, blobs: Iterable[str], error: PodkeelError) -> None:
        """Delete the fetched bytes of ``blobs``, whose pull failed with ``error`` and would fail again.

        If the disk was full, delete all partial blobs, and return when they are deleted.
        """
        if isinstance(error, NoSpaceError):
            await self.partials.drop_all()
            await self._trash.emptied()
        else:
            await self.partials.drop(blobs)

    def _sweep_folders(self, layers: set[int], blobs: set[str]) -> list[str]:
        """Throw away folders without a layer. Returns the digests of blobs without a layer."""
        keep = {str(number) for number in layers} | {str(EMPTY_LAYER)}
        for path in self._folders.layers.iterdir():
            if path.name not in keep:
                self._trash.throw(path)
        for path in self._folders.incoming.iterdir():
            self._trash.throw(path)
        found = [
            f"{name}:{path.name}" for name in ("sha256", "sha512") for path in (self._folders.content / name).iterdir()
        ]
        return [digest for digest in found if digest not in blobs]


def _limit(most: int) -> str:
    return f"and the limit is {most} (images.max_image_bytes)"
