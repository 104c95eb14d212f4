"""Helpers for HTTP requests to a registry: timeouts, rates, proxies and error messages."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp

from images.registry.hosts import is_loopback

_MAX_WAIT_SECONDS = 30.0
_CONTENT_RANGE = re.compile(r"\s*bytes\s+([0-9]{1,18})-", re.IGNORECASE)
_TLS_OF_CONNECTION = re.compile(r" ssl:(?:<[^>]*>|\w+)(?= \[)")  # aiohttp prints a Python object here


class RateWatch:
    """Checks the rate of all transfers of one pull, over windows of time spent waiting for the network.

    Time in which every transfer waits for the disk does not count. ``least`` is in bytes a second; 0 allows any rate.
    """

    def __init__(self, least: int, window: float) -> None:
        self._least = least
        self._window = window
        self._waiting = 0
        self._since = 0.0
        self._waited = 0.0
        self._received = 0
        self._slow = ""

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Declare that a transfer waits for the network during the block."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._waited += time.monotonic() - self._since

    async def watched(self, chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The same chunks, with their bytes and waiting time counted."""
        async with contextlib.aclosing(chunks):
            while True:
                with self.waiting():
                    chunk = await anext(chunks, b"")
                if not chunk:
                    return
                self._received += len(chunk)
                yield chunk

    def too_slow(self) -> str:
        """A sentence about the rate of a window if it was too low, otherwise an empty string."""
        now = time.monotonic()
        waited = self._waited + (now - self._since if self._waiting else 0.0)
        if waited < self._window or self._slow or not self._least:
            return self._slow
        if self._received < self._least * waited:
            self._slow = f"{self._received} bytes were received in {waited:.3g} s, less than {self._least} a second"
        self._since, self._waited, self._received = now, 0.0, 0
        return self._slow


async def body_of(response: aiohttp.ClientResponse, stall_seconds: float) -> AsyncGenerator[bytes, None]:
    """The body, piece by piece. Closes the response.

    TimeoutError if no bytes of the body arrive for ``stall_seconds``. aiohttp's own limit is not enough: it also counts
    bytes between the pieces (of chunked encoding, of trailers) as progress.
    """
    try:
        while True:
            async with asyncio.timeout(stall_seconds):
                chunk = await response.content.readany()
            if not chunk:
                return
            yield chunk
    finally:
        response.close()


@contextlib.asynccontextmanager
async def answer_within(
    seconds: float, body: AsyncIterator[bytes] | bytes | None
) -> AsyncIterator[AsyncIterator[bytes] | bytes | None]:
    """Raise TimeoutError in the block ``seconds`` after all of ``body`` was sent. Provides the body to send."""
    loop = asyncio.get_running_loop()

    async def pieces(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in body:
            yield piece
        with contextlib.suppress(RuntimeError):  # the answer has already arrived
            limit.reschedule(loop.time() + seconds)

    streamed = None if body is None or isinstance(body, bytes) else body
    async with asyncio.timeout(seconds if streamed is None else None) as limit:
        yield body if streamed is None else pieces(streamed)


async def without_first(chunks: AsyncGenerator[bytes, None], skip: int) -> AsyncGenerator[bytes, None]:
    """The chunks without their first ``skip`` bytes."""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            yield chunk[skip:] if skip else chunk
            skip = 0


def first_byte(response: aiohttp.ClientResponse) -> int | None:
    """The offset of the body in the whole object (RFC 9110, section 14.4); None if the response does not state it."""
    if response.status != 206:
        return 0
    reported = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    return int(reported[1]) if reported is not None else None


async def back_off(failures: int, retry_after: str = "") -> None:
    """Wait before the next attempt: as long as Retry-After demands, otherwise longer after each failure."""
    seconds = random.uniform(0.5, 1.0) * 0.2 * 2**failures
    with contextlib.suppress(ValueError, OverflowError):  # an invalid date
        if retry_after.isascii() and retry_after.isdigit():
            seconds = float(retry_after)
        elif retry_after and (date := email.utils.parsedate_tz(retry_after)):
            seconds = email.utils.mktime_tz(date) - time.time()
    await asyncio.sleep(max(0.0, min(seconds, _MAX_WAIT_SECONDS)))


def reason_of(error: BaseException) -> str:
    """A message for a network error."""
    if isinstance(error, TimeoutError):
        return f"no answer in time {error}".strip()
    return _TLS_OF_CONNECTION.sub("", str(error)) or type(error).__name__


def proxy_for(url: str) -> str | None:
    """The proxy for ``url`` from the environment (http_proxy, https_proxy, all_proxy, no_proxy)."""
    proxies = getproxies_environment()
    parts = urlsplit(url)
    if not proxies or is_loopback(parts.netloc) or proxy_bypass(parts.netloc, proxies):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")
