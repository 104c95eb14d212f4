"""The layers of this node: unpacked once, numbered, counted, shared by all images and containers that have them."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from host.database import Database
from host.errors import InvalidArgumentError, LimitError, PodkeelError
from host.threads import in_image_thread, in_long_thread
from host.undo import Undo
from images import layer_rows
from images.disk_sync import DiskSync
from images.fetching import LayerFetcher
from images.inheritance import inherit
from images.joining import Joined
from images.layer import Layer
from images.layer_source import LayerSource
from images.options import ImageOptions
from images.partials import PartialBlobs, publish
from images.progress import LayerProgress
from images.trash import Trash
from images.trees import look_at

_log = logging.getLogger("podkeel.images")

EMPTY_LAYER = 0  # an always empty folder, for images without layers


@dataclass(frozen=True, slots=True)
class _Dropped:
    """A layer that nobody uses any more, the digest of its blob if that has no other user, and whether it was new."""

    layer: Layer
    blob: str
    new: bool


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
        self._new: set[int] = set()  # made for pulls that may yet break off: their blobs are worth keeping then
        self._scratches = itertools.count()
        self._disk = DiskSync(self._folder)
        self.partials = PartialBlobs(self._content / "partial", trash, options.partial_hours * 3600)
        self.fetcher = LayerFetcher(options, self.partials, trash)
        self._used_bytes = 0
        self._used_inodes = 0

    @property
    def used_bytes(self) -> int:
        """What layers and compressed layers take on disk, partial ones included."""
        return self._used_bytes + self.partials.used_bytes

    @property
    def used_inodes(self) -> int:
        """The same in inodes."""
        return self._used_inodes + self.partials.used_inodes

    async def start(self) -> None:
        """Read the layers, forgetting those that a crash left half-made."""
        for folder in (self._folder, self._content):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)  # images hold set-user-id programs, which nobody else on the node may run
        algorithms = [self._content / name for name in ("sha256", "sha512")]
        for folder in (self._folder / str(EMPTY_LAYER) / "fs", *algorithms, self._incoming):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        await self.partials.start()
        rows = self._database.read(
            "SELECT number, chain_id, diff_id, blob_digest, blob_bytes, used_bytes, used_inodes, opaque, "
            "tree_digest, ready FROM layers WHERE ready"
        )
        lost = 0
        for row in rows:
            layer = Layer(row[0], row[1], row[2], row[3], row[4], row[5], row[6], bool(row[7]), row[8])
            if not self.path(layer.number).is_dir():
                lost += 1
                continue
            if layer.blob_digest and not self._blob_path(layer.blob_digest).is_file():
                layer = replace(layer, blob_digest="")
            self._add(layer)
            if row[9] == layer_rows.NEW:
                self._new.add(layer.number)
        if lost:
            _log.warning("%d layers were lost with the machine's last stop; images that had them are dropped", lost)

    async def sweep(self) -> None:
        """After the users are known: drop what nobody uses, and folders and blobs that the store does not know.

        The blobs of pulls that a crash broke off are kept as partial ones.
        """
        dropped = [self._forget(number) for number in tuple(self._layers) if not self._users[number]]
        await self._throw(self._blob_path(gone.blob) for gone in dropped if gone.blob and not gone.new)
        known = set(self._layers)
        await self._database.write(lambda connection: layer_rows.delete_others(connection, known))
        for digest in await in_long_thread(self._sweep_folders, known, set(self._blob_users)):
            await self.partials.keep(digest, self._blob_path(digest))
        self._trash.wake()

    async def close(self) -> None:
        """Cancel what is being unpacked; a start later undoes the rest."""
        await self._joined.close()
        await self.partials.close()
        self.fetcher.close()

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
        return self.fetcher.transfers.progress(source, there=source.chain_id in self._by_chain)

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

    def settle(self, numbers: Iterable[int]) -> None:
        """An image has them now, so that no pull of theirs can break off any more."""
        self._new.difference_update(numbers)

    async def _make(self, source: LayerSource) -> Layer:
        with self.fetcher.transfers.making(source):
            try:
                return await self._make_whole(source)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise LimitError(f"{source.subject} could not be unpacked, the disk is full: {error}") from error

    async def _make_whole(self, source: LayerSource) -> Layer:
        async with Undo(source.subject) as undo:
            number = await self._database.write(lambda connection: layer_rows.insert(connection, source))
            folder = self._folder / str(number)
            making, incoming = self._folder / f"{number}.new", self._incoming / str(number)
            undo.push("its row", lambda: self._database.execute("DELETE FROM layers WHERE number = ?", (number,)))
            undo.push("its folder", lambda: self._take_back((folder, making, incoming)))
            unpacked = await self.fetcher.fetch(
                source, making / "fs", incoming, self._blob_path(source.descriptor.digest)
            )
            if unpacked.diff_id != source.diff_id:
                raise InvalidArgumentError(
                    f"{source.subject} is broken: unpacked, its digest is {unpacked.diff_id}, expected {source.diff_id}"
                )
            if unpacked.implied and source.below:
                lower = [self.path(layer.number) for layer in await self._layers_below(source)]
                await in_long_thread(inherit, making / "fs", lower, unpacked.implied)
            layer = Layer(
                number,
                source.chain_id,
                source.diff_id,
                unpacked.blob_digest if self._options.keep_blobs else "",
                unpacked.blob_bytes,
                unpacked.used_bytes,
                unpacked.used_inodes,
                unpacked.opaque,
                await self._tree_digest(making / "fs"),
            )
            undo.push("its blob", lambda: self._unpublish(source, layer))
            await self._publish(source, layer, making, incoming)
            self._add(layer)
            if source.resumable:
                self._new.add(number)
        await self.partials.drop([layer.blob_digest])
        return layer

    async def _tree_digest(self, folder: Path) -> str:
        """What takes the place of the blob when the layer is checked; empty where blobs are kept."""
        if self._options.keep_blobs:
            return ""
        async with self.fetcher.slots:
            return (await look_at(folder)).digest

    async def _publish(self, source: LayerSource, layer: Layer, making: Path, incoming: Path) -> None:
        """Let the whole layer have its names, once it is on the disk."""
        await self._disk.flush()
        await in_image_thread(making.rename, self._folder / str(layer.number))
        if layer.blob_digest:
            await in_image_thread(publish, incoming, self._blob_path(layer.blob_digest))
        await self._database.write(
            lambda connection: layer_rows.complete(connection, layer, resumable=source.resumable)
        )

    async def _unpublish(self, source: LayerSource, layer: Layer) -> None:
        if layer.blob_digest and layer.blob_digest not in self._blob_users:
            path = self._blob_path(layer.blob_digest)
            if source.resumable:
                await self.partials.keep(layer.blob_digest, path)
            else:
                await self._throw([path])

    async def _layers_below(self, source: LayerSource) -> list[Layer]:
        async def missing() -> Layer:
            raise PodkeelError(f"{source.subject}: a layer below it could not be unpacked")

        below = []
        for chain_id in source.below:
            below.append(self._by_chain.get(chain_id) or await self._joined.run(chain_id, missing))
        return below

    def _add(self, layer: Layer) -> None:
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
        """Take the layer out of memory."""
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
        """An empty folder on the layers' file system that goes when the block ends, or at the next start."""
        folder = self._incoming / f"check-{next(self._scratches)}"
        await in_image_thread((folder / "fs").mkdir, mode=0o755, parents=True)
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
        self._used_bytes -= users[0].blob_bytes
        self._used_inodes -= 1
        await self._database.write(lambda connection: layer_rows.forget_blob(connection, digest))
        await self._throw([self._blob_path(digest)])

    async def _drop_if_unused(self, chain_id: str) -> None:
        layer = self._by_chain.get(chain_id)
        if layer is not None and not self._users[layer.number]:
            await self._drop([self._forget(layer.number)])

    async def _drop(self, dropped: list[_Dropped]) -> None:
        rows = [(gone.layer.number,) for gone in dropped]
        try:
            await self._database.write(
                lambda connection: connection.executemany("DELETE FROM layers WHERE number = ?", rows) and None
            )
        except LimitError as error:  # the files make room; the next start, or the layer's next pull, finds the rows
            _log.warning("rows of %d layers stay for now: %s", len(rows), error)
        paths = [self._folder / str(gone.layer.number) for gone in dropped]
        # A pull may have brought the same blob again meanwhile.
        blobs = [gone for gone in dropped if gone.blob and gone.blob not in self._blob_users]
        for gone in blobs:
            if gone.new:
                await self.partials.keep(gone.blob, self._blob_path(gone.blob))
            else:
                paths.append(self._blob_path(gone.blob))
        await self._throw(paths)

    async def give_up(self, blobs: Iterable[str], error: PodkeelError) -> None:
        """A pull with these blobs failed with ``error``, and would again: drop what came of them.

        All partial blobs go if there was no room, and this returns when there is.
        """
        if isinstance(error, LimitError):
            await self.partials.drop_all()
            await self._trash.emptied()
        else:
            await self.partials.drop(blobs)

    async def _take_back(self, paths: Iterable[Path]) -> None:
        """Throw away and wait until it is gone: the disk may be full, and the store wants to write next."""
        await self._throw(paths)
        await self._trash.emptied()

    async def _throw(self, paths: Iterable[Path]) -> None:
        await in_image_thread(lambda: [self._trash.throw(path) for path in paths])
        self._trash.wake()

    def _sweep_folders(self, layers: set[int], blobs: set[str]) -> list[str]:
        """Throw away folders that no layer has; returns the digests of such blobs."""
        keep = {str(number) for number in layers} | {str(EMPTY_LAYER)}
        for path in self._folder.iterdir():
            if path.name not in keep:
                self._trash.throw(path)
        for path in self._incoming.iterdir():
            self._trash.throw(path)
        found = [f"{name}:{path.name}" for name in ("sha256", "sha512") for path in (self._content / name).iterdir()]
        return [digest for digest in found if digest not in blobs]
