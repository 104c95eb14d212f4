"""The images of this node: finds them by any form of reference, names them and removes them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from host.concurrency.tasks import uninterrupted
from host.concurrency.threads import in_image_thread, in_stats_thread
from host.database import Database
from host.errors import InvalidArgumentError, NotFoundError
from host.stages import Operation
from images import image_rows
from images.content.source import Candidate
from images.image import Image, ImageConfig
from images.layers.layer import Layer
from images.layers.store import LayerStore
from images.oci import digests
from images.oci.reference import Reference, parse
from images.options import ImageOptions
from images.usage import FilesystemUsage

_log = logging.getLogger("podkeel.images")

MIN_ID_LENGTH = 4
_ID_PREFIX = re.compile(rf"(?:sha256:)?([0-9a-f]{{{MIN_ID_LENGTH},64}})")


@dataclass(slots=True)
class _Record:
    """An image in the store. ``names`` are its tags and digest references."""

    id: str
    manifest_digest: str
    manifest_bytes: int
    config: ImageConfig
    config_size: int
    layers: tuple[Layer, ...]
    names: set[str] = field(default_factory=set)


class ImageStore:
    """The images and their names. Lookups read only memory. ``revision`` increases with each change."""

    def __init__(self, options: ImageOptions, data_dir: Path, database: Database, layers: LayerStore) -> None:
        self._options = options
        self._data_dir = data_dir
        self._database = database
        self._layers = layers
        self._records: dict[str, _Record] = {}
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}
        self._changing = asyncio.Lock()
        self.revision = 0

    def images(self) -> Sequence[Image]:
        """All images."""
        return tuple(self._images.values())

    def find(self, reference: str) -> Image | None:
        """The image that ``reference`` names: an id, a unique prefix of one, a tag, a digest or a short name.

        Raises InvalidArgumentError for an ambiguous prefix and for an invalid reference.
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
            image = self.named(name)
            if image is not None:
                return image
        return self._find_by_prefix(prefix[1]) if prefix is not None else None

    def named(self, name: Reference) -> Image | None:
        """The image that has exactly this name."""
        image_id = self._names.get(_key(name))
        return self._images[image_id] if image_id is not None else None

    def get(self, reference: str) -> Image:
        """As ``find``, but raises NotFoundError if there is none."""
        image = self.find(reference)
        if image is None:
            raise NotFoundError(f"image {reference} is not on this node: pull or import it first")
        return image

    def _find_by_prefix(self, prefix: str) -> Image | None:
        found = [image for image_id, image in self._images.items() if image_id.startswith(f"sha256:{prefix}")]
        if len(found) > 1:
            raise InvalidArgumentError(
                f"image id {prefix} is ambiguous: {len(found)} images begin with it: give more characters"
            )
        return found[0] if found else None

    def filesystem_usage(self) -> FilesystemUsage:
        """The size of layers on disk, including kept blobs. Read from kept counts."""
        return FilesystemUsage(str(self._data_dir), self._layers.used_bytes, self._layers.used_inodes)

    async def tag(self, reference: str, name: str) -> str:
        """Give the image that ``reference`` names one more name; another image that has the name loses it.

        Returns the full name. Raises NotFoundError if there is no such image, InvalidArgumentError if ``name`` has no
        tag or has a digest.
        """
        target = parse(name)
        if target.digest:
            raise InvalidArgumentError(f"image name {name}: a new name must have a tag and no digest")
        async with self._changing:
            image = self.get(reference)
            record = self._records[image.id]
            await uninterrupted(self._add_name(record, target.tagged))
        return target.tagged

    async def add_digest(self, image: Image, name: str) -> None:
        """Add a digest reference of a registry to the image. Does nothing if the image was removed in the meantime."""
        async with self._changing:
            record = self._records.get(image.id)
            if record is None or name in record.names:
                return
            await uninterrupted(self._add_name(record, name))

    async def _add_name(self, record: _Record, name: str) -> None:
        await self._database.write(lambda connection: image_rows.insert_names(connection, record.id, [name]))
        self._name(record, [name])
        self._publish(record)

    async def config_file(self, image: Image) -> bytes:
        """The image's configuration as received, read from the database.

        Raises NotFoundError if the image was removed in the meantime.
        """
        rows = await in_stats_thread(self._database.read, "SELECT config FROM images WHERE id = ?", (image.id,))
        if not rows:
            raise NotFoundError(f"image {image.name} was removed in the meantime: pull it again")
        content: bytes = rows[0][0]
        return content

    async def remove(self, reference: str) -> None:
        """Remove the image that ``reference`` names, with all its names. Success if there is none.

        Layers that containers use stay until the last of these containers is removed.
        """
        async with self._changing:
            image = self.find(reference)
            if image is None:
                return
            await uninterrupted(self._remove(image))

    async def _remove(self, image: Image) -> None:
        operation = Operation("RemoveImage")
        async with operation.stage("forget"):
            await self._database.write(lambda connection: image_rows.delete(connection, [image.id]))
            self._forget(self._records[image.id])
        async with operation.stage("layers"):
            await self._layers.release(image.layers)
        _log.info("image %s: removed", image.id, extra={"fields": {"image_id": image.id}})

    async def commit(self, candidate: Candidate, layers: tuple[Layer, ...]) -> Image:
        """Add an image whose layers are all on the node, with its names. Lookups find it when this returns."""
        async with self._changing:
            return await uninterrupted(self._commit(candidate, candidate.config.config, layers))

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
        self._layers.mark_used(layer.number for layer in layers)
        self._name(record, candidate.names)
        return self._publish(record)

    def _name(self, record: _Record, names: Iterable[str]) -> None:
        for name in names:
            owner = self._names.get(name, record.id)
            if owner != record.id:
                self._records[owner].names.discard(name)
                self._publish(self._records[owner])
            self._names[name] = record.id
            record.names.add(name)

    def _publish(self, record: _Record) -> Image:
        """Make lookups return the record in its present state."""
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

    def publish_again(self) -> None:
        """Update all images after the options changed, which say what is pinned."""
        for record in self._records.values():
            self._publish(record)

    def _forget(self, record: _Record) -> None:
        del self._records[record.id], self._images[record.id]
        for name in record.names:
            del self._names[name]
        self.revision += 1

    async def load(self) -> None:
        """Read the images from the database. Drops those whose layers are missing or not those of the configuration."""
        names: dict[str, set[str]] = {}
        for name, image_id in self._database.read("SELECT name, image_id FROM image_references"):
            names.setdefault(image_id, set()).add(name)
        numbers: dict[str, list[int]] = {}
        for image_id, number in self._database.read("SELECT image_id, layer FROM image_layers ORDER BY position"):
            numbers.setdefault(image_id, []).append(number)
        broken = []
        rows = await in_image_thread(image_rows.readable, self._database)
        for image_id, manifest_digest, manifest_bytes, file in rows:
            layers = [self._layers.get(number) for number in numbers.get(image_id, ())]
            present = tuple(layer for layer in layers if layer is not None)
            if tuple(layer.chain_id for layer in present) != digests.chain_ids(file.diff_ids):
                broken.append(image_id)
                continue
            size, given = len(file.content), names.get(image_id, set())
            record = _Record(image_id, manifest_digest, manifest_bytes, file.config, size, present, given)
            self._records[image_id] = record
            self._names.update(dict.fromkeys(record.names, image_id))
            self._layers.retain(layer.number for layer in present)
            self._publish(record)
        if broken:
            _log.warning("images: removed because layers are missing or wrong: %s", ", ".join(broken))
            await self._database.write(lambda connection: image_rows.delete(connection, broken))
        if (names.keys() | numbers.keys()) - {row[0] for row in rows}:
            strays = await self._database.write(image_rows.delete_strays)
            _log.warning("images: %d names or layers of images that do not exist: deleted", strays)


def _key(name: Reference) -> str:
    """The name in the store: the digest reference if there is a digest, otherwise the tag."""
    return f"{name.repository}@{name.digest}" if name.digest else name.tagged
