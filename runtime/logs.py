"""The log of a container: its file in the pod's log folder, and the link by which conmon finds it.

conmon gets a path in the bundle that is safe for every name of a log. It is a link to a descriptor of the agent, which
has exactly the checked file open. To reopen its log, conmon (2.0 to 2.2) closes the file, opens ``<path>.tmp`` with
O_TRUNC, without O_APPEND, and renames that to its path. If any of this fails, conmon ends. So the agent first makes
``<path>.tmp`` a link to a new, empty file. This file is bind mounted into the bundle, because a stopped conmon may
continue after the agent that asked it has died with its descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host import libc, processes
from host.errors import InvalidArgumentError, LimitError, PodkeelError
from host.files import mounts
from host.files.file_tree import open_below
from host.processes import ProcessName

_PIDFD_GETFD = 438
# How many bytes at the end of a log are searched: conmon's records are smaller than 9 KiB.
_TAIL = 256 * 1024
_BOUND = "log-"
_OF_THE_PATH = (
    errno.EXDEV,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.EEXIST,
)


@dataclass(frozen=True, slots=True)
class LogFile:
    """The log at ``path`` in the pod's log folder ``folder``."""

    folder: Path
    path: Path

    def open(self) -> int:
        """Open the file for appending, and create it if it is missing.

        Raises:
            InvalidArgumentError: the path leads out of the folder, or is not a regular file.
            LimitError: the file system is full.
        """
        return self._open(os.O_WRONLY | os.O_APPEND | os.O_CREAT, make_folders=True)

    def end_last_lines(self) -> None:
        """End the last line of each stream with a record ``F``, if its program wrote no newline. Raises OSError.

        conmon cannot know that the line is the last, and writes a record ``P``: the line continues.
        """
        descriptor = self._open(os.O_RDWR, make_folders=False)
        try:
            start = max(0, os.fstat(descriptor).st_size - _TAIL)
            tail = os.pread(descriptor, _TAIL, start)
            for position in _unfinished(tail, whole=start == 0):
                os.pwrite(descriptor, b"F", start + position)
        finally:
            os.close(descriptor)

    def _open(self, flags: int, *, make_folders: bool) -> int:
        try:
            if make_folders:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            with _opened(os.open(self.folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
                descriptor = self._open_in(folder, flags, make_folders=make_folders)
        except OSError as error:
            raise self._explained(error) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidArgumentError(f"log {self.path} exists and is not a regular file: remove it")
        os.set_blocking(descriptor, True)
        return descriptor

    def _open_in(self, folder: int, flags: int, *, make_folders: bool) -> int:
        *parents, name = self.path.relative_to(self.folder).parts
        for depth in range(1, len(parents) + 1) if make_folders else ():
            with _opened(_inside(folder, parents[: depth - 1])) as parent, contextlib.suppress(FileExistsError):
                os.mkdir(parents[depth - 1], 0o755, dir_fd=parent)
        with _opened(_inside(folder, parents)) as parent:
            # O_NONBLOCK: a fifo is refused instead of waited for.
            return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=parent)

    def _explained(self, error: OSError) -> PodkeelError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            return LimitError(f"log {self.path} cannot be made: {error.strerror}")
        if error.errno in _OF_THE_PATH:
            return InvalidArgumentError(f"log {self.path} cannot be opened, or only by a link: {error.strerror}")
        return PodkeelError(f"log {self.path} cannot be opened: {error.strerror}")


class LogLink:
    """The path ``log`` in a container's bundle ``folder``. conmon gets this path."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "log"
        self._next = folder / "log.tmp"

    @property
    def is_used(self) -> bool:
        """Whether this container's conmon got the path."""
        return self.path.is_symlink()

    def lead_to(self, descriptor: int) -> None:
        """Make conmon open the file of ``descriptor`` at its start. The caller keeps it open until conmon has."""
        _link(self.path, f"/proc/{os.getpid()}/fd/{descriptor}")

    def bind_next(self, descriptor: int) -> Path:
        """Bind mount the file of ``descriptor`` into the bundle, for ``lead_next_to``. ``release`` unmounts it.

        Raises OSError.
        """
        bound = self.path.with_name(f"{_BOUND}{secrets.token_hex(8)}")
        bound.touch(mode=0o600, exist_ok=False)
        try:
            mounts.bind(f"/proc/self/fd/{descriptor}", bound)
        except OSError:
            bound.unlink()
            raise
        return bound

    def lead_next_to(self, bound: Path) -> None:
        """Make conmon open the file at ``bound`` when it is asked to reopen its log."""
        _link(self._next, str(bound))

    def waiting(self) -> Path | None:
        """The file that conmon must open next and has not opened yet, also for an earlier agent; None if there is
        none."""
        with contextlib.suppress(OSError):
            return self._next.readlink()
        return None

    def open_waiting(self) -> int | None:
        """Open the file that is bound for conmon to open next; None if there is none."""
        waiting = self.waiting()
        if waiting is None or waiting.parent != self.path.parent or not waiting.name.startswith(_BOUND):
            return None  # a link of an older version leads to a descriptor of an earlier agent
        with contextlib.suppress(OSError):
            return os.open(waiting, os.O_PATH | os.O_CLOEXEC)
        return None

    def leads_to(self, bound: Path) -> bool:
        """Whether conmon has opened the file of ``lead_next_to``: it renames the link then."""
        with contextlib.suppress(OSError):
            return self.waiting() is None and self.path.readlink() == bound
        return False

    def release(self, *, but: Path | None = None) -> None:
        """Unmount the files that conmon no longer needs: all except ``but``. May be repeated. Raises OSError."""
        for bound in self.path.parent.glob(f"{_BOUND}*"):
            if bound != but:
                mounts.unmount(bound, lazy=True)
                bound.unlink()


def has_open(monitor: ProcessName, descriptor: int) -> bool:
    """Whether conmon writes to the file of ``descriptor``."""
    return _number_in(monitor, descriptor) is not None


def append_from_now_on(monitor: ProcessName, descriptor: int) -> None:
    """Make conmon, which has the file of ``descriptor`` open, append to it, even if others write to or truncate it."""
    number = _number_in(monitor, descriptor)
    pidfd = processes.open_process(monitor.pid, monitor.started)
    if pidfd is None or number is None:
        return
    with _opened(pidfd), contextlib.suppress(OSError):
        with _opened(libc.syscall(_PIDFD_GETFD, ctypes.c_int(pidfd), ctypes.c_int(number), ctypes.c_uint(0))) as theirs:
            fcntl.fcntl(theirs, fcntl.F_SETFL, fcntl.fcntl(theirs, fcntl.F_GETFL) | os.O_APPEND)


def _number_in(monitor: ProcessName, descriptor: int) -> int | None:
    wanted = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{monitor.pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(entry.stat(), wanted) and processes.start_time(monitor.pid) == monitor.started:
                    return int(entry.name)
    return None


def _inside(folder: int, parts: list[str]) -> int:
    """Open the folder ``parts`` below ``folder``. A link may lead to another place below it."""
    flags = os.O_PATH | os.O_DIRECTORY
    return open_below(folder, "/".join([*parts, "."]), flags, libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS)


def _link(path: Path, target: str) -> None:
    """Create or replace a link in one step: conmon may open it at any time, and creates a file if it is missing."""
    made = path.with_name(f"{path.name}.new")
    made.unlink(missing_ok=True)
    made.symlink_to(target)
    made.rename(path)


def _unfinished(tail: bytes, *, whole: bool) -> Iterator[int]:
    """The positions of the tags of each stream's last record, if the tag says that the line continues."""
    streams = {b"stdout", b"stderr"}
    end = len(tail)
    while streams and end > 0:
        begin = tail.rfind(b"\n", 0, end - 1) + 1
        if begin == 0 and not whole:
            return  # it may be the end of a record
        words = tail[begin:end].split(b" ", 3)
        if len(words) == 4 and words[1] in streams:
            streams.discard(words[1])
            if words[2] == b"P":
                yield begin + len(words[0]) + len(words[1]) + 2
        end = begin


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
