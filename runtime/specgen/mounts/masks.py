"""Masks files of a container with a null device of the agent, if the OCI runtime would use the node's."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.specgen import config as oci
from runtime.specgen.mounts.container_paths import ContainerPaths, Place

# No option: the file system of the null device is itself read-only, so a second call for the mount is not needed.
_OPTIONS = ["bind"]
_OPTIONS_OF_FOLDERS = ["ro", "nosuid", "nodev", "noexec", "size=4k", "nr_inodes=1", "mode=755"]
_NODES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
# Paths that differ between processes and networks; all others in /proc and /sys are the same on the node.
_OF_CONTAINER = re.compile("/proc/([0-9]+|self|thread-self|net|sys/net)/|/sys/(class|devices/virtual)/net/")


def mask_files(linux: oci.Linux, paths: ContainerPaths, null: Path) -> list[oci.Mount]:
    """Mounts of ``null`` over the files among the masked paths, which are removed from ``linux``.

    They come after all other mounts, because they also mask files of these. Folders of the image and of volumes get an
    empty file system. The OCI runtime masks those of /proc, /sys and /dev, where no file can replace them, and ignores
    missing ones. Missing paths elsewhere are not passed to it: they may be files by then. ``paths`` are those of the
    container with all mounts. Raises InvalidArgumentError for paths that exist only because of the container's own
    processes and network.
    """
    hidden: dict[str, oci.Mount] = {}
    kept = []
    nodes = {*_NODES, *(device.path for device in linux.devices)}
    for path in linux.masked_paths:
        place = paths.resolve(path)
        if _is_file(place) or place.path in nodes:
            hidden[place.path] = oci.Mount(destination=place.path, type="bind", source=str(null), options=_OPTIONS)
        elif place.of_kernel or place.path.startswith("/dev/"):
            _require_same_on_node(place)
            kept.append(path)
        elif place.is_folder:
            hidden[place.path] = oci.Mount(
                destination=place.path, type="tmpfs", source="tmpfs", options=_OPTIONS_OF_FOLDERS
            )
    linux.masked_paths = kept
    return list(hidden.values())


def _require_same_on_node(place: Place) -> None:
    if _OF_CONTAINER.match(place.path) and not Path(place.path).is_dir():
        raise InvalidArgumentError(
            f"masked path {place.path}: the node has no such file, so it cannot be masked: remove this path"
        )


def _is_file(place: Place) -> bool:
    if place.exists:
        return not place.is_folder
    if not place.of_kernel:
        return False
    try:  # /proc and /sys have the same files on the node
        return not stat.S_ISDIR(Path(place.path).stat().st_mode)
    except OSError:
        return False
