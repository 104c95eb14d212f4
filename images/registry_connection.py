"""Requests to the hosts of one registry: with retries, redirects, and the authorization each of them asks for."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urljoin, urlsplit

import aiohttp
import yarl

from host.errors import NotFoundError, PermissionDeniedError
from host.threads import in_thread
from images import authorization
from images.credentials import Credentials
from images.hosts import RegistryHost, hosts_for
from images.node_credentials import DOCKER_HUB_NAMES, FoundCredentials, find_credentials
from images.options import ImageOptions
from images.reference import DEFAULT_DOMAIN, Reference
from images.transfer import back_off, error_text, proxy_for, reason_of

_CHUNK = 256 << 10
_REDIRECTS = 5
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECT = frozenset((301, 302, 303, 307, 308))

Body = Callable[[], AsyncIterator[bytes]]


class UnreachableError(Exception):
    """This host cannot serve now; another one might."""


@dataclass(slots=True)
class ConnectedHost:
    """One of the hosts, with what was learned about it; ``found`` is None until it asked for credentials."""

    config: RegistryHost
    tls: ssl.SSLContext | bool = True
    found: FoundCredentials | None = None
    authorization: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RegistryConnection:
    """The hosts for one reference; for ``async with``.

    Each host gets only the credentials meant for it, when it asks for some: those of the request, else the node's own.
    """

    def __init__(
        self, options: ImageOptions, reference: Reference, credentials: Credentials | None, *, actions: str = "pull"
    ) -> None:
        self._options = options
        self._reference = reference
        self._credentials = credentials if credentials != Credentials() else None
        self._actions = actions
        self._session: aiohttp.ClientSession | None = None
        self.hosts: list[ConnectedHost] = []

    async def __aenter__(self) -> Self:
        for config in await in_thread(hosts_for, self._reference.domain, self._options):
            tls = await in_thread(config.tls) if config.base.startswith("https:") else True
            self.hosts.append(ConnectedHost(config, tls))
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

    async def request(
        self,
        host: ConnectedHost,
        method: str,
        path: str,
        headers: dict[str, str],
        *,
        query: str = "",
        body: Body | None = None,
        good: tuple[int, ...] = (200, 206),
    ) -> aiohttp.ClientResponse:
        """Send one request about the repository, with retries; the answer has one of the ``good`` statuses.

        ``path`` may also be a whole address, where the registry named one. Raises UnreachableError, NotFoundError or
        PermissionDeniedError.
        """
        url = path if "://" in path else f"{host.config.base}/{self._reference.path}{path}"
        queries = [f"ns={self._reference.domain}"] if host.config.mirror else []
        queries += [query] if query else []
        if queries:
            url += ("&" if "?" in url else "?") + "&".join(queries)
        failures = 0
        asked = False
        while True:
            try:
                response, at_home = await self._send(host, method, url, headers, body)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failures += 1
                if failures >= self._options.attempts or isinstance(error, aiohttp.ClientConnectorError):
                    raise UnreachableError(reason_of(error)) from error
                await back_off(failures)
                continue
            if response.status in good:
                return response
            status = response.status
            text = await error_text(response)
            # What a host redirects to must not be able to ask for that host's credentials.
            if status == 401 and not asked and at_home:
                asked = await self._authorize(host, response)
            elif status in (401, 403):
                raise PermissionDeniedError(
                    f"{self._reference}: {host.config.address} refused access ({text}): check the image's name and the "
                    f"credentials ({who(host)})"
                )
            elif status == 404:
                raise NotFoundError(
                    f"{self._reference}: {host.config.address} does not have {path.lstrip('/')} ({text})"
                )
            elif status in _TRANSIENT:
                failures += 1
                if failures >= self._options.attempts:
                    raise UnreachableError(f"status {status}: {text}")
                await back_off(failures, response.headers.get("Retry-After", ""))
            else:
                raise UnreachableError(f"unexpected status {status}: {text}")

    async def _send(
        self, host: ConnectedHost, method: str, url: str, headers: dict[str, str], body: Body | None
    ) -> tuple[aiohttp.ClientResponse, bool]:
        """One request, redirects followed, and whether the host itself answered it.

        What was meant for the host is not sent to where it redirects.
        """
        origin = urlsplit(host.config.base)[:2]
        for _ in range(_REDIRECTS):
            at_home = urlsplit(url)[:2] == origin
            sent = dict(headers)
            if at_home:
                sent.update(host.config.headers)
                if host.authorization:
                    sent["Authorization"] = host.authorization
            tls = host.tls if at_home else True
            data = body() if body is not None else None
            response = await self._open(method, url, sent, tls=tls, host=host, data=data)
            if response.status not in _REDIRECT:
                return response, at_home
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
        host: ConnectedHost,
        data: dict[str, str] | AsyncIterator[bytes] | None,
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
            data=data,
            ssl=tls,
            timeout=timeout,
            allow_redirects=False,
            proxy=proxy_for(url),
        )

    async def _authorize(self, host: ConnectedHost, refused: aiohttp.ClientResponse) -> bool:
        """Find an Authorization header that answers the challenge; several transfers of one pull share it.

        False if another transfer had found a new one meanwhile, which has yet to be tried.
        """
        challenges = authorization.parse_challenges(refused.headers.getall("WWW-Authenticate", []))
        tried = refused.request_info.headers.get("Authorization", "")
        async with host.lock:
            if host.authorization and host.authorization != tried:
                return False
            if host.found is None:
                host.found = await self._find_credentials(host.config)
            credentials = host.found.credentials
            try:
                direct = authorization.answer_directly(challenges, credentials)
                if direct is None:
                    secure = host.config.base.startswith("https:")
                    request = authorization.token_request(
                        challenges, credentials, f"repository:{self._reference.path}:{self._actions}", secure=secure
                    )
                    direct = await self._fetch_token(host, request)
            except PermissionDeniedError as error:
                raise PermissionDeniedError(
                    f"{self._reference}: {host.config.address}: {error.message} (credentials: {who(host)})"
                ) from error
            host.authorization = direct
        return True

    async def _find_credentials(self, config: RegistryHost) -> FoundCredentials:
        addresses = [config.address]
        if not config.mirror:
            addresses += [self._reference.domain]
            addresses += DOCKER_HUB_NAMES if self._reference.domain == DEFAULT_DOMAIN else ()
        if self._credentials is not None:
            meant_for = self._credentials.server_host()
            if meant_for in addresses or (not meant_for and not config.mirror):
                return FoundCredentials(self._credentials, "the request")
        return await find_credentials(self._options, addresses, self._reference.path)

    async def _fetch_token(self, host: ConnectedHost, request: authorization.TokenRequest) -> str:
        method = "GET" if request.form is None else "POST"
        server = urlsplit(request.url).netloc
        tls = host.tls if server == host.config.address or host.config.skip_verify else True
        if host.config.ca:
            tls = host.tls  # a private registry's token server has a certificate of the same authority
        failures = 0
        while True:
            try:
                response = await self._open(method, request.url, request.headers, tls=tls, host=host, data=request.form)
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
                raise UnreachableError(f"token server {server}: {reason}")
            await back_off(failures)


def who(host: ConnectedHost) -> str:
    """With which credentials the host is asked, without their secrets."""
    if host.found is None:
        return "none were asked for"
    if host.found.credentials is None:
        return f"none: {host.found.origin}"
    return f"{host.found.credentials.described()}, from {host.found.origin}"
