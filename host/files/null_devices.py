"""Makes null devices with separate inodes, for processes that must not reach the node's /dev/null."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_NULL = os.makedev(1, 3)


def make_null_device(path: Path) -> None:
    """Make a null device that every user may read and write, with any umask. Raises OSError."""
    os.mknod(path, stat.S_IFCHR | 0o600, _NULL)
    path.chmod(0o666)


def open_new_null_device(name: str, folder: int) -> int:
    """Open a new null device. It is made as ``name`` in the folder of a descriptor, and deleted again."""
    os.mknod(name, stat.S_IFCHR | 0o600, _NULL, dir_fd=folder)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.unlink(name, dir_fd=folder)
    os.fchmod(descriptor, 0o666)
    return descriptor
