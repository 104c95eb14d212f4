"""Copies images from the node to archives and registries."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from host.concurrency.threads import in_image_thread
from host.database import Database
from host.errors import InvalidArgumentError, NotFoundError
from images.archives.writer import export
from images.image import Image
from images.layers.store import LayerStore
from images.oci.reference import parse
from images.options import ImageOptions
from images.outgoing import OutgoingImage, outgoing
from images.registry.credentials import Credentials
from images.store import ImageStore

if TYPE_CHECKING:
    from images.registry.push import Pushed


class Exporter:
    """Exports and pushes images of ``store``. The blobs of an image stay on the node until its export or push ends."""

    def __init__(self, store: ImageStore, options: ImageOptions, layers: LayerStore, database: Database) -> None:
        self._store = store
        self._options = options
        self._layers = layers
        self._database = database

    async def export(self, references: Sequence[str], path: Path) -> int:
        """Write images to an OCI archive at ``path``. Returns its size in bytes.

        An image referenced by a tag gets that name in the archive, any other image all its tags. Raises NotFoundError
        if an image is missing, WrongStateError if its compressed layers were not kept, otherwise as
        ``images.archives.writer.export``.
        """
        async with AsyncExitStack() as stack:
            chosen = []
            for reference in references:
                image = self._store.get(reference)
                ready = await stack.enter_async_context(self._outgoing(image))
                chosen.append((ready, _archive_names(reference, image)))
            return await export(chosen, path)

    async def push(self, reference: str, destination: str = "", credentials: Credentials | None = None) -> Pushed:
        """Push the image that ``reference`` names, to ``destination`` (empty: to ``reference`` itself).

        Afterwards the image has one more digest reference, that of the destination's repository, but no new tag.

        Raises NotFoundError and WrongStateError as ``export``, otherwise as ``images.registry.push.push``.
        """
        image = self._store.get(reference)
        target = parse(destination or reference)
        names = map(parse, (*image.repo_digests, *image.repo_tags))
        siblings = {name.path for name in names if name.domain == target.domain} - {target.path}
        pushing = await in_image_thread(importlib.import_module, f"{__package__}.registry.push")
        async with self._outgoing(image) as ready:
            pushed: Pushed = await pushing.push(
                ready, target, options=self._options, credentials=credentials, siblings=sorted(siblings)
            )
        await self._store.add_digest(image, f"{target.repository}@{pushed.digest}")
        return pushed

    @asynccontextmanager
    async def _outgoing(self, image: Image) -> AsyncIterator[OutgoingImage]:
        statement = "SELECT manifest, config FROM images WHERE id = ?"
        rows = await in_image_thread(self._database.read, statement, (image.id,))
        if not rows:
            raise NotFoundError(f"image {image.name} was removed in the meantime: pull it again")
        manifest, config = rows[0]
        async with outgoing(image, manifest, config, self._layers) as ready:
            yield ready


def _archive_names(reference: str, image: Image) -> Sequence[str]:
    try:
        name = parse(reference).tagged
    except InvalidArgumentError:  # an id
        return image.repo_tags
    return (name,) if name in image.repo_tags else image.repo_tags
