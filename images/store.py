"""The images of this node: found by any form of reference, pulled, imported, removed."""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from host.concurrency.tasks import SingleFlight
from host.concurrency.threads import in_image_thread, in_long_thread, in_stats_thread
from host.database import Database
from host.errors import InvalidArgumentError, LimitError, NotFoundError
from host.stages import Operation
from images import image_rows
from images.archives.reader import ImageArchive
from images.checker import ImageChecker
from images.content.progress import PullProgress, RunningPull
from images.content.source import Candidate
from images.content.trash import Trash
from images.disk_usage import DiskUsage, disk_usage
from images.exporter import Shipping
from images.image import Image, ImageConfig, check_linux
from images.layers.layer import Layer
from images.layers.store import LayerStore
from images.oci.reference import Reference, parse
from images.options import ImageOptions
from images.registry.credentials import Credentials
from images.snapshots.store import SnapshotStore
from images.usage import FilesystemUsage

if TYPE_CHECKING:
    from images.registry.client import HostAnswer

_log = logging.getLogger("podkeel.images")

SHORTEST_ID = 4
_ID_PREFIX = re.compile(rf"(?:sha256:)?([0-9a-f]{{{SHORTEST_ID},64}})")


@dataclass(slots=True)
class _Record:
    """An image as the store keeps it; ``names`` are its tags and digest references."""

    id: str
    manifest_digest: str
    manifest_bytes: int
    config: ImageConfig
    config_size: int
    layers: tuple[Layer, ...]
    names: set[str] = field(default_factory=set)


