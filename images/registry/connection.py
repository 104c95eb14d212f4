"""Sends requests to the hosts of one registry, with retries, redirects and authorization."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlencode, urlsplit

import aiohttp
import yarl

from host.concurrency.threads import in_image_thread
from host.errors import NotFoundError, PermissionDeniedError
from images.oci.reference import DEFAULT_DOMAIN, Reference
from images.options import ImageOptions
from images.registry import tokens
from images.registry.auth_file import DOCKER_HUB_NAMES, FoundCredentials, find_credentials
from images.registry.bodies import MAX_TOKEN_BYTES, BodyError, decoded, encoding_of, error_text, read_body
from images.registry.credentials import Credentials
from images.registry.hosts import RegistryHost, hosts_for
from images.registry.http import answer_within, back_off, proxy_for, reason_of
from images.registry.name_lookup import NameLookup
from images.registry.redirects import Body, Origin, Sending, follow, origin_of

_CHUNK = 256 << 10
_LONGEST_HEADER = 64 << 10  # bytes; the addresses of some storage services are longer than aiohttp's 8 KiB
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))
_NO_GET = frozenset((404, 405, 501))  # statuses of token servers that only accept POST


class UnreachableError(Exception):
    """This host cannot serve the request now. Another host may."""


@dataclass(slots=True)
class ConnectedHost:
    """One of the hosts, with its TLS settings and credentials. ``found`` is None until it requires credentials.

    ``tls_elsewhere`` is for its token server and the targets of its redirects: it has the same authorities, but not the
    client certificate. ``elsewhere`` are anonymous access tokens for targets of its redirects.
    """

    config: RegistryHost
    origin: Origin
    tls: ssl.SSLContext | bool = True
    tls_elsewhere: ssl.SSLContext | bool = True
    found: FoundCredentials | None = None
    authorization: str = ""
    elsewhere: dict[Origin, str] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class RegistryConnection:
    """The hosts for one reference; for ``async with``.

    A host gets credentials only if it requires them, and only those meant for it: from the request, or else the node's.
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
        for config in await in_image_thread(hosts_for, self._reference.domain, self._options):
            tls = await in_image_thread(config.tls) if config.base.startswith("https:") else True
            special = config.ca or config.skip_verify
            elsewhere = await in_image_thread(config.tls, with_client=False) if special else True
            self.hosts.append(ConnectedHost(config, origin_of(config.base), tls, elsewhere))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=0, resolver=NameLookup()),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": "podkeel", "Accept-Encoding": "identity"},
            read_bufsize=_CHUNK,
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
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
        good: tuple[int, ...] = (200, 203, 206),
    ) -> aiohttp.ClientResponse:
        """Send one request about the repository, with retries. The response has one of the ``good`` statuses.

        ``path`` may also be a full address that the registry has sent. Raises UnreachableError, NotFoundError or
        PermissionDeniedError.
        """
        url = path if "://" in path else f"{host.config.base}/{self._reference.path}{path}"
        queries = [f"ns={self._reference.domain}"] if host.config.mirror else []
        queries += [query] if query else []
        if queries:
            url += ("&" if "?" in url else "?") + "&".join(queries)
        failures = 0
        asked: set[Origin] = set()
        while True:
            try:
                response, origin = await self._send(host, method, url, headers, body)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                failures += 1
                if failures >= self._options.attempts or isinstance(error, aiohttp.ClientConnectorError):
                    raise UnreachableError(reason_of(error)) from error
                await back_off(failures)
                continue
            if response.status in good:
                return response
            status = response.status
            text = await error_text(response, self._options.stall_seconds)
            if status == 401 and origin not in asked:
                if await self._authorize(host, response, origin):
                    asked.add(origin)
            elif status in (401, 403):
                there = (
                    host.config.address if origin == host.origin else f"{response.url.authority}, a redirect's target,"
                )
                raise PermissionDeniedError(
                    f"{self._reference}: {there} refused access ({text}): check the image's name and the "
                    f"credentials ({credentials_of(host)})"
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
    ) -> tuple[aiohttp.ClientResponse, Origin]:
        """Send one request and follow redirects. Also returns the origin that answered."""
        private = dict(host.config.headers)
        if host.authorization:
            private["Authorization"] = host.authorization
        sending = Sending(method, url, headers, private, body, elsewhere=host.elsewhere)
        return await follow(sending, host.origin, functools.partial(self._open, host))

    async def _open(
        self,
        host: ConnectedHost,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: AsyncIterator[bytes] | bytes | None,
    ) -> aiohttp.ClientResponse:
        assert self._session is not None
        seconds = host.config.connect_seconds or self._options.connect_seconds
        stall = self._options.stall_seconds
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=seconds, sock_read=stall)
        try:
            # A total limit, because headers sent byte by byte, or endless interim answers (1xx), count as progress.
            async with answer_within(seconds + stall, body) as sent:
                return await self._session.request(
                    method,
                    yarl.URL(url, encoded=True),
                    headers=headers,
                    data=sent,
                    ssl=host.tls if origin_of(url) == host.origin else host.tls_elsewhere,
                    timeout=timeout,
                    allow_redirects=False,
                    proxy=proxy_for(url),
                )
        except aiohttp.ClientError:
            raise
        except ValueError as error:  # a host name that IDNA refuses, or a header with a line break
            raise aiohttp.ClientPayloadError(f"{urlsplit(url).netloc} cannot be requested: {error}") from error

    async def _authorize(self, host: ConnectedHost, refused: aiohttp.ClientResponse, origin: Origin) -> bool:
        """Set an Authorization header that answers the challenge of ``origin``. All transfers of a pull share it.

        The target of a redirect gets an anonymous token, never the credentials of the redirecting host. Returns False
        if another transfer has set a new header, which is not tried yet.
        """
        challenges = tokens.parse_challenges(refused.headers.getall("WWW-Authenticate", []))
        tried = refused.request_info.headers.get("Authorization", "")
        at_home = origin == host.origin
        async with host.lock:
            present = host.authorization if at_home else host.elsewhere.get(origin, "")
            if present and present != tried:
                return False
            try:
                if at_home:
                    host.authorization = await self._answer_of(host, challenges)
                else:
                    host.elsewhere[origin] = await self._token(host, challenges, None, secure=False)
            except PermissionDeniedError as error:
                given = credentials_of(host) if at_home else "those of the registry are not for it"
                raise PermissionDeniedError(
                    f"{self._reference}: {_named(host, origin)}: {error.message} (credentials: {given})"
                ) from error
        return True

    async def _answer_of(self, host: ConnectedHost, challenges: list[tokens.Challenge]) -> str:
        """The Authorization header for the host itself."""
        if host.found is None:
            host.found = await self._find_credentials(host.config)
        credentials = host.found.credentials
        direct = tokens.answer_directly(challenges, credentials)
        if direct is not None:
            return direct
        return await self._token(host, challenges, credentials, secure=host.config.base.startswith("https:"))

    async def _token(
        self, host: ConnectedHost, challenges: list[tokens.Challenge], credentials: Credentials | None, *, secure: bool
    ) -> str:
        scope = f"repository:{self._reference.path}:{self._actions}"
        return await self._fetch_token(host, tokens.token_request(challenges, credentials, scope, secure=secure))

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

    async def _fetch_token(self, host: ConnectedHost, request: tokens.TokenRequest) -> str:
        server = urlsplit(request.url).netloc
        failures = 0
        while True:
            try:
                status, content, retry_after = await self._ask_for_token(host, request)
                reason = f"status {status}"
            except BodyError as error:
                raise PermissionDeniedError(f"the token server's answer is not understood: it is {error}") from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                status, retry_after, reason = 0, "", reason_of(error)
            if 200 <= status < 300:  # some servers answer 201: a token was created
                return tokens.read_token(content)
            if status in _NO_GET and request.instead is not None:
                request = request.instead
                continue
            if status and status not in _TRANSIENT:
                raise PermissionDeniedError(f"the token server {server} refused access ({reason})")
            failures += 1
            if failures >= self._options.attempts:
                raise UnreachableError(f"token server {server}: {reason}")
            await back_off(failures, retry_after)

    async def _ask_for_token(self, host: ConnectedHost, request: tokens.TokenRequest) -> tuple[int, bytes, str]:
        """Status, body and Retry-After. The credentials go only to the token server that the registry named."""
        send = functools.partial(self._open, host)
        if request.form is None:
            sending = Sending("GET", request.url, {}, request.headers)
        else:
            body = urlencode(request.form, errors="surrogateescape").encode()
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            sending = Sending("POST", request.url, kind, {}, body, secret=True)
        response, _ = await follow(sending, origin_of(request.url), send)
        encoding, retry_after = encoding_of(response), response.headers.get("Retry-After", "")
        content = await read_body(response, MAX_TOKEN_BYTES, self._options.stall_seconds)
        return response.status, await decoded(content, encoding, MAX_TOKEN_BYTES), retry_after


def _named(host: ConnectedHost, origin: Origin) -> str:
    """The name of an origin that answers for the host, in messages."""
    return host.config.address if origin == host.origin else f"{origin[1]}:{origin[2]} (the target of a redirect)"


def credentials_of(host: ConnectedHost) -> str:
    """A description of the credentials used for the host, without secrets."""
    if host.found is None:
        return "none were required"
    if host.found.credentials is None:
        return f"none: {host.found.origin}"
    return f"{host.found.credentials.described()}, from {host.found.origin}"
