"""The agent's socket as a client sees it: one typed call for all methods of the CRI and of the agent's own service."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from google.protobuf.message import Message

# gRPC reads this once, when it is imported. Its log lines would mix with our one-line errors.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from host.errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidArgumentError,
    LimitError,
    NotFoundError,
    PodkeelError,
    UnavailableError,
    UnsupportedError,
    WrongStateError,
)
from proto.podkeel.v1 import agent_pb2
from proto.runtime.v1 import cri_pb2

R = TypeVar("R", bound=Message)

CALL_SECONDS = 120.0
_PROBE_SECONDS = 1.0
_MESSAGE_BYTES = 64 * 1024 * 1024

_KINDS: dict[grpc.StatusCode, type[PodkeelError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: WrongStateError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def _methods() -> dict[str, str]:
    """The path of the method that takes each request, by the request's full name: no two methods share a request."""
    return {
        method.input_type.full_name: f"/{service.full_name}/{method.name}"
        for file in (cri_pb2.DESCRIPTOR, agent_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }


class Client:
    """A connection to the agent at ``socket`` (``unix:///path``), for a ``with`` block."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._paths = _methods()
        self._channel = grpc.insecure_channel(
            socket,
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; streams still open end with it."""
        self._channel.close()

    def call(self, request: Message, response: type[R], what: str = "", *, timeout: float | None = CALL_SECONDS) -> R:
        """Send ``request`` to the method that takes it and return its answer, a ``response``.

        A refusal is raised as the kind of PodkeelError of its code, with ``what`` (the method's name if empty) before
        the agent's message. ``timeout`` is in seconds.
        """
        path = self._paths[request.DESCRIPTOR.full_name]
        method = self._channel.unary_unary(
            path, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        try:
            answer: R = method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self._refusal(error, what or path.rpartition("/")[2]) from error
        return answer

    def stream(self, request: Message, response: type[R], what: str = "") -> Iterator[R]:
        """Like ``call`` for a method that answers with a stream, until it ends."""
        path = self._paths[request.DESCRIPTOR.full_name]
        method = self._channel.unary_stream(
            path, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        try:
            yield from method(request)
        except grpc.RpcError as error:
            raise self._refusal(error, what or path.rpartition("/")[2]) from error

    def _refusal(self, error: Any, what: str) -> PodkeelError:
        code, details = error.code(), " ".join((error.details() or "").split())
        if code is grpc.StatusCode.UNAVAILABLE and (reason := _why_unreachable(self.socket)):
            return UnavailableError(reason)
        kind = _KINDS.get(code, PodkeelError)
        return kind(f"{what}: {details or code.name}")


def _why_unreachable(address: str) -> str:
    """Why no agent can be reached at ``address``; empty if a process listens there."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_SECONDS)
            probe.connect(address.removeprefix("unix://"))
    except TimeoutError:
        return ""
    except PermissionError:
        return f"{address} is closed to user {os.geteuid()}: run this command as root"
    except OSError:
        return f"no agent listens on {address}: start one with `podkeel serve`, or name its socket with --socket"
    return ""
