"""Takes over the locks and sockets of a killed process that cannot end: one of its threads waits for a file server.

The kernel closes its descriptors only when that thread has ended, which may never happen. Until then its locks and
ports stay taken, and its clients wait for answers. The process never executes its program again, so nothing is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from host import libc
from host.files import procfs

_PIDFD_OPEN, _PIDFD_GETFD = 434, 438
_PIDFD_THREAD = os.O_EXCL
_STATUS_BYTES = 8 * 1024


def release_locks_and_sockets(pid: int, lock: Path) -> bool:
    """Release what the dying process ``pid`` holds: its lock by flock(2) on the file ``lock``, and its sockets.

    Returns whether that was done. It is not done if a thread of the process may run again, or if the process does not
    have that file open. Needs Linux 6.9.
    """
    threads = _threads(pid)
    if not threads or not all(map(_is_dying, threads)):
        return False
    there = lock.stat()
    for thread in threads:
        with contextlib.suppress(OSError):
            pidfd = libc.syscall(_PIDFD_OPEN, thread, _PIDFD_THREAD)
            try:
                if _unlock(pidfd, thread, lock, (there.st_dev, there.st_ino)):
                    _shut_down_sockets(pidfd, thread)
                    return True
            finally:
                os.close(pidfd)
    return False


def _threads(pid: int) -> list[int]:
    try:
        return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _is_dying(thread: int) -> bool:
    fields = procfs.read_bounded(f"/proc/{thread}/stat", _STATUS_BYTES).rpartition(b")")[2].split()
    return not fields or fields[0] in (b"Z", b"X") or procfs.is_being_killed(thread)


def _open_files(thread: int) -> list[tuple[int, str]]:
    """The descriptors of a thread with their names in /proc. The files are not opened, which could hang."""
    found = []
    for link in Path(f"/proc/{thread}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append((int(link.name), str(link.readlink())))
    return found


def _unlock(pidfd: int, thread: int, lock: Path, identity: tuple[int, int]) -> bool:
    for number, path in _open_files(thread):
        if path == os.path.realpath(lock):
            taken = libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
            try:
                status = os.fstat(taken)
                if (status.st_dev, status.st_ino) == identity:
                    fcntl.flock(taken, fcntl.LOCK_UN)  # the lock belongs to the open file, not to a descriptor
                    return True
            finally:
                os.close(taken)
    return False


def _shut_down_sockets(pidfd: int, thread: int) -> None:
    for number, path in _open_files(thread):
        if path.startswith("socket:"):
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=libc.syscall(_PIDFD_GETFD, pidfd, number, 0)) as one,
            ):
                one.shutdown(socket.SHUT_RDWR)
