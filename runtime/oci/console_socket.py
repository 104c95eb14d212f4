"""The socket on which an OCI runtime passes the master of a terminal that it made inside a container."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from host.errors import PodkeelError

# The OCI runtime finds the socket's folder by this: addresses of unix sockets are short, paths of containers are long.
FOLDER_DESCRIPTOR = 5


class ConsoleSocket:
    """A listening socket ``name`` in ``folder``, for ``with``. The OCI runtime gets ``descriptors`` and the path."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            self._socket.close()
            raise
        try:
            self._socket.bind(f"/proc/self/fd/{self._folder}/{name}")
            self._socket.listen(1)
        except BaseException:
            self.close()
            raise
        self.path = f"/proc/self/fd/{FOLDER_DESCRIPTOR}/{name}"
        self.descriptors = {FOLDER_DESCRIPTOR: self._folder}

    def fileno(self) -> int:
        """The socket's descriptor. It becomes readable when the OCI runtime passes the terminal."""
        return self._socket.fileno()

    def terminal(self) -> int:
        """The master's descriptor, which the caller must close, once the OCI runtime has ended.

        Raises PodkeelError if the OCI runtime passed none, or something else.
        """
        try:
            connection, _ = self._socket.accept()
            with connection:
                # runc sends it from inside the container, where other processes may have opened the socket.
                connection.setblocking(False)
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        except OSError:
            descriptors = []
        if not descriptors:
            raise PodkeelError("the OCI runtime did not pass a terminal")
        os.set_inheritable(descriptors[0], False)
        if not os.isatty(descriptors[0]):
            os.close(descriptors[0])
            raise PodkeelError("the OCI runtime passed something other than a terminal")
        return descriptors[0]

    def close(self) -> None:
        """Remove the socket."""
        self._socket.close()
        os.close(self._folder)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
