"""A short-lived process that compares two file trees, or computes the inode count and the digest of one.

Started as ``python -I -S`` with one or two folders as its last arguments, it prints one JSON object. For one tree that
is ``inodes`` and ``digest``; for two it is ``differences`` of the second from the first, at most twenty sentences. It
only reads, and follows no symbolic link.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys

from host.files.file_tree import FolderStack

MAX_DIFFERENCES = 20
_PIECE = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class TooManyDifferencesError(Exception):
    """The maximum number of differences was found."""


class Summary:
    """The ``inodes`` of an open folder and of all below it, and a digest of everything that a comparison compares."""

    def __init__(self, folder: int) -> None:
        self.inodes = 1
        self._linked: set[int] = set()
        self._hash = hashlib.sha256()
        self._attributes(b"", os.fstat(folder), _xattrs(folder, "."))
        with FolderStack(folder) as stack:
            self._walk(stack)

    @property
    def digest(self) -> str:
        """The digest of the whole tree."""
        return f"sha256:{self._hash.hexdigest()}"

    def _walk(self, stack: FolderStack) -> None:
        path = b""
        waiting = [_names_last_first(stack.descriptor)]
        while True:
            if waiting[-1]:
                name = waiting[-1].pop()
                own_path = path + b"/" + os.fsencode(name)
                if self._is_folder(stack.descriptor, name, own_path):
                    stack.enter(name)
                    path = own_path
                    waiting.append(_names_last_first(stack.descriptor))
            elif stack.depth == 0:
                return
            else:
                _leave(stack)
                waiting.pop()
                path = path.rpartition(b"/")[0]

    def _is_folder(self, folder: int, name: str, path: bytes) -> bool:
        """Add one entry to the digest. Returns whether it is a folder."""
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        self._attributes(path, status, _xattrs(folder, name))
        if stat.S_ISDIR(status.st_mode):
            self.inodes += 1
            return True
        if status.st_nlink == 1 or status.st_ino not in self._linked:
            self._linked.add(status.st_ino)
            self.inodes += 1
        if stat.S_ISREG(status.st_mode):
            self._content(folder, name)
        elif stat.S_ISLNK(status.st_mode):
            self._hash.update(os.fsencode(os.readlink(name, dir_fd=folder)))
        return False

    def _attributes(self, path: bytes, status: os.stat_result, xattrs: dict[str, bytes]) -> None:
        facts = [status.st_mode, status.st_uid, status.st_gid, status.st_rdev]
        if not stat.S_ISDIR(status.st_mode):
            whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
            facts += [status.st_size, status.st_nlink, 0 if whiteout else status.st_mtime_ns]
        self._hash.update(repr((path, facts, sorted(xattrs.items()))).encode())

    def _content(self, folder: int, name: str) -> None:
        file = os.open(name, _FILE, dir_fd=folder)
        try:
            while piece := os.read(file, _PIECE):
                self._hash.update(piece)
        finally:
            os.close(file)


class Comparison:
    """Walks two trees side by side.

    Ignores the times of folders, which change with their entries, and the times of whiteouts, which mean nothing.
    """

    def __init__(self) -> None:
        self.differences: list[str] = []

    def compare(self, wanted: int, found: int) -> None:
        """Compare two open folders. Raises TooManyDifferencesError when ``differences`` is full."""
        with FolderStack(wanted) as ones, FolderStack(found) as others:
            path = ""
            waiting = [self._folder(ones.descriptor, others.descriptor, path)]
            while True:
                if waiting[-1]:
                    name = waiting[-1].pop()
                    if self._is_folder(ones.descriptor, others.descriptor, name, f"{path}/{name}"):
                        ones.enter(name)
                        others.enter(name)
                        path = f"{path}/{name}"
                        waiting.append(self._folder(ones.descriptor, others.descriptor, path))
                elif ones.depth == 0:
                    return
                else:
                    _leave(ones)
                    _leave(others)
                    waiting.pop()
                    path = path.rpartition("/")[0]

    def _folder(self, wanted: int, found: int, path: str) -> list[str]:
        """Compare two folders and the names in them. Returns the names that both have, the last first."""
        self._attributes(os.fstat(wanted), os.fstat(found), path or "/")
        self._xattrs(wanted, found, ".", path or "/")
        names, others = set(os.listdir(wanted)), set(os.listdir(found))
        for name in sorted(names ^ others):
            self._differs(f"{path}/{name}", "is not in the layer" if name in others else "is missing")
        return sorted(names & others, reverse=True)

    def _is_folder(self, wanted: int, found: int, name: str, path: str) -> bool:
        """Compare the two entries of one name. Returns whether both are folders."""
        one = os.stat(name, dir_fd=wanted, follow_symlinks=False)
        other = os.stat(name, dir_fd=found, follow_symlinks=False)
        if stat.S_IFMT(one.st_mode) != stat.S_IFMT(other.st_mode):
            self._differs(path, "is of another type")
            return False
        if stat.S_ISDIR(one.st_mode):
            return True
        self._attributes(one, other, path)
        self._xattrs(wanted, found, name, path)
        if stat.S_ISREG(one.st_mode):
            self._content(wanted, found, name, path)
        elif stat.S_ISLNK(one.st_mode) and os.readlink(name, dir_fd=wanted) != os.readlink(name, dir_fd=found):
            self._differs(path, "has another target")
        return False

    def _attributes(self, one: os.stat_result, other: os.stat_result, path: str) -> None:
        if stat.S_IMODE(one.st_mode) != stat.S_IMODE(other.st_mode):
            modes = f"{stat.S_IMODE(other.st_mode):o} instead of {stat.S_IMODE(one.st_mode):o}"
            self._differs(path, f"has mode {modes}")
        if (one.st_uid, one.st_gid) != (other.st_uid, other.st_gid):
            owners = f"{other.st_uid}:{other.st_gid} instead of {one.st_uid}:{one.st_gid}"
            self._differs(path, f"belongs to {owners}")
        if stat.S_ISDIR(one.st_mode):
            return
        if one.st_rdev != other.st_rdev:
            self._differs(path, "is another device")
        whiteout = stat.S_ISCHR(one.st_mode) and one.st_rdev == 0
        if one.st_mtime_ns != other.st_mtime_ns and not whiteout:
            self._differs(path, "has another modification time")
        if one.st_nlink != other.st_nlink:
            self._differs(path, f"has {other.st_nlink} names instead of {one.st_nlink}")

    def _xattrs(self, wanted: int, found: int, name: str, path: str) -> None:
        if _xattrs(wanted, name) != _xattrs(found, name):
            self._differs(path, "has other extended attributes")

    def _content(self, wanted: int, found: int, name: str, path: str) -> None:
        one = os.open(name, _FILE, dir_fd=wanted)
        try:
            other = os.open(name, _FILE, dir_fd=found)
            try:
                if not _same(one, other):
                    self._differs(path, "has another content")
            finally:
                os.close(other)
        finally:
            os.close(one)

    def _differs(self, path: str, how: str) -> None:
        self.differences.append(f"{path} {how}".encode(errors="backslashreplace").decode())
        if len(self.differences) >= MAX_DIFFERENCES:
            raise TooManyDifferencesError


def _names_last_first(folder: int) -> list[str]:
    return sorted(os.listdir(folder), reverse=True)


def _leave(stack: FolderStack) -> None:
    if not stack.leave():
        raise RuntimeError("a folder was moved while it was compared")


def _same(one: int, other: int) -> bool:
    if os.fstat(one).st_size != os.fstat(other).st_size:
        return False
    while piece := os.read(one, _PIECE):
        rest = piece
        while rest:
            found = os.read(other, len(rest))
            if not found or not rest.startswith(found):
                return False
            rest = rest[len(found) :]
    return True


def _xattrs(folder: int, name: str) -> dict[str, bytes]:
    path = f"/proc/self/fd/{folder}/{name}"
    return {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}


def main(folders: list[str]) -> None:
    """Compare the second folder with the first, or summarise the only one."""
    os.nice(10)
    opened = [os.open(folder, _FOLDER) for folder in folders]
    comparison = Comparison()
    summary = None
    if len(opened) == 1:
        summary = Summary(opened[0])
    else:
        with contextlib.suppress(TooManyDifferencesError):
            comparison.compare(opened[0], opened[1])
    result: dict[str, object] = {"differences": comparison.differences}
    if summary is not None:
        result |= {"inodes": summary.inodes, "digest": summary.digest}
    sys.stdout.write(json.dumps(result))
