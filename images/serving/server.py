"""An HTTP server for other nodes that pull this node's images: the pull part of the OCI distribution specification."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import logging
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

import h11

from host.concurrency.tasks import cancel_and_wait
from host.concurrency.threads import in_image_thread
from host.errors import NotFoundError, PodkeelError
from host.listener import Listener, PendingConnection
from images.serving.catalog import Catalog, ServedManifest
from images.serving.requests import Wanted, has_token, span_of, wanted

HEADER_LIMIT = 16 * 1024
CONNECTION_LIMIT = 256
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 60.0
PIECE_SECONDS = 60.0  # the maximum time for a client to take a piece of a blob
_PIECE = 1 << 20
_READ_BYTES = 4096

_log = logging.getLogger("podkeel.serving")

# Pulls the image of a repository and tag or digest to this node. Raises NotFoundError or another PodkeelError.
Fetch = Callable[[Wanted], Awaitable[None]]


class _Length:
    """Represents that many bytes, which are sent without h11."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


class _Refusal(Exception):  # noqa: N818 - an answer
    """An error answer, with its code in the distribution specification."""

    def __init__(self, status: HTTPStatus, code: str, message: str, *headers: tuple[str, str]) -> None:
        self.status = status
        self.headers = headers
        self.body = json.dumps({"errors": [{"code": code, "message": message}]}).encode()


class ImageServer:
    """Answers GET and HEAD for manifests and blobs of ``catalog``.

    With ``tokens``, a request without one of them is refused. With ``fetch``, an image that is missing is pulled first.
    A connection must send a request within ``REQUEST_SECONDS``, or ``IDLE_SECONDS`` after its last one.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        tokens: Sequence[bytes] | None = None,
        tls: ssl.SSLContext | None = None,
        fetch: Fetch | None = None,
    ) -> None:
        self._catalog = catalog
        self._tokens = tokens
        self._fetch = fetch
        self._listener = Listener("image server", self._protocol, tls=tls, grace=REQUEST_SECONDS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. The system chooses it for port 0. OSError if the address is in use."""
        return await self._listener.start(host, port)

    async def close(self) -> None:
        """Stop listening and end all connections."""
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
        connection = _Connection(reader, writer)
        try:
            request = await connection.request()  # the listener limits the time
            pending.admit()
            if len(self._tasks) > CONNECTION_LIMIT:
                busy = _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "TOOMANYREQUESTS", "too many connections")
                await connection.refuse(busy, last=True)
                return
            while await self._answer(connection, request):
                async with asyncio.timeout(IDLE_SECONDS):
                    request = await connection.request()
        except h11.RemoteProtocolError as error:
            with contextlib.suppress(OSError, TimeoutError, h11.LocalProtocolError):
                refusal = _Refusal(HTTPStatus(error.error_status_hint), "UNSUPPORTED", str(error))
                await connection.refuse(refusal, last=True)
        except (OSError, TimeoutError, EOFError, h11.LocalProtocolError):
            pass  # the client has left, sent nothing or read nothing
        finally:
            pending.forget()
            self._tasks.discard(task)
            with contextlib.suppress(AttributeError):  # raised by Python 3.11 for a TLS connection that is closed
                writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, connection: _Connection, request: h11.Request) -> bool:
        """Answer a request. Returns whether the connection can have another one."""
        try:
            return await self._respond(connection, request)
        except _Refusal as refusal:
            return await connection.refuse(refusal)
        except NotFoundError as error:
            return await connection.refuse(_Refusal(HTTPStatus.NOT_FOUND, "MANIFEST_UNKNOWN", error.message))
        except PodkeelError as error:
            _log.warning("image server: %s: %s", request.target[:300].decode("latin-1"), error)
            return await connection.refuse(_Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "UNAVAILABLE", error.message))

    async def _respond(self, connection: _Connection, request: h11.Request) -> bool:
        if request.method not in (b"GET", b"HEAD"):
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "UNSUPPORTED", "images can only be pulled here")
        if self._tokens is not None and not has_token(request, self._tokens):
            challenge = ("WWW-Authenticate", 'Basic realm="podkeel"')
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "UNAUTHORIZED", "a token is needed", challenge)
        target = request.target.decode("latin-1")
        if target.partition("?")[0].rstrip("/") == "/v2":
            return await connection.send(HTTPStatus.OK, "application/json", b"{}")
        asked = wanted(target)
        if asked is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "UNSUPPORTED", "only manifests and blobs of repositories are here")
        if asked.kind == "manifests":
            return await self._send_manifest(connection, asked)
        return await self._send_blob(connection, request, asked)

    async def _send_manifest(self, connection: _Connection, asked: Wanted) -> bool:
        found = await self._manifest(asked)
        if found is None and self._fetch is not None:
            await self._fetch(asked)
            found = await self._manifest(asked)
        if found is None:
            raise NotFoundError(f"{asked.repository} has no complete image {asked.reference} on this node")
        _log.info("manifest %s of %s: served", asked.reference, asked.repository)
        digest = ("Docker-Content-Digest", found.digest)
        return await connection.send(HTTPStatus.OK, found.media_type, found.content, digest)

    async def _manifest(self, asked: Wanted) -> ServedManifest | None:
        return await in_image_thread(self._catalog.manifest, asked.repository, asked.reference)

    async def _send_blob(self, connection: _Connection, request: h11.Request, asked: Wanted) -> bool:
        found = await in_image_thread(self._catalog.blob, asked.reference)
        if found is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, "BLOB_UNKNOWN", f"blob {asked.reference} is not on this node")
        digest = ("Docker-Content-Digest", asked.reference)
        if isinstance(found, bytes):
            return await connection.send(HTTPStatus.OK, "application/octet-stream", found, digest)
        with os.fdopen(found, "rb", buffering=0) as file:
            size = os.fstat(found).st_size
            span = span_of(request, size)
            if span is None:
                outside = ("Content-Range", f"bytes */{size}")
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                raise _Refusal(status, "RANGE_INVALID", f"blob {asked.reference} has {size} bytes", outside)
            more = await connection.send_file(file, span, size, digest)
            _log.info("blob %s of %s: bytes %d to %d of %d: served", asked.reference, asked.repository, *span, size)
            return more


