"""Restricts the mounts at paths of the kernel's own files in a container.

OCI runtimes open /dev/null and terminals of the container, change their owner to the container's user and mask files
with them. They confine the process by writing to /proc. If a volume is mounted there, they use its files instead
(CVE-2019-16884, CVE-2025-31133, CVE-2025-52565).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.specgen import config
from runtime.specgen.mounts.container_paths import is_link_of_dev
from runtime.specgen.mounts.private_devices import DEFAULT_NODES

# Paths at which a volume would replace files that OCI runtimes open. A terminal is opened by /dev/ptmx and /dev/pts.
_OF_THE_NODE = ("/dev", "/proc", "/sys", "/dev/pts", "/dev/ptmx", "/dev/console")
_KERNEL_FOLDERS = ("/dev", "/proc", "/sys")
_OWN_OF_SYS = ("/sys/class/net/", "/sys/devices/virtual/net/", "/sys/fs/cgroup/")
_NULL = "/dev/null"
_DEVICES = {f"/dev/{name}": device for device, name in DEFAULT_NODES.items()}
_DEVICE_PLACES = (*_DEVICES, "/dev/console", "/dev/ptmx", "/dev/pts")
# File systems in which no folder can be made, unless a volume replaces them.
_WITHOUT_FOLDERS = ("/dev/mqueue",)
# Files that are commonly replaced (for example by lxcfs): OCI runtimes do not write to them.
_SHOWN = frozenset(
    (
        *("/proc/cpuinfo", "/proc/diskstats", "/proc/loadavg", "/proc/meminfo", "/proc/slabinfo", "/proc/stat"),
        *("/proc/swaps", "/proc/uptime", "/proc/net/dev", "/proc/sys/crypto/fips_enabled"),
    )
)


def refuse_imitations(mounts: Sequence[config.Mount], folders: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Raise InvalidArgumentError for a bind mount that would replace files of the kernel.

    At /dev, /dev/pts, /dev/ptmx, /dev/console, /proc, /sys and below /proc only the node's own can be mounted, and some
    files of /proc that are commonly replaced. At /dev/null only a null device is allowed, at the other devices of every
    container only the same device, at the links of /dev and below devices, terminals and message queues nothing.
    Destinations have no links. ``folders`` maps a source that is bind mounted later to the present folder of its
    content. ``names`` are those of ``SettledMounts``.
    """
    volumes = [mount for mount in mounts if mount.type == "bind" and mount.destination.startswith(_KERNEL_FOLDERS)]
    others = [place for place in _WITHOUT_FOLDERS if all(mount.destination != place for mount in volumes)]
    for mount in volumes:
        try:
            _refuse_place(mount.destination, (*_DEVICE_PLACES, *others))
            _refuse_imitation(mount.destination, folders.get(mount.source, mount.source))
        except InvalidArgumentError as error:
            subject = names.get(mount.destination, "mounts")
            raise InvalidArgumentError(f"{subject}: {error.message}") from None


def refuse_missing(mounts: Sequence[config.Mount]) -> None:
    """Raise InvalidArgumentError for a bind mount in /sys at a missing path: nothing can be created in /sys.

    Paths of network devices and of cgroups differ between containers, and are not checked.
    """
    places = [mount.destination for mount in mounts if mount.type == "bind" and mount.destination.startswith("/sys/")]
    for place in places:
        above = any(place.startswith(f"{other}/") for other in places)
        if not above and not place.startswith(_OWN_OF_SYS) and not os.path.lexists(place):
            raise InvalidArgumentError(
                f"mounts: {place} does not exist in /sys, and nothing can be made there: mount it elsewhere"
            )


def kernel_folders_last(mounts: Iterable[config.Mount]) -> list[config.Mount]:
    """``mounts`` with those of the kernel's folders behind all others, otherwise in their order.

    A link that other processes put into a volume can lead a mount to any place in the container, just before the OCI
    runtime mounts it. The later mounts at /dev, /proc and /sys then hide it, and until then no link leads to processes.
    """
    return sorted(mounts, key=lambda mount: _is_of_kernel(mount.destination))


def refuse_nested(nested: Iterable[str], mounts: Sequence[config.Mount], *, sees_others: bool) -> None:
    """Raise InvalidArgumentError for a volume in a volume for which ``kernel_folders_last`` is not enough.

    ``nested`` are the destinations in volumes. A volume with a whole system could replace the root and have the node's
    devices. A volume in a folder of the kernel is mounted after the devices. It is refused if the container
    ``sees_others``, because files of other processes could replace the devices. Others cannot write to the node's own
    /dev, /proc and /sys, so these do not count as volumes.
    """
    volumes = {mount.destination: mount.source for mount in mounts if mount.type == "bind"}
    for destination in nested:
        if destination in volumes and _device(volumes[destination] + _NULL) >= 0:
            raise InvalidArgumentError(
                f"mounts: {volumes[destination]} has devices and would be mounted inside another volume, at "
                f"{destination}, where links may lead it anywhere: mount it outside of volumes"
            )
        for outer, source in volumes.items():
            inside = destination.startswith(f"{outer}/") and _is_of_kernel(outer)
            if sees_others and inside and not _is_host_file(outer, source):
                raise InvalidArgumentError(
                    f"mounts: {destination} is in the volume at {outer}, and the container sees processes of others: "
                    "mount it elsewhere"
                )


def _is_of_kernel(destination: str) -> bool:
    return "/" + destination.split("/")[1] in _KERNEL_FOLDERS


def _refuse_place(destination: str, places: Iterable[str]) -> None:
    """Raise InvalidArgumentError for a destination below one of ``places``, which have no folders."""
    for place in places:
        if destination.startswith(f"{place}/"):
            raise InvalidArgumentError(f"nothing can be mounted below {place}, at {destination}: mount it elsewhere")


def _refuse_imitation(destination: str, source: str) -> None:
    if is_link_of_dev(destination) or _is_of_a_process(destination):
        raise InvalidArgumentError(f"nothing can be mounted at {destination}: mount it elsewhere")
    below_proc = destination.startswith("/proc/") and destination not in _SHOWN
    if (below_proc or destination in _OF_THE_NODE) and not _is_host_file(destination, source):
        raise InvalidArgumentError(
            f"{destination} can only be the node's own {destination}, not {source}: give host_path "
            f"{destination}, or mount the volume elsewhere"
        )
    if destination in _DEVICES:
        device = _device(source)
        if destination == _NULL and device != _DEVICES[_NULL]:
            raise InvalidArgumentError(
                f"{destination} can only be a null device, which {source} is not: mount it elsewhere"
            )
        if device not in DEFAULT_NODES:
            raise InvalidArgumentError(
                f"{destination} can only be one of the devices that every container has, which {source} is "
                "not: mount it elsewhere"
            )


def _is_of_a_process(destination: str) -> bool:
    names = destination.split("/")
    return len(names) > 2 and names[1] == "proc" and (names[2] in ("self", "thread-self") or names[2].isdigit())


def _is_host_file(destination: str, source: str) -> bool:
    """Whether ``source``, a path on the host, is the host's own ``destination``."""
    try:
        return Path(source).samefile(destination)
    except OSError:
        return False


def _device(path: str) -> int:
    """The number of a character device; -1 for any other file."""
    try:
        status = Path(path).stat()
    except OSError:
        return -1
    return status.st_rdev if stat.S_ISCHR(status.st_mode) else -1
