"""Prepares an image of the store for an export or push: its manifest, configuration and compressed layers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from host.concurrency.threads import in_image_thread
from host.errors import InvalidArgumentError, WrongStateError
from images.image import Image
from images.layers.store import LayerStore
from images.oci import digests
from images.oci.manifests import OCI_CONFIG, OCI_MANIFEST, Descriptor, Manifest, parse_manifest

OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_COMPRESSIONS = {b"\x1f\x8b": "+gzip", b"\x28\xb5\x2f\xfd": "+zstd"}


@dataclass(frozen=True, slots=True)
class OutgoingImage:
    """An image to export or push. ``layers`` has the path of each of the manifest's layer blobs."""

    image: Image
    manifest: bytes
    manifest_type: str
    config: Descriptor
    config_bytes: bytes
    layers: tuple[tuple[Descriptor, Path], ...]

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        return digests.digest_of(self.manifest)


@asynccontextmanager
async def outgoing(image: Image, manifest: bytes, config: bytes, layers: LayerStore) -> AsyncIterator[OutgoingImage]:
    """Provide the image. Its blobs stay on the node during the block, even if the image is removed in the meantime.

    Its manifest is the original one if all blobs that it names are kept. Otherwise a manifest is written for the kept
    blobs: the image had no manifest, or shares layers that were fetched in another compression. The configuration, and
    so the image's id, never changes. Raises WrongStateError if blobs were not kept.
    """
    layers.retain(image.layers)
    try:
        yield await in_image_thread(_prepare, image, manifest, config, layers)
    finally:
        await layers.release(image.layers)


def _prepare(image: Image, content: bytes, config_bytes: bytes, layers: LayerStore) -> OutgoingImage:
    manifest = None
    if image.manifest_digest:
        with contextlib.suppress(InvalidArgumentError):  # older versions accepted manifests that are refused today
            manifest = parse_manifest(content, f"image {image.name}")
    if manifest is not None and manifest.config is not None:
        found = [(layer, layers.blob(layer.digest)) for layer in manifest.layers]
        kept = tuple((layer, path) for layer, path in found if path is not None)
        if len(kept) == len(found):
            kind = manifest.media_type or OCI_MANIFEST
            return OutgoingImage(image, content, kind, manifest.config, config_bytes, kept)
    kept = tuple(_kept_layer(image, number, layers) for number in image.layers)
    config = Descriptor(OCI_CONFIG, image.id, len(config_bytes))
    written = Manifest(2, OCI_MANIFEST, config, [descriptor for descriptor, _ in kept])
    return OutgoingImage(image, _encoded(written), OCI_MANIFEST, config, config_bytes, kept)


def _encoded(manifest: Manifest) -> bytes:
    fields = msgspec.to_builtins(manifest)
    del fields["manifests"]
    return msgspec.json.encode(fields)


def _kept_layer(image: Image, number: int, layers: LayerStore) -> tuple[Descriptor, Path]:
    layer = layers.get(number)
    path = layers.blob(layer.blob_digest) if layer is not None else None
    if layer is None or path is None:
        raise WrongStateError(
            f"image {image.name} cannot be exported or pushed: its compressed layers were not kept. Set "
            "images.keep_blobs, remove the image and pull it again"
        )
    with path.open("rb") as file:
        start = file.read(4)
    compression = next((suffix for magic, suffix in _COMPRESSIONS.items() if start.startswith(magic)), "")
    return Descriptor(OCI_LAYER + compression, layer.blob_digest, layer.blob_bytes), path
