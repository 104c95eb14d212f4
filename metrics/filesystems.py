"""Metrics of file systems, and names of block devices by number."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from metrics.stats import FilesystemReading


@lru_cache(maxsize=256)
def device_name(major: int, minor: int) -> str:
    """``/dev/…`` with the kernel's name of the device (sysfs uevent); ``major:minor`` if it has none."""
    try:
        with open(f"/sys/dev/block/{major}:{minor}/uevent", encoding="utf-8") as uevent:
            for line in uevent:
                if line.startswith("DEVNAME="):
                    return "/dev/" + line.rstrip("\n").removeprefix("DEVNAME=")
    except OSError:
        pass
    return f"{major}:{minor}"


class Filesystem:
    """The file system of ``folder``, queried once for many readings. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._status = os.statvfs(folder)
        device = folder.stat().st_dev
        self._device = device_name(os.major(device), os.minor(device))

    def reading(self, used_bytes: int) -> FilesystemReading:
        """The reading for a container that uses ``used_bytes`` of it."""
        status = self._status
        return FilesystemReading(
            device=self._device,
            usage=used_bytes,
            limit=status.f_blocks * status.f_frsize,
            inodes_free=status.f_ffree,
            inodes_total=status.f_files,
        )
