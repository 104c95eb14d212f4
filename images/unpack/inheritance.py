"""Adjusts a layer to the layers below it.

Parent folders without an entry in the layer get owner, mode, time and attributes from the layers below. Whiteouts that
hide nothing are removed: in a folder that no layer below has, overlayfs shows them as names without a file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from images.unpack.beneath import opened_beneath

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OPAQUE = "trusted.overlay.opaque"
_KEPT_XATTRS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")


def inherit(layer: Path, lower: Sequence[Path], folders: Sequence[bytes]) -> None:
    """Copy the metadata of ``folders`` (relative, in ``layer``) from the topmost of ``lower`` (lowest first).

    Blocks. A folder that those layers hide, lack or have as something else is not changed. Names come from images, so
    no symbolic link is followed and nothing outside of the layers is reached.
    """
    below = [_Lower(path) for path in reversed(lower)]
    for name in folders:
        for one in below:
            seen = one.find(name)
            if seen.folder:
                _copy(layer, name, one.path)
            if seen.folder or not seen.lower_visible:
                break


def remove_needless_whiteouts(
    layer: Path, lower: Sequence[Path], folders: Sequence[bytes], implied: Collection[bytes]
) -> tuple[int, int]:
    """Remove the whiteouts in ``folders`` (relative, in ``layer``) if ``lower`` (lowest first) do not show the folder.

    An ``implied`` folder that is empty then is removed too, because a layer below may have a file of that name.
    Returns how many files and folders were removed. Blocks. Names are handled as in ``inherit``.
    """
    own = _Lower(layer)
    below = [_Lower(path) for path in reversed(lower)]
    files = emptied = 0
    for name in sorted(folders, key=lambda name: name.count(b"/"), reverse=True):
        seen = own.find(name)
        if not seen.folder or (seen.lower_visible and _is_shown(name, below)):
            continue
        files += _remove_whiteouts(layer, name)
        needless = name
        while needless and needless in implied and not _is_shown(needless, below) and _remove_empty(layer, needless):
            emptied += 1
            needless = needless.rpartition(b"/")[0]
    return files, emptied


def _is_shown(name: bytes, below: Sequence[_Lower]) -> bool:
    for one in below:
        seen = one.find(name)
        if seen.folder or not seen.lower_visible:
            return seen.folder
    return False


def _remove_whiteouts(layer: Path, name: bytes) -> int:
    removed = 0
    try:
        with opened_beneath(layer, name, os.O_RDONLY | os.O_DIRECTORY) as folder:
            before = os.fstat(folder)
            for entry in os.listdir(folder):  # noqa: PTH208 - by its descriptor
                status = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISCHR(status.st_mode) and not status.st_rdev:
                    os.unlink(entry, dir_fd=folder)
                    removed += 1
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    except OSError as error:
        if error.errno not in _MISSING:  # it was removed with a needless folder in it
            raise
    return removed


def _remove_empty(layer: Path, name: bytes) -> bool:
    parent, _, base = name.rpartition(b"/")
    try:
        with opened_beneath(layer, parent, os.O_RDONLY | os.O_DIRECTORY) as folder:
            before = os.fstat(folder)
            os.rmdir(base, dir_fd=folder)
            os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, *_MISSING):
            raise
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Seen:
    """Whether a layer has the folder; if not, whether layers further down may show it."""

    folder: bool
    lower_visible: bool


@dataclass(frozen=True, slots=True)
class _Lower:
    """A layer below, with a cache of what is known about its folders."""

    path: Path
    seen: dict[bytes, _Seen] = field(default_factory=dict)

    def find(self, name: bytes) -> _Seen:
        """Whether the layer has the folder ``name``."""
        path = b""
        seen = self._at(path, hidden=False)
        for part in filter(None, name.split(b"/")):
            if not seen.folder:
                return seen
            path = path + b"/" + part if path else part
            seen = self._at(path, hidden=not seen.lower_visible)
        return seen

    def _at(self, path: bytes, *, hidden: bool) -> _Seen:
        if path not in self.seen:
            self.seen[path] = self._find(path, hidden=hidden)
        return self.seen[path]

    def _find(self, path: bytes, *, hidden: bool) -> _Seen:
        """Look up a folder. ``hidden``: a folder in its path is opaque, so layers further down do not count."""
        try:
            with opened_beneath(self.path, path, os.O_PATH) as descriptor:
                if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    return _Seen(folder=False, lower_visible=False)
                return _Seen(folder=True, lower_visible=not hidden and not _is_opaque(descriptor))
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            return _Seen(folder=False, lower_visible=not hidden)


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
        if error.errno not in _MISSING:
            raise
