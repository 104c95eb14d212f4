"""A /dev/null to hand to processes that are not trusted."""

from __future__ import annotations

import functools
import os
import stat
import threading
import uuid

from host import libc
from host.files import mounts

_NULL = os.makedev(1, 3)


def open_private_null() -> int:
    """A descriptor of a null device with a separate inode, for the caller to close. The first call blocks briefly.

    OCI runtimes give the standard streams to the container's user, who then owns them. With the node's /dev/null, a
    container could change the mode of that file for the whole node; with a shared one, for other containers.
    """
    folder = _folder()
    name = uuid.uuid4().hex
    os.mknod(name, stat.S_IFCHR | 0o600, _NULL, dir_fd=folder)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.unlink(name, dir_fd=folder)
    os.fchmod(descriptor, 0o666)
    return descriptor


@functools.cache
def _folder() -> int:
    """A descriptor of an empty folder on a tmpfs that is mounted nowhere; opened once, it stays open."""
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
    """The mount namespace ends with the calling thread; only the open folder remains."""
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("", "/", "", mounts.MS_REC | mounts.MS_PRIVATE, "")
    libc.mount("null", "/dev", "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, "mode=0700,size=4k")
    return os.open("/dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
