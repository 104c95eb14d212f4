"""Folders for an image's VOLUMEs. Each container gets its own, filled with the image's content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.specgen import config
from runtime.specgen.mounts import openat2
from runtime.specgen.mounts.configured import container_path
from runtime.specgen.mounts.container_paths import ContainerPaths
from runtime.specgen.mounts.volume_content import CopyLimits, VolumeCopier
from runtime.specgen.security.relabel import relabel_all
from runtime.specgen.security.selinux import Relabel

_MAX_VOLUMES = 500
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder on the host that is created before the container, its path in the container, and its SELinux label."""

    folder: Path
    container_path: str
    label: str = ""


def image_volumes(paths: Iterable[str], rootfs: Path, container_folder: Path, label: str = "") -> list[Volume]:
    """One volume per path.

    Raises InvalidArgumentError for too many, because each is a mount. Raises it also for a VOLUME that would cover the
    root, /dev, its null device, /sys, /proc or files in /proc, and for one that a link of the image leads into /sys:
    OCI runtimes read and write files there that confine the process.
    """
    paths = tuple(paths)
    if len(paths) > _MAX_VOLUMES:
        raise InvalidArgumentError(f"the image has {len(paths)} VOLUMEs: use one with at most {_MAX_VOLUMES}")
    wanted = {container_path("/" + path.lstrip("/"), "VOLUME of the image:") for path in paths}
    image = ContainerPaths(rootfs)
    for path in wanted:
        place = image.destination(path, "VOLUME of the image:").path
        if place in ("/", "/dev", "/dev/null", "/proc", "/sys") or place.startswith("/proc/"):
            raise InvalidArgumentError(
                f"VOLUME of the image: {path} is {place}: use an image whose VOLUME is a separate folder"
            )
    return [
        Volume(container_folder / "volumes" / hashlib.sha256(path.encode()).hexdigest()[:32], path, label)
        for path in sorted(wanted)
    ]


def volume_mounts(volumes: Iterable[Volume]) -> list[config.Mount]:
    """The bind mounts of volumes."""
    return [
        config.Mount(
            destination=volume.container_path,
            type="bind",
            source=str(volume.folder),
            options=["rbind", "rprivate", "rw"],
        )
        for volume in volumes
    ]


def make_volumes(
    volumes: Iterable[Volume],
    rootfs: Path,
    owner: tuple[int, int] = (0, 0),
    *,
    limits: CopyLimits,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Create the folders with the owner, mode and content of the image's. Blocks: call it in a thread.

    ``owner`` is the host's uid and gid for the container's root. It owns folders that the image does not have. The
    folders are below the container's folder and are removed with it. The image's files are read without following links
    out of ``rootfs``. Links inside are copied as links. ``check`` is called regularly and may raise. Raises LimitError
    if the image's content exceeds ``limits``.
    """
    copier = VolumeCopier(limits, check)
    for volume in volumes:
        check()
        volume.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.chown(volume.folder, *owner)
        try:
            with openat2.locate(rootfs, volume.container_path) as descriptor:
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    _copy(copier, descriptor, volume)
        except (FileNotFoundError, NotADirectoryError):
            pass
        if volume.label:
            relabel_all([Relabel(str(volume.folder.resolve()), volume.label)])


def _copy(copier: VolumeCopier, place: int, volume: Volume) -> None:
    source = os.open(".", _FOLDER, dir_fd=place)
    try:
        target = os.open(volume.folder, _FOLDER)
        try:
            copier.copy(source, target, f"VOLUME {volume.container_path} of the image")
        finally:
            os.close(target)
    finally:
        os.close(source)
