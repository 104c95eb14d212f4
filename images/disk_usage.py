"""The size of each image on disk, and how much of it no other image shares. Computed from kept counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from images.image import Image
from images.layers.layer import Layer
from images.layers.store import LayerStore


@dataclass(frozen=True, slots=True)
class ImageUsage:
    """``used_bytes`` of layers and kept blobs, of which ``unique_bytes`` belong to no other image."""

    image: Image
    used_bytes: int
    unique_bytes: int
    containers: int


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes on disk. ``blobs`` include partial ones; ``containers`` is the size of containers' writable layers."""

    images: tuple[ImageUsage, ...]
    layers: int
    blobs: int
    containers: int


def disk_usage(images: Sequence[Image], layers: LayerStore, used_by: dict[str, int], written: int) -> DiskUsage:
    """Add up the counts. ``used_by`` is the number of containers of each image, by image id."""
    users = Counter(number for image in images for number in set(image.layers))
    usages = []
    for image in images:
        own = [layer for number in set(image.layers) if (layer := layers.get(number)) is not None]
        unique = sum(map(_bytes, (layer for layer in own if users[layer.number] == 1)))
        usages.append(ImageUsage(image, sum(map(_bytes, own)), unique, used_by.get(image.id, 0)))
    blobs = {layer.blob_digest: layer.blob_bytes for layer in layers.all() if layer.blob_digest}
    unpacked = sum(layer.used_bytes for layer in layers.all())
    return DiskUsage(tuple(usages), unpacked, sum(blobs.values()) + layers.partials.used_bytes, written)


def _bytes(layer: Layer) -> int:
    return layer.used_bytes + (layer.blob_bytes if layer.blob_digest else 0)
