"""The socket where plugins connect."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from host.concurrency.threads import in_thread
from host.errors import UnavailableError
from runtime.nri.options import DEFAULT_SOCKET
from runtime.nri.plugins.trunk import Trunk

_BACKLOG = 64
_log = logging.getLogger("podkeel.nri")


class Listener:
    """Listens on a unix socket to which only root can connect. ``trunk`` makes the protocol of each connection."""

    def __init__(self, path: str, trunk: Callable[[], Trunk]) -> None:
        self._path = Path(path)
        self._trunk = trunk
        self._server: asyncio.Server | None = None
        self._inode = 0

    async def open(self) -> str:
        """Begin to listen. Return the reason if that failed on the default socket, else an empty text.

        For another socket, raises UnavailableError if it cannot be bound or another process serves it. For the default
        socket this is only a warning.
        """
        try:
            bound = await in_thread(self._bind)
        except OSError as error:
            problem = f"nri.socket {self._path}: cannot listen: {error.strerror or error}"
            remedy = "set nri.socket to another path, or nri.external_connections to false"
            if str(self._path) != DEFAULT_SOCKET:
                raise UnavailableError(f"{problem}: {remedy}") from error
            _log.warning("nri: plugins cannot connect: %s: %s", problem, remedy)
            return problem
        self._server = await asyncio.get_running_loop().create_unix_server(self._trunk, sock=bound, backlog=_BACKLOG)
        _log.info("nri: plugins can connect to %s", self._path)
        return ""

    def _bind(self) -> socket.socket:
        """Bind the socket. A socket file that no process serves is replaced."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(self._path.parent), contextlib.ExitStack() as stack:
            if self._path.is_socket():
                if _is_served(self._path):
                    raise OSError(errno.EADDRINUSE, "another process serves it")
                self._path.unlink()
            bound = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            bound.bind(str(self._path))
            self._path.chmod(0o600)  # no plugin can connect before it listens
            self._inode = self._path.stat().st_ino
            stack.pop_all()
        return bound

    async def close(self) -> None:
        """Accept no more connections. Existing ones stay open."""
        if self._server is not None:
            self._server.close()
            await in_thread(self._unlink)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError), _alone(self._path.parent):
            if self._path.stat().st_ino == self._inode:  # else it belongs to another agent by now
                self._path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other agents from checking for a socket in ``folder`` meanwhile.

    An agent that holds the lock for a long time is ignored.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno == errno.EAGAIN  # its backlog is full
        return True
