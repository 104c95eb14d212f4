"""Writes the tar files of a checkpoint, with any names, owners and extended attributes. Blocks."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Callable

from host.errors import PodkeelError
from host.files.file_tree import Walk, open_below, shown

_PIECE = 8 << 20
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_XATTRS = "SCHILY.xattr."
_OWN_XATTRS = ("trusted.overlay.", "user.overlay.")  # written by overlayfs for itself


class TarWriter:
    """Writes members to an open file, one after the other. ``check`` is called regularly and may raise.

    Raises OSError.
    """

    def __init__(self, descriptor: int, check: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._check = check
        self._linked: dict[tuple[int, int], str] = {}

    def folder(self, name: str, mode: int = 0o700) -> None:
        """Write a folder that root owns."""
        member = tarfile.TarInfo(name)
        member.type, member.mode = tarfile.DIRTYPE, mode
        self._header(member)

    def content(self, name: str, content: bytes) -> None:
        """Write a file with ``content`` that root owns."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o600
        self._header(member)
        self._write(content + _padding(len(content)))

    def file(self, name: str, source: int) -> None:
        """Write a file that root owns, with the present content of the open file ``source``."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = os.fstat(source).st_size, 0o600
        self._header(member)
        self._copy(source, member.size, name)

    def tree(self, root: int, leave_out: Callable[[int, str, str, os.stat_result], bool] | None = None) -> None:
        """Write the open folder ``root`` and everything below it, with owners and attributes.

        ``leave_out`` is called for each file with its folder, its name, its path and its status. Sockets are left out.
        """
        self._entry(root, ".", ".", os.fstat(root))
        walk = Walk(root, on_error=_refuse)
        for step in walk:
            if step.entry is None:
                continue
            place = "/".join([*walk.names(), step.name])
            status = os.stat(step.name, dir_fd=step.folder, follow_symlinks=False)
            if stat.S_ISSOCK(status.st_mode) or (leave_out and leave_out(step.folder, step.name, place, status)):
                continue
            self._entry(step.folder, step.name, place, status)
        if walk.left_out:
            raise PodkeelError("it has more folders than the agent can walk")

    def end(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _entry(self, folder: int, name: str, place: str, status: os.stat_result) -> None:
        member = tarfile.TarInfo("./" if place == "." else place)
        member.mode, member.uid, member.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
        member.mtime = int(status.st_mtime)
        kind, key = stat.S_IFMT(status.st_mode), (status.st_dev, status.st_ino)
        if kind != stat.S_IFDIR and status.st_nlink > 1 and key in self._linked:
            member.type, member.linkname = tarfile.LNKTYPE, self._linked[key]
            self._header(member)
            return
        if kind != stat.S_IFDIR and status.st_nlink > 1:
            self._linked[key] = place
        if kind == stat.S_IFREG:
            descriptor = open_below(folder, name, _FILE)
            try:
                member.size = os.fstat(descriptor).st_size
                member.pax_headers = _xattrs(descriptor)
                self._header(member)
                self._copy(descriptor, member.size, place)
            finally:
                os.close(descriptor)
            return
        if kind == stat.S_IFDIR:
            member.type = tarfile.DIRTYPE
            descriptor = os.dup(folder) if place == "." else open_below(folder, name, _FILE | os.O_DIRECTORY)
            try:
                member.pax_headers = _xattrs(descriptor)
            finally:
                os.close(descriptor)
        elif kind == stat.S_IFLNK:
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=folder)
        elif kind == stat.S_IFIFO:
            member.type = tarfile.FIFOTYPE
        else:
            member.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
            member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        self._header(member)

    def _header(self, member: tarfile.TarInfo) -> None:
        self._check()
        self._write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _copy(self, source: int, size: int, name: str) -> None:
        position = 0
        while position < size:
            self._check()
            copied = os.sendfile(self._descriptor, source, position, min(_PIECE, size - position))
            if not copied:
                raise PodkeelError(f"{shown(name)} became shorter while it was copied")
            position += copied
        self._write(_padding(size))

    def _write(self, data: bytes) -> None:
        written = 0
        while written < len(data):
            written += os.write(self._descriptor, memoryview(data)[written:])


def _refuse(place: str, error: OSError) -> None:
    raise OSError(error.errno, f"{place}: {error.strerror}")


def _xattrs(descriptor: int) -> dict[str, str]:
    try:
        names = os.listxattr(descriptor)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    kept = [name for name in names if not name.startswith(_OWN_XATTRS)]
    return {_XATTRS + name: os.getxattr(descriptor, name).decode("utf-8", "surrogateescape") for name in kept}


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
