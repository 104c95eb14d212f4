"""A WebSocket on a connection. It sends whole messages and receives pieces; a message's first byte is its channel."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from typing import TYPE_CHECKING

from cri.streaming.httpstream.channel import Channel, ChannelResetError
from cri.streaming.httpstream.connection import Link
from cri.streaming.httpstream.http_upgrade import HttpError, UpgradeRequest
from cri.streaming.httpstream.turns import Turns

if TYPE_CHECKING:
    from wsproto.connection import Connection
    from wsproto.events import CloseConnection, Event

CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
_SEND_CHUNK = 64 * 1024
_CLOSE_CHANNEL = 255


class WebSocketLink:
    """The server's end of a WebSocket.

    ``on_message`` gets the bytes of messages as they arrive, with whether they begin and whether they end a message.
    ``on_closed`` is called when the client closed or violated the protocol.
    """

    def __init__(
        self, link: Link, on_message: Callable[[bytes, bool, bool], None], on_closed: Callable[[str], None]
    ) -> None:
        self.link = link
        self._later = Turns(link)
        self._on_message = on_message
        self._on_closed = on_closed
        self._connection: Connection | None = None
        self._message_begins = True
        self._client_closed = False

    def accept(self, request: UpgradeRequest, subprotocol: str | None) -> None:
        """Write the answer to the handshake; raises HttpError when the request is not a proper one."""
        from wsproto.connection import ConnectionType
        from wsproto.events import AcceptConnection
        from wsproto.handshake import H11Handshake
        from wsproto.utilities import ProtocolError

        handshake = H11Handshake(ConnectionType.SERVER)
        try:
            headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers]
            handshake.initiate_upgrade_connection(headers, request.target)
            answer = handshake.send(AcceptConnection(subprotocol=subprotocol))
        except ProtocolError as error:
            raise HttpError(400, f"not a WebSocket handshake: {error}") from error
        self._connection = handshake.connection
        self.link.write(answer)

    def receive(self, data: bytes) -> None:
        """Bytes of the client. What takes longer than a turn of the loop may is left for the next ones."""
        if self._connection is None or self._client_closed:
            return
        self._connection.receive_data(data)
        if not self._later.waits:
            self._take_events(self._connection)

    def _take_events(self, connection: Connection) -> None:
        from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

        end = self._later.end_of_turn()
        for event in connection.events():
            if isinstance(event, BytesMessage):
                self._deliver(event.data, event.message_finished)
            elif isinstance(event, TextMessage):
                self._deliver(event.data.encode(), event.message_finished)
            elif isinstance(event, Ping):
                self._send(event.response())
            elif isinstance(event, CloseConnection):
                # The library reports bytes that violate the protocol in the same way.
                self._client_closed = True
                self._close(event.response())
                self._on_closed(f"the client closed the WebSocket with code {event.code}")
                return
            if self._later.put_off(end, lambda: self._take_events(connection)):
                return

    def _deliver(self, data: bytes | bytearray, finished: bool) -> None:
        begins = self._message_begins
        self._message_begins = finished
        self._on_message(bytes(data), begins, finished)

    def send_bytes(self, data: bytes) -> None:
        """Write one binary message."""
        from wsproto.events import BytesMessage

        self._send(BytesMessage(data=data))

    def send_text(self, text: str) -> None:
        """Write one text message."""
        from wsproto.events import TextMessage

        self._send(TextMessage(data=text))

    def _send(self, event: Event) -> None:
        from wsproto.connection import ConnectionState

        if self._connection is not None and self._connection.state is ConnectionState.OPEN:
            self.link.write(self._connection.send(event))

    def close(self, code: int) -> None:
        """Write a close message, once; nothing that the client sent is handled from now on."""
        self._later.close()
        from wsproto.events import CloseConnection

        self._close(CloseConnection(code=code))

    def _close(self, event: CloseConnection) -> None:
        from wsproto.connection import ConnectionState

        may_close = (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING)
        if self._connection is not None and self._connection.state in may_close:
            self.link.write(self._connection.send(event))


class TunnelLink:
    """A link that sends its bytes as binary messages. The boundaries of messages have no meaning."""

    def __init__(self, websocket: WebSocketLink) -> None:
        self._websocket = websocket

    def write(self, data: bytes) -> None:
        """Queue bytes."""
        self._websocket.send_bytes(data)

    async def drain(self) -> None:
        """Wait until the client takes more."""
        await self._websocket.link.drain()

    def hold(self, holder: object) -> None:
        """Read no more from the client until ``holder`` releases."""
        self._websocket.link.hold(holder)

    def release(self, holder: object) -> None:
        """Undo ``hold``."""
        self._websocket.link.release(holder)

    def touch(self) -> None:
        """Data passed."""
        self._websocket.link.touch()


class ChannelSocket:
    """Numbered channels on one WebSocket: each message begins with the channel, as a byte or as a digit with base64."""

    def __init__(
        self, link: Link, on_closed: Callable[[str], None], *, use_base64: bool = False, closes: bool = False
    ) -> None:
        self._websocket = WebSocketLink(link, self._on_message, on_closed)
        self._base64 = use_base64
        self._closes = closes
        self._channels: dict[int, WebSocketChannel] = {}
        self._current: int | None = None
        self._undecoded = b""
        self.turn = asyncio.Lock()

    def accept(self, request: UpgradeRequest, subprotocol: str | None) -> None:
        """Write the answer to the handshake; raises HttpError when the request is not a proper one."""
        self._websocket.accept(request, subprotocol)

    def open(self, number: int) -> WebSocketChannel:
        """The channel of that number."""
        self._channels[number] = WebSocketChannel(self, number)
        return self._channels[number]

    @property
    def link(self) -> Link:
        """The link that carries the messages."""
        return self._websocket.link

    def _on_message(self, data: bytes, begins: bool, ends: bool) -> None:
        """Bytes of a message of the client."""
        if begins:
            if not data:
                return
            self._current = (data[0] - ord("0")) & 0xFF if self._base64 else data[0]
            self._undecoded = b""
            data = data[1:]
        if self._base64:
            data = self._decode(data, ends)
        if self._closes and self._current == _CLOSE_CHANNEL:
            for number in data:
                self._feed(number, b"", fin=True)
        elif data and self._current is not None:
            self._feed(self._current, data)

    def _feed(self, number: int, data: bytes, *, fin: bool = False) -> None:
        channel = self._channels.get(number)
        if channel is not None:
            self.link.touch()
            channel.feed(data, fin=fin)

    def _decode(self, data: bytes, ends: bool) -> bytes:
        text = self._undecoded + data
        whole = len(text) if ends else len(text) // 4 * 4
        self._undecoded = text[whole:]
        try:
            return base64.b64decode(text[:whole])
        except binascii.Error:
            return b""

    def send(self, number: int, data: bytes | memoryview) -> None:
        """Write one message on a channel."""
        if self._base64:
            self._websocket.send_text(f"{number}{base64.b64encode(data).decode()}")
        else:
            self._websocket.send_bytes(b"".join((bytes((number,)), data)))

    def receive(self, data: bytes) -> None:
        """Bytes of the client."""
        self._websocket.receive(data)

    def close(self, code: int) -> None:
        """Close the WebSocket."""
        self._websocket.close(code)


class WebSocketChannel(Channel):
    """One numbered channel. The protocol cannot half-close it: the client sees the end by the status."""

    def __init__(self, socket: ChannelSocket, number: int) -> None:
        super().__init__()
        self._socket = socket
        self._number = number
        self._finished = False

    async def send(self, data: bytes | memoryview) -> None:
        """Send bytes in messages of moderate size."""
        view = memoryview(data)
        for start in range(0, len(view), _SEND_CHUNK):
            async with self._socket.turn:
                await self._socket.link.drain()
                if self._finished:
                    raise ChannelResetError(f"channel {self._number} is closed")
                self._socket.send(self._number, view[start : start + _SEND_CHUNK])
                self._socket.link.touch()

    def send_last(self, data: bytes) -> None:
        """Send a short text, if there is one. No more input is taken, since the protocol has no half-close."""
        if data and not self._finished:
            self._socket.send(self._number, data)
        self._finished = True
        self.feed(b"", fin=True)

    def reset(self) -> None:
        """End both directions."""
        self._finished = True
        self.fail()

    def _on_consumed(self, count: int) -> None:
        del count
        self._socket.link.release(self)

    def _hold(self) -> None:
        self._socket.link.hold(self)
