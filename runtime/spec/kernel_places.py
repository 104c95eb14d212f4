"""What may be mounted in a container where the kernel's own files go: nothing but those files.

OCI runtimes open /dev/null of the container, give it to the container's user and hide files behind it, and write to
/proc what confines the process: what a volume has there would be taken for it (CVE-2019-16884, CVE-2025-31133).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.spec import oci

_WHOLE = ("/dev", "/proc", "/sys")
_NULL = "/dev/null"
_NULL_DEVICE = os.makedev(1, 3)


def refuse_imitations(mounts: Iterable[oci.Mount], folders: Mapping[str, str]) -> None:
    """Raise InvalidArgumentError for a bind mount that would stand in for files of the kernel.

    At /dev, /proc and /sys only the node's own may be mounted, at /dev/null only a null device. Destinations are free
    of links. ``folders`` maps a source that is still to be bound to where its content is now.
    """
    for mount in mounts:
        if mount.type == "bind":
            _refuse_imitation(mount.destination, folders.get(mount.source, mount.source))


def _refuse_imitation(destination: str, source: str) -> None:
    if destination in _WHOLE and not _is_the_node_s(destination, source):
        raise InvalidArgumentError(
            f"mounts: {destination} can only be the node's own {destination}, not {source}: give host_path "
            f"{destination}, or mount the volume at a path below {destination} or elsewhere"
        )
    if destination == _NULL and not _is_null_device(source):
        raise InvalidArgumentError(
            f"mounts: {destination} can only be a null device, which {source} is not: mount it elsewhere"
        )


def _is_the_node_s(destination: str, source: str) -> bool:
    """Whether ``source``, a path on the host, is what the host has at ``destination``."""
    try:
        return Path(source).samefile(destination)
    except OSError:
        return False


def _is_null_device(path: str) -> bool:
    try:
        status = Path(path).stat()
    except OSError:
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL_DEVICE
