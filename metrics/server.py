"""A small HTTP/1.1 server on the event loop for scrapers and probes: GET and HEAD of a few fixed paths."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from metrics.prometheus import Page

HEADER_LIMIT = 16 * 1024
IDLE_SECONDS = 90.0
TLS_HANDSHAKE_SECONDS = 10.0
CONNECTION_LIMIT = 64

_log = logging.getLogger("podkeel.metrics")

# Gets the Accept header; raises NotReady to answer 503.
Route = Callable[[str], Awaitable[Page]]


class NotReady(Exception):  # noqa: N818 - a state that is answered, not a fault
    """The answer is 503 with this text."""


class MetricsServer:
    """Serves ``routes`` by path at one address until closed."""

    def __init__(self, routes: Mapping[str, Route], tls: ssl.SSLContext | None = None) -> None:
        self._routes = routes
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._idle: dict[asyncio.Task[None], None] = {}  # those that wait for a request, longest first

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port, which the system chooses if 0 is given; OSError if the address is taken."""
        handshake = TLS_HANDSHAKE_SECONDS if self._tls is not None else None
        self._server = await asyncio.start_server(
            self._accept, host, port, ssl=self._tls, ssl_handshake_timeout=handshake, limit=HEADER_LIMIT
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and end the connections."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or not self._has_room():
            writer.close()
            return
        self._connections.add(task)
        try:
            while await self._serve_one(task, reader, writer):
                pass
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client went away, was silent, or speaks something else
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _has_room(self) -> bool:
        """Make room for one more: who is silent for longest goes, so that silence keeps no scraper out."""
        if len(self._connections) < CONNECTION_LIMIT:
            return True
        longest = next(iter(self._idle), None)
        if longest is None:
            return False
        del self._idle[longest]
        self._connections.discard(longest)
        longest.cancel()
        return True

    async def _serve_one(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; False when the connection is to be closed."""
        self._idle[task] = None
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        finally:
            self._idle.pop(task, None)
        request, *lines = head.split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        words = request.split()
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            await _answer(writer, HTTPStatus.BAD_REQUEST, _text("not an HTTP/1 request\n"), keep=False)
            return False
        method, target, version = words
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close" and not has_body
        status, page = await self._page(method, target.partition("?")[0], headers.get("accept", ""))
        await _answer(writer, status, page, keep=keep, with_body=method != "HEAD")
        return keep

    async def _page(self, method: str, path: str, accept: str) -> tuple[HTTPStatus, Page]:
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, _text("only GET and HEAD\n")
        route = self._routes.get(path)
        if route is None:
            return HTTPStatus.NOT_FOUND, _text(f"there is {', '.join(self._routes)}\n")
        try:
            return HTTPStatus.OK, await route(accept)
        except NotReady as state:
            return HTTPStatus.SERVICE_UNAVAILABLE, _text(f"{state}\n")
        except Exception:
            _log.exception("request for %s failed", path)
            return HTTPStatus.INTERNAL_SERVER_ERROR, _text("failed; the agent's log says why\n")


def _text(text: str) -> Page:
    return Page("text/plain; charset=utf-8", text.encode())


async def _answer(
    writer: asyncio.StreamWriter, status: HTTPStatus, page: Page, *, keep: bool, with_body: bool = True
) -> None:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {page.content_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nConnection: {'keep-alive' if keep else 'close'}\r\n\r\n"
    )
    writer.write(head.encode())
    if with_body:
        writer.write(page.body)
    async with asyncio.timeout(IDLE_SECONDS):
        await writer.drain()
