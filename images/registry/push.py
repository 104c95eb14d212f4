"""Pushes an image to a registry (OCI distribution specification, "Push"). The first push imports this module."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aiohttp

from host.concurrency.threads import acquired, in_image_thread
from host.errors import InvalidArgumentError, NotFoundError, UnavailableError
from images.oci.manifests import Descriptor
from images.oci.reference import Reference
from images.options import ImageOptions
from images.outgoing import OutgoingImage
from images.registry.connection import ConnectedHost, RegistryConnection, UnreachableError
from images.registry.credentials import Credentials
from images.registry.redirects import target_of

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Pushed:
    """The result of a push: the manifest's digest in the registry, and the numbers of blobs.

    A blob was ``sent``, ``mounted`` from another repository, or already ``present``.
    """

    reference: str
    digest: str
    sent: int
    mounted: int
    present: int


async def push(
    image: OutgoingImage,
    destination: Reference,
    *,
    options: ImageOptions,
    credentials: Credentials | None,
    siblings: Sequence[str],
) -> Pushed:
    """Push the image as ``destination``, to the registry itself and never to a mirror of it.

    Blobs that the registry has are not sent again. ``siblings`` are repositories of the same registry that may have
    them too. Raises InvalidArgumentError, PermissionDeniedError, UnavailableError.
    """
    if not destination.tag:
        raise InvalidArgumentError(f"image {destination} cannot be pushed: give it a tag")
    async with RegistryConnection(options, destination, credentials, actions="pull,push") as connection:
        host = next((host for host in connection.hosts if not host.config.mirror), None)
        if host is None or "push" not in host.config.capabilities:
            raise InvalidArgumentError(f"image {destination}: the configuration of its registry does not allow pushes")
        sender = _Sender(connection, host, options, siblings)
        try:
            await sender.send_all(image, destination.tag)
        except UnreachableError as error:
            raise UnavailableError(f"image {destination} could not be pushed to {host.config.base}: {error}") from error
    return Pushed(destination.tagged, image.digest, sender.sent, sender.mounted, sender.present)


class _Sender:
    def __init__(
        self, connection: RegistryConnection, host: ConnectedHost, options: ImageOptions, siblings: Sequence[str]
    ) -> None:
        self._connection = connection
        self._host = host
        self._siblings = siblings
        self._attempts = options.attempts
        self._slots = asyncio.Semaphore(options.max_parallel_downloads)
        self.sent = 0
        self.mounted = 0
        self.present = 0

    async def send_all(self, image: OutgoingImage, tag: str) -> None:
        """Send the blobs, several at the same time, then the manifest."""
        blobs: dict[str, tuple[Descriptor, bytes | Path]] = {image.config.digest: (image.config, image.config_bytes)}
        blobs |= {layer.digest: (layer, path) for layer, path in image.layers}
        tasks = [asyncio.create_task(self._send(*blob)) for blob in blobs.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        headers = {"Content-Type": image.manifest_type, "Content-Length": str(len(image.manifest))}
        response = await self._connection.request(
            self._host,
            "PUT",
            f"/manifests/{tag}",
            headers,
            body=lambda: _pieces(image.manifest),
            good=(200, 201, 202),
        )
        response.release()

    async def _send(self, descriptor: Descriptor, content: bytes | Path) -> None:
        async with self._slots:
            for attempt in range(1, self._attempts + 1):
                try:
                    await self._send_once(descriptor, content)
                    break
                except (UnreachableError, NotFoundError):  # the registry may have dropped an interrupted upload
                    if attempt == self._attempts:
                        raise

    async def _send_once(self, descriptor: Descriptor, content: bytes | Path) -> None:
        digest = descriptor.digest
        try:
            response = await self._connection.request(self._host, "HEAD", f"/blobs/{digest}", {}, good=(200,))
        except NotFoundError:
            pass
        else:
            response.release()
            self.present += 1
            return
        location = await self._begin(digest)
        if location is None:
            self.mounted += 1
            return
        try:
            upload = target_of(f"{self._host.config.base}/", location)
        except aiohttp.ClientPayloadError as error:
            raise UnreachableError(f"it sent no valid address for the upload: {error}") from error
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
        response = await self._connection.request(
            self._host,
            "PUT",
            upload,
            headers,
            query=f"digest={digest}",
            body=lambda: _pieces(content),
            good=(201, 202, 204),
        )
        response.release()
        self.sent += 1

    async def _begin(self, digest: str) -> str | None:
        """Start an upload and return its address; None if the registry mounted the blob from a sibling."""
        for sibling in self._siblings[:1]:
            query = f"mount={digest}&from={quote(sibling)}"
            response = await self._connection.request(
                self._host, "POST", "/blobs/uploads/", {}, query=query, good=(201, 202)
            )
            response.release()
            return None if response.status == 201 else response.headers.get("Location", "")
        response = await self._connection.request(self._host, "POST", "/blobs/uploads/", {}, good=(202,))
        response.release()
        return response.headers.get("Location", "")


async def _pieces(content: bytes | Path) -> AsyncIterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    descriptor = await acquired(in_image_thread, lambda: os.open(content, os.O_RDONLY | os.O_CLOEXEC), os.close)
    try:
        while piece := await in_image_thread(os.read, descriptor, _PIECE):
            yield piece
    finally:
        os.close(descriptor)
