"""Folders that a layer contains without describing them take owner, mode, time and attributes from the layers below."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from images.unpack.beneath import opened_beneath

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OPAQUE = "trusted.overlay.opaque"
_KEPT_XATTRS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")


def inherit(layer: Path, lower: Sequence[Path], folders: Sequence[bytes]) -> None:
    """Give each of ``folders`` (relative, in ``layer``) the metadata that it has in the topmost of ``lower`` (lowest
    first).

    Blocking. A folder that those layers do not show, or show as something else, stays as it is. Names come from images,
    so no symbolic link is followed and nothing above the layers is reached.
    """
    below = [_Lower(path) for path in reversed(lower)]
    for name in folders:
        for one in below:
            seen = one.look(name)
            if seen.folder:
                _copy(layer, name, one.path)
            if seen.folder or not seen.go_on:
                break


@dataclass(frozen=True, slots=True)
class _Seen:
    """Whether a layer has the folder; if not, whether layers further down may show it."""

    folder: bool
    go_on: bool


@dataclass(frozen=True, slots=True)
class _Lower:
    """A layer below, with what was found out about its folders: each is looked at once."""

    path: Path
    seen: dict[bytes, _Seen] = field(default_factory=dict)

    def look(self, name: bytes) -> _Seen:
        """The metadata of the folder ``name`` in this layer."""
        path = b""
        seen = self._at(path, hidden=False)
        for part in filter(None, name.split(b"/")):
            if not seen.folder:
                return seen
            path = path + b"/" + part if path else part
            seen = self._at(path, hidden=not seen.go_on)
        return seen

    def _at(self, path: bytes, *, hidden: bool) -> _Seen:
        if path not in self.seen:
            self.seen[path] = self._look_at(path, hidden=hidden)
        return self.seen[path]

    def _look_at(self, path: bytes, *, hidden: bool) -> _Seen:
        """``hidden``: a folder in the path hides what layers further down have there."""
        try:
            with opened_beneath(self.path, path, os.O_PATH) as descriptor:
                if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    return _Seen(folder=False, go_on=False)
                return _Seen(folder=True, go_on=not hidden and not _is_opaque(descriptor))
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            return _Seen(folder=False, go_on=not hidden)


def _is_opaque(descriptor: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{descriptor}", _OPAQUE) == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


def _copy(layer: Path, name: bytes, below: Path) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY
    try:
        with opened_beneath(below, name, flags) as source, opened_beneath(layer, name, flags) as target:
            status = os.fstat(source)
            os.fchown(target, status.st_uid, status.st_gid)
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            for xattr in os.listxattr(source):
                if xattr in _KEPT_XATTRS or (xattr.startswith("user.") and not xattr.startswith("user.overlay.")):
                    os.setxattr(target, xattr, os.getxattr(source, xattr))
            os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
