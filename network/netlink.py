"""Netlink messages and a blocking request socket (RFC 3549, netlink(7)), small enough for the start of every pod."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Self, TypeVar

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_SNDBUFFORCE = 32
_BUFFER_BYTES = 8 * 1024 * 1024
_REPLY_SECONDS = 10

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")

_Answer = TypeVar("_Answer")


class Message(NamedTuple):
    """One request: its type, flags (NLM_F_REQUEST is added), and what follows the header."""

    kind: int
    flags: int
    body: bytes


class Refusal(NamedTuple):
    """The kernel's answer to the message at ``position`` of an exchange that it did not carry out."""

    position: int
    number: int
    reason: str

    def error(self) -> OSError:
        """The refusal as an exception."""
        return OSError(self.number, self.reason)


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A zero-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def number32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in host order."""
    return attribute(kind, struct.pack("=I", value))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in ``data`` by type; the last one wins."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & _NLA_TYPE_MASK] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class NetlinkSocket:
    """Requests to one netlink family, in the network namespace of the thread that opens it; safe between threads."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@qq", _REPLY_SECONDS, 0))
        except BaseException:
            self._socket.close()
            raise
        self._lock = threading.Lock()
        self._sequence = 0

    def allow_large_batches(self) -> None:
        """Let one exchange hold thousands of messages (needs CAP_NET_ADMIN in the initial user namespace)."""
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER_BYTES)

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        with self._lock:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, messages: Sequence[Message], last: int = -1) -> list[Refusal]:
        """Send all in one datagram and return what was refused, once the kernel has dealt with message ``last``.

        The kernel carries messages out in order and reports failures whether asked or not; success is asked for only
        for ``last``, so that thousands of messages do not overflow the receive buffer.
        """
        last %= len(messages)
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(messages)
            packed = [
                _HEADER.pack(
                    16 + len(message.body),
                    message.kind,
                    message.flags | NLM_F_REQUEST | (NLM_F_ACK if index == last else 0),
                    first + index,
                    0,
                )
                + message.body
                + bytes(-len(message.body) % 4)
                for index, message in enumerate(messages)
            ]
            self._socket.send(b"".join(packed))
            return self._collect(first, first + last)

    def request(self, messages: Sequence[Message], tolerate: Collection[int] = ()) -> None:
        """Exchange; raises OSError for the first refusal whose number is not in ``tolerate``."""
        for refusal in self.exchange(messages):
            if refusal.number not in tolerate:
                raise refusal.error()

    def ask(self, question: Message, read: Callable[[bytes], _Answer | None]) -> list[_Answer]:
        """What ``read`` makes of each answer, less None, as they arrive; raises OSError when the kernel refuses.

        ``question`` is about one object, or with NLM_F_DUMP about all. ``read`` gets what follows the header.
        """
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
            flags = question.flags | NLM_F_REQUEST | NLM_F_ACK
            self._socket.send(_HEADER.pack(16 + len(question.body), question.kind, flags, sequence, 0) + question.body)
            found: list[_Answer] = []
            while True:
                for kind, _, answered, body in self._receive():
                    if answered != sequence:
                        continue
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        number = -_ERROR.unpack_from(body)[0] if len(body) >= 4 else 0
                        if number > 0:
                            raise OSError(number, os.strerror(number))
                        return found
                    answer = read(body)
                    if answer is not None:
                        found.append(answer)

    def _collect(self, first: int, last: int) -> list[Refusal]:
        refusals: list[Refusal] = []
        while True:
            for kind, flags, answered, body in self._receive():
                if kind != _NLMSG_ERROR or not first <= answered <= last:
                    continue
                number = -_ERROR.unpack_from(body)[0]
                if number:
                    refusals.append(Refusal(answered - first, number, _reason(number, flags, body)))
                if answered == last:
                    return refusals

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            raise OSError(errno.ETIMEDOUT, f"the kernel did not answer within {_REPLY_SECONDS} s") from None
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            yield kind, flags, sequence, data[offset + 16 : offset + length]
            offset += (length + 3) & ~3


def _reason(number: int, flags: int, body: bytes) -> str:
    reason = os.strerror(number)
    if flags & _NLM_F_ACK_TLVS:
        # After the error number comes the refused message's header, with its body unless the answer is capped.
        skipped = 16 if flags & _NLM_F_CAPPED else (_HEADER.unpack_from(body, 4)[0] + 3) & ~3
        detail = attributes(body[4 + skipped :]).get(_NLMSGERR_ATTR_MSG)
        if detail:
            reason = f"{reason} ({detail.rstrip(bytes(1)).decode(errors='replace')})"
    return reason