class ImageStore:
    """Everything about images. Lookups read memory only; ``revision`` rises with each change.

    ``fetched_bytes`` is what came from registries since the start.

    ``snapshots`` makes containers' root file systems out of them, ``shipping`` takes them off the node, ``checker``
    looks for what is broken.
    """

    def __init__(self, options: ImageOptions, data_dir: Path, database: Database) -> None:
        self._options = options
        self._data_dir = data_dir
        self._database = database
        self._trash = Trash(data_dir / "trash")
        self._layers = LayerStore(options, data_dir, database, self._trash)
        self.checker = ImageChecker(self, self._layers, database)
        self.shipping = Shipping(self, options, self._layers, database)
        self.snapshots = SnapshotStore(options, data_dir, database, self._layers, self._trash)
        self._records: dict[str, _Record] = {}
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}
        self._changing = asyncio.Lock()
        self._pulls: SingleFlight[tuple[str, Credentials | None], Image] = SingleFlight(
            "the pull was ended: the agent is stopping"
        )
        self._running_pulls: list[RunningPull] = []
        self.revision = 0
        self.fetched_bytes = 0

    async def start(self) -> None:
        """Read the store; undo pulls and finish removals that a crash cut off."""
        self._trash.start()
        await self._layers.start()
        await self.snapshots.start()  # before images, of whose rows it may have to learn layers
        await self._load()
        await self._layers.sweep()

    async def close(self) -> None:
        """Cancel running pulls with their clean-up, and stop background work."""
        await self._pulls.close()
        await self.snapshots.close()
        await self._layers.close()
        await self._trash.close()

    async def emptied(self) -> None:
        """Wait until what was removed has left the disk."""
        await self._trash.emptied()

    def images(self) -> Sequence[Image]:
        """All images."""
        return tuple(self._images.values())

    def find(self, reference: str) -> Image | None:
        """The image that ``reference`` names: an id, a unique prefix of one, a tag, a digest or a short name.

        Raises InvalidArgumentError for an ambiguous prefix and for what is no reference at all.
        """
        image = self._images.get(reference) or self._images.get(f"sha256:{reference}")
        if image is not None:
            return image
        prefix = _ID_PREFIX.fullmatch(reference)
        try:
            name = parse(reference)
        except InvalidArgumentError:
            if prefix is None:
                raise
        else:
            image_id = self._names.get(_key(name))
            if image_id is not None:
                return self._images[image_id]
        return self._find_by_prefix(prefix[1]) if prefix is not None else None

    def get(self, reference: str) -> Image:
        """Like ``find``; NotFoundError if there is none."""
        image = self.find(reference)
        if image is None:
            raise NotFoundError(f"image {reference} is not on this node: pull or import it first")
        return image

    def _find_by_prefix(self, prefix: str) -> Image | None:
        found = [image for image_id, image in self._images.items() if image_id.startswith(f"sha256:{prefix}")]
        if len(found) > 1:
            raise InvalidArgumentError(f"image id {prefix} is ambiguous: {len(found)} images begin so, give more of it")
        return found[0] if found else None

    def filesystem_usage(self) -> FilesystemUsage:
        """What layers, kept blobs included, take on disk; from kept counts."""
        return FilesystemUsage(str(self._data_dir), self._layers.used_bytes, self._layers.used_inodes)

    async def pull(self, reference: str, credentials: Credentials | None = None) -> Image:
        """Fetch the image and return it once it is complete; identical pulls at the same time are one.

        A tag that another image had moves to this one. Raises InvalidArgumentError for a malformed reference or a
        broken image, NotFoundError, PermissionDeniedError, LimitError, UnsupportedError for an artifact, and
        KubeletReasonError ``RegistryUnavailable``. Whatever the error, nothing of it stays but partial blobs, which the
        next pull of it goes on with.
        """
        name = parse(reference)
        begin = time.perf_counter()
        image = await self._pulls.run((str(name), credentials), lambda: self._pull(name, credentials))
        fields = {"image": str(name), "image_id": image.id, "seconds": round(time.perf_counter() - begin, 6)}
        _log.info("image %s is %s", name, image.id, extra={"fields": fields})
        return image

    async def _pull(self, name: Reference, credentials: Credentials | None) -> Image:
        # The HTTP client takes 20 MiB and a fifth of a second: an agent that never pulls never has it.
        pulling = await in_image_thread(importlib.import_module, "images.registry.resolve")
        operation = Operation("PullImage")
        known = self._names.get(_key(name))
        known_digests = self._images[known].repo_digests if known else ()
        running = RunningPull(str(name))
        self._running_pulls.append(running)
        try:
            async with pulling.fetch(self._options, name, credentials, known_digests, operation) as candidate:
                if candidate is not None:
                    running.sources = candidate.layer_sources()
                    try:
                        return await self._install(candidate, operation)
                    finally:
                        self.fetched_bytes += candidate.transferred()
        finally:
            self._running_pulls.remove(running)
        if known in self._images:
            return self._images[known]
        return await self._pull(name, credentials)  # it was removed while the registry was asked

    def pulls(self) -> list[PullProgress]:
        """How far each running pull is, oldest first."""
        return [
            PullProgress(pull.reference, pull.started, tuple(map(self._layers.progress, pull.sources)))
            for pull in self._running_pulls
        ]

    async def explain(
        self, reference: str, credentials: Credentials | None = None
    ) -> tuple[Reference, list[HostAnswer]]:
        """The reference in full, and what each host that a pull tries answers to it; nothing is pulled."""
        name = parse(reference)
        registry = await in_image_thread(importlib.import_module, "images.registry.client")
        async with registry.RegistryClient(self._options, name, credentials) as client:
            return name, await client.explain()

    async def import_archive(self, path: Path, reference: str = "") -> list[Image]:
        """Take in the images of an OCI layout folder, an OCI archive or a docker archive (gzipped ones too).

        An image without a name of its own gets ``reference``, or none. Raises NotFoundError if there is no such file,
        InvalidArgumentError if it is broken, LimitError, UnsupportedError.
        """
        operation = Operation("ImportImage")
        archive = ImageArchive(path, self._data_dir, self._options.max_archive_bytes)
        try:
            async with operation.stage("manifest"):
                await in_long_thread(archive.open)
                candidates = await in_long_thread(archive.candidates, reference)
            return [await self._install(candidate, operation) for candidate in candidates]
        finally:
            archive.close()

    async def tag(self, reference: str, name: str) -> str:
        """Give the image that ``reference`` names one more name, taken from whichever had it; returns it in full.

        Raises NotFoundError if there is no such image, InvalidArgumentError if ``name`` is no name with a tag.
        """
        target = parse(name)
        if target.digest:
            raise InvalidArgumentError(f"image name {name}: a name that is given has a tag and no digest")
        async with self._changing:
            image = self.get(reference)
            record = self._records[image.id]
            await self._database.write(
                lambda connection: image_rows.insert_names(connection, record.id, [target.tagged])
            )
            self._name(record, [target.tagged])
            self._show(record)
        return target.tagged

    async def add_digest(self, image: Image, name: str) -> None:
        """Let the image be known by a digest reference, as a registry has it under; not if it was removed meanwhile."""
        async with self._changing:
            record = self._records.get(image.id)
            if record is None or name in record.names:
                return
            await self._database.write(lambda connection: image_rows.insert_names(connection, record.id, [name]))
            self._name(record, [name])
            self._show(record)

    async def config_file(self, image: Image) -> bytes:
        """The image's configuration as it came; NotFoundError if it was removed meanwhile. It is not kept in memory."""
        rows = await in_stats_thread(self._database.read, "SELECT config FROM images WHERE id = ?", (image.id,))
        if not rows:
            raise NotFoundError(f"image {image.name} was removed meanwhile")
        content: bytes = rows[0][0]
        return content

    async def disk_usage(self) -> DiskUsage:
        """What each image takes on disk, and what they share."""
        rows = await in_stats_thread(
            self._database.read, "SELECT image_id, count(DISTINCT container_id) FROM snapshots GROUP BY image_id"
        )
        return disk_usage(self.images(), self._layers, dict(rows), self.snapshots.filesystem_usage().used_bytes)

    async def remove(self, reference: str) -> None:
        """Remove the image that ``reference`` names, with all its names; success if there is none.

        Layers that containers use stay until the last of those is removed.
        """
        async with self._changing:
            image = self.find(reference)
            if image is None:
                return
            record = self._records[image.id]
            operation = Operation("RemoveImage")
            async with operation.stage("forget"):
                await self._database.write(lambda connection: image_rows.delete(connection, [image.id]))
                self._forget(record)
            async with operation.stage("layers"):
                await self._layers.release(image.layers)
            _log.info("image %s is removed", image.id, extra={"fields": {"image_id": image.id}})

    async def _install(self, candidate: Candidate, operation: Operation) -> Image:
        """Unpack what is missing of the image, then make it visible."""
        try:
            return await self._install_layers(candidate, operation)
        except (InvalidArgumentError, LimitError) as error:
            await self._layers.give_up([layer.digest for layer in candidate.layers], error)
            raise

    async def _install_layers(self, candidate: Candidate, operation: Operation) -> Image:
        config = candidate.config.config
        check_linux(candidate.config, candidate.subject)
        layers: list[Layer] = []
        try:
            async with operation.stage("layers"):
                layers = await self._layers.obtain_all(candidate.layer_sources(), candidate.subject)
            async with operation.stage("commit"), self._changing:
                return await self._commit(candidate, config, tuple(layers))
        finally:
            await self._layers.release([layer.number for layer in layers])

    async def _commit(self, candidate: Candidate, config: ImageConfig, layers: tuple[Layer, ...]) -> Image:
        record = self._records.get(candidate.id)
        new = record is None
        if record is None:
            record = _Record(
                candidate.id,
                candidate.manifest_digest,
                len(candidate.manifest),
                config,
                len(candidate.config.content),
                layers,
            )
        await self._database.write(lambda connection: image_rows.insert(connection, candidate, layers))
        if new:
            self._records[record.id] = record
            self._layers.retain(layer.number for layer in layers)
        self._layers.settle(layer.number for layer in layers)
        self._name(record, candidate.names)
        return self._show(record)

    def _name(self, record: _Record, names: Iterable[str]) -> None:
        for name in names:
            owner = self._names.get(name, record.id)
            if owner != record.id:
                self._records[owner].names.discard(name)
                self._show(self._records[owner])
            self._names[name] = record.id
            record.names.add(name)

    def _show(self, record: _Record) -> Image:
        """Let the record be seen as it is now."""
        names = sorted(record.names)
        image = Image(
            id=record.id,
            manifest_digest=record.manifest_digest,
            repo_tags=tuple(name for name in names if "@" not in name),
            repo_digests=tuple(name for name in names if "@" in name),
            size=sum(layer.used_bytes for layer in record.layers) + record.config_size + record.manifest_bytes,
            config=record.config,
            layers=tuple(layer.number for layer in record.layers),
            chain_ids=tuple(layer.chain_id for layer in record.layers),
            pinned=any(fnmatchcase(name, pattern) for name in names for pattern in self._options.pinned),
        )
        self._images[record.id] = image
        self.revision += 1
        return image

    def _forget(self, record: _Record) -> None:
        del self._records[record.id], self._images[record.id]
        for name in record.names:
            del self._names[name]
        self.revision += 1

    async def _load(self) -> None:
        names: dict[str, set[str]] = {}
        for name, image_id in self._database.read("SELECT name, image_id FROM image_references"):
            names.setdefault(image_id, set()).add(name)
        numbers: dict[str, list[int]] = {}
        for image_id, number in self._database.read("SELECT image_id, layer FROM image_layers ORDER BY position"):
            numbers.setdefault(image_id, []).append(number)
        broken = []
        rows = await in_image_thread(image_rows.readable, self._database)
        for image_id, manifest_digest, manifest_bytes, content, config in rows:
            layers = [self._layers.get(number) for number in numbers.get(image_id, ())]
            present = tuple(layer for layer in layers if layer is not None)
            if len(present) < len(layers):
                broken.append(image_id)
                continue
            record = _Record(
                image_id, manifest_digest, manifest_bytes, config, len(content), present, names.get(image_id, set())
            )
            self._records[image_id] = record
            self._names.update(dict.fromkeys(record.names, image_id))
            self._layers.retain(layer.number for layer in present)
            self._show(record)
        if broken:
            _log.warning("images dropped because layers of theirs are missing: %s", ", ".join(broken))
            await self._database.write(lambda connection: image_rows.delete(connection, broken))


def _key(name: Reference) -> str:
    """What the store has an image under: the digest reference if there is a digest, else the tag."""
    return f"{name.repository}@{name.digest}" if name.digest else name.tagged
