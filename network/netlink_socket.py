"""A blocking netlink socket (RFC 3549, netlink(7)) that carries messages in batches.

A socket belongs to the network namespace of the thread that opens it. All functions block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple, Self, TypeVar

from network.netlink import (
    NETLINK_EXT_ACK,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    Message,
    read_refusal,
)

_NETLINK_CAP_ACK = 10
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 8 * 1024 * 1024
_MAX_DATAGRAM_BYTES = 65536
_REPLY_SECONDS = 10
_DUMP_TRIES = 3

_HEADER = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")

_Value = TypeVar("_Value")


class Refusal(NamedTuple):
    """The kernel's refusal of the message at ``position`` of an exchange."""

    position: int
    number: int
    reason: str

    def error(self) -> OSError:
        """The refusal as an exception."""
        return OSError(self.number, self.reason)


class NetlinkSocket:
    """Requests to one netlink family in the network namespace of the opening thread. Threads may share it."""

    def __init__(self, family: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, family)
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@qq", _REPLY_SECONDS, 0))
        except BaseException:
            self._socket.close()
            raise
        self._lock = threading.Lock()
        self._sequence = 0

    @property
    def port_id(self) -> int:
        """The address of the socket among those of its family and namespace."""
        return int(self._socket.getsockname()[0])

    def allow_large_batches(self) -> None:
        """Allow an exchange of thousands of messages, each of which may be refused.

        Needs CAP_NET_ADMIN in the initial user namespace.
        """
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        with self._lock:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, messages: Sequence[Message], last: int = -1) -> list[Refusal]:
        """Send all messages in one datagram. Return the refusals once the kernel has processed message ``last``.

        The kernel processes messages in order and always reports failures. Success is requested only for ``last``, so
        that the answers to thousands of messages do not overflow the receive buffer.
        """
        last %= len(messages)
        with self._lock:
            first = self._sequence + 1
            self._sequence += len(messages)
            packed = [
                _pack(request, NLM_F_ACK if index == last else 0, first + index)
                for index, request in enumerate(messages)
            ]
            self._socket.send(b"".join(packed))
            return self._collect(first, first + last)

    def request(self, messages: Sequence[Message], tolerate: Collection[int] = ()) -> None:
        """Exchange messages. Raises OSError for the first refusal whose number is not in ``tolerate``."""
        for refusal in self.exchange(messages):
            if refusal.number not in tolerate:
                raise refusal.error()

    def ask(self, question: Message, read: Callable[[bytes], _Value | None]) -> list[_Value]:
        """The result of ``read`` for each answer, without None, as answers arrive. Raises OSError for a refusal.

        ``question`` asks for one object, or with NLM_F_DUMP for all. If something changes during a dump, the answers
        may be old or incomplete, so the dump is repeated. ``read`` gets the bytes after the header.
        """
        for _ in range(_DUMP_TRIES - 1):
            found = self._answers(question, read, whole=False)
            if found is not None:
                return found
        return self._answers(question, read, whole=True) or []

    def _answers(
        self, question: Message, read: Callable[[bytes], _Value | None], *, whole: bool
    ) -> list[_Value] | None:
        """The answers; None if something changed before the last answer, unless ``whole``."""
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
            self._socket.send(_pack(question, NLM_F_ACK, sequence))
            found: list[_Value] = []
            interrupted = False
            while True:
                for kind, flags, answered, body in self._receive():
                    if answered != sequence:
                        continue
                    interrupted |= not whole and bool(flags & NLM_F_DUMP_INTR)
                    if kind in (NLMSG_DONE, NLMSG_ERROR):
                        number = -_ERROR.unpack_from(body)[0] if len(body) >= 4 else 0
                        if number > 0:
                            raise OSError(number, os.strerror(number))
                        return None if interrupted else found
                    value = None if interrupted else read(body)
                    if value is not None:
                        found.append(value)

    def _collect(self, first: int, last: int) -> list[Refusal]:
        refusals: list[Refusal] = []
        while True:
            for kind, flags, answered, body in self._receive():
                if kind != NLMSG_ERROR or not first <= answered <= last:
                    continue
                number = -_ERROR.unpack_from(body)[0]
                if number:
                    refusals.append(Refusal(answered - first, number, _reason(number, flags, body)))
                if answered == last:
                    return refusals

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, sequence number and body of each message in the next datagram from the kernel."""
        try:
            data, _, flags, (sender, _) = self._socket.recvmsg(_MAX_DATAGRAM_BYTES)
        except BlockingIOError:
            raise OSError(errno.ETIMEDOUT, f"the kernel did not answer within {_REPLY_SECONDS} s") from None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self._drop_answers()  # otherwise the kernel would also drop answers to the next request
            raise
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EMSGSIZE, f"the kernel's answer is longer than {_MAX_DATAGRAM_BYTES} bytes")
        if sender != 0:
            return  # another process sent it: the kernel's address is 0
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if not _HEADER.size <= length <= len(data) - offset:
                raise OSError(errno.EBADMSG, f"the kernel's answer has a message of {length} bytes at {offset}")
            yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3

    def _drop_answers(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.recv(1, socket.MSG_DONTWAIT)


def _pack(request: Message, flags: int, sequence: int) -> bytes:
    body = request.body
    header = _HEADER.pack(_HEADER.size + len(body), request.kind, request.flags | NLM_F_REQUEST | flags, sequence, 0)
    return header + body + bytes(-len(body) % 4)


def _reason(number: int, flags: int, body: bytes) -> str:
    detail = read_refusal(body).get_attr("NLMSGERR_ATTR_MSG") if flags & NLM_F_ACK_TLVS else None
    return f"{os.strerror(number)} ({detail})" if detail else os.strerror(number)
