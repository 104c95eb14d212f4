"""Project quotas of ext4 and xfs: the file system counts the usage of folders with a project id. Sets no limits.

Documents: quotactl(2), quotactl_fd (Linux 5.14), and ``struct fsxattr`` of ioctl_xfs_fsgetxattr(2).
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
_INHERITED = 0x200  # FS_XFLAG_PROJINHERIT: new files in the folder get its project id

_QUOTACTL_FD = 443
_GET_PROJECT = 0x800007 << 8 | 2  # QCMD(Q_GETQUOTA, PRJQUOTA)
_DQBLK = struct.Struct("=2Q Q 2Q Q 2Q I4x")  # the third number is used bytes, the sixth used inodes


@dataclass(frozen=True, slots=True)
class ProjectUsage:
    """The usage of the files of one project."""

    used_bytes: int
    inodes: int


class ProjectQuotas:
    """Assigns project ids to folders on one file system, and reads their usage; for any thread.

    ``ids`` are the first and the last usable id. The first one assigned depends on ``folder``, so that several agents
    on one file system use different ids. Call ``open`` first.
    """

    def __init__(self, folder: Path, ids: tuple[int, int]) -> None:
        first, last = ids
        count = last - first + 1
        begin = first + zlib.crc32(os.fsencode(folder)) % count
        self._ids = (range(begin, last + 1), range(first, begin))
        self._folder = folder
        self._descriptor = -1
        self._assigned: set[int] = set()
        self._lock = threading.Lock()

    def open(self) -> str:
        """Test quotas with a new folder in ``folder``. Returns why they cannot be used there; empty if they can."""
        trial = self._folder / "quota-trial"
        with contextlib.suppress(FileNotFoundError):
            trial.rmdir()
        self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _attributes(self._descriptor)[0] & _INHERITED:
                return self._unusable(f"{self._folder} belongs to a project already")
            trial.mkdir(mode=0o700)
            project = self.assign(trial)
            counted = self.usage(project).inodes
            trial.rmdir()
            self.release(project)
        except LimitError as error:
            return self._unusable(str(error))
        except OSError as error:
            return self._unusable(_REASONS.get(error.errno or 0, str(error.strerror)))
        finally:
            with contextlib.suppress(FileNotFoundError):
                trial.rmdir()
        return "" if counted == 1 else self._unusable("the file system does not count projects")

    def close(self) -> None:
        """Close the descriptor of the file system."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def assign(self, folder: Path) -> int:
        """Assign an unused id to the new, empty ``folder``; everything made in it inherits the id. Returns the id.

        Raises LimitError if no id is unused, OSError if the file system has no project ids.
        """
        with self._lock:
            project = self._unused()
            self._assigned.add(project)
        try:
            _set_project(folder, project)
        except BaseException:
            self.release(project)
            raise
        return project

    def assigned(self, folder: Path) -> int:
        """The id that an earlier agent assigned to ``folder``; 0 if it has none."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags, _, _, project, _ = _attributes(descriptor)
        finally:
            os.close(descriptor)
        if not flags & _INHERITED:
            return 0
        with self._lock:
            self._assigned.add(project)
        return int(project)

    def release(self, project: int) -> None:
        """Release the id of a folder that is being removed. It is assigned again once its usage is zero."""
        with self._lock:
            self._assigned.discard(project)

    def usage(self, project: int) -> ProjectUsage:
        """The current usage of this id, including data not yet written to the disk. Takes microseconds.

        Raises OSError.
        """
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
            if error.errno == errno.ENOENT:  # xfs, for an id that was never used
                return ProjectUsage(0, 0)
            raise
        _, _, used, _, _, inodes, _, _, _ = _DQBLK.unpack(buffer.raw)
        return ProjectUsage(used, inodes)

    def _unused(self) -> int:
        for part in self._ids:
            for project in part:
                if project not in self._assigned and self.usage(project) == ProjectUsage(0, 0):
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
