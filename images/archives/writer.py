"""Writes images of the store to an OCI archive: an image layout (OCI image specification) in one tar file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from host.concurrency.threads import acquired, in_image_thread, in_long_thread
from host.errors import InvalidArgumentError, LimitError, NotFoundError, PodkeelError
from images.oci.manifests import OCI_INDEX, Descriptor
from images.oci.reference import parse
from images.outgoing import OutgoingImage

_PIECE = 16 << 20  # bytes copied at a time, so that a cancelled export ends soon
_FULL_NAME = "io.containerd.image.name"
_NAME = "org.opencontainers.image.ref.name"


async def export(images: Sequence[tuple[OutgoingImage, Sequence[str]]], path: Path) -> int:
    """Write ``images``, each with its names in the archive, to ``path``. Returns the size of the archive in bytes.

    An existing file is replaced once the new one is complete. Raises NotFoundError if the folder does not exist,
    LimitError for a full disk, PodkeelError if the archive cannot be written.
    """
    async with _new_file(path) as descriptor:
        archive = Archive(descriptor)
        index = [_entry(image, name) for image, names in images for name in names or ("",)]
        content = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": index}
        await archive.add_bytes("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        await archive.add_bytes("index.json", msgspec.json.encode(content))
        for image, _ in images:
            await archive.add_bytes(_blob_name(image.digest), image.manifest)
            await archive.add_bytes(_blob_name(image.config.digest), image.config_bytes)
            for layer, blob in image.layers:
                await archive.add_file(_blob_name(layer.digest), blob)
        return await archive.end()


def _entry(image: OutgoingImage, name: str) -> Descriptor:
    annotations = {_FULL_NAME: name, _NAME: parse(name).tag} if name else None
    return Descriptor(image.manifest_type, image.digest, len(image.manifest), annotations=annotations)


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


class Archive:
    """Writes members one after the other, and each name once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._names: set[str] = set()
        self._size = 0

    async def add_bytes(self, name: str, content: bytes) -> None:
        """Add a file with this content, unless the archive has one of that name."""
        if self._begins(name):
            await in_image_thread(self._write, _header(name, len(content)) + content + _padding(len(content)))

    async def add_file(self, name: str, path: Path) -> None:
        """Add a file with the content of ``path``, unless the archive has one of that name."""
        if not self._begins(name):
            return
        source = await acquired(in_image_thread, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), os.close)
        try:
            size = os.fstat(source).st_size
            await in_image_thread(self._write, _header(name, size))
            position = 0
            while position < size:
                copied = await in_image_thread(
                    os.sendfile, self._descriptor, source, position, min(_PIECE, size - position)
                )
                if not copied:
                    raise PodkeelError(f"{path} became shorter while it was copied")
                position += copied
            self._size += size
            await in_image_thread(self._write, _padding(size))
        finally:
            os.close(source)

    async def end(self) -> int:
        """Write the end of the archive and return its size in bytes."""
        await in_image_thread(self._write, bytes(2 * tarfile.BLOCKSIZE))
        return self._size

    def _begins(self, name: str) -> bool:
        new = name not in self._names
        self._names.add(name)
        return new

    def _write(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, memoryview(data)[written:])
        self._size += len(data)


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


@asynccontextmanager
async def _new_file(path: Path) -> AsyncIterator[int]:
    """Provide a descriptor of a new file, which replaces ``path`` if the block succeeds and is deleted otherwise."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        if await in_image_thread(path.is_dir):
            raise InvalidArgumentError(f"image archive {path}: it is a folder")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = await acquired(in_image_thread, lambda: os.open(partial, flags, 0o644), os.close)
            try:
                yield descriptor
                await in_long_thread(os.fsync, descriptor)
                await in_image_thread(partial.replace, path)
            finally:
                os.close(descriptor)
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                await in_image_thread(partial.unlink)
    except FileNotFoundError as error:
        raise NotFoundError(f"image archive {path}: folder {path.parent} does not exist") from error
    except OSError as error:
        kind = LimitError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else PodkeelError
        raise kind(f"image archive {path} could not be written: {error.strerror}") from error
