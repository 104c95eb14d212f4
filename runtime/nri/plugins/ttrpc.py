"""ttrpc over one connection of a trunk: unary calls to the plugin, and calls of the plugin to the agent.

A message is a header of 10 bytes (length of the body, stream id, type, flags; big-endian), then the body. A client's
streams have odd, rising ids.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from host.errors import PodkeelError, UnavailableError
from proto.ttrpc.v1 import ttrpc_pb2
from runtime.nri.plugins.budget import Share
from runtime.nri.plugins.decoding import Decoder
from runtime.nri.plugins.encoding import field
from runtime.nri.plugins.trunk import Trunk

BODY_LIMIT = 4 << 20
FIRST_BODY_LIMIT = 64 << 10  # for messages of a plugin that has not registered yet
MAX_CALLS_AT_ONCE = 8
_MAX_UNEXPECTED = 256
_WORDS = 1024

OK, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 0, 2, 3, 4, 8, 12
"""Codes of a status, the same as gRPC's."""

_REQUEST, _RESPONSE = 1, 2
_HEADER = struct.Struct(">IIBB")
_log = logging.getLogger("podkeel.nri")

Handler = Callable[[bytes], Awaitable[bytes]]


class CallError(PodkeelError):
    """The other side answered a call with an error; ``code`` is a code of gRPC."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Message(NamedTuple):
    """One message. Its body is None if it was larger than the limit and was dropped.

    ``counted`` is the number of its bytes that count in its plugin's share of the budget, until the receiver drops
    them.
    """

    stream: int
    kind: int
    flags: int
    body: bytes | None
    counted: int = 0


class MessageReader:
    """Cuts bytes into messages and passes each to ``received``. Keeps one body at most, of at most ``limit`` bytes.

    The kept bytes are counted in ``share``. A message that arrives in one piece is small and is not counted.
    """

    def __init__(self, received: Callable[[Message], None], share: Share, limit: int = BODY_LIMIT) -> None:
        self.limit = limit
        self._received = received
        self._share = share
        self._buffer = bytearray()
        self._header: tuple[int, int, int] | None = None
        self._wanted = 0
        self._dropped = 0

    def feed(self, data: bytes) -> None:
        """Process the next bytes of the connection."""
        at = 0
        while at < len(data) or self._header is not None:
            if self._header is None and not self._buffer and len(data) - at >= _HEADER.size:
                length, stream, kind, flags = _HEADER.unpack_from(data, at)
                end = at + _HEADER.size + length
                if length <= self.limit and end <= len(data):  # a whole message: the usual case
                    self._received(Message(stream, kind, flags, data[at + _HEADER.size : end]))
                    at = end
                    continue
            if self._header is None:
                at = self._fill(data, at, _HEADER.size)
                if len(self._buffer) < _HEADER.size:
                    return
                length, *header = _HEADER.unpack(self._buffer)
                self._header = (header[0], header[1], header[2])
                self._buffer.clear()
                self._share.drop(_HEADER.size)
                self._wanted, self._dropped = (length, 0) if length <= self.limit else (0, length)
            if self._dropped:
                taken = min(self._dropped, len(data) - at)
                at += taken
                self._dropped -= taken
                if self._dropped:
                    return
                self._finish(None)
            else:
                at = self._fill(data, at, self._wanted)
                if len(self._buffer) < self._wanted:
                    return
                self._finish(bytes(self._buffer))

    def _fill(self, data: bytes, at: int, wanted: int) -> int:
        part = data[at : at + wanted - len(self._buffer)]
        self._buffer += part
        self._share.add(len(part))
        return at + len(part)

    def close(self) -> None:
        """Drop the kept bytes."""
        self._buffer = bytearray()

    def _finish(self, body: bytes | None) -> None:
        assert self._header is not None
        message = Message(*self._header, body, len(self._buffer))
        self._header = None
        self._buffer.clear()
        self._received(message)


class Client:
    """Calls the service that the other side has on ``connection``."""

    def __init__(
        self,
        trunk: Trunk,
        connection: int,
        service: str,
        *,
        share: Share,
        decoder: Decoder,
        limit: int = BODY_LIMIT,
    ) -> None:
        self._reader = MessageReader(self._received, share, limit)
        self._trunk = trunk
        self._connection = connection
        self._service = service
        self._share = share
        self._decoder = decoder
        self._next = 1
        self._heads: dict[tuple[str, float], bytes] = {}
        self._pending: dict[int, tuple[asyncio.Future[Message], float]] = {}  # with the time by which it must be there
        self._timer: asyncio.TimerHandle | None = None
        self._unexpected = 0
        trunk.receive_by(connection, self._reader.feed)

    def allow_large(self) -> None:
        """Accept messages of up to 4 MiB from now on."""
        self._reader.limit = BODY_LIMIT

    async def call(self, method: str, payload: bytes, seconds: float) -> bytes:
        """Call ``method`` and return the payload of its answer.

        Raises CallError if the answer is an error, UnavailableError when the trunk ends, TimeoutError, and
        InvalidArgumentError for an answer that has too many fields.
        """
        stream, self._next = self._next, (self._next + 2) % (1 << 32)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Message] = loop.create_future()
        self._trunk.write(self._connection, encode(stream, _REQUEST, self._request(method, payload, seconds)))
        until = loop.time() + seconds
        self._pending[stream] = answer, until
        self._watch(until)
        try:
            message = await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self._share.drop(answer.result().counted)
            raise
        finally:
            self._pending.pop(stream, None)
            answer.cancel()
        if not message.body:  # without a status and a payload, as most answers to events
            self._share.drop(message.counted)
            return b""
        try:
            response = await self._decoder.decode(ttrpc_pb2.Response, message.body)
        except DecodeError:
            why = "it sent an answer that is not a ttrpc message"
            self._trunk.close(why)
            raise UnavailableError(why) from None
        finally:
            self._share.drop(message.counted)
        if response.status.code != OK:
            raise CallError(response.status.code, shortened(response.status.message))
        return response.payload

    def _request(self, method: str, payload: bytes, seconds: float) -> bytes:
        """The encoded ``ttrpc_pb2.Request``, with the payload as its last field."""
        head = self._heads.get((method, seconds))
        if head is None:
            nanoseconds = int(seconds * 1_000_000_000)
            request = ttrpc_pb2.Request(service=self._service, method=method, timeout_nano=nanoseconds)
            head = self._heads[method, seconds] = request.SerializeToString()
        return head + field(3, payload)

    def _watch(self, until: float) -> None:
        """Have one timer for all calls, not one for each: it is not stopped when a call is answered."""
        if self._timer is not None:
            if self._timer.when() <= until:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(until, self._expire)

    def _expire(self) -> None:
        """Fail the calls whose time is over."""
        timer, self._timer = self._timer, None
        now = timer.when() if timer is not None else asyncio.get_running_loop().time()
        left = []
        for answer, until in self._pending.values():
            if answer.done():
                continue
            if until <= now:
                answer.set_exception(TimeoutError())
            else:
                left.append(until)
        if left:
            self._watch(min(left))

    def close(self, why: str) -> None:
        """Fail the calls that are running."""
        self._reader.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for answer, _ in self._pending.values():
            if not answer.done():
                answer.set_exception(UnavailableError(why))

    def _received(self, message: Message) -> None:
        answer, _ = self._pending.get(message.stream, (None, 0.0))
        if answer is None or answer.done() or message.kind != _RESPONSE:
            self._share.drop(message.counted)
            self._unexpected += 1  # the call timed out, or there was no such call
            if self._unexpected > _MAX_UNEXPECTED:
                self._trunk.close(f"it sent more than {_MAX_UNEXPECTED} answers to calls that do not exist")
            return
        if message.body is None:
            answer.set_exception(CallError(RESOURCE_EXHAUSTED, f"the answer is larger than {BODY_LIMIT} bytes"))
        else:
            answer.set_result(message)


class Server:
    """Answers the calls on ``connection`` for ``service``.

    At most eight calls run at once. Further calls, and messages that are too large, are answered with
    RESOURCE_EXHAUSTED. The error of a handler becomes the message of the answer.
    """

    def __init__(
        self,
        trunk: Trunk,
        connection: int,
        service: str,
        handlers: Mapping[str, Handler],
        *,
        share: Share,
        decoder: Decoder,
        limit: int = BODY_LIMIT,
    ) -> None:
        self._reader = MessageReader(self._received, share, limit)
        self._trunk = trunk
        self._connection = connection
        self._service = service
        self._handlers = handlers
        self._share = share
        self._decoder = decoder
        self._calls: set[asyncio.Task[None]] = set()
        self._ignored = 0
        trunk.receive_by(connection, self._reader.feed)

    def allow_large(self) -> None:
        """Accept messages of up to 4 MiB from now on."""
        self._reader.limit = BODY_LIMIT

    def close(self) -> None:
        """Cancel the calls that are running."""
        self._reader.close()
        for call in self._calls:
            call.cancel()

    def _received(self, message: Message) -> None:
        if message.kind != _REQUEST:
            self._share.drop(message.counted)
            self._ignored += 1
            if self._ignored > _MAX_UNEXPECTED:
                self._trunk.close(f"it sent more than {_MAX_UNEXPECTED} messages that are not requests")
            return
        if len(self._calls) >= 2 * MAX_CALLS_AT_ONCE:
            self._trunk.close(f"it has more than {2 * MAX_CALLS_AT_ONCE} calls under way")
            return
        call = asyncio.get_running_loop().create_task(self._answer(message, full=len(self._calls) >= MAX_CALLS_AT_ONCE))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, message: Message, *, full: bool) -> None:
        response = ttrpc_pb2.Response()
        try:
            response.payload = await self._call(message, full=full)
        except CallError as error:
            response.status.code, response.status.message = error.code, str(error)
        except PodkeelError as error:
            response.status.code, response.status.message = UNKNOWN, str(error)
        except Exception:
            _log.exception("nri: call of a plugin: failed")
            response.status.code, response.status.message = UNKNOWN, "internal error: see the agent's log"
        try:
            await self._trunk.send(self._connection, encode(message.stream, _RESPONSE, response.SerializeToString()))
        except UnavailableError:
            return  # no caller waits for the answer any more
        finally:
            self._share.drop(message.counted)

    async def _call(self, message: Message, *, full: bool) -> bytes:
        if message.body is None:
            raise CallError(RESOURCE_EXHAUSTED, f"the message is larger than {self._reader.limit} bytes")
        if full:
            raise CallError(RESOURCE_EXHAUSTED, f"{MAX_CALLS_AT_ONCE} calls are running already: wait for one to end")
        try:
            request = await self._decoder.decode(ttrpc_pb2.Request, message.body)
        except DecodeError:
            raise CallError(INVALID_ARGUMENT, "the message is not a ttrpc request") from None
        handler = self._handlers.get(request.method) if request.service == self._service else None
        if handler is None:
            raise CallError(UNIMPLEMENTED, f"the method {request.service}/{request.method} does not exist")
        if message.flags:
            raise CallError(UNIMPLEMENTED, f"{request.method} is unary: streams are not supported")
        try:
            return await handler(request.payload)
        except DecodeError:
            raise CallError(INVALID_ARGUMENT, f"the payload is not a request of {request.method}") from None


def shortened(words: str) -> str:
    """A plugin's text for a log line or an error, shortened to a few lines."""
    words = words[:_WORDS]
    return words if words.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in words)


def encode(stream: int, kind: int, body: bytes) -> bytes:
    """A message with its header. Raises CallError if the body is larger than the limit."""
    if len(body) > BODY_LIMIT:
        raise CallError(RESOURCE_EXHAUSTED, f"the message has {len(body)} bytes: the limit is {BODY_LIMIT}")
    return _HEADER.pack(len(body), stream, kind, 0) + body
