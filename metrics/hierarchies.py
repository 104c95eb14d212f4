"""Where cgroup hierarchies are mounted, and how container cgroups are named under each cgroup driver."""

from __future__ import annotations

import posixpath
from pathlib import Path

import msgspec

from host import mounts
from host.errors import InvalidArgumentError

SCOPE_PREFIX = "podkeel"


class Hierarchies(msgspec.Struct, frozen=True):
    """Mount points: of v1 controllers by name (named hierarchies as ``name=…``), and of the one cgroup2, if any."""

    v1: dict[str, str]
    unified: str | None

    @property
    def pure_v2(self) -> bool:
        """Whether no controller is on v1: the setup of current distributions."""
        return self.unified is not None and not self.v1


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


def container_cgroup(driver: str, parent: str, container_id: str) -> str:
    """The cgroup of a container below the ``parent`` that kubelet gave: absolute, as seen from each mount point.

    ``cgroupfs``: ``<parent>/<id>``. ``systemd``: ``podkeel-<id>.scope`` in the parent's slice. Raises
    InvalidArgumentError for a parent that is no name of the driver's kind.
    """
    if driver == "systemd":
        return f"{slice_path(parent)}/{SCOPE_PREFIX}-{container_id}.scope"
    return f"{pod_cgroup(driver, parent)}/{container_id}"


def pod_cgroup(driver: str, parent: str) -> str:
    """The cgroup that kubelet means with a pod's ``cgroup_parent``."""
    if driver == "systemd":
        return slice_path(parent)
    if ".." in parent.split("/"):
        raise InvalidArgumentError(f"cgroup parent {parent!r} climbs out of the cgroup tree: leave out '..'")
    path = posixpath.normpath("/" + parent.strip("/"))
    return "" if path == "/" else path


def slice_path(name: str) -> str:
    """The path of a systemd slice, whose dashes spell its parents: ``a-b.slice`` is ``/a.slice/a-b.slice``.

    A path is taken by its last part. The rules are those of systemd.slice(5); InvalidArgumentError if they are broken.
    """
    base = posixpath.basename(name.rstrip("/"))
    stem = base.removesuffix(".slice")
    if stem == "-" and base != stem:
        return ""
    if base == stem or not stem or stem.startswith("-") or stem.endswith("-") or "--" in stem:
        raise InvalidArgumentError(
            f"cgroup parent {name!r} is no systemd slice (like kubepods-burstable.slice): kubelet and Podkeel must use "
            "the same cgroup driver"
        )
    parts = stem.split("-")
    return "".join(f"/{'-'.join(parts[: depth + 1])}.slice" for depth in range(len(parts)))


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
