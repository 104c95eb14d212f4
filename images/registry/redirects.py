"""Follows redirects (RFC 9110, section 15.4), so that data for one host is never sent to another."""

from __future__ import annotations

import string
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import quote, urljoin, urlsplit

import aiohttp

from host.errors import PermissionDeniedError

MAX_REDIRECTS = 10
MAX_ADDRESS_LENGTH = 16 << 10

_REDIRECT = frozenset((301, 302, 303, 307, 308))
_TO_GET = frozenset((301, 302, 303))  # the body is not sent again
_DEFAULT_PORTS = {"http": 80, "https": 443}
_KEPT = string.punctuation  # besides letters and digits, all characters that an address may hold, also escapes

Origin: TypeAlias = tuple[str, str, int]
Body: TypeAlias = Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Sending:
    """One request. ``private`` are headers for its own origin only, and so is the body if it is ``secret``.

    ``elsewhere`` are values of Authorization for other origins.
    """

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    private: Mapping[str, str] = field(default_factory=dict)
    body: Body | bytes | None = None
    secret: bool = False
    elsewhere: Mapping[Origin, str] = field(default_factory=dict)

    def headers_for(self, origin: Origin, home: Origin) -> dict[str, str]:
        """The headers that ``origin`` gets."""
        if origin == home:
            return {**self.headers, **self.private}
        authorization = self.elsewhere.get(origin)
        return {**self.headers, **({"Authorization": authorization} if authorization else {})}


# Sends method, address, headers and body once.
Open: TypeAlias = Callable[
    [str, str, Mapping[str, str], AsyncIterator[bytes] | bytes | None], Awaitable[aiohttp.ClientResponse]
]


async def follow(sending: Sending, home: Origin, send: Open) -> tuple[aiohttp.ClientResponse, Origin]:
    """The response after all redirects, and the origin that sent it.

    Raises aiohttp.ClientPayloadError for a redirect to an invalid address and for too many. Raises
    PermissionDeniedError if a secret body would have to be sent to another origin.
    """
    method, url, body = sending.method, sending.url, sending.body
    for _ in range(MAX_REDIRECTS + 1):
        origin = origin_of(url)
        if body is not None and sending.secret and origin != home:
            raise PermissionDeniedError(f"it redirects to {urlsplit(url).netloc}, which must not get the credentials")
        headers = sending.headers_for(origin, home)
        response = await send(method, url, headers, body() if callable(body) else body)
        if response.status not in _REDIRECT:
            return response, origin
        response.close()
        url = target_of(url, response.headers.get("Location", ""))
        if response.status in _TO_GET and method not in ("GET", "HEAD"):
            method, body = "GET", None
    raise aiohttp.ClientPayloadError(f"more than {MAX_REDIRECTS} redirects")


def target_of(base: str, location: str) -> str:
    """The address in a Location header. aiohttp.ClientPayloadError if it is invalid."""
    try:
        if location:
            return address(urljoin(base, location))
    except ValueError:
        pass
    raise aiohttp.ClientPayloadError(f"redirected to {location[:200]!r}, which is no http address")


def address(text: str) -> str:
    """``text`` as an http or https address of ASCII characters. ValueError if it is invalid."""
    quoted = quote(text, safe=_KEPT, errors="surrogateescape")
    if len(quoted) > MAX_ADDRESS_LENGTH:
        raise ValueError(f"an address of {len(quoted)} bytes")
    origin_of(quoted)
    return quoted


def origin_of(url: str) -> Origin:
    """Scheme, host and port. ValueError if this is no http or https address."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url[:200]!r} is no http or https address")
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme]
