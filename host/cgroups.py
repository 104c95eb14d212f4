"""The cgroup version of the machine, the mount points of its hierarchies, and what they can limit."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from host.files import mounts

HUGE_PAGES = "/sys/kernel/mm/hugepages"


class Hierarchies(msgspec.Struct, frozen=True):
    """Mount points: of v1 controllers by name (named hierarchies as ``name=…``), and of cgroup2, if it is mounted."""

    v1: dict[str, str]
    unified: str | None

    @property
    def version(self) -> int:
        """The cgroup version that limits containers: 1 if the memory controller is mounted as version 1, else 2."""
        return 1 if "memory" in self.v1 or self.unified is None else 2

    def controllers(self) -> frozenset[str]:
        """Names of the available controllers. With version 2 this reads a file."""
        if self.version == 1:
            return frozenset(self.v1)
        return frozenset(_read(self._unified / "cgroup.controllers").split())

    def counts_swap(self, own_cgroup: str = "/proc/self/cgroup") -> bool:
        """Whether the memory controller limits swap too."""
        if self.version == 1:
            return "memory" in self.v1 and Path(self.v1["memory"], "memory.memsw.limit_in_bytes").exists()
        # The root has no limits, and not every cgroup has the memory controller: read the first cgroup that has it.
        own = _read(Path(own_cgroup)).rstrip("\n").rpartition("\n")[2].partition("::")[2].strip("/")
        for folder in (self._unified / own, *(entry for entry in self._unified.iterdir() if entry.is_dir())):
            if (folder / "memory.max").exists():
                return (folder / "memory.swap.max").exists()
        return False

    def huge_page_sizes(self, folder: str = HUGE_PAGES) -> frozenset[str]:
        """Huge page sizes that can be limited, in the form of the function ``huge_page_sizes``.

        None without hugetlb.
        """
        return frozenset(huge_page_sizes(folder)) if "hugetlb" in self.controllers() else frozenset()

    @property
    def _unified(self) -> Path:
        return Path(self.unified or "")


def discover(mountinfo: str = "/proc/self/mountinfo") -> Hierarchies:
    """Read the mount table. If a hierarchy is mounted several times, the first mount is used."""
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


def huge_page_sizes(folder: str = HUGE_PAGES) -> tuple[str, ...]:
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


def _read(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
