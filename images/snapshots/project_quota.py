"""Project quotas of ext4 and xfs: the file system itself counts what is below a folder with a project id.

quotactl(2), quotactl_fd (Linux 5.14) and ``struct fsxattr`` of ioctl_xfs_fsgetxattr(2). Limits are never set.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from host import libc
from host.errors import LimitError

_FSGETXATTR = 0x801C581F
_FSSETXATTR = 0x401C5820
_FSXATTR = struct.Struct("=IIIII8x")  # flags, extent size, extents, project id, extent size of copies on write
_INHERITED = 0x200  # FS_XFLAG_PROJINHERIT: what is made in the folder gets its id

_QUOTACTL_FD = 443
_GET_PROJECT = 0x800007 << 8 | 2  # QCMD(Q_GETQUOTA, PRJQUOTA)
_DQBLK = struct.Struct("=2Q Q 2Q Q 2Q I4x")  # bytes used are the third number, inodes used the sixth


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """The usage of the files of one project."""

    used_bytes: int
    inodes: int


class ProjectQuotas:
    """Gives folders on one file system project ids, and reads the usage of those; for any thread.

    ``ids`` are the first and the last id that may be used. The first one used depends on ``folder``, so that several
    agents on one file system use different ids. Call ``open`` first.
    """

    def __init__(self, folder: Path, ids: tuple[int, int]) -> None:
        first, last = ids
        count = last - first + 1
        begin = first + zlib.crc32(os.fsencode(folder)) % count
        self._ids = (range(begin, last + 1), range(first, begin))
        self._folder = folder
        self._descriptor = -1
        self._given: set[int] = set()
        self._lock = threading.Lock()

    def open(self) -> str:
        """Try it out on a new folder in ``folder``; why it cannot be used there, or nothing if it can."""
        trial = self._folder / "quota-trial"
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()
        self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _attributes(self._descriptor)[0] & _INHERITED:
                return self._unusable(f"{self._folder} belongs to a project already")
            trial.mkdir(mode=0o700)
            project = self.give(trial)
            counted = self.usage(project).inodes
            trial.rmdir()
            self.take_back(project)
        except LimitError as error:
            return self._unusable(str(error))
        except OSError as error:
            return self._unusable(_REASONS.get(error.errno or 0, str(error.strerror)))
        finally:
            with contextlib.suppress(FileNotFoundError):
                trial.rmdir()
        return "" if counted == 1 else self._unusable("the file system does not count projects")

    def close(self) -> None:
        """Close the file system."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def give(self, folder: Path) -> int:
        """Give the new, empty ``folder`` and all that will be made in it an id that nothing has; returns it.

        Raises LimitError if no id is left, OSError if the file system has none.
        """
        with self._lock:
            project = self._unused()
            self._given.add(project)
        try:
            _set_project(folder, project)
        except BaseException:
            self.take_back(project)
            raise
        return project

    def known(self, folder: Path) -> int:
        """The id that ``folder`` was given by an earlier agent; 0 if it has none."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags, _, _, project, _ = _attributes(descriptor)
        finally:
            os.close(descriptor)
        if not flags & _INHERITED:
            return 0
        with self._lock:
            self._given.add(project)
        return int(project)

    def take_back(self, project: int) -> None:
        """The folder with this id is being removed; the id is given again once nothing has it any more."""
        with self._lock:
            self._given.discard(project)

    def usage(self, project: int) -> ProjectUsage:
        """The current usage of this id, including data that is not written back yet. Takes some microseconds. Raises
        OSError."""
        buffer = ctypes.create_string_buffer(_DQBLK.size)
        try:
            libc.syscall(
                _QUOTACTL_FD,
                ctypes.c_uint(self._descriptor),
                ctypes.c_uint(_GET_PROJECT),
                ctypes.c_uint(project),
                buffer,
            )
        except OSError as error:
            if error.errno == errno.ENOENT:  # xfs, of an id that never had anything
                return ProjectUsage(0, 0)
            raise
        _, _, used, _, _, inodes, _, _, _ = _DQBLK.unpack(buffer.raw)
        return ProjectUsage(used, inodes)

    def _unused(self) -> int:
        for part in self._ids:
            for project in part:
                if project not in self._given and self.usage(project) == ProjectUsage(0, 0):
                    return project
        raise LimitError("all project ids are in use: give images.project_ids a larger range")

    def _unusable(self, reason: str) -> str:
        self.close()
        return reason


_REASONS = {
    errno.ENOTTY: "the file system has no projects",
    errno.EOPNOTSUPP: "the file system was made without projects (mkfs.ext4 -O project,quota)",
    errno.ENOSYS: "the file system has no quotas, or the kernel is older than Linux 5.14",
    errno.ESRCH: "the file system is mounted without prjquota",
    errno.ENOTBLK: "the file system is on no block device",
}


def _attributes(descriptor: int) -> tuple[int, ...]:
    buffer = bytearray(_FSXATTR.size)
    fcntl.ioctl(descriptor, _FSGETXATTR, buffer)
    return _FSXATTR.unpack(buffer)


def _set_project(folder: Path, project: int) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags, extent, extents, _, copied = _attributes(descriptor)
        content = _FSXATTR.pack(flags | _INHERITED, extent, extents, project, copied)
        fcntl.ioctl(descriptor, _FSSETXATTR, content)
    finally:
        os.close(descriptor)
