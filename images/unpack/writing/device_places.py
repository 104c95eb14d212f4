"""Placeholders for device nodes of a layer.

The unpack worker has no right to make device nodes, so it makes a placeholder file for each. Later entries of the layer
may link to it or replace it. At the end the remaining placeholders are removed and listed for the agent
(``images/unpack/special_files.py``).
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH108
from __future__ import annotations

import os
import stat

from images.unpack.tar.headers import BLOCK_DEVICE, CHARACTER_DEVICE, Entry
from images.unpack.writing.layer_root import LayerRoot, clean

_KINDS = {CHARACTER_DEVICE: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK}


class Device:
    """A device node that the agent makes later: type and mode, number, owner, time and names."""

    __slots__ = ("device", "gid", "mode", "mtime", "paths", "uid")

    def __init__(self, entry: Entry, mtime: int) -> None:
        self.mode = _KINDS[entry.kind] | entry.mode
        self.device = entry.device
        self.uid = entry.uid
        self.gid = entry.gid
        self.mtime = mtime
        self.paths: list[bytes] = []


class DevicePlaces:
    """The placeholders of device nodes. A secret in its content identifies each."""

    def __init__(self, root: LayerRoot) -> None:
        self._root = root
        self._start = b"podkeel device %s " % os.urandom(16).hex().encode()
        self._devices: list[Device] = []
        self._paths: dict[bytes, None] = {}

    def fill(self, descriptor: int, path: bytes, device: Device) -> None:
        """Make the new empty file at ``path`` the placeholder of ``device``."""
        os.write(descriptor, self._start + b"%d" % len(self._devices))
        self._devices.append(device)
        self.linked(path)

    def linked(self, path: bytes) -> None:
        """Record a new hard link at ``path``, which may be one to a placeholder."""
        if self._devices:  # resolved now, because links in the path may be replaced later
            folder, _, base = path.rpartition(b"/")
            self._paths[clean(self._root.resolve(folder)[0] + b"/" + base)] = None

    def at(self, path: bytes) -> Device | None:
        """The device whose placeholder is at ``path``; None if there is none."""
        if not self._devices or self._root.kind(path) != stat.S_IFREG:
            return None
        descriptor = os.open(self._root.near(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            content = os.read(descriptor, 100)
        finally:
            os.close(descriptor)
        number = content.removeprefix(self._start)
        return self._devices[int(number)] if number != content else None

    def take(self) -> list[Device]:
        """Remove the remaining placeholders. Returns their devices with all their names."""
        found: dict[int, Device] = {}
        for path in self._paths:
            device = self.at(path)
            if device is not None:
                os.unlink(self._root.near(path))
                found[id(device)] = device
                device.paths.append(path)
        return list(found.values())
