"""The sessions that serve a connection after its upgrade, one class for each protocol of clients."""

from __future__ import annotations

import asyncio
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from cri.streaming.backend import StreamBackend
from cri.streaming.httpstream.channel import Channel
from cri.streaming.httpstream.connection import Link
from cri.streaming.httpstream.http_upgrade import UpgradeRequest
from cri.streaming.httpstream.spdy_link import SpdyChannel, SpdyLink
from cri.streaming.httpstream.websocket_link import (
    CLOSE_GOING_AWAY,
    CLOSE_NORMAL,
    ChannelSocket,
    TunnelLink,
    WebSocketLink,
)
from cri.streaming.limits import StreamLimits
from cri.streaming.port_forward import forward_port
from cri.streaming.remote_command import CommandChannels, RemoteCommand
from cri.streaming.status import CommandStatus
from cri.streaming.tokens import AttachRequest, ExecRequest, PortForwardRequest

logger = logging.getLogger(__name__)

CommandRequest = ExecRequest | AttachRequest
Cancel = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every session gets: the backend, the limits, and a function that ends the session with a reason."""

    backend: StreamBackend
    limits: StreamLimits
    cancel: Cancel


class Session(ABC):
    """The work of one upgraded connection."""

    @abstractmethod
    def receive(self, data: bytes) -> None:
        """Bytes of the client."""

    @abstractmethod
    async def run(self) -> None:
        """Serve until everything that the client requested has ended.

        Raises ConnectionResetError if the client has left.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """End all streams at once, and send the client the reason if the protocol can."""

    @abstractmethod
    def end(self) -> None:
        """Close the connection as the protocol says."""


class SpdyCommandSession(Session):
    """Exec or attach over SPDY: one stream for each purpose, named by its header ``streamType``."""

    def __init__(self, link: Link, surroundings: Surroundings, request: CommandRequest, version: int) -> None:
        self._limits = surroundings.limits
        self._spdy = SpdyLink(link, self._on_stream, surroundings.cancel, self._limits.max_streams)
        self._backend = surroundings.backend
        self._request = request
        self._json_status = version >= 4
        wanted = {"stdin": request.stdin, "stdout": request.stdout, "stderr": request.stderr and not request.tty}
        self._missing = {"error"} | {name for name, asked in wanted.items() if asked}
        if request.tty and version >= 3:
            self._missing.add("resize")
        self._channels: dict[str, Channel] = {}
        self._complete = asyncio.Event()
        self._command: RemoteCommand | None = None

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._spdy.receive(data)

    def _on_stream(self, channel: SpdyChannel) -> bool:
        name = channel.headers.get("streamtype", "")
        if name not in self._missing:
            return False
        self._missing.remove(name)
        self._channels[name] = channel
        if not self._missing:
            self._complete.set()
        return True

    async def run(self) -> None:
        """Wait for all streams, then run the command."""
        try:
            async with asyncio.timeout(self._limits.creation_timeout):
                await self._complete.wait()
        except TimeoutError:
            self.abort(f"the client did not open the streams {', '.join(sorted(self._missing))} in time")
            return
        channels = CommandChannels(**self._channels)
        self._command = RemoteCommand(self._backend, self._request, channels, json_status=self._json_status)
        await self._command.run()

    def abort(self, reason: str) -> None:
        """Send the reason as the status."""
        if self._command is not None:
            self._command.abort(reason)
        elif "error" in self._channels:
            status = CommandStatus.of_error("streams not set up", reason)
            self._channels["error"].send_last(status.as_json() if self._json_status else status.as_text())

    def end(self) -> None:
        """Reset what is open and send GOAWAY."""
        self._spdy.go_away()


class SpdyPortForwardSession(Session):
    """Port forward over SPDY: pairs of streams with the same header ``requestID``, until the client leaves."""

    def __init__(self, link: Link, surroundings: Surroundings, request: PortForwardRequest) -> None:
        self._limits = surroundings.limits
        self._spdy = SpdyLink(link, self._on_stream, surroundings.cancel, self._limits.max_streams)
        self._backend = surroundings.backend
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._halves: dict[str, dict[str, SpdyChannel]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._spdy.receive(data)

    def _on_stream(self, channel: SpdyChannel) -> bool:
        kind = channel.headers.get("streamtype", "")
        port = _port_number(channel.headers.get("port", ""))
        if kind not in ("data", "error") or port is None:
            return False
        # Old clients do not send the header. They open the error stream first, and then the data stream.
        without_id = str(channel.stream_id - (2 if kind == "data" else 0))
        identifier = channel.headers.get("requestid") or f"stream {without_id}"
        halves = self._halves.setdefault(identifier, {})
        if kind in halves or any(other.headers.get("port") != channel.headers["port"] for other in halves.values()):
            return False
        halves[kind] = channel
        if len(halves) == 2:
            del self._halves[identifier]
            self._forward(port, halves["data"], halves["error"])
        else:
            self._loop.call_later(self._limits.creation_timeout, self._drop_half, identifier, channel)
        return True

    def _drop_half(self, identifier: str, channel: SpdyChannel) -> None:
        if channel in self._halves.get(identifier, {}).values():
            del self._halves[identifier]
            channel.send_last(b"the other stream of this connection was not opened in time")
            channel.reset()

    def _forward(self, port: int, data: SpdyChannel, error: SpdyChannel) -> None:
        work = self._forward_pair(port, data, error)
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)

    async def _forward_pair(self, port: int, data: SpdyChannel, error: SpdyChannel) -> None:
        try:
            await forward_port(self._backend, self._request.sandbox_id, port, data, error)
        finally:
            self._spdy.forget(data)
            self._spdy.forget(error)

    async def run(self) -> None:
        """Serve until the client sends GOAWAY or disconnects."""
        try:
            await self._spdy.over.wait()
        finally:
            for task in self._tasks:
                task.cancel()

    def abort(self, reason: str) -> None:
        """The protocol has no message for it; ``end`` resets the streams."""

    def end(self) -> None:
        """Reset what is open and send GOAWAY."""
        self._spdy.go_away()


