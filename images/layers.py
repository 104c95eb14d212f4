"""The layers of this node: unpacked once, numbered, counted, shared by all images and containers that have them."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from host.database import Database
from host.errors import InvalidArgumentError, PodkeelError
from host.threads import in_thread
from host.undo import Undo
from images import layer_rows
from images.inheritance import inherit
from images.joining import Joined
from images.layer import Layer
from images.layer_source import LayerSource
from images.manifests import Descriptor
from images.options import ImageOptions
from images.progress import LayerProgress, Transfers
from images.trash import Trash
from images.unpacking import Unpacked, Unpacker

_log = logging.getLogger("podkeel.images")

SYNC_DELAY = 45.0  # seconds: by then the kernel has written most of it by itself, and nobody has to wait for the rest
EMPTY_LAYER = 0  # an always empty folder, for images without layers


class LayerStore:
    """Keeps each layer in ``layers/<number>/fs`` of the data folder; a layer nobody uses any more is dropped.

    Images and snapshots use layers for as long as they exist, pulls while they run: ``retain`` and ``release`` count.
    """

    def __init__(self, options: ImageOptions, data_dir: Path, database: Database, trash: Trash) -> None:
        self._options = options
        self._folder = data_dir / "layers"
        self._content = data_dir / "content"
        self._incoming = data_dir / "content" / "incoming"
        self._database = database
        self._trash = trash
        self._layers: dict[int, Layer] = {}
        self._by_chain: dict[str, Layer] = {}
        self._users: Counter[int] = Counter()
        self._blob_users: Counter[str] = Counter()
        self._joined: Joined[Layer] = Joined()
        self._transfers = Transfers()
        self._slots = asyncio.Semaphore(options.max_parallel_downloads)
        self._unpacker: Unpacker | None = None
        self._unsynced: set[int] = set()
        self._scratches = itertools.count()
        self._sync_task: asyncio.Task[None] | None = None
        self._boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self.used_bytes = 0
        self.used_inodes = 0

    async def start(self) -> None:
        """Read the layers, forgetting those that a crash left half-made or unwritten to the disk."""
        algorithms = [self._content / name for name in ("sha256", "sha512")]
        for folder in (self._folder / str(EMPTY_LAYER) / "fs", *algorithms, self._incoming):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        rows = self._database.read(
            "SELECT number, chain_id, diff_id, blob_digest, blob_bytes, used_bytes, used_inodes, opaque, unsynced_boot "
            "FROM layers WHERE ready"
        )
        lost = []
        for row in rows:
            unsynced = row[8]
            layer = Layer(row[0], row[1], row[2], row[3], row[4], row[5], row[6], bool(row[7]))
            if (unsynced and unsynced != self._boot_id) or not self.path(layer.number).is_dir():
                lost.append(layer.chain_id)
                continue
            self._add(layer)
            if unsynced:
                self._unsynced.add(layer.number)
        if lost:
            _log.warning(
                "%d layers were lost with the machine's last stop; images that had them are dropped", len(lost)
            )
        if self._unsynced:
            self._sync_soon()

    async def sweep(self) -> None:
        """After the users are known: drop what nobody uses, and folders and blobs that the store does not know."""
        unused = [number for number in self._layers if not self._users[number]]
        for number in unused:
            self._forget(number)
        known = set(self._layers)
        await self._database.write(lambda connection: layer_rows.delete_others(connection, known))
        await in_thread(self._sweep_folders, known, set(self._blob_users))
        self._trash.wake()

    async def close(self) -> None:
        """Cancel what is being unpacked; a start later undoes the rest."""
        await self._joined.close()
        if self._sync_task is not None:
            self._sync_task.cancel()
            await asyncio.wait((self._sync_task,))
        if self._unpacker is not None:
            self._unpacker.close()

    def path(self, number: int) -> Path:
        """The folder of a layer's files."""
        return self._folder / str(number) / "fs"

    def blob(self, digest: str) -> Path | None:
        """The compressed form of a layer, if it was kept."""
        return self._blob_path(digest) if digest in self._blob_users else None

    def _blob_path(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        return self._content / algorithm / name

    def get(self, number: int) -> Layer | None:
        """The layer of that number."""
        return self._layers.get(number)

    def all(self) -> Collection[Layer]:
        """Every layer there is."""
        return self._layers.values()

    def has(self, numbers: Iterable[int]) -> bool:
        """Whether all of them are there."""
        return all(number in self._layers or number == EMPTY_LAYER for number in numbers)

    def progress(self, source: LayerSource) -> LayerProgress:
        """How far a layer is that somebody obtains."""
        return self._transfers.progress(source, there=source.chain_id in self._by_chain)

    def retain(self, numbers: Iterable[int]) -> None:
        """Count one more user of each."""
        self._users.update(numbers)

    async def release(self, numbers: Iterable[int]) -> None:
        """Count one user less of each, and drop those that have none left."""
        unused = []
        for number in numbers:
            self._users[number] -= 1
            if self._users[number] <= 0:
                del self._users[number]
                if number in self._layers:
                    unused.append(self._forget(number))
        if unused:
            await self._drop(unused)

    async def obtain(self, source: LayerSource) -> Layer:
        """The layer, retained for the caller; unpacked now, once for all who want it, if it is not there."""
        while True:
            layer = self._by_chain.get(source.chain_id)
            if layer is None:
                try:
                    layer = await self._joined.run(source.chain_id, lambda: self._make(source))
                except asyncio.CancelledError:
                    await self._drop_if_unused(source.chain_id)
                    raise
            if layer.number in self._layers:  # otherwise another user came and went while this one was waking up
                self.retain((layer.number,))
                return layer

    async def _make(self, source: LayerSource) -> Layer:
        async with Undo(source.subject) as undo:
            number = await self._database.write(lambda connection: layer_rows.insert(connection, source, self._boot_id))
            folder = self._folder / str(number)
            incoming = self._incoming / str(number)
            undo.push("its row", lambda: self._database.execute("DELETE FROM layers WHERE number = ?", (number,)))
            undo.push("its folder", lambda: self._take_back((folder, incoming)))
            await in_thread((folder / "fs").mkdir, mode=0o755, parents=True)
            async with self._slots:
                keep = incoming if self._options.keep_blobs else None
                with self._transfers.running(source) as chunks:
                    unpacked = await self._worker().unpack(
                        chunks, source.descriptor, folder / "fs", keep, source.subject
                    )
            if unpacked.diff_id != source.diff_id:
                raise InvalidArgumentError(
                    f"{source.subject} is broken: unpacked, its digest is {unpacked.diff_id}, expected {source.diff_id}"
                )
            if unpacked.implied and source.below:
                lower = [self.path(layer.number) for layer in await self._layers_below(source)]
                await in_thread(inherit, folder / "fs", lower, unpacked.implied)
            if keep is not None:
                await in_thread(keep.rename, self._blob_path(unpacked.blob_digest))
            layer = Layer(
                number,
                source.chain_id,
                source.diff_id,
                unpacked.blob_digest if keep is not None else "",
                unpacked.blob_bytes,
                unpacked.used_bytes,
                unpacked.used_inodes,
                unpacked.opaque,
            )
            await self._database.write(lambda connection: layer_rows.complete(connection, layer))
            self._add(layer)
        self._unsynced.add(number)
        self._sync_soon()
        return layer

    async def _layers_below(self, source: LayerSource) -> list[Layer]:
        async def missing() -> Layer:
            raise PodkeelError(f"{source.subject}: a layer below it could not be unpacked")

        below = []
        for chain_id in source.below:
            below.append(self._by_chain.get(chain_id) or await self._joined.run(chain_id, missing))
        return below

    def _worker(self) -> Unpacker:
        if self._unpacker is None:
            self._unpacker = Unpacker(
                max_bytes=self._options.max_layer_bytes,
                max_entries=self._options.max_layer_entries,
                parallel=self._options.max_parallel_downloads,
            )
        return self._unpacker

    def _add(self, layer: Layer) -> None:
        self._layers[layer.number] = layer
        self._by_chain[layer.chain_id] = layer
        self.used_bytes += layer.used_bytes
        self.used_inodes += layer.used_inodes
        if layer.blob_digest:
            self._blob_users[layer.blob_digest] += 1
            if self._blob_users[layer.blob_digest] == 1:
                self.used_bytes += layer.blob_bytes
                self.used_inodes += 1

    def _forget(self, number: int) -> tuple[Layer, str]:
        """Take the layer out of memory; returns it, and the digest of its blob if that has no other user."""
        layer = self._layers.pop(number)
        del self._by_chain[layer.chain_id]
        self._unsynced.discard(number)
        self.used_bytes -= layer.used_bytes
        self.used_inodes -= layer.used_inodes
        if not layer.blob_digest:
            return layer, ""
        self._blob_users[layer.blob_digest] -= 1
        if self._blob_users[layer.blob_digest]:
            return layer, ""
        del self._blob_users[layer.blob_digest]
        self.used_bytes -= layer.blob_bytes
        self.used_inodes -= 1
        return layer, layer.blob_digest

    async def unpack(
        self, chunks: AsyncGenerator[bytes, None], descriptor: Descriptor, folder: Path, subject: str
    ) -> Unpacked:
        """Unpack a layer to ``folder`` outside of the store; errors as ``Unpacker.unpack``."""
        async with self._slots:
            return await self._worker().unpack(chunks, descriptor, folder, None, subject)

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """An empty folder on the layers' file system that goes when the block ends, or at the next start."""
        folder = self._incoming / f"check-{next(self._scratches)}"
        await in_thread((folder / "fs").mkdir, mode=0o755, parents=True)
        try:
            yield folder / "fs"
        finally:
            await self._take_back((folder,))

    async def retire(self, number: int) -> None:
        """Nobody gets the layer any more that does not have it; success if it is gone."""
        layer = self._layers.get(number)
        if layer is None or layer.retired:
            return
        retired = layer.retire()
        del self._by_chain[layer.chain_id]
        self._layers[number] = self._by_chain[retired.chain_id] = retired
        await self._database.write(lambda connection: layer_rows.retire(connection, retired))

    async def drop_blob(self, digest: str) -> None:
        """Keep the compressed form no longer; success if it is not kept."""
        users = [layer for layer in self._layers.values() if layer.blob_digest == digest]
        if not digest or not users:
            return
        for layer in users:
            self._layers[layer.number] = self._by_chain[layer.chain_id] = replace(layer, blob_digest="")
        del self._blob_users[digest]
        self.used_bytes -= users[0].blob_bytes
        self.used_inodes -= 1
        await self._database.write(lambda connection: layer_rows.forget_blob(connection, digest))
        await self._throw([self._blob_path(digest)])

    async def _drop_if_unused(self, chain_id: str) -> None:
        layer = self._by_chain.get(chain_id)
        if layer is not None and not self._users[layer.number]:
            await self._drop([self._forget(layer.number)])

    async def _drop(self, dropped: list[tuple[Layer, str]]) -> None:
        rows = [(layer.number,) for layer, _ in dropped]
        await self._database.write(
            lambda connection: connection.executemany("DELETE FROM layers WHERE number = ?", rows) and None
        )
        paths = [self._folder / str(layer.number) for layer, _ in dropped]
        # A pull may have brought the same blob again meanwhile.
        paths += [self._blob_path(digest) for _, digest in dropped if digest and digest not in self._blob_users]
        await self._throw(paths)

    async def _take_back(self, paths: Iterable[Path]) -> None:
        """Throw away and wait until it is gone: the disk may be full, and the store wants to write next."""
        await self._throw(paths)
        await self._trash.emptied()

    async def _throw(self, paths: Iterable[Path]) -> None:
        await in_thread(lambda: [self._trash.throw(path) for path in paths])
        self._trash.wake()

    def _sweep_folders(self, layers: set[int], blobs: set[str]) -> None:
        keep = {str(number) for number in layers} | {str(EMPTY_LAYER)}
        for path in self._folder.iterdir():
            if path.name not in keep:
                self._trash.throw(path)
        for path in self._incoming.iterdir():
            self._trash.throw(path)
        for algorithm in ("sha256", "sha512"):
            for path in (self._content / algorithm).iterdir():
                if f"{algorithm}:{path.name}" not in blobs:
                    self._trash.throw(path)

    def _sync_soon(self) -> None:
        if self._sync_task is None or self._sync_task.done():
            self._sync_task = asyncio.create_task(self._sync(), name="sync layers")

    async def _sync(self) -> None:
        """Write layers to the disk behind everybody's back; until that is done, a power cut costs them."""
        while self._unsynced:
            await asyncio.sleep(SYNC_DELAY)
            numbers = set(self._unsynced)
            try:
                await in_thread(sync_file_system, self._folder)
            except OSError as error:
                _log.warning("%s could not be written to the disk: %s", self._folder, error)
                return
            self._unsynced -= numbers
            await self._database.write(functools.partial(layer_rows.mark_synced, numbers=numbers))


def sync_file_system(folder: Path) -> None:
    """Write what the file system of ``folder`` has in memory to its disk (syncfs(2)); blocks until it is done."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
