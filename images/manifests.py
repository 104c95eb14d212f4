"""Manifests, indexes and what they point to (OCI image specification; Docker image manifest version 2, schema 2)."""

from __future__ import annotations

from typing import Any

import msgspec

from host.errors import InvalidArgumentError, UnsupportedError
from images.digests import check_digest
from images.platforms import Platform, suitability

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
MANIFEST_TYPES = (OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST)
LARGEST_MANIFEST = 8 << 20
LARGEST_CONFIG = 16 << 20

_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
_LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)


class PlatformFields(msgspec.Struct, frozen=True):
    """The ``platform`` of a descriptor in an index."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """What names a blob: type, digest and size in bytes. In archives without digests, digest is empty and size -1."""

    media_type: str = ""
    digest: str = ""
    size: int = -1
    platform: PlatformFields | None = None
    annotations: dict[str, str] | None = None
    urls: list[str] | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest or an index, told apart by ``is_index``."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] = []
    manifests: list[Descriptor] | None = None

    @property
    def is_index(self) -> bool:
        """Whether it lists manifests rather than layers."""
        return self.manifests is not None


def parse_manifest(content: bytes, subject: str, media_type: str = "") -> Manifest:
    """The manifest or index in ``content``, checked so far that every descriptor has a digest and a size."""
    if media_type.startswith(_SCHEMA_1):
        raise _schema_1(subject)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{subject} is not a valid manifest: {error}") from error
    if manifest.schema_version == 1:
        raise _schema_1(subject)
    if manifest.schema_version != 2:
        raise InvalidArgumentError(f"{subject} is not a valid manifest: schemaVersion is not 2")
    descriptors = list(manifest.manifests or ()) if manifest.is_index else list(manifest.layers)
    if not manifest.is_index:
        if manifest.config is None:
            raise InvalidArgumentError(f"{subject} is not a valid manifest: it names no config")
        descriptors.append(manifest.config)
    for descriptor in descriptors:
        check_digest(descriptor.digest, subject)
        if descriptor.size < 0:
            raise InvalidArgumentError(f"{subject} is not a valid manifest: {descriptor.digest} has no size")
    return manifest


def choose(index: Manifest, machine: Platform, subject: str) -> Descriptor:
    """The descriptor of the index that suits ``machine`` best; NotFound-like InvalidArgumentError if none does."""
    best: tuple[int, Descriptor] | None = None
    offered: list[str] = []
    for descriptor in index.manifests or ():
        if descriptor.media_type not in ("", *MANIFEST_TYPES):
            continue
        fields = descriptor.platform
        if fields is None:
            score = 1  # an index without platforms, as layouts of a single image often are
        else:
            platform = Platform(fields.os, fields.architecture, fields.variant)
            offered.append(str(platform))
            score = suitability(platform, machine)
        if score and (best is None or score > best[0]):
            best = (score, descriptor)
    if best is None:
        raise InvalidArgumentError(
            f"{subject} has no image for {machine}; it has {', '.join(sorted(set(offered))) or 'none'}"
        )
    return best[1]


def check_is_image(manifest: Manifest, subject: str) -> Descriptor:
    """The config descriptor; UnsupportedError when this is an artifact or has layers that cannot be unpacked."""
    config = manifest.config
    if config is None:
        raise InvalidArgumentError(f"{subject} names no config")
    if config.media_type not in ("", OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream"):
        raise UnsupportedError(f"{subject} is not a container image but an artifact of type {config.media_type}")
    for layer in manifest.layers:
        base = layer.media_type
        if base.endswith("+encrypted") or "+encrypted" in base:
            raise UnsupportedError(f"{subject}: layer {layer.digest} is encrypted, which Podkeel cannot unpack")
        if layer.urls and ("foreign" in base or "nondistributable" in base):
            raise UnsupportedError(f"{subject}: layer {layer.digest} is kept outside the registry ({layer.urls[0]})")
        if base and not base.startswith(_LAYER_TYPES):
            raise UnsupportedError(f"{subject}: layer {layer.digest} has type {base}, which is not a layer")
    return config


def decode_json(content: bytes, kind: type[Any], subject: str) -> Any:
    """``content`` as ``kind``; InvalidArgumentError naming ``subject`` otherwise."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"{subject} is not valid: {error}") from error


def _schema_1(subject: str) -> UnsupportedError:
    return UnsupportedError(
        f"{subject} is a Docker schema 1 manifest, which is obsolete: push it again with a newer tool"
    )
