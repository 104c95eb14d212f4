"""Makes entries of a layer that the unpack worker has no right to make: device nodes and marks of opaque folders.

A layer may have taken control of the worker. So the worker's lists are bounded, and every path is opened by descriptors
below the layer's folder, without following links.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import msgspec

from host.errors import InvalidArgumentError
from images.unpack.beneath import opened_beneath

_OPAQUE = "trusted.overlay.opaque"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY


class DeviceNode(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A device node with all its names in hexadecimal digits. ``mtime`` is in nanoseconds."""

    block: bool
    mode: int
    major: int
    minor: int
    uid: int
    gid: int
    mtime: int
    names: list[str]


def make_special_files(layer: Path, devices: Sequence[DeviceNode], opaque: Sequence[bytes], subject: str) -> None:
    """Make the device nodes and marks below the folder ``layer``; blocks.

    Raises InvalidArgumentError, naming ``subject`` and the path, for a path that is not in the layer or exists already.
    Raises OSError if the disk is full or fails.
    """
    path = b""
    try:
        for path in opaque:
            with opened_beneath(layer, path, _FOLDER) as folder:
                os.setxattr(folder, _OPAQUE, b"y")
        for device in devices:
            names = [bytes.fromhex(name) for name in device.names]
            path = names[0]
            _make(layer, device, path)
            for path in names[1:]:
                _link(layer, names[0], path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM):
            raise
        shown = path.decode("utf-8", "backslashreplace")
        raise InvalidArgumentError(f"{subject} is broken: {shown!r} could not be made: {error.strerror}") from error
    except (OverflowError, ValueError) as error:
        raise InvalidArgumentError(f"{subject} is broken: {path!r} could not be made: {error}") from error


def _make(layer: Path, device: DeviceNode, path: bytes) -> None:
    folder_path, _, name = path.rpartition(b"/")
    with opened_beneath(layer, folder_path, _FOLDER) as folder:
        before = os.fstat(folder)
        kind = stat.S_IFBLK if device.block else stat.S_IFCHR
        os.mknod(name, kind | 0o600, os.makedev(device.major, device.minor), dir_fd=folder)
        os.chown(name, device.uid, device.gid, dir_fd=folder, follow_symlinks=False)
        os.chmod(name, device.mode & 0o7777, dir_fd=folder)
        os.utime(name, ns=(device.mtime, device.mtime), dir_fd=folder, follow_symlinks=False)
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _link(layer: Path, first: bytes, path: bytes) -> None:
    first_folder, _, first_name = first.rpartition(b"/")
    folder_path, _, name = path.rpartition(b"/")
    with opened_beneath(layer, first_folder, _FOLDER) as source, opened_beneath(layer, folder_path, _FOLDER) as folder:
        before = os.fstat(folder)
        os.link(first_name, name, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
