"""A simple, fast client for a CRI socket. It makes calls by name, with paths and types from the descriptors."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message

from proto.runtime.v1 import cri_pb2

CALL_SECONDS = 120.0
_OPTIONS = (
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
)


class Client:
    """One channel to ``socket`` (``unix:///…``). Several threads may use it at the same time."""

    def __init__(self, address: str, *descriptors: FileDescriptor) -> None:
        self.address = address
        self.metrics_url = ""
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._calls: dict[str, Callable[..., Any]] = {}
        for descriptor in (cri_pb2.DESCRIPTOR, *descriptors):
            for service in descriptor.services_by_name.values():
                for method in service.methods:
                    if method.server_streaming or method.client_streaming:
                        continue
                    self._calls[method.name] = self._channel.unary_unary(
                        f"/{service.full_name}/{method.name}",
                        request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
                        response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
                    )

    def call(self, name: str, request: Message, timeout: float = CALL_SECONDS) -> Any:
        """The response to one unary call. Raises ``grpc.RpcError``."""
        return self._calls[name](request, timeout=timeout)

    def answers(self, name: str, request: Message) -> bool:
        """Whether the server implements the call. Sends it once."""
        try:
            self.call(name, request)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return False
            raise
        return True

    def knows(self, name: str) -> bool:
        """Whether the client has a descriptor with this call."""
        return name in self._calls

    def wait_ready(self, seconds: float) -> None:
        """Wait until the server accepts connections. Raises ``grpc.FutureTimeoutError``."""
        grpc.channel_ready_future(self._channel).result(timeout=seconds)

    def server_pid(self) -> int | None:
        """The process that listens on the socket (SO_PEERCRED); None if its pid is not visible from here."""
        path = self.address.removeprefix("unix://")
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
            connection.connect(path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = int(struct.unpack("3i", credentials)[0])
        return pid if pid > 0 and Path(f"/proc/{pid}").exists() else None

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()
