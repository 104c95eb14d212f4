"""The null device that masks files of containers, if the OCI runtime would use the node's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from host import libc
from host.files import mounts
from host.files.null_devices import make_null_device

_LABEL = "security.selinux"
_FLAGS = mounts.MS_NOSUID | mounts.MS_NOEXEC
_LAYERS = ("lower", "lowest")  # without an upper layer an overlay needs two


class MaskDevice:
    """The null device ``path``, in a separate file system that is mounted on its folder when an agent starts.

    That is an overlay without an upper layer. Unlike other file systems it cannot be made writable, even by a container
    that may mount. So no container can change the owner or the mode of the device, which all of them share. Containers
    have their own mounts: they keep the device when the folder is unmounted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent
        self._layers = self._folder.with_name(f"{self._folder.name}.layers")

    def make(self) -> None:
        """Mount it, and replace one that a killed agent left. Blocks for some milliseconds. Raises OSError."""
        self.remove()
        for folder in (self._folder, self._layers):
            folder.mkdir(mode=0o711, exist_ok=True)
        try:
            self._fill_layers()
            self._mount_overlay()
        finally:
            self._remove_layers()  # the overlay still has them

    def _fill_layers(self) -> None:
        libc.mount("mask", str(self._layers), "tmpfs", _FLAGS, "mode=0711,size=4k,nr_inodes=8")
        for name in _LAYERS:
            (self._layers / name).mkdir()
            (self._layers / name).chmod(0o711)
        device = self._layers / _LAYERS[0] / self._path.name
        make_null_device(device)
        with contextlib.suppress(OSError):  # if there is no SELinux
            os.setxattr(device, _LABEL, os.getxattr("/dev/null", _LABEL))

    def _mount_overlay(self) -> None:
        with contextlib.ExitStack() as stack:
            names = []  # without the name of the run folder, which may have colons and commas
            for name in _LAYERS:
                opened = os.open(self._layers / name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, opened)
                names.append(f"/proc/self/fd/{opened}")
            options = "lowerdir=" + ":".join(names)
            libc.mount("mask", str(self._folder), "overlay", _FLAGS | mounts.MS_RDONLY, options)

    def remove(self) -> None:
        """Unmount it. May be repeated."""
        while mounts.unmount(self._folder, lazy=True):
            pass
        self._remove_layers()

    def _remove_layers(self) -> None:
        while mounts.unmount(self._layers, lazy=True):
            pass
        with contextlib.suppress(FileNotFoundError):
            self._layers.rmdir()
