"""Names of block devices by number."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=256)
def device_name(major: int, minor: int) -> str:
    """``/dev/…`` as the kernel names the device (sysfs uevent), or ``major:minor`` where it has no name."""
    try:
        with open(f"/sys/dev/block/{major}:{minor}/uevent", encoding="utf-8") as uevent:
            for line in uevent:
                if line.startswith("DEVNAME="):
                    return "/dev/" + line.rstrip("\n").removeprefix("DEVNAME=")
    except OSError:
        pass
    return f"{major}:{minor}"
