"""A client of the OCI distribution API: resolves a reference, fetches manifests and blobs, from mirrors where set."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
import yarl

from host.errors import (
    InvalidArgumentError,
    KubeletReasonError,
    NotFoundError,
    PermissionDeniedError,
    PodkeelError,
)
from host.threads import in_thread
from images import authorization, digests
from images.credentials import Credentials
from images.hosts import RegistryHost, hosts_for
from images.manifests import LARGEST_MANIFEST, MANIFEST_TYPES, Descriptor
from images.options import ImageOptions
from images.reference import Reference
from images.transfer import after, back_off, error_text, proxy_for, reason_of

_log = logging.getLogger("podkeel.images")

_CHUNK = 256 << 10
_PROGRESS = 1 << 20  # bytes between two breaks that make a transfer worth going on with
_REDIRECTS = 5
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))


T = TypeVar("T")


class _UnreachableError(Exception):
    """This host cannot serve now; another one might."""


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest or index as the registry has it, its digest verified."""

    content: bytes
    digest: str
    media_type: str


@dataclass(slots=True)
class _Host:
    """One of the hosts for this pull, with what was learned about it."""

    config: RegistryHost
    tls: ssl.SSLContext | bool = True
    credentials: Credentials | None = None
    authorization: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RegistryClient:
    """Fetches one image; for ``async with``. Each host gets only the credentials meant for it.

    Raises KubeletReasonError ``RegistryUnavailable`` when no host can be reached, NotFoundError when none has what is
    asked, PermissionDeniedError when access is refused.
    """

    def __init__(self, options: ImageOptions, reference: Reference, credentials: Credentials | None) -> None:
        self._options = options
        self._reference = reference
        self._credentials = credentials
        self._hosts: list[_Host] = []
        self._session: aiohttp.ClientSession | None = None
        self.transferred = 0

    async def __aenter__(self) -> Self:
        configs = await in_thread(hosts_for, self._reference.domain, self._options)
        for config in configs:
            tls = await in_thread(config.tls) if config.base.startswith("https:") else True
            self._hosts.append(_Host(config, tls, self._credentials_for(config)))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": "podkeel"},
            read_bufsize=_CHUNK,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    def _credentials_for(self, config: RegistryHost) -> Credentials | None:
        if self._credentials is None:
            return None
        meant_for = self._credentials.server_host()
        if meant_for:
            names = {config.address} if config.mirror else {config.address, self._reference.domain}
            if not config.mirror and self._reference.domain == "docker.io":
                names |= {"index.docker.io", "docker.io"}
            return self._credentials if meant_for in names else None
        return None if config.mirror else self._credentials

    async def head(self) -> str:
        """The digest that the reference names now; empty if the registry does not say."""
        return (await self._first("resolve", self._head)).digest

    async def manifest(self, digest: str = "") -> FetchedManifest:
        """The manifest of that digest, or the one that the reference names."""
        wanted = digest or self._reference.digest
        return await self._first("pull" if digest else "resolve", lambda host: self._get_manifest(host, wanted))

    async def small_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A whole blob in memory, verified; InvalidArgumentError if it is larger than ``limit`` or broken."""
        subject = f"blob {descriptor.digest} of {self._reference}"
        if descriptor.size > limit:
            raise InvalidArgumentError(f"{subject} is larger than {limit} bytes")
        content = bytearray()
        async for chunk in self.blob(descriptor):
            content += chunk
            if len(content) > descriptor.size:
                break
        if len(content) != descriptor.size:
            raise InvalidArgumentError(f"{subject} is broken: its size is not {descriptor.size}")
        digests.verify(bytes(content), descriptor.digest, subject)
        return bytes(content)

    async def blob(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """The bytes of a blob, unverified; a broken connection is taken up again where it broke."""
        received = 0
        failures = 0
        while True:
            begin = received
            try:
                open_here = functools.partial(self._open_blob, descriptor=descriptor, offset=received)
                response = await self._first("pull", open_here)
                async with contextlib.aclosing(after(response, received)) as chunks:
                    async for chunk in chunks:
                        received += len(chunk)
                        self.transferred += len(chunk)
                        yield chunk
                if received >= descriptor.size:
                    return
                raise aiohttp.ClientPayloadError(f"{received} of {descriptor.size} bytes came")
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failures = 1 if received - begin >= _PROGRESS else failures + 1
                if failures >= self._options.attempts:
                    raise KubeletReasonError(
                        "RegistryUnavailable",
                        f"blob {descriptor.digest} of {self._reference}: transfer broke off at byte {received}: "
                        f"{reason_of(error)}",
                    ) from error
                _log.warning("blob %s broke off at byte %d: %s", descriptor.digest, received, reason_of(error))
                await back_off(failures)

    async def _first(self, capability: str, ask: Callable[[_Host], Coroutine[Any, Any, T]]) -> T:
        """The answer of the first host that has one; otherwise the error of the registry itself, or what all said."""
        refusal: PodkeelError | None = None
        unreachable: list[str] = []
        for host in self._hosts:
            if capability not in host.config.capabilities:
                continue
            try:
                return await ask(host)
            except _UnreachableError as error:
                unreachable.append(f"{host.config.base}: {error}")
                refusal = None  # what a mirror lacks, the registry behind it may have
            except (NotFoundError, PermissionDeniedError) as error:
                refusal = error
        if refusal is not None:
            raise refusal
        if unreachable:
            raise KubeletReasonError("RegistryUnavailable", f"{self._reference}: {'; '.join(unreachable)}")
        raise InvalidArgumentError(f"{self._reference}: no configured registry host may {capability} images")

    async def _head(self, host: _Host) -> FetchedManifest:
        name = self._reference.digest or self._reference.tag
        response = await self._request(host, "HEAD", f"/manifests/{name}", {"Accept": ", ".join(MANIFEST_TYPES)})
        response.release()
        return FetchedManifest(b"", response.headers.get("Docker-Content-Digest", ""), response.content_type)

    async def _get_manifest(self, host: _Host, digest: str) -> FetchedManifest:
        name = digest or self._reference.tag
        subject = f"manifest {name} of {self._reference.repository}"
        response = await self._request(host, "GET", f"/manifests/{name}", {"Accept": ", ".join(MANIFEST_TYPES)})
        try:
            content = await response.content.read(LARGEST_MANIFEST + 1)
            while len(content) <= LARGEST_MANIFEST and (more := await response.content.read(LARGEST_MANIFEST)):
                content += more
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _UnreachableError(reason_of(error)) from error
        finally:
            response.close()
        if len(content) > LARGEST_MANIFEST:
            raise InvalidArgumentError(f"{subject} is larger than {LARGEST_MANIFEST} bytes")
        said = response.headers.get("Docker-Content-Digest", "")
        expected = digest or (said if digests.is_digest(said) else "")
        if expected:
            digests.verify(content, expected, subject)
        return FetchedManifest(content, expected or digests.digest_of(content), response.content_type)

    async def _open_blob(self, host: _Host, descriptor: Descriptor, offset: int) -> aiohttp.ClientResponse:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        return await self._request(host, "GET", f"/blobs/{descriptor.digest}", headers)

    async def _request(self, host: _Host, method: str, path: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """Send one request with retries; the answer is a success. Raises _UnreachableError or the fitting error."""
        url = f"{host.config.base}/{self._reference.path}{path}"
        if host.config.mirror:
            url += f"?ns={self._reference.domain}"
        failures = 0
        asked = False
        while True:
            try:
                response = await self._send(host, method, url, headers)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failures += 1
                if failures >= self._options.attempts or isinstance(error, aiohttp.ClientConnectorError):
                    raise _UnreachableError(reason_of(error)) from error
                await back_off(failures)
                continue
            if response.status in (200, 206):
                return response
            status = response.status
            text = await error_text(response)
            if status == 401 and not asked:
                asked = True
                await self._authorize(host, response)
            elif status in (401, 403):
                raise PermissionDeniedError(
                    f"{self._reference}: {host.config.address} refused access ({text}): check the image's name and the "
                    "credentials (imagePullSecrets)"
                )
            elif status == 404:
                raise NotFoundError(f"{self._reference}: {host.config.address} does not have {path[1:]} ({text})")
            elif status in _TRANSIENT:
                failures += 1
                if failures >= self._options.attempts:
                    raise _UnreachableError(f"status {status}: {text}")
                await back_off(failures, response.headers.get("Retry-After", ""))
            else:
                raise _UnreachableError(f"unexpected status {status}: {text}")

    async def _send(self, host: _Host, method: str, url: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """One request, redirects followed; what was meant for the host is not sent to where it redirects."""
        origin = urlsplit(url)[:2]
        for _ in range(_REDIRECTS):
            at_home = urlsplit(url)[:2] == origin
            sent = dict(headers)
            if at_home:
                sent.update(host.config.headers)
                if host.authorization:
                    sent["Authorization"] = host.authorization
            response = await self._open(method, url, sent, tls=host.tls if at_home else True, host=host)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            response.release()
            target = urljoin(url, response.headers.get("Location", ""))
            if urlsplit(target).scheme not in ("http", "https"):
                raise aiohttp.ClientPayloadError(f"redirected to {target!r}, which is no http address")
            url = target
        raise aiohttp.ClientPayloadError(f"more than {_REDIRECTS} redirects")

    async def _open(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        *,
        tls: ssl.SSLContext | bool,
        host: _Host,
        form: dict[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        seconds = host.config.connect_seconds or self._options.connect_seconds
        timeout = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=seconds, sock_read=self._options.stall_seconds
        )
        return await self._session.request(
            method,
            yarl.URL(url, encoded=True),
            headers=headers,
            data=form,
            ssl=tls,
            timeout=timeout,
            allow_redirects=False,
            proxy=proxy_for(url),
        )

    async def _authorize(self, host: _Host, refused: aiohttp.ClientResponse) -> None:
        """Find an Authorization header that answers the challenge; several transfers of one pull share it."""
        challenges = authorization.parse_challenges(refused.headers.getall("WWW-Authenticate", []))
        tried = refused.request_info.headers.get("Authorization", "")
        async with host.lock:
            if host.authorization and host.authorization != tried:
                return  # another transfer got a new one meanwhile
            try:
                direct = authorization.answer_directly(challenges, host.credentials)
                if direct is None:
                    secure = host.config.base.startswith("https:")
                    request = authorization.token_request(
                        challenges, host.credentials, repository=self._reference.path, secure=secure
                    )
                    direct = await self._fetch_token(host, request)
            except PermissionDeniedError as error:
                raise PermissionDeniedError(f"{self._reference}: {host.config.address}: {error.message}") from error
            host.authorization = direct

    async def _fetch_token(self, host: _Host, request: authorization.TokenRequest) -> str:
        method = "GET" if request.form is None else "POST"
        server = urlsplit(request.url).netloc
        tls = host.tls if server == host.config.address or host.config.skip_verify else True
        if host.config.ca:
            tls = host.tls  # a private registry's token server has a certificate of the same authority
        failures = 0
        while True:
            try:
                response = await self._open(method, request.url, request.headers, tls=tls, host=host, form=request.form)
                content = await response.read()
                transient = response.status in _TRANSIENT
                reason = f"status {response.status}"
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                transient, reason = True, reason_of(error)
            else:
                if response.status == 200:
                    return authorization.read_token(content)
            if not transient:
                raise PermissionDeniedError(f"the token server {server} refused access ({reason})")
            failures += 1
            if failures >= self._options.attempts:
                raise _UnreachableError(f"token server {server}: {reason}")
            await back_off(failures)
