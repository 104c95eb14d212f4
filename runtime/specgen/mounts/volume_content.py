"""Copies the image's content of a VOLUME by open folders, with holes and hard links, within limits."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from host.errors import InvalidArgumentError, LimitError
from host.files.file_tree import FolderStack, open_below

_CHUNK = 16 << 20  # bytes between two checks whether the call was cancelled
_PIECE = 1 << 20  # where the kernel has no copy call
_MAX_LINKS = 100_000  # files with several names that are remembered; others are copied once per name
_MAX_PATH_LENGTH = 4000
_NO_COPYING = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_ATTRIBUTE = (errno.ENOTSUP, errno.EPERM, errno.ENODATA, errno.EINVAL)
_ATTRIBUTES = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """The limits for all VOLUMEs of a container together: bytes of data (without holes), and entries."""

    max_bytes: int
    max_entries: int


class VolumeCopier:
    """Copies trees. Owners, modes, times and the attributes with a meaning in a container are kept.

    ``check`` is called regularly and may raise to end the copying. Only regular files and folders are ever opened.
    Device nodes, fifos and sockets are created again.
    """

    def __init__(self, limits: CopyLimits, check: Callable[[], None]) -> None:
        self._limits = limits
        self._check = check
        self._bytes = 0
        self._entries = 0
        self._links: dict[tuple[int, int], str] = {}

    def copy(self, source: int, target: int, subject: str) -> None:
        """Copy the content and the attributes of the open folder ``source`` to the empty ``target``.

        Raises LimitError, with ``subject``, if a limit is exceeded or the disk is full, and OSError.
        """
        self._links.clear()
        try:
            with FolderStack(source) as sources, FolderStack(target) as targets:
                self._copy_tree(sources, targets, subject)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LimitError(f"{subject} could not be copied, the disk is full: {error.strerror}") from error

    def _copy_tree(self, source: FolderStack, target: FolderStack, subject: str) -> None:
        root = target.descriptor
        path: list[str] = []
        waiting = [self._copy_folder(source.descriptor, target.descriptor, path, root, subject)]
        while True:
            if waiting[-1]:
                path.append(waiting[-1].pop())
                source.enter(path[-1])
                target.enter(path[-1])
                waiting.append(self._copy_folder(source.descriptor, target.descriptor, path, root, subject))
                continue
            _copy_attributes(source.descriptor, target.descriptor)
            if not path:
                return
            waiting.pop()
            path.pop()
            if not (source.leave() and target.leave()):
                raise InvalidArgumentError(f"{subject} changed while it was copied")

    def _copy_folder(self, source: int, target: int, path: list[str], root: int, subject: str) -> list[str]:
        """Copy everything in a folder except the content of folders. Returns their names."""
        folders = []
        with os.scandir(source) as entries:
            for entry in entries:
                self._check()
                self._entries += 1
                if self._entries > self._limits.max_entries:
                    self._refuse(subject, f"{self._limits.max_entries} entries", "max_volume_copy_entries")
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    os.mkdir(entry.name, 0o700, dir_fd=target)
                    folders.append(entry.name)
                elif status.st_nlink == 1 or not self._link(entry.name, status, target, path, root):
                    self._copy_entry(entry.name, status, source, target, subject)
        return folders

    def _link(self, name: str, status: os.stat_result, target: int, path: list[str], root: int) -> bool:
        """Add this name to a file that was copied under another name. False if it was not, or is not remembered."""
        identity = (status.st_dev, status.st_ino)
        known = self._links.get(identity)
        if known is not None:
            os.link(known, name, src_dir_fd=root, dst_dir_fd=target, follow_symlinks=False)
            return True
        here = "/".join([*path, name])
        if len(self._links) < _MAX_LINKS and len(os.fsencode(here)) < _MAX_PATH_LENGTH:
            self._links[identity] = here
        return False

    def _copy_entry(self, name: str, status: os.stat_result, source: int, target: int, subject: str) -> None:
        if stat.S_ISREG(status.st_mode):
            self._copy_file(name, source, target, subject)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            _set_times(name, status, target)
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=target)
            os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
            os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=target)
            _set_times(name, status, target)

    def _copy_file(self, name: str, source: int, target: int, subject: str) -> None:
        one = open_below(source, name, os.O_RDONLY | os.O_NONBLOCK)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            other = os.open(name, flags, 0o600, dir_fd=target)
            try:
                self._copy_data(one, other, subject)
                _copy_attributes(one, other)
            finally:
                os.close(other)
        finally:
            os.close(one)

    def _copy_data(self, source: int, target: int, subject: str) -> None:
        size = os.fstat(source).st_size
        os.ftruncate(target, size)
        end = 0
        while end < size:
            try:
                begin = os.lseek(source, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                raise
            end = min(os.lseek(source, begin, os.SEEK_HOLE), size)
            self._bytes += end - begin
            if self._bytes > self._limits.max_bytes:
                self._refuse(subject, f"{self._limits.max_bytes} bytes", "max_volume_copy_bytes")
            self._copy_range(source, target, begin, end)

    def _copy_range(self, source: int, target: int, begin: int, end: int) -> None:
        offset = begin
        while offset < end:
            self._check()
            copied = _copy_some(source, target, offset, min(_CHUNK, end - offset))
            if not copied:
                return  # it became shorter meanwhile
            offset += copied

    def _refuse(self, subject: str, what: str, option: str) -> NoReturn:
        raise LimitError(
            f"{subject}: the VOLUMEs of the image have more than {what}, which is the limit for copying to a "
            f"container (runtime.{option}): mount a volume there, or raise the limit"
        )


def _copy_some(source: int, target: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, offset, offset)
    except OSError as error:
        if error.errno not in _NO_COPYING:
            raise
    piece = os.pread(source, min(size, _PIECE), offset)
    written = 0
    while written < len(piece):
        written += os.pwrite(target, piece[written:], offset + written)
    return written


def _copy_attributes(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))  # after chown, which clears set-id bits and capabilities
    for name in _listed(source):
        if name in _ATTRIBUTES or name.startswith("user."):
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as error:
                if error.errno not in _NO_ATTRIBUTE:
                    raise
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _listed(descriptor: int) -> list[str]:
    try:
        return os.listxattr(descriptor)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTE:
            raise
        return []


def _set_times(name: str, status: os.stat_result, folder: int) -> None:
    os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=folder, follow_symlinks=False)
