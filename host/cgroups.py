"""Where cgroup hierarchies are mounted, and which huge page sizes the machine has."""

from __future__ import annotations

from pathlib import Path

import msgspec

from host.files import mounts


class Hierarchies(msgspec.Struct, frozen=True):
    """Mount points: of v1 controllers by name (named hierarchies as ``name=…``), and of the one cgroup2, if any."""

    v1: dict[str, str]
    unified: str | None


def discover(mountinfo: str = "/proc/self/mountinfo") -> Hierarchies:
    """Read the mount table; where a hierarchy is mounted several times, the first one counts."""
    v1: dict[str, str] = {}
    unified: str | None = None
    for entry in mounts.mount_table(mountinfo):
        if entry.filesystem == "cgroup2" and unified is None:
            unified = entry.target
        elif entry.filesystem == "cgroup":
            for option in entry.super_options.split(","):
                if option not in _MOUNT_OPTIONS and not option.startswith("release_agent="):
                    v1.setdefault(option, entry.target)
    return Hierarchies(v1, unified)


_MOUNT_OPTIONS = frozenset(("rw", "ro", "xattr", "clone_children", "noprefix", "cpuset_v2_mode", "favordynmods"))


def huge_page_sizes(folder: str = "/sys/kernel/mm/hugepages") -> tuple[str, ...]:
    """Names of the huge page sizes as the hugetlb controller spells them (``64KB``, ``2MB``, ``1GB``)."""
    try:
        names = [entry.name for entry in Path(folder).iterdir()]
    except FileNotFoundError:
        return ()
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names)
    return tuple(_size_name(size) for size in sizes)


def _size_name(kibibytes: int) -> str:
    for unit, size in (("GB", 1024 * 1024), ("MB", 1024)):
        if kibibytes >= size:
            return f"{kibibytes // size}{unit}"
    return f"{kibibytes}KB"
