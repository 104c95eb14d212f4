"""A /dev/null to hand to processes that are not trusted."""

from __future__ import annotations

import functools
import os
import stat
import threading
from pathlib import Path

from host import libc, mounts

_NULL = os.makedev(1, 3)


@functools.cache
def open_private_null() -> int:
    """A descriptor of a null device that is nobody else's inode; opened once, it stays open. Blocks for a millisecond.

    Root in a container owns what it is handed: by the node's /dev/null as its standard input it could change the mode
    of that file for the whole node.
    """
    opened: list[int | OSError] = []

    def open_it() -> None:
        try:
            opened.append(_open_in_own_mount_namespace())
        except OSError as error:
            opened.append(error)

    thread = threading.Thread(target=open_it, name="null-device")
    thread.start()
    thread.join()
    result = opened[0]
    if isinstance(result, OSError):
        raise result
    return result


def _open_in_own_mount_namespace() -> int:
    """The mount namespace goes with the calling thread, and with it all but the open device."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE, "")
    libc.mount("null", "/dev", "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, "mode=0755,size=4k,nr_inodes=4")
    device = Path("/dev/null")
    os.mknod(device, stat.S_IFCHR | 0o600, _NULL)
    device.chmod(0o666)
    return os.open(device, os.O_RDWR | os.O_CLOEXEC)
