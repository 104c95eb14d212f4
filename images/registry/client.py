"""A client of the OCI distribution API: resolves references, fetches manifests and blobs, also from mirrors."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Self, TypeVar
from urllib.parse import quote

import aiohttp

from host.concurrency.threads import in_image_thread
from host.errors import (
    InvalidArgumentError,
    KubeletReasonError,
    NotFoundError,
    PermissionDeniedError,
    PodkeelError,
    UnsupportedError,
)
from images.oci import digests
from images.oci.manifests import MANIFEST_TYPES, MAX_MANIFEST_BYTES, OCI_INDEX, Descriptor
from images.oci.reference import Reference
from images.options import ImageOptions
from images.registry.bodies import ENCODINGS, BodyError, collect, decoded, decoded_blob, encoding_of
from images.registry.connection import ConnectedHost, RegistryConnection, UnreachableError, credentials_of
from images.registry.credentials import Credentials
from images.registry.http import RateWatch, back_off, body_of, first_byte, reason_of, without_first

_log = logging.getLogger("podkeel.images")

_PROGRESS = 1 << 20  # bytes; a transfer that brought so many before it broke resets the count of failures
# Statuses that hosts send for a request with Range, without transient server errors and refused access.
_ANSWERS_TO_RANGES = (200, 203, 206, 400, 403, 405, 406, 411, 412, 413, 416, 417, 422, 500, 501, 505)
# What registries may answer to a call that they do not know.
_ANSWERS_TO_NEW_CALLS = (200, 400, 404, 405, 406, 410, 415, 501)
_ACCEPT = {"Accept": ", ".join(MANIFEST_TYPES)}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest or index as received, its digest verified. After ``head``, ``content`` is empty."""

    content: bytes
    digest: str
    media_type: str
    size: int


@dataclass(frozen=True, slots=True)
class _Document:
    """A document to fetch whole: of at most ``limit`` bytes, and with ``digest`` unless that is empty."""

    subject: str
    path: str
    headers: dict[str, str]
    limit: int
    digest: str


@dataclass(frozen=True, slots=True)
class HostAnswer:
    """The answer of one host about a reference. ``answered``: it has the image. ``credentials`` holds no secret."""

    address: str
    configured_in: str
    mirror: bool
    credentials: str
    answered: bool
    answer: str


