"""The attach socket that conmon keeps beside each container, and its control pipe.

The first byte of a packet from conmon names the stream. A packet to conmon holds input for the container only. A line
``1 <height> <width>`` in the control pipe resizes the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path

from host.errors import UnavailableError, WrongStateError

STDOUT = 2
STDERR = 3
# conmon sends at most 8 KiB and a byte a packet, and cuts packets that are larger than its own buffer.
PACKET_SIZE = 64 * 1024
INPUT_PACKET_SIZE = 8 * 1024
_RESIZE = 1
_ACCEPT_SECONDS = 10.0
_BETWEEN_ATTEMPTS = 0.01


class AttachSocket:
    """A connection to one container's console: ``socket`` is non-blocking and keeps packet boundaries."""

    def __init__(self, connected: socket.socket, control_pipe: Path | None) -> None:
        self.socket = connected
        self._control_pipe = control_pipe

    @classmethod
    async def connect(cls, directory: Path) -> AttachSocket:
        """Connect to ``attach`` in conmon's folder of the container, whose control pipe is ``ctl``.

        conmon accepts few connections at once: this waits up to ten seconds for it. Raises WrongStateError if conmon
        does not listen, UnavailableError if it accepts no connection.
        """
        deadline = time.monotonic() + _ACCEPT_SECONDS
        while True:
            try:
                return cls._connect(directory)
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_BETWEEN_ATTEMPTS)

    @classmethod
    def _connect(cls, directory: Path) -> AttachSocket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            # Addresses of unix sockets are short, so the folder is named by a descriptor instead of its path.
            folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{folder}/attach")
            finally:
                os.close(folder)
        except BlockingIOError as error:
            connection.close()
            raise UnavailableError(f"conmon accepts no client at {directory}/attach; try again") from error
        except OSError as error:
            connection.close()
            raise WrongStateError(f"nothing to attach to in {directory}: {error.strerror}; is it running?") from error
        return cls(connection, directory / "ctl")

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size in characters; nothing when the container has ended."""
        if self._control_pipe is None:
            return
        with contextlib.suppress(OSError):
            pipe = os.open(self._control_pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(pipe, f"{_RESIZE} {height} {width}\n".encode())
            finally:
                os.close(pipe)

    def end_input(self) -> None:
        """End the input of this client. With ``stdin_once`` conmon then closes the container's input."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Disconnect; the container keeps running."""
        self.socket.close()
