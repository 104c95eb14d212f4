"""The interface of the streaming server to the rest of the agent."""

from __future__ import annotations

import socket
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from cri.streaming.attach_socket import AttachSocket
from cri.streaming.process_io import ProcessIO
from cri.streaming.tokens import AttachRequest, ExecRequest


class TerminalSize(NamedTuple):
    """In characters."""

    width: int
    height: int


class ExecProcess(Protocol):
    """A process that runs in a container."""

    @property
    def io(self) -> ProcessIO:
        """Our ends of its streams."""

    async def wait(self) -> int:
        """Its exit code once it has ended, 128 + n after signal n."""


class StreamBackend(Protocol):
    """Containers and pods as the streaming server sees them. Errors of host.errors go to the client as text."""

    def exec(self, request: ExecRequest, size: TerminalSize | None) -> AbstractAsyncContextManager[ExecProcess]:
        """Start the command with the streams asked for (a terminal if ``tty``, of that size if the client sent one).

        The end of the block kills the process with its group if it still runs, and closes the streams. An error before
        the process runs (no such container, not running, no such executable) is raised on entering.
        """

    def attach(self, request: AttachRequest) -> AbstractAsyncContextManager[AttachSocket]:
        """Connect to the running container's console: output from now on.

        At the end of the block the container continues.
        """

    async def connect(self, sandbox_id: str, port: int) -> socket.socket:
        """A connected, non-blocking TCP socket to the port on the pod's loopback.

        The calling task, which is that connection's alone, may be cancelled when the pod stops.
        """
