"""A small HTTP/1.1 server on the event loop for scrapers and probes: GET and HEAD of a few fixed paths."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from http import HTTPStatus

import h11

from host.concurrency.tasks import cancel_and_wait
from host.listener import Listener, PendingConnection
from metrics.exposition.prometheus import Page

HEADER_LIMIT = 16 * 1024
IDLE_SECONDS = 90.0
REQUEST_SECONDS = 10.0
CONNECTION_LIMIT = 64
# The maximum number of clients that have not yet read their whole answer.
SLOW_LIMIT = 16
# The maximum time for a client to close its connection, and the maximum number of such clients.
CLOSE_SECONDS = 5.0
CLOSING_LIMIT = 32
_READ_BYTES = 4096

_log = logging.getLogger("podkeel.metrics")

# Called with the Accept header. Raises NotReady to answer 503.
Route = Callable[[str], Awaitable[Page]]


class NotReady(Exception):  # noqa: N818 - a state that is reported, not an error
    """Makes the server answer 503 with this text."""


class MetricsServer:
    """Serves ``routes`` by path at one address until it is closed.

    A client must send its first request within ``REQUEST_SECONDS`` (including TLS). If there are too many clients, the
    server closes the connection that has been waiting the longest.
    """

    def __init__(self, routes: Mapping[str, Route], tls: ssl.SSLContext | None = None) -> None:
        self._routes = routes
        self._listener = Listener(
            "metrics server", self._protocol, tls=tls, grace=REQUEST_SECONDS, pending_limit=CONNECTION_LIMIT
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: set[asyncio.Task[None]] = set()  # tasks whose first request has arrived
        self._silent: dict[asyncio.Task[None], None] = {}  # of these: tasks without a request, longest first
        self._slow: dict[asyncio.Task[None], None] = {}  # and tasks whose client does not read its answer
        self._closing: dict[asyncio.Task[None], None] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. The system chooses it for port 0. OSError if the address is in use."""
        return await self._listener.start(host, port)

    async def close(self) -> None:
        """Stop listening and close all connections."""
        self._listener.close()
        await cancel_and_wait(*self._tasks)

    def _protocol(self, pending: PendingConnection) -> asyncio.Protocol:
        reader = asyncio.StreamReader(limit=HEADER_LIMIT)
        return asyncio.StreamReaderProtocol(reader, functools.partial(self._accept, pending))

    async def _accept(
        self, pending: PendingConnection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_LIMIT)
        try:
            request = await _next_request(http, reader)  # the listener limits the time
            pending.admit()
            while await self._answer_one(task, http, request, writer):
                with self._listed_in(self._silent, task):
                    async with asyncio.timeout(IDLE_SECONDS):
                        request = await _next_request(http, reader)
        except h11.RemoteProtocolError as error:
            with contextlib.suppress(OSError):
                await _answer(http, writer, HTTPStatus(error.error_status_hint), _text(f"{error}\n"), keep=False)
        except (OSError, TimeoutError, EOFError):
            _cut_off(writer)  # the client has left, sent nothing or read nothing
        except asyncio.CancelledError:
            _cut_off(writer)
            raise
        finally:
            self._served.discard(task)
            pending.forget()
            try:
                await self._close(task, writer)
            finally:
                self._tasks.discard(task)

    async def _close(self, task: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        """Close a connection once its client has read everything. The time is limited, as a client may never read."""
        while len(self._closing) >= CLOSING_LIMIT:
            self._end(next(iter(self._closing)))
        try:
            with self._listed_in(self._closing, task):
                writer.close()
                async with asyncio.timeout(CLOSE_SECONDS):
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            pass
        finally:
            _cut_off(writer)

    def _has_room(self, task: asyncio.Task[None]) -> bool:
        """Count the client as served. If there are too many, end the longest waiting one; False if none is waiting."""
        if task not in self._served and len(self._served) >= CONNECTION_LIMIT:
            longest = next(iter(self._silent), None) or next(iter(self._slow), None)
            if longest is None:
                return False
            self._end(longest)
        self._served.add(task)
        return True

    def _end(self, task: asyncio.Task[None]) -> None:
        self._served.discard(task)
        self._silent.pop(task, None)
        self._slow.pop(task, None)
        self._closing.pop(task, None)
        task.cancel()

    @contextlib.contextmanager
    def _listed_in(self, those: dict[asyncio.Task[None], None], task: asyncio.Task[None]) -> Iterator[None]:
        those[task] = None
        try:
            yield
        finally:
            those.pop(task, None)

    async def _answer_one(
        self, task: asyncio.Task[None], http: h11.Connection, request: h11.Request, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request. Returns False if the connection must be closed."""
        if not self._has_room(task):
            busy = HTTPStatus.SERVICE_UNAVAILABLE
            return await _answer(http, writer, busy, _text("too many connections\n"), keep=False)
        method, target = request.method.decode(), request.target.decode()
        accept = next((value.decode("latin-1") for name, value in request.headers if name == b"accept"), "")
        status, page = await self._page(method, target.partition("?")[0], accept)
        while len(self._slow) >= SLOW_LIMIT:  # each of them has its page in memory
            self._end(next(iter(self._slow)))
        with self._listed_in(self._slow, task):
            return await _answer(http, writer, status, page, with_body=method != "HEAD")

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
            _log.exception("metrics: request for %s failed", path)
            return HTTPStatus.INTERNAL_SERVER_ERROR, _text("failed; the agent's log says why\n")


def _cut_off(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(AttributeError):  # raised by Python 3.11 for a TLS connection that is closed already
        writer.transport.abort()


def _text(text: str) -> Page:
    return Page("text/plain; charset=utf-8", text.encode())


async def _next_request(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    """The head of the next request. EOFError if the client has left, RemoteProtocolError for an invalid request."""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            return event
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError


async def _answer(
    http: h11.Connection,
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    page: Page,
    *,
    keep: bool = True,
    with_body: bool = True,
) -> bool:
    """Send an answer. Returns whether the connection can serve another request: not after a request with a body."""
    headers = [("Content-Type", page.content_type), ("Content-Length", str(len(page.body)))]
    keep = keep and isinstance(http.next_event(), h11.EndOfMessage)
    if not keep:
        headers.append(("Connection", "close"))
    head = http.send(h11.Response(status_code=status.value, reason=status.phrase.encode(), headers=headers))
    writer.write(head or b"")
    if with_body:
        http.send_with_data_passthrough(h11.Data(data=page.body))
        writer.write(page.body)
    http.send(h11.EndOfMessage())
    async with asyncio.timeout(IDLE_SECONDS):
        await writer.drain()
    if http.our_state is not h11.DONE:
        return False
    http.start_next_cycle()
    return True