class _Connection:
    """The HTTP/1.1 connection of one client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_LIMIT)
        self._with_body = True
        self._last = False

    async def request(self) -> h11.Request:
        """The next request, which must have no body. EOFError if the client has left; RemoteProtocolError."""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self._reader.read(_READ_BYTES))
            elif isinstance(event, h11.Request):
                self._with_body = event.method != b"HEAD"
                self._last = not isinstance(self._http.next_event(), h11.EndOfMessage)
                return event
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError

    async def refuse(self, refusal: _Refusal, *, last: bool = False) -> bool:
        """Send an error, as ``send``. ``last``: close the connection after it."""
        self._last |= last
        return await self.send(refusal.status, "application/json", refusal.body, *refusal.headers)

    async def send(self, status: HTTPStatus, kind: str, body: bytes, *headers: tuple[str, str]) -> bool:
        """Send an answer. Returns whether the connection can have another request."""
        self._begin(status, len(body), ("Content-Type", kind), *headers)
        if self._with_body:
            self._writer.write(body)
        async with asyncio.timeout(PIECE_SECONDS):
            await self._writer.drain()
        return self._end()

    async def send_file(self, file: io.FileIO, span: tuple[int, int], size: int, *headers: tuple[str, str]) -> bool:
        """Send a part of an open file of ``size`` bytes, as ``send``."""
        begin, end = span
        whole = end - begin == size
        if not whole:
            headers += (("Content-Range", f"bytes {begin}-{end - 1}/{size}"),)
        status = HTTPStatus.OK if whole else HTTPStatus.PARTIAL_CONTENT
        kind = ("Content-Type", "application/octet-stream")
        self._begin(status, end - begin, kind, ("Accept-Ranges", "bytes"), *headers)
        loop = asyncio.get_running_loop()
        while self._with_body and begin < end:
            count = min(_PIECE, end - begin)
            async with asyncio.timeout(PIECE_SECONDS):
                if await loop.sendfile(self._writer.transport, file, begin, count) != count:
                    raise EOFError  # the file became shorter: the client sees an incomplete answer
            begin += count
        return self._end()

    def _begin(self, status: HTTPStatus, length: int, *headers: tuple[str, str]) -> None:
        all_headers = [*headers, ("Content-Length", str(length)), ("Docker-Distribution-API-Version", "registry/2.0")]
        if self._last:
            all_headers.append(("Connection", "close"))
        head = h11.Response(status_code=status.value, reason=status.phrase.encode(), headers=all_headers)
        self._writer.write(self._http.send(head) or b"")
        if self._with_body and length:
            self._http.send_with_data_passthrough(h11.Data(data=_Length(length)))  # type: ignore[arg-type]  # as h11 documents

    def _end(self) -> bool:
        self._http.send(h11.EndOfMessage())
        if self._last or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True
