"""Images for tests, made by the code that makes the busybox image of ``make run``."""

from __future__ import annotations

from scripts.build_busybox_image import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    BuiltImage,
    build_busybox_archive,
    busybox_image,
    busybox_layer,
    descriptor,
    digest_of,
    entry,
    folder,
    make_tar,
)

__all__ = [
    "BuiltImage",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_MANIFEST",
    "build_busybox_archive",
    "busybox_image",
    "busybox_layer",
    "descriptor",
    "digest_of",
    "entry",
    "folder",
    "make_tar",
]
