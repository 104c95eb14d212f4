"""A /dev/null for processes that are not trusted."""

from __future__ import annotations

import functools
import os
import uuid

from host import libc
from host.concurrency.thread_starting import run_in_new_thread
from host.files import mounts
from host.files.null_devices import open_new_null_device


def open_private_null() -> int:
    """A descriptor of a null device with a separate inode. The caller closes it. The first call blocks briefly.

    OCI runtimes change the owner of the standard streams to the container's user. With the node's /dev/null, a
    container could change the mode of that file for the whole node; with a shared one, for other containers.
    """
    return open_new_null_device(uuid.uuid4().hex, _folder())


@functools.cache
def _folder() -> int:
    """A descriptor of an empty folder on a tmpfs that is mounted nowhere. It is opened once and stays open."""
    return run_in_new_thread(_open_in_own_mount_namespace, name="null-device")


def _open_in_own_mount_namespace() -> int:
    """Open the folder in a new mount namespace, which ends with the calling thread. Only the open folder remains."""
    mounts.enter_new_mount_namespace()
    libc.mount("null", "/dev", "tmpfs", mounts.MS_NOSUID | mounts.MS_NOEXEC, "mode=0700,size=4k")
    return os.open("/dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
