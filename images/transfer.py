"""The small steps of talking HTTP to a registry: waiting, proxies, bodies and the words of an error."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import AsyncGenerator
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
import msgspec

from images.hosts import is_loopback

_LONGEST_WAIT = 30.0


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error]


async def after(response: aiohttp.ClientResponse, offset: int) -> AsyncGenerator[bytes, None]:
    """The body, without its first ``offset`` bytes if the registry does not know how to begin there."""
    skip = offset if response.status == 200 else 0
    try:
        async for chunk in response.content.iter_any():
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            yield chunk[skip:] if skip else chunk
            skip = 0
    finally:
        response.close()


async def error_text(response: aiohttp.ClientResponse) -> str:
    """A short form of a registry's error body (OCI distribution specification, "Error Codes")."""
    try:
        content = await response.content.read(4096)
    except (aiohttp.ClientError, TimeoutError, OSError):
        content = b""
    finally:
        response.close()
    try:
        errors = msgspec.json.decode(content, type=_Errors).errors
    except (msgspec.MsgspecError, UnicodeDecodeError):
        errors = []
    words = [" ".join(filter(None, (error.code, error.message))) for error in errors[:3]]
    return "; ".join(words)[:300] or f"{response.status} {response.reason}"


async def back_off(failures: int, retry_after: str = "") -> None:
    """Wait before the next try: what the registry asks for, else longer each time."""
    seconds = random.uniform(0.5, 1.0) * 0.2 * 2**failures
    if retry_after.isdigit():
        seconds = float(retry_after)
    elif retry_after and (date := email.utils.parsedate_tz(retry_after)):
        seconds = email.utils.mktime_tz(date) - time.time()
    await asyncio.sleep(max(0.0, min(seconds, _LONGEST_WAIT)))


def reason_of(error: BaseException) -> str:
    """What to say of an error of the network."""
    if isinstance(error, TimeoutError):
        return f"no answer in time {error}".strip()
    return str(error) or type(error).__name__


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url`` (http_proxy, https_proxy, all_proxy, no_proxy)."""
    proxies = getproxies_environment()
    parts = urlsplit(url)
    if not proxies or is_loopback(parts.netloc) or proxy_bypass(parts.netloc, proxies):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")