class WebSocketCommandSession(Session):
    """Exec or attach over WebSocket channels."""

    def __init__(
        self, sockets: ChannelSocket, surroundings: Surroundings, request: CommandRequest, version: int
    ) -> None:
        self._sockets = sockets
        self._code = CLOSE_NORMAL
        names = {"stdin": request.stdin, "stdout": request.stdout, "stderr": request.stderr and not request.tty}
        numbers = {"stdin": 0, "stdout": 1, "stderr": 2}
        opened = {name: sockets.open(numbers[name]) for name, asked in names.items() if asked}
        channels = CommandChannels(sockets.open(3), **opened, resize=sockets.open(4) if request.tty else None)
        # Clients wait for a first message, which may be empty, before they treat the stream as open.
        sockets.send(next((numbers[name] for name in ("stdout", "stderr") if name in opened), 3), b"")
        self._command = RemoteCommand(surroundings.backend, request, channels, json_status=version >= 4)

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._sockets.receive(data)

    async def run(self) -> None:
        """Run the command."""
        await self._command.run()

    def abort(self, reason: str) -> None:
        """Send the reason as the status."""
        self._code = CLOSE_GOING_AWAY
        self._command.abort(reason)

    def end(self) -> None:
        """Close the WebSocket."""
        self._sockets.close(self._code)


class WebSocketPortForwardSession(Session):
    """Port forward over WebSocket channels: two for each port, beginning with the port in little-endian bytes."""

    def __init__(
        self, sockets: ChannelSocket, surroundings: Surroundings, sandbox_id: str, ports: tuple[int, ...]
    ) -> None:
        self._sockets = sockets
        self._code = CLOSE_NORMAL
        self._pairs = []
        for index, port in enumerate(ports):
            data, error = sockets.open(2 * index), sockets.open(2 * index + 1)
            for number in (2 * index, 2 * index + 1):
                sockets.send(number, port.to_bytes(2, "little"))
            self._pairs.append(functools.partial(forward_port, surroundings.backend, sandbox_id, port, data, error))

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._sockets.receive(data)

    async def run(self) -> None:
        """Serve until the pod has closed all connections, or until cancelled."""
        tasks = [asyncio.create_task(pair()) for pair in self._pairs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def abort(self, reason: str) -> None:
        """The protocol has only the code of the close message for it."""
        self._code = CLOSE_GOING_AWAY

    def end(self) -> None:
        """Close the WebSocket."""
        self._sockets.close(self._code)


class TunnelSession(Session):
    """A SPDY port forward whose bytes are sent in WebSocket messages."""

    def __init__(self, link: Link, surroundings: Surroundings, request: PortForwardRequest) -> None:
        self._websocket = WebSocketLink(link, lambda data, begins, ends: self._inner.receive(data), surroundings.cancel)
        self._inner = SpdyPortForwardSession(TunnelLink(self._websocket), surroundings, request)
        self._code = CLOSE_NORMAL

    def accept(self, request: UpgradeRequest, subprotocol: str) -> None:
        """Write the answer to the handshake; raises HttpError when the request is not a proper one."""
        self._websocket.accept(request, subprotocol)

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._websocket.receive(data)

    async def run(self) -> None:
        """As the session inside."""
        await self._inner.run()

    def abort(self, reason: str) -> None:
        """As the session inside."""
        self._code = CLOSE_GOING_AWAY
        self._inner.abort(reason)

    def end(self) -> None:
        """End the session inside, then close the WebSocket."""
        self._inner.end()
        self._websocket.close(self._code)


def _port_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536 else None


def _report(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is not None and not isinstance(error, ConnectionResetError):
        logger.error("streaming: forwarded connection failed", exc_info=error)
