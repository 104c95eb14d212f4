"""Folders that a layer contains without describing them take owner, mode and time from the layers below."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from host import libc

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08


def inherit(layer: Path, lower: Sequence[Path], folders: Sequence[bytes]) -> None:
    """Give each of ``folders`` (relative, in ``layer``) what the topmost of ``lower`` (lowest first) says of it.

    Blocking. A folder that those layers do not show, or show as something else, stays as it is. Names come from images,
    so no symbolic link is followed and nothing above the layers is reached.
    """
    for name in folders:
        for below in reversed(lower):
            found, go_on = _look(below, name)
            if found is not None:
                _copy(layer, name, found)
            if found is not None or not go_on:
                break


def _look(layer: Path, name: bytes) -> tuple[os.stat_result | None, bool]:
    """The folder's status in this layer, and whether a layer further down could show it instead."""
    hidden_below = False
    path = b"."
    for part in (b"", *filter(None, name.split(b"/"))):
        path = path + b"/" + part if part else path
        with _open(layer, path) as descriptor:
            if descriptor < 0:
                return None, not hidden_below
            status = os.fstat(descriptor)
            if not stat.S_ISDIR(status.st_mode):
                return None, False
            hidden_below = hidden_below or _is_opaque(descriptor)
    return status, False


def _is_opaque(descriptor: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{descriptor}", "trusted.overlay.opaque") == b"y"
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return False
        raise


def _copy(layer: Path, name: bytes, status: os.stat_result) -> None:
    with _open(layer, name or b".", os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        if descriptor < 0:
            return
        os.fchown(descriptor, status.st_uid, status.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
        os.utime(descriptor, ns=(status.st_mtime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def _open(folder: Path, name: bytes, flags: int = os.O_PATH) -> Iterator[int]:
    """A descriptor of ``name`` below ``folder``, or -1 if it is missing or behind a symbolic link."""
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = (ctypes.c_uint64 * 3)(flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
        try:
            descriptor = libc.syscall(_SYS_OPENAT2, root, name, how, ctypes.c_size_t(ctypes.sizeof(how)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            descriptor = -1
    finally:
        os.close(root)
    try:
        yield descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)
