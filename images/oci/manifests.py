"""Manifests, indexes and descriptors (OCI image specification; Docker image manifest version 2, schema 2).

Members that are null count as absent, and text that is not valid Unicode is replaced, as in containerd.
"""

from __future__ import annotations

import json
from typing import TypeVar

import msgspec

from host import untrusted_json
from host.errors import InvalidArgumentError, UnsupportedError
from host.untrusted_json import JsonError
from images.oci.digests import check_digest
from images.oci.layer_limit import MAX_LAYERS

T = TypeVar("T")

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
MANIFEST_TYPES = (OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST)
MAX_MANIFEST_BYTES = 4 << 20  # OCI distribution specification, "Pushing Manifests"
MAX_CONFIG_BYTES = 8 << 20

_MAX_BLOB_BYTES = 1 << 50  # of a blob, in bytes
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
_LAYER_TYPES = (
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)
_MEMBERS = {name.lower(): name for name in ("schemaVersion", "mediaType", "config", "layers", "manifests", "fsLayers")}


class PlatformFields(msgspec.Struct, frozen=True):
    """The ``platform`` of a descriptor in an index."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """A descriptor of a blob: type, digest and size in bytes.

    In archives without digests, ``digest`` is empty and ``size`` is -1.
    """

    media_type: str = ""
    digest: str = ""
    size: int = -1
    platform: PlatformFields | None = None
    annotations: dict[str, str] | None = None
    urls: list[str] | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image manifest or an index, depending on ``is_index``."""

    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] = []
    manifests: list[Descriptor] | None = None

    @property
    def is_index(self) -> bool:
        """Whether it lists manifests rather than layers."""
        return self.manifests is not None


class _RawPlatform(msgspec.Struct):
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None


class _RawDescriptor(msgspec.Struct, rename="camel"):
    media_type: str | None = None
    digest: str | None = None
    size: int | None = None
    platform: _RawPlatform | None = None
    annotations: dict[str, str | None] | None = None
    urls: list[str | None] | None = None


class _RawManifest(msgspec.Struct, rename="camel"):
    schema_version: int | None = None
    media_type: str | None = None
    config: _RawDescriptor | None = None
    layers: list[_RawDescriptor | None] | None = None
    manifests: list[_RawDescriptor | None] | None = None
    fs_layers: msgspec.Raw = msgspec.Raw(b"null")  # msgspec.Raw in a union with None does not accept an array


def parse_manifest(content: bytes, subject: str, *claimed: str) -> Manifest:
    """Decode the manifest or index in ``content``. Every descriptor has a digest and a size.

    ``claimed`` are its media types according to other sources: the Content-Type header, the descriptor. Raises
    InvalidArgumentError for a malformed document, for one that could be read both as an image and as an index
    (CVE-2021-41190), and for more layers than this node can mount. Raises UnsupportedError for Docker's schema 1 and
    for other documents.
    """
    types = [_plain(name) for name in claimed]
    if any(name.startswith(_SCHEMA_1) for name in types):
        raise _schema_1(subject)
    try:
        raw = untrusted_json.decode(content, _RawManifest, max_bytes=MAX_MANIFEST_BYTES, any_text=True)
    except JsonError as error:
        limit = f"; an image has at most {MAX_LAYERS} layers" if content.count(b'"digest"') > MAX_LAYERS else ""
        raise InvalidArgumentError(f"{subject} is not a valid manifest: {error}{limit}") from error
    if raw.schema_version == 1 or _present(raw.fs_layers):
        raise _schema_1(subject)
    if raw.schema_version not in (None, 2):
        raise InvalidArgumentError(f"{subject} is not a valid manifest: schemaVersion is not 2")
    if len(raw.layers or ()) > MAX_LAYERS:
        raise InvalidArgumentError(
            f"{subject} has {len(raw.layers or ())} layers: this node can mount at most {MAX_LAYERS}"
        )
    _check_unambiguous(content, raw, types, subject)
    manifest = Manifest(
        2,
        raw.media_type or "",
        None if raw.config is None else _descriptor(raw.config),
        [_descriptor(item) for item in raw.layers or ()],
        None if raw.manifests is None else [_descriptor(item) for item in raw.manifests if item is not None],
    )
    if not manifest.is_index and manifest.config is None:
        raise InvalidArgumentError(f"{subject} is not a valid manifest: it names no config")
    for descriptor in (*manifest.layers, *(manifest.manifests or ()), manifest.config):
        if descriptor is not None:
            _check_descriptor(descriptor, subject)
    return manifest


