"""Finds the image for this machine in what a reference names: an image, or indexes with platforms or configs.

The search is a generator that yields requests for documents and receives them, so registries and archives share it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from host.errors import InvalidArgumentError, UnsupportedError
from images.image import ConfigFile, read_config
from images.oci import digests
from images.oci.manifests import (
    MANIFEST_TYPES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    check_is_image,
    parse_manifest,
)
from images.oci.platforms import OTHER_ARCHITECTURE, Platform, suitability

_NESTING = 4  # depth of indexes within indexes
_MAX_READ = 40  # manifests of one search
_REFERENCE_TYPE = "vnd.docker.reference.type"  # BuildKit's annotation of attestations
_NO_ARCHITECTURE = 1  # suitability of a config that names no architecture
_PERFECT = 99


@dataclass(frozen=True, slots=True)
class Wanted:
    """A document that the search needs next, of at most ``limit`` bytes."""

    descriptor: Descriptor
    is_manifest: bool

    @property
    def limit(self) -> int:
        """The maximum size in bytes."""
        return MAX_MANIFEST_BYTES if self.is_manifest else MAX_CONFIG_BYTES


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest, index or config as received; ``media_type`` is the type that its sender claims."""

    content: bytes
    media_type: str = ""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image's manifest, as received and decoded, and its config."""

    content: bytes
    digest: str
    manifest: Manifest
    config: ConfigFile


Search: TypeAlias = Generator[Wanted, Document, FoundImage]


def advance(search: Search, answer: Document | None) -> Wanted | FoundImage:
    """Send ``answer`` (None at first) to ``search``. Returns its next request or its result.

    Blocks for a moment if the document is large.
    """
    try:
        return next(search) if answer is None else search.send(answer)
    except StopIteration as stop:
        found: FoundImage = stop.value
        return found


def find_image(top: Document, digest: str, machine: Platform, subject: str) -> Search:
    """Search from ``top``, a manifest or index with that digest, for the image that suits ``machine`` best.

    Entries of an index without a platform are judged by their configs. Attestations and other artifacts are skipped. An
    image without an index is used as it is. Raises InvalidArgumentError if there is no image for this machine, naming
    the platforms that exist, or if a document is broken. Raises UnsupportedError for an artifact.
    """
    return _Search(machine, subject).run(top, digest)


@dataclass(slots=True)
class _Search:
    machine: Platform
    subject: str
    offered: set[str] = field(default_factory=set)
    read: int = 0

    def run(self, top: Document, digest: str) -> Search:
        manifest = parse_manifest(top.content, self.subject, top.media_type)
        if not manifest.is_index:
            return (yield from self._image(top, digest, manifest))
        found = yield from self._in_index(manifest, 1)
        if found is None:
            offered = ", ".join(sorted(self.offered)) or "none"
            raise InvalidArgumentError(f"{self.subject} has no image for {self.machine}; it has {offered}")
        return found[1]

    def _image(self, document: Document, digest: str, manifest: Manifest) -> Search:
        wanted = Wanted(check_is_image(manifest, self.subject), is_manifest=False)
        config = read_config((yield wanted).content, self.subject)
        return FoundImage(document.content, digests.check_digest(digest, self.subject), manifest, config)

    def _in_index(self, index: Manifest, depth: int) -> Generator[Wanted, Document, tuple[int, FoundImage] | None]:
        """The image that suits best, and its suitability."""
        if depth > _NESTING:
            raise InvalidArgumentError(f"{self.subject} is broken: it nests more than {_NESTING} indexes")
        best: tuple[int, FoundImage] | None = None
        for score, descriptor in self._by_suitability(index):
            if score and best is not None:
                continue  # entries are sorted by suitability, so this one is no better
            self.read += 1
            if self.read > _MAX_READ:
                raise InvalidArgumentError(
                    f"{self.subject}: its indexes have more than {_MAX_READ} images that name no platform: build it "
                    "again with a platform for each"
                )
            document = yield Wanted(descriptor, is_manifest=True)
            manifest = parse_manifest(document.content, self.subject, document.media_type, descriptor.media_type)
            if manifest.is_index:
                found = yield from self._in_index(manifest, depth + 1)
            elif score:
                found = score, (yield from self._image(document, descriptor.digest, manifest))
            else:
                found = yield from self._probe(document, descriptor, manifest)
            if found is not None and (best is None or found[0] > best[0]):
                best = found
            if best is not None and (score > OTHER_ARCHITECTURE or best[0] >= _PERFECT):
                break
        return best

    def _by_suitability(self, index: Manifest) -> Iterator[tuple[int, Descriptor]]:
        """Entries whose platform suits this machine, the best first; then, with 0, those without a platform."""
        suitable: list[tuple[int, Descriptor]] = []
        without_platform: list[Descriptor] = []
        for descriptor in index.manifests or ():
            if descriptor.media_type not in ("", *MANIFEST_TYPES) or _REFERENCE_TYPE in (descriptor.annotations or {}):
                continue
            fields = descriptor.platform
            if fields is None or not fields.architecture:
                without_platform.append(descriptor)
                continue
            platform = Platform(fields.os or self.machine.os, fields.architecture, fields.variant)
            if score := suitability(platform, self.machine):
                suitable.append((score, descriptor))
            if "unknown" not in (platform.os, platform.architecture):
                self.offered.add(str(platform))
        yield from sorted(suitable, key=lambda pair: -pair[0])
        yield from ((0, descriptor) for descriptor in without_platform)

    def _probe(
        self, document: Document, descriptor: Descriptor, manifest: Manifest
    ) -> Generator[Wanted, Document, tuple[int, FoundImage] | None]:
        """The image with its suitability, if its config suits this machine; otherwise None."""
        try:
            image = yield from self._image(document, descriptor.digest, manifest)
        except UnsupportedError:
            return None  # an attestation, a signature
        platform = image.config.platform
        if not platform.architecture:
            return _NO_ARCHITECTURE, image
        platform = Platform(platform.os or self.machine.os, platform.architecture, platform.variant)
        self.offered.add(str(platform))
        score = suitability(platform, self.machine)
        return (score, image) if score else None