class RegistryClient:
    """Fetches one image; for ``async with``. Each host gets only the credentials meant for it.

    Raises KubeletReasonError ``RegistryUnavailable`` if no host can be reached or the transfer is too slow,
    NotFoundError if no host has the object, PermissionDeniedError if access is refused.
    """

    def __init__(self, options: ImageOptions, reference: Reference, credentials: Credentials | None) -> None:
        self._options = options
        self._reference = reference
        self._connection = RegistryConnection(options, reference, credentials)
        self.transferred = 0
        self._rate = RateWatch(options.slowest_bytes_per_second, options.slow_seconds)

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.__aexit__()

    async def head(self) -> FetchedManifest:
        """The current descriptor of the reference, without the content.

        The digest is empty if the registry does not report it.
        """
        return await self._first("resolve", self._head)

    async def manifest(self, digest: str = "") -> FetchedManifest:
        """The manifest with that digest; without one, the manifest that the reference names."""
        wanted = digest or self._reference.digest
        return await self._first("pull" if digest else "resolve", lambda host: self._get_manifest(host, wanted))

    async def tagged(self, tag: str) -> FetchedManifest:
        """The manifest that another tag of the repository names; NotFoundError if there is none."""
        return await self._first("resolve", lambda host: self._get_manifest(host, "", tag))

    async def referrers(self, digest: str, artifact_type: str) -> bytes:
        """The index of what refers to the manifest ``digest`` and has this type (OCI distribution specification,
        "Listing Referrers"); NotFoundError from registries that do not know the call.
        """
        subject = f"referrers of {digest} in {self._reference.repository}"
        query = f"artifactType={quote(artifact_type, safe='')}"

        async def ask(host: ConnectedHost) -> bytes:
            path = f"/referrers/{digest}"
            headers = {"Accept": OCI_INDEX}
            response = await self._connection.request(
                host, "GET", path, headers, query=query, good=_ANSWERS_TO_NEW_CALLS
            )
            if response.status != 200:
                response.close()
                raise NotFoundError(f"{subject}: {host.config.address} does not list them")
            try:
                return await collect(response, self._watched(response), MAX_MANIFEST_BYTES)
            except BodyError as error:
                raise InvalidArgumentError(f"{subject} are {error}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise UnreachableError(f"{subject} broke off: {reason_of(error)}") from error

        return await self._first("resolve", ask)

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A whole blob in memory, verified. InvalidArgumentError if it is larger than ``limit`` or broken."""
        subject = f"blob {descriptor.digest} of {self._reference}"
        if descriptor.size > limit:
            raise InvalidArgumentError(f"{subject} is larger than {limit} bytes")
        wanted = _Document(subject, f"/blobs/{descriptor.digest}", {}, limit, descriptor.digest)
        content, _ = await self._first("pull", lambda host: self._whole(host, wanted))
        if len(content) != descriptor.size:
            raise InvalidArgumentError(f"{subject} is broken: its size is not {descriptor.size}")
        self.transferred += len(content)
        return content

    async def blob(self, descriptor: Descriptor, begin: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """The bytes of a blob from ``begin`` on, unverified. Resumes the transfer if the connection breaks.

        With ``end``, exactly the bytes before it; raises UnsupportedError if the host does not send such a range.
        """
        last = descriptor.size if end is None else end
        received = begin
        failures = 0
        while True:
            begin = received
            try:
                open_here = functools.partial(self._open_blob, descriptor=descriptor, offset=received, end=end)
                with self._rate.waiting():
                    response, first = await self._first("pull", open_here)
                watched = self._rate.watched(self._body_of(response, descriptor, first))
                async with contextlib.aclosing(without_first(watched, received - first)) as chunks:
                    async for chunk in chunks:
                        received += len(chunk)
                        self.transferred += len(chunk)
                        if end is not None and received >= end:
                            yield chunk[: len(chunk) - (received - end)]
                            return
                        yield chunk
                        self._check_rate(descriptor, response)
                if received >= last:
                    return
                raise aiohttp.ClientPayloadError(f"{received} of {last} bytes were received")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if received >= descriptor.size:
                    return  # only the end of the response is missing
                failures = 1 if received - begin >= _PROGRESS else failures + 1
                if failures >= self._options.attempts:
                    raise KubeletReasonError(
                        "RegistryUnavailable",
                        f"blob {descriptor.digest} of {self._reference}: transfer interrupted at byte {received}: "
                        f"{reason_of(error)}",
                    ) from error
                _log.warning(
                    "blob %s: transfer interrupted at byte %d: %s", descriptor.digest, received, reason_of(error)
                )
                with self._rate.waiting():
                    await back_off(failures)

    def _body_of(
        self, response: aiohttp.ClientResponse, descriptor: Descriptor, first: int
    ) -> AsyncGenerator[bytes, None]:
        body = body_of(response, self._options.stall_seconds)
        if not _is_encoded(response, descriptor.size - first):
            return body
        return decoded_blob(body, encoding_of(response), descriptor.media_type)

    def _check_rate(self, descriptor: Descriptor, response: aiohttp.ClientResponse) -> None:
        slow = self._rate.too_slow()
        if slow:
            raise KubeletReasonError(
                "RegistryUnavailable",
                f"blob {descriptor.digest} of {self._reference}: {response.url.authority} is too slow: {slow} "
                "(images.slowest_bytes_per_second)",
            )

    async def explain(self) -> list[HostAnswer]:
        """Send a request to every host that may resolve, in the configured order. Returns what each of them answers."""
        answers = []
        for host in self._connection.hosts:
            answered = False
            if "resolve" not in host.config.capabilities:
                answer = f"not asked: it is configured to {', '.join(sorted(host.config.capabilities))} only"
            else:
                try:
                    found = await self._head_or_get(host)
                    answered, answer = True, found.digest or "it has the image, but reports no digest"
                except UnreachableError as error:
                    answer = f"unreachable: {error}"
                except (NotFoundError, PermissionDeniedError) as error:
                    answer = error.message
            origin = host.config.origin or "the default"
            answers.append(
                HostAnswer(host.config.base, origin, host.config.mirror, credentials_of(host), answered, answer)
            )
        return answers

    async def _first(self, capability: str, ask: Callable[[ConnectedHost], Coroutine[None, None, T]]) -> T:
        """The answer of the first host that has one. Otherwise raises the registry's error, or those of all hosts."""
        refusal: PodkeelError | None = None
        unreachable: list[str] = []
        for host in self._connection.hosts:
            if capability not in host.config.capabilities:
                continue
            try:
                return await ask(host)
            except UnreachableError as error:
                unreachable.append(f"{host.config.base}: {error}")
                refusal = None  # the registry may have what a mirror does not have
            except (NotFoundError, PermissionDeniedError) as error:
                refusal = error
        if refusal is not None:
            raise refusal
        if unreachable:
            raise KubeletReasonError("RegistryUnavailable", f"{self._reference}: {'; '.join(unreachable)}")
        raise InvalidArgumentError(f"{self._reference}: no configured registry host may {capability} images")

    async def _head_or_get(self, host: ConnectedHost) -> FetchedManifest:
        try:
            return await self._head(host)
        except (NotFoundError, PermissionDeniedError):  # some hosts do not support HEAD, or refuse it
            return await self._get_manifest(host, self._reference.digest)

    async def _head(self, host: ConnectedHost) -> FetchedManifest:
        name = self._reference.digest or self._reference.tag
        response = await self._connection.request(host, "HEAD", f"/manifests/{name}", _ACCEPT)
        response.release()
        digest = response.headers.get("Docker-Content-Digest", "")
        return FetchedManifest(b"", digest, response.content_type, response.content_length or 0)

    async def _get_manifest(self, host: ConnectedHost, digest: str, tag: str = "") -> FetchedManifest:
        name = digest or tag or self._reference.tag
        subject = f"manifest {name} of {self._reference.repository}"
        wanted = _Document(subject, f"/manifests/{name}", _ACCEPT, MAX_MANIFEST_BYTES, digest)
        content, response = await self._whole(host, wanted)
        found = digest or digests.digest_of(content, _reported_digest(response))
        return FetchedManifest(content, found, response.content_type, len(content))

    async def _whole(self, host: ConnectedHost, wanted: _Document) -> tuple[bytes, aiohttp.ClientResponse]:
        """A document and its response. Requests it again if the transfer breaks.

        Raises InvalidArgumentError if it has more bytes than its limit or another digest.
        """
        failures = 0
        while True:
            response = await self._connection.request(host, "GET", wanted.path, wanted.headers)
            received = bytearray()
            digest = wanted.digest or _reported_digest(response)
            try:
                content = await collect(response, self._watched(response), wanted.limit, received)
                return await _unencoded(content, encoding_of(response), digest, wanted), response
            except BodyError as error:
                raise InvalidArgumentError(f"{wanted.subject} is {error}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if digest and await _has_digest(bytes(received), digest):
                    return bytes(received), response  # only the end of the response is missing
                failures += 1
                if failures >= self._options.attempts:
                    raise UnreachableError(f"{wanted.subject}: transfer interrupted: {reason_of(error)}") from error
                _log.warning("%s: transfer interrupted: %s", wanted.subject, reason_of(error))
            await back_off(failures)

    async def _watched(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        body = body_of(response, self._options.stall_seconds)
        async with contextlib.aclosing(self._rate.watched(body)) as chunks:
            async for chunk in chunks:
                yield chunk
                if slow := self._rate.too_slow():
                    raise UnreachableError(f"it is too slow: {slow} (images.slowest_bytes_per_second)")

    async def _open_blob(
        self, host: ConnectedHost, descriptor: Descriptor, offset: int, end: int | None = None
    ) -> tuple[aiohttp.ClientResponse, int]:
        """Request the blob. Returns the response, and the offset where it begins: ``offset`` or less.

        If a host does not send exactly the requested range, this requests the whole blob; with ``end`` it raises
        UnsupportedError instead.
        """
        path = f"/blobs/{descriptor.digest}"
        if end is not None:
            headers = {"Range": f"bytes={offset}-{end - 1}"}
            response = await self._connection.request(host, "GET", path, headers, good=_ANSWERS_TO_RANGES)
            if response.status != 206 or first_byte(response) != offset:
                response.close()
                raise UnsupportedError(f"{host.config.address} sends no ranges of blob {descriptor.digest}")
            return response, offset
        if offset:
            headers = {"Range": f"bytes={offset}-"}
            response = await self._connection.request(host, "GET", path, headers, good=_ANSWERS_TO_RANGES)
            first = first_byte(response)
            usable = response.status in (200, 203, 206) and first is not None and first <= offset
            # A range of an encoded body is not one of the blob.
            if usable and not (response.status == 206 and _is_encoded(response, descriptor.size - (first or 0))):
                return response, first or 0
            reported = response.headers.get("Content-Range", "no Content-Range")
            response.close()
            _log.info(
                "blob %s: %s does not resume at byte %d: status %d (%s): requesting the whole blob",
                *(descriptor.digest, host.config.address, offset, response.status, reported[:100]),
            )
        response = await self._connection.request(host, "GET", path, {})
        if first_byte(response):  # some hosts answer 206 to any request, then without Content-Range
            response.close()
            raise UnreachableError(f"blob {descriptor.digest} was requested as a whole, but a part of it was received")
        return response, 0


def _is_encoded(response: aiohttp.ClientResponse, size: int) -> bool:
    """Whether the body has a Content-Encoding that this client decodes, and not ``size`` bytes as it is."""
    return encoding_of(response) in ENCODINGS and response.content_length != size


def _reported_digest(response: aiohttp.ClientResponse) -> str:
    """The digest in the response's headers; empty if there is none or it is invalid."""
    reported = response.headers.get("Docker-Content-Digest", "")
    return reported if digests.is_digest(reported) else ""


async def _has_digest(content: bytes, digest: str) -> bool:
    return await in_image_thread(digests.digest_of, content, digest) == digest


async def _unencoded(content: bytes, encoding: str, digest: str, wanted: _Document) -> bytes:
    """The content with that digest: as received, or with its Content-Encoding decoded.

    Some hosts declare compressed files as encoded although they are not.
    """
    if encoding and not (digest and await _has_digest(content, digest)):
        content = await decoded(content, encoding, wanted.limit)
    if digest:
        await in_image_thread(digests.verify, content, digest, wanted.subject)
    return content