def _plain(media_type: str) -> str:
    """Without parameters, in lower case (RFC 9110, section 8.3.1)."""
    return media_type.partition(";")[0].strip().lower()


def _present(member: msgspec.Raw) -> bool:
    return bytes(member) != b"null"


def _check_unambiguous(content: bytes, raw: _RawManifest, claimed: list[str], subject: str) -> None:
    """Raise InvalidArgumentError if programs could read this document as different kinds."""

    def refuse(why: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{subject} is ambiguous, which is refused: {why}")

    def without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise refuse("its manifest has the same member twice")
        return members

    try:
        members = json.loads(content.decode(errors="replace"), object_pairs_hook=without_doubles)
    except ValueError as error:
        raise InvalidArgumentError(f"{subject} is not a valid manifest: {error}") from error
    for name in members:
        proper = _MEMBERS.get(name.lower(), name)
        if name != proper:
            raise refuse(f"some programs read its member {name!r} as {proper!r}")
    if raw.manifests is not None and (raw.config is not None or raw.layers is not None):
        raise refuse("it has the members of an image (config, layers) and of an index (manifests)")
    own = _plain(raw.media_type or "")
    if own and own not in MANIFEST_TYPES:
        raise UnsupportedError(f"{subject} is no image: its manifest has media type {raw.media_type}")
    named = {own, *claimed} & set(MANIFEST_TYPES)
    if len(named) > 1:
        raise refuse(f"its media type is given as {' and as '.join(sorted(named))}")
    if named and (named.pop() in INDEX_TYPES) != (raw.manifests is not None):
        raise refuse("its media type is that of an image and its members are those of an index, or the reverse")


def _descriptor(raw: _RawDescriptor | None) -> Descriptor:
    if raw is None:
        return Descriptor()
    platform = annotations = urls = None
    if raw.platform is not None:
        fields = raw.platform
        platform = PlatformFields(fields.os or "", fields.architecture or "", fields.variant or "")
    if raw.annotations is not None:
        annotations = {key: value or "" for key, value in raw.annotations.items()}
    if raw.urls is not None:
        urls = [url for url in raw.urls if url]
    size = -1 if raw.size is None else raw.size
    return Descriptor(_plain(raw.media_type or ""), raw.digest or "", size, platform, annotations, urls)


def _check_descriptor(descriptor: Descriptor, subject: str) -> None:
    check_digest(descriptor.digest, subject)
    if descriptor.size < 0:
        raise InvalidArgumentError(f"{subject} is not a valid manifest: {descriptor.digest} has no size")
    if descriptor.size > _MAX_BLOB_BYTES:
        raise InvalidArgumentError(
            f"{subject} is not a valid manifest: {descriptor.digest} has an impossible size of {descriptor.size} bytes"
        )


def check_is_image(manifest: Manifest, subject: str) -> Descriptor:
    """The config descriptor. UnsupportedError if this is an artifact or has layers that cannot be unpacked."""
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


def decode_json(content: bytes, kind: type[T], subject: str, max_bytes: int) -> T:
    """Decode ``content`` as ``kind``. Otherwise InvalidArgumentError naming ``subject``."""
    try:
        return untrusted_json.decode(content, kind, max_bytes=max_bytes, any_text=True)
    except JsonError as error:
        raise InvalidArgumentError(f"{subject} is not valid: {error}") from error


def _schema_1(subject: str) -> UnsupportedError:
    return UnsupportedError(
        f"{subject} is a Docker schema 1 manifest, which is obsolete: push it again with a newer tool"
    )
