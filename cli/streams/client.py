"""Exec, attach and port-forward connections as a client: SPDY/3.1 over an upgraded HTTP connection."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

# Client and server share the SPDY protocol machine. These modules load no other part of the server.
from cli.streams.tls import TlsFiles, refusal
from cli.streams.upgrade import Upgrade
from cri.streaming.httpstream.connection import StreamConnection
from cri.streaming.httpstream.spdy_link import SpdyChannel, SpdyLink
from host.errors import PodkeelError, UnavailableError

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

COMMAND_PROTOCOLS = ("v4.channel.k8s.io",)
PORT_FORWARD_PROTOCOLS = ("portforward.k8s.io",)
_CONNECT_SECONDS = 10.0
_STREAM_WINDOW = 256 * 1024
_SESSION_WINDOW = 16 * 1024 * 1024


class StreamClient:
    """One connection to a streaming URL."""

    def __init__(self) -> None:
        self._connection: StreamConnection | None = None
        self._upgrade = Upgrade()
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._link: SpdyLink | None = None

    @classmethod
    async def connect(cls, url: str, protocols: Sequence[str], tls: TlsFiles) -> StreamClient:
        """Connect and upgrade.

        Raises UnavailableError if no server listens or its certificate is not trusted, PodkeelError if the server
        refuses.
        """
        client = cls()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None or parts.port is None:
            raise PodkeelError(f"streams at {url.rpartition('/')[0]} need another client: this one supports HTTP only")
        context = tls.context() if parts.scheme == "https" else None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await client._open(parts.hostname, parts.port, context)
                client._write(client._upgrade.request(parts.path, parts.netloc, protocols))
                await client._answered
        except TimeoutError as error:
            raise UnavailableError(f"cannot reach the agent's streams at {parts.netloc}: no answer") from error
        except OSError as error:
            if context is not None and hasattr(error, "reason"):
                raise refusal(parts.netloc, error) from error
            raise UnavailableError(f"cannot reach the agent's streams at {parts.netloc}: {error}") from error
        except PodkeelError:
            if client._upgrade.answered or context is None or tls.certificate is not None:
                raise
            raise UnavailableError(
                f"the agent's streams at {parts.netloc} ended the connection: if they ask clients for a certificate, "
                "give --tls-cert and --tls-key"
            ) from None
        client.link.grant(_STREAM_WINDOW, _SESSION_WINDOW)
        return client

    async def _open(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: StreamConnection(self._on_made), host, port, ssl=context)

    @property
    def link(self) -> SpdyLink:
        """The SPDY session."""
        assert self._link is not None, "not connected"
        return self._link

    def open(self, headers: Mapping[str, str]) -> SpdyChannel:
        """Open a stream."""
        return self.link.open(headers)

    async def close(self) -> None:
        """Send GOAWAY and close the connection."""
        if self._link is not None:
            self._link.go_away()
        if self._connection is not None:
            await self._connection.close(0)

    def _on_made(self, connection: StreamConnection) -> None:
        self._connection = connection
        self._link = SpdyLink(connection, lambda channel: False, lambda reason: self._lose(), 100_000, client=True)
        connection.receiver = self._on_answer
        connection.on_lost = self._lose

    def _on_answer(self, data: bytes) -> None:
        """Take bytes of the answer; b"" means its end."""
        if self._answered.done():
            return
        try:
            rest = self._upgrade.receive(data)
        except PodkeelError as error:
            self._answered.set_exception(error)
            return
        if rest is not None:
            assert self._connection is not None
            self._connection.receiver = self.link.receive
            self._answered.set_result(None)
            self.link.receive(rest)

    def _lose(self) -> None:
        self._on_answer(b"")
        self.link.lose()

    def _write(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.write(data)


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` on an event loop that accepts regular files, since standard input may be one."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.PollSelector())) as runner:
        return runner.run(main())
