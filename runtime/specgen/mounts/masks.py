"""Hiding files of a container behind a null device of the agent's, where the OCI runtime would take the node's."""

from __future__ import annotations

import stat
from pathlib import Path

from runtime.specgen import config as oci
from runtime.specgen.mounts.container_paths import ContainerPaths, Place

# No option: the file system of the null device is read-only itself, so the mount need not be made so by a second call.
_OPTIONS = ["bind"]


def mask_files(linux: oci.Linux, paths: ContainerPaths, null: Path) -> list[oci.Mount]:
    """Mounts of ``null`` over the files among the masked paths, which are taken from ``linux``.

    They belong behind all other mounts, as they hide what these bring. Folders stay with the OCI runtime, which hides
    them behind empty ones, and so does what does not exist, which it passes over. ``paths`` are the container's with
    all mounts.
    """
    hidden: dict[str, None] = {}
    kept = []
    for path in linux.masked_paths:
        place = paths.resolve(path)
        if _is_file(place):
            hidden[place.path] = None
        else:
            kept.append(path)
    linux.masked_paths = kept
    return [oci.Mount(destination=path, type="bind", source=str(null), options=_OPTIONS) for path in hidden]


def _is_file(place: Place) -> bool:
    if place.exists:
        return not place.is_folder
    if not place.of_kernel:
        return False
    try:  # what the kernel shows in /proc and /sys is the same on the node
        return not stat.S_ISDIR(Path(place.path).stat().st_mode)
    except OSError:
        return False
