"""Checks the image store: the digests of its documents, and every file of every layer."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from host.concurrency.threads import acquired, in_image_thread, in_long_thread
from host.database import Database
from host.errors import InvalidArgumentError
from images.image import Image, read_config
from images.layers.layer import Layer
from images.layers.store import LayerStore
from images.oci import digests
from images.oci.manifests import Descriptor
from images.snapshots.store import SnapshotStore
from images.store import ImageStore
from images.unpack.inheritance import inherit, remove_needless_whiteouts
from images.unpack.trees import inspect_trees

_log = logging.getLogger("podkeel.images")

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ImageFinding:
    """A problem of one object, the images that have the object, and the repair (empty: none was made)."""

    digest: str
    problem: str
    images: tuple[str, ...]
    repair: str = ""


@dataclass(frozen=True, slots=True)
class ImageReport:
    """How many images and layers were checked, and what was found."""

    images: int
    layers: int
    findings: tuple[ImageFinding, ...]


class ImageChecker:
    """Checks one layer after the other: unpacks its kept blob again and compares the files.

    A layer without a kept blob is compared with the tree digest that was made when it was unpacked. Pulls and removals
    may run at the same time.
    """

    def __init__(self, store: ImageStore, snapshots: SnapshotStore, layers: LayerStore, database: Database) -> None:
        self._store = store
        self._snapshots = snapshots
        self._layers = layers
        self._database = database

    async def check(self, *, repair: bool) -> ImageReport:
        """Check all images and layers. With ``repair``, also remove what is broken, so that the next pull fetches it.

        A broken blob is removed alone. A broken layer or configuration is removed with the images that have it;
        containers that use them keep running. ``repair`` also removes partial blobs, because nothing can verify them.
        """
        findings = await self._check_images(repair=repair)
        images = self._store.images()
        stacks = [*(image.layers for image in images), *self._snapshots.stacks()]
        layers = [(layer, _below(layer, stacks)) for layer in self._layers.all() if not layer.retired]
        layers.sort(key=lambda pair: len(pair[1]))
        broken: set[int] = set()
        for layer, below in layers:
            async with AsyncExitStack() as stack:
                if self._layers.get(layer.number) is None:
                    continue  # it was removed since
                self._layers.retain((layer.number,))
                stack.push_async_callback(self._layers.release, (layer.number,))
                found = await self._check_layer(layer, below, broken, repair=repair)
            findings += found
        if repair:
            await self._layers.partials.drop_all()
        for finding in findings:
            _log.warning("%s: %s%s", finding.digest, finding.problem, f" ({finding.repair})" if finding.repair else "")
        return ImageReport(len(images), len(layers), tuple(findings))

    async def _check_images(self, *, repair: bool) -> list[ImageFinding]:
        findings = []
        for image in self._store.images():
            rows = await in_long_thread(
                self._database.read,
                "SELECT CAST(manifest_digest AS BLOB), manifest, config FROM images WHERE id = ?",
                (image.id,),
            )
            problem = await in_long_thread(_problem, image, *rows[0]) if rows else ""
            if problem:
                findings.append(await self._found(image.id, problem, [image], repair=repair))
        return findings

    async def _check_layer(
        self, layer: Layer, below: Sequence[int], broken: set[int], *, repair: bool
    ) -> list[ImageFinding]:
        images = [image for image in self._store.images() if layer.number in image.layers]
        findings = []
        blob = self._layers.blob(layer.blob_digest)
        problem = "" if await in_image_thread(self._layers.path(layer.number).is_dir) else "its folder is missing"
        if blob is not None and not problem:
            try:
                problem = await self._compare(layer, blob, below, broken)
            except InvalidArgumentError as error:
                repaired = ""
                if repair:
                    await self._layers.drop_blob(layer.blob_digest)
                    repaired = "the compressed layer was removed"
                names = tuple(image.name for image in images)
                findings.append(ImageFinding(layer.blob_digest, error.message, names, repaired))
                blob = None
        if blob is None and not problem:
            problem = await self._count(layer)
        if problem:
            broken.add(layer.number)
            if repair:
                await self._layers.retire(layer.number)
            findings.append(await self._found(layer.diff_id, problem, images, repair=repair))
        return findings

    async def _found(self, digest: str, problem: str, images: list[Image], *, repair: bool) -> ImageFinding:
        if repair:
            for image in images:
                await self._store.remove(image.id)
        repaired = "removed with its images: pull them again" if repair else ""
        return ImageFinding(digest, problem, tuple(image.name for image in images), repaired)

    async def _compare(self, layer: Layer, blob: Path, below: Sequence[int], broken: set[int]) -> str:
        """What is wrong with the layer's files, compared with its blob; empty if nothing.

        Raises InvalidArgumentError if the blob is broken.
        """
        subject = f"kept layer {layer.blob_digest}"
        async with self._layers.scratch() as fresh:
            descriptor = Descriptor("", layer.blob_digest, layer.blob_bytes)
            unpacked = await self._layers.fetcher.unpack(_chunks(blob), descriptor, fresh, subject)
            if unpacked.diff_id != layer.diff_id:
                raise InvalidArgumentError(f"{subject} is broken: unpacked, its digest is {unpacked.diff_id}")
            if broken.intersection(below):
                return await self._count(layer)  # folders copied from a broken layer cannot be compared
            lower = [self._layers.path(number) for number in below]
            if unpacked.hiding:
                shown = () if unpacked.opaque else lower
                implied = frozenset(unpacked.implied)
                await in_long_thread(remove_needless_whiteouts, fresh, shown, unpacked.hiding, implied)
            if unpacked.implied and below:
                await in_long_thread(inherit, fresh, lower, unpacked.implied)
            trees = await inspect_trees(fresh, self._layers.path(layer.number))
        if not trees.differences:
            return ""
        more = " …" if len(trees.differences) > 3 else ""
        return f"its files differ from the layer's: {'; '.join(trees.differences[:3])}{more}"

    async def _count(self, layer: Layer) -> str:
        trees = await inspect_trees(self._layers.path(layer.number))
        if trees.inodes != layer.used_inodes:
            return f"it has {trees.inodes} files, and {layer.used_inodes} were unpacked"
        if layer.tree_digest and trees.digest != layer.tree_digest:
            return "its files have changed since they were unpacked"
        return ""


def _problem(image: Image, manifest_digest: bytes, manifest: bytes, config: bytes) -> str:
    """What is wrong with the rows of an image, which were valid when the store was opened; empty if nothing."""
    if digests.digest_of(config) != image.id:
        return "its configuration has another digest"
    if digests.chain_ids(read_config(config, image.name).diff_ids) != image.chain_ids:
        return "it has other layers than its configuration says"
    digest = manifest_digest.decode(errors="replace")
    if digest and not (digests.is_digest(digest) and digests.digest_of(manifest, digest) == digest):
        return "its manifest has another digest"
    return ""


def _below(layer: Layer, stacks: Sequence[Sequence[int]]) -> Sequence[int]:
    """The layers below, lowest first. They are the same in every stack that contains the layer."""
    stack = next((stack for stack in stacks if layer.number in stack), ())
    return stack[: stack.index(layer.number)] if stack else ()


async def _chunks(path: Path) -> AsyncGenerator[bytes, None]:
    descriptor = await acquired(in_image_thread, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), os.close)
    try:
        while chunk := await in_image_thread(os.read, descriptor, _CHUNK):
            yield chunk
    finally:
        os.close(descriptor)
