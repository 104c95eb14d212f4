"""Limits the connections to the CRI's socket: at the limit, the process with the most loses its oldest ones."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from host.concurrency.threads import in_thread

_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_DESCRIPTORS = Path("/proc/self/fd")

_log = logging.getLogger("podkeel.server")


@dataclass(frozen=True, slots=True)
class _Connection:
    descriptor: int
    inode: int  # grows with time, except for those of the same moment
    user: int  # of its client
    pid: int  # of its client; 0 for one outside of this PID namespace


async def keep_room(path: Path, most: int) -> None:
    """Keep at most ``most`` clients connected to this process's socket ``path``, for as long as this runs.

    At its own limit gRPC refuses new clients, and it cannot close a connection on request. The connections are
    descriptors of this process: if one is shut down, gRPC sees that its client left.
    """
    while True:
        await asyncio.sleep(_SECONDS)
        try:
            closed = await in_thread(make_room, str(path), most)
        except OSError as error:  # no descriptor is free to examine the connections
            _log.warning("socket %s: its connections cannot be counted: %s", path, error)
            continue
        for pid, (count, had) in closed.items():
            _log.warning("socket %s: process %d had %d connections: its %d oldest were closed", path, pid, had, count)


def make_room(path: str, most: int) -> dict[int, tuple[int, int]]:
    """How many connections of each process were closed, and how many it had. Blocks for some milliseconds."""
    if len(os.listdir(_DESCRIPTORS)) <= most:  # noqa: PTH208 - once a second
        return {}
    found = sorted(_connections(path), key=lambda connection: connection.inode)
    had = Counter(connection.pid for connection in found)
    of_users = Counter(connection.user for connection in found)  # a user with many processes has one connection in each
    left, closed = had.copy(), Counter[int]()
    for _ in range(len(found) - most):
        given_up = max(found, key=lambda connection: (of_users[connection.user], left[connection.pid]))
        found.remove(given_up)
        closed[given_up.pid] += _shut_down(given_up, path)
        of_users[given_up.user] -= 1
        left[given_up.pid] -= 1
    return {pid: (count, had[pid]) for pid, count in closed.items() if count}


def _connections(path: str) -> Iterator[_Connection]:
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - of thousands
        descriptor = int(name)
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode) and (found := _connection(descriptor, path)) is not None:
                yield found


def _connection(descriptor: int, path: str) -> _Connection | None:
    """The identity of a descriptor; None if it is no client's connection to ``path``.

    Raises OSError if it is closed.
    """
    with socket.socket(fileno=os.dup(descriptor)) as same:
        if same.family != socket.AF_UNIX or same.getsockname() != path:
            return None
        if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        credentials = same.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, user, _ = _CREDENTIALS.unpack(credentials)
        return _Connection(descriptor, os.fstat(same.fileno()).st_ino, user, pid)


def _shut_down(connection: _Connection, path: str) -> bool:
    """Shut the connection down; returns whether it still existed."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.descriptor)) as same:
        if os.fstat(same.fileno()).st_ino == connection.inode and same.getsockname() == path:
            same.shutdown(socket.SHUT_RDWR)
            return True
    return False
