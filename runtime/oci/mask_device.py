"""The null device behind which files of containers are hidden, where the OCI runtime would take the node's."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from host import libc
from host.files import mounts

_NULL = os.makedev(1, 3)
_LABEL = "security.selinux"


class MaskDevice:
    """The null device ``path``, on a tmpfs of its own that is mounted on its folder when an agent starts.

    The file system itself is read-only, so nobody in a container can change the owner or the mode of the device: a
    mount of it that is made writable changes nothing. Containers have mounts of their own: they keep the device when
    the folder is unmounted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent

    def make(self) -> None:
        """Mount it, in place of one that a killed agent left. Blocks for a millisecond; raises OSError."""
        self.remove()
        self._folder.mkdir(mode=0o711, exist_ok=True)
        flags = mounts.MS_NOSUID | mounts.MS_NOEXEC
        libc.mount("mask", str(self._folder), "tmpfs", flags, "mode=0711,size=4k,nr_inodes=4")
        os.mknod(self._path, stat.S_IFCHR | 0o600, _NULL)
        self._path.chmod(0o666)
        with contextlib.suppress(OSError):  # where there is no SELinux
            os.setxattr(self._path, _LABEL, os.getxattr("/dev/null", _LABEL))
        libc.mount("", str(self._folder), "", mounts.MS_REMOUNT | mounts.MS_RDONLY | flags, "")

    def remove(self) -> None:
        """Unmount it; repeatable."""
        while mounts.unmount(self._folder, lazy=True):
            pass
