"""Image archives on the node: OCI layout folders, OCI archives and docker archives (``docker save``), also gzipped."""

from __future__ import annotations

import errno
import gzip
import os
import posixpath
import stat
import tarfile
import zlib
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from host.concurrency.threads import acquired, in_image_thread
from host.errors import InvalidArgumentError, LimitError
from images.archives.files import BoundedTarInfo, open_archive, open_member
from images.content.manifest_search import Document, FoundImage, Wanted, advance, find_image
from images.content.source import Candidate
from images.image import ConfigFile, read_config
from images.oci import digests
from images.oci.manifests import MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Descriptor, decode_json, parse_manifest
from images.oci.platforms import this_machine
from images.oci.reference import Reference, parse

_CHUNK = 1 << 20
_MAX_MEMBERS = 100_000
_MAX_NAMES_LENGTH = 8192
_NESTING = 4
_NAME = "org.opencontainers.image.ref.name"
_FULL_NAME = "io.containerd.image.name"


class _DockerImage(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    link: str = ""


class ImageArchive:
    """Reads an archive's members by name, without extracting it. Call ``open`` first and ``close`` at the end."""

    def __init__(self, path: Path, scratch: Path, max_bytes: int) -> None:
        self._path = path
        self._scratch = scratch
        self._max_bytes = max_bytes
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None
        self._folder = -1
        self._members: dict[str, _Member] = {}

    def open(self) -> None:
        """Open and index the archive; blocks. Raises NotFoundError, or InvalidArgumentError if it cannot be read."""
        descriptor = open_archive(self._path)
        with ExitStack() as stack:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self._folder = descriptor
                stack.callback(os.close, descriptor)
            else:
                self._file = stack.enter_context(os.fdopen(descriptor, "rb"))
                self._decompress(stack)
                self._index()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close the archive. Success if it was never opened."""
        self._stack.close()

    def _decompress(self, stack: ExitStack) -> None:
        """Replace a gzipped file by an unpacked copy without a name, because members are read in any order."""
        assert self._file is not None
        start = self._file.read(2)
        self._file.seek(0)
        if start != b"\x1f\x8b":
            return
        copy = stack.enter_context(os.fdopen(os.open(self._scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC), "r+b"))
        total = 0
        try:
            with gzip.GzipFile(fileobj=self._file) as plain:
                while chunk := plain.read(_CHUNK):
                    total += len(chunk)
                    if total > self._max_bytes:
                        raise LimitError(
                            f"image archive {self._path} unpacks to more than {self._max_bytes} bytes "
                            "(images.max_archive_bytes)"
                        )
                    copy.write(chunk)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidArgumentError(f"image archive {self._path} is broken: {error}") from error
        copy.seek(0)
        self._file = copy

    def _index(self) -> None:
        try:
            with tarfile.open(fileobj=self._file, mode="r:", tarinfo=BoundedTarInfo) as archive:
                for member in archive:
                    member.pax_headers = {}  # may be large, and tarfile keeps all members
                    if len(member.name) + len(member.linkname) > _MAX_NAMES_LENGTH:
                        raise tarfile.ReadError(f"a name is longer than {_MAX_NAMES_LENGTH} bytes")
                    if len(self._members) >= _MAX_MEMBERS:
                        raise LimitError(f"image archive {self._path} has more than {_MAX_MEMBERS} members")
                    name = posixpath.normpath(member.name)
                    if member.issym() or member.islnk():
                        base = posixpath.dirname(name) if member.issym() else ""
                        target = posixpath.normpath(posixpath.join(base, member.linkname))
                        self._members[name] = _Member(0, 0, target)
                    elif member.isreg() and not member.issparse():
                        self._members[name] = _Member(member.offset_data, member.size)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise InvalidArgumentError(f"image archive {self._path} is broken or is no tar archive: {error}") from error

    def has(self, name: str) -> bool:
        """Whether the archive has that member."""
        if self._file is not None:
            return name in self._members
        try:
            os.close(open_member(self._folder, name)[0])
        except (OSError, ValueError):
            return False
        return True

    def read(self, name: str, limit: int) -> bytes:
        """A whole member. Raises InvalidArgumentError if it is missing, truncated or larger than ``limit``."""
        if self._file is None:
            descriptor, size = self._open_file(name)
            with os.fdopen(descriptor, "rb") as file:
                self._check_size(name, size, limit)
                return file.read(limit)
        member = self._member(name)
        self._check_size(name, member.size, limit)
        content = os.pread(self._file.fileno(), member.size, member.offset)
        if len(content) < member.size:
            raise InvalidArgumentError(f"image archive {self._path} is broken: {name} is cut off")
        return content

    async def chunks(self, name: str, begin: int) -> AsyncGenerator[bytes, None]:
        """A member's bytes from ``begin`` on, piece by piece."""
        if self._file is None:
            descriptor, size = await acquired(
                in_image_thread, lambda: self._open_file(name), lambda opened: os.close(opened[0])
            )
            start = 0
        else:
            member = self._member(name)
            descriptor, size, start = os.dup(self._file.fileno()), member.size, member.offset
        try:
            offset, end = start + begin, start + size
            while offset < end:
                chunk = await in_image_thread(os.pread, descriptor, min(_CHUNK, end - offset), offset)
                if not chunk:
                    raise InvalidArgumentError(f"image archive {self._path} is broken: {name} is cut off")
                offset += len(chunk)
                yield chunk
        finally:
            os.close(descriptor)

    def _open_file(self, name: str) -> tuple[int, int]:
        try:
            return open_member(self._folder, name)
        except OSError as error:
            outside = error.errno == errno.EXDEV
            reason = "leads out of the archive's folder" if outside else error.strerror
            raise InvalidArgumentError(f"image archive {self._path} is broken: {name}: {reason}") from error
        except ValueError as error:
            raise InvalidArgumentError(f"image archive {self._path} is broken: {name}: {error}") from error

    def _member(self, name: str) -> _Member:
        for _ in range(_NESTING):
            member = self._members.get(name)
            if member is None:
                break
            if not member.link:
                return member
            name = member.link
        raise InvalidArgumentError(f"image archive {self._path} is broken: {name} is missing")

    def _check_size(self, name: str, size: int, limit: int) -> None:
        if size > limit:
            raise InvalidArgumentError(f"image archive {self._path}: {name} is larger than {limit} bytes")

    def candidates(self, reference: str) -> list[Candidate]:
        """The archive's images; one without a name gets ``reference``. Raises InvalidArgumentError."""
        # docker save writes both formats today; only docker's own has the names.
        if self.has("manifest.json"):
            found = self._docker_images(reference)
        elif self.has("index.json"):
            found = self._oci_images(reference)
        else:
            raise InvalidArgumentError(f"{self._path} is neither an OCI layout nor a docker archive")
        if not found:
            raise InvalidArgumentError(f"image archive {self._path} holds no image")
        return found

    def _docker_images(self, reference: str) -> list[Candidate]:
        subject = f"image archive {self._path}: manifest.json"
        entries: list[_DockerImage] = decode_json(
            self.read("manifest.json", MAX_MANIFEST_BYTES), list[_DockerImage], subject, MAX_MANIFEST_BYTES
        )
        found = []
        for entry in entries:
            names = [str(parse(tag)) for tag in entry.repo_tags or ()] or _names_from(reference)
            members = {f"#{index}": posixpath.normpath(name) for index, name in enumerate(entry.layers)}
            for name in members.values():
                self._member(name) if self._file else None
            content = self.read(posixpath.normpath(entry.config), MAX_CONFIG_BYTES)
            config = read_config(content, f"image {names[0] if names else entry.config} in {self._path}")
            found.append(self._docker_candidate(config, list(members.values()), names))
        return found

    def _docker_candidate(self, config: ConfigFile, layers: list[str], names: list[str]) -> Candidate:
        # The members have no digests; they are compared with the diff IDs of the config.
        descriptors = [Descriptor(annotations={"member": name}) for name in layers]
        manifest = msgspec.json.encode(descriptors)
        return Candidate(
            subject=f"image {names[0] if names else config.digest} in {self._path}",
            manifest=manifest,
            manifest_digest="",
            config=config,
            layers=tuple(descriptors),
            names=tuple(names),
            open_layer=lambda descriptor, begin: self.chunks((descriptor.annotations or {})["member"], begin),
        )

    def _oci_images(self, reference: str) -> list[Candidate]:
        index = parse_manifest(self.read("index.json", MAX_MANIFEST_BYTES), f"{self._path}: index.json")
        found = []
        for descriptor in index.manifests or ():
            names = self._names(descriptor, reference, alone=len(index.manifests or ()) == 1)
            image = self._search(descriptor, f"image {names[0] if names else descriptor.digest} in {self._path}")
            digest_names = [f"{parse(name).repository}@{descriptor.digest}" for name in names]
            found.append(
                Candidate(
                    subject=f"image {names[0] if names else descriptor.digest} in {self._path}",
                    manifest=image.content,
                    manifest_digest=image.digest,
                    config=image.config,
                    layers=tuple(image.manifest.layers),
                    names=(*names, *digest_names),
                    open_layer=lambda descriptor, begin: self.chunks(_blob_name(descriptor.digest), begin),
                )
            )
        return found

    def _search(self, descriptor: Descriptor, subject: str) -> FoundImage:
        """The image for this machine in an entry of the layout."""
        top = Document(self._blob(descriptor, MAX_MANIFEST_BYTES, subject), descriptor.media_type)
        search = find_image(top, descriptor.digest, this_machine(), subject)
        found = advance(search, None)
        while isinstance(found, Wanted):
            found = advance(search, Document(self._blob(found.descriptor, found.limit, subject)))
        return found

    def _blob(self, descriptor: Descriptor, limit: int, subject: str) -> bytes:
        content = self.read(_blob_name(digests.check_digest(descriptor.digest, subject)), limit)
        if len(content) != descriptor.size:
            raise InvalidArgumentError(
                f"{subject} is broken: {descriptor.digest} has {len(content)} bytes, expected {descriptor.size}"
            )
        digests.verify(content, descriptor.digest, subject)
        return content

    def _names(self, descriptor: Descriptor, reference: str, *, alone: bool) -> list[str]:
        annotations = descriptor.annotations or {}
        full = annotations.get(_FULL_NAME, "")
        short = annotations.get(_NAME, "")
        if full or any(mark in short for mark in "/:"):
            return [str(parse(full or short))]
        if reference:
            given = parse(reference)
            return [str(given)] if alone or not short else [str(Reference(given.domain, given.path, short))]
        return []


def _names_from(reference: str) -> list[str]:
    return [str(parse(reference))] if reference else []


def _blob_name(digest: str) -> str:
    algorithm, _, name = digest.partition(":")
    return f"blobs/{algorithm}/{name}"
