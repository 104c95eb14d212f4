"""Folders for an image's VOLUMEs: each container gets its own, filled with what the image has there."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from host.errors import InvalidArgumentError
from runtime.spec import oci, rooted
from runtime.spec.container_paths import ContainerPaths
from runtime.spec.mounts import container_path
from runtime.spec.relabel import relabel_all
from runtime.spec.selinux import Relabel


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder of the host's to make before the container is, where the container sees it, and its SELinux label."""

    folder: Path
    container_path: str
    label: str = ""


def image_volumes(paths: Iterable[str], rootfs: Path, container_folder: Path, label: str = "") -> list[Volume]:
    """One volume per path.

    Raises InvalidArgumentError for one that would cover the root, /dev, /sys or /proc, or what is in /proc, and for one
    that a link of the image leads into /sys: OCI runtimes look there for what they close, and write there what confines
    the process.
    """
    wanted = {container_path("/" + path.lstrip("/"), "VOLUME of the image:") for path in paths}
    image = ContainerPaths(rootfs)
    for path in wanted:
        place = image.destination(path, "VOLUME of the image:").path
        if place in ("/", "/dev", "/proc", "/sys") or place.startswith("/proc/"):
            raise InvalidArgumentError(f"VOLUME of the image: {path} is {place}: use an image with a folder of its own")
    return [
        Volume(container_folder / "volumes" / hashlib.sha256(path.encode()).hexdigest()[:32], path, label)
        for path in sorted(wanted)
    ]


def volume_mounts(volumes: Iterable[Volume]) -> list[oci.Mount]:
    """Their bind mounts."""
    return [
        oci.Mount(
            destination=volume.container_path,
            type="bind",
            source=str(volume.folder),
            options=["rbind", "rprivate", "rw"],
        )
        for volume in volumes
    ]


def make_volumes(volumes: Iterable[Volume], rootfs: Path, owner: tuple[int, int] = (0, 0)) -> None:
    """Make the folders with the owner, mode and content of what the image has there; blocking, so for a thread.

    ``owner`` is the uid and gid on the host of root in the container, whose a folder is that the image does not have.
    They are below the container's folder and go with it. What is in the image is reached without following links out
    of ``rootfs``, and links inside are copied as links.
    """
    for volume in volumes:
        volume.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.chown(volume.folder, *owner)
        try:
            with rooted.locate(rootfs, volume.container_path) as descriptor:
                source = f"/proc/self/fd/{descriptor}"
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    _copy_folder(source, str(volume.folder))
        except (FileNotFoundError, NotADirectoryError):
            pass
        if volume.label:
            relabel_all([Relabel(str(volume.folder.resolve()), volume.label)])


def _copy_folder(source: str, target: str) -> None:
    with os.scandir(source + "/.") as entries:
        for entry in entries:
            to = f"{target}/{entry.name}"
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                Path(to).mkdir()
                _copy_folder(f"{source}/{entry.name}", to)
            elif stat.S_ISLNK(status.st_mode):
                Path(to).symlink_to(Path(entry.path).readlink())
                os.chown(to, status.st_uid, status.st_gid, follow_symlinks=False)
            elif stat.S_ISREG(status.st_mode):
                shutil.copyfile(f"{source}/{entry.name}", to, follow_symlinks=False)
                _copy_attributes(f"{source}/{entry.name}", to)
            elif stat.S_ISFIFO(status.st_mode):
                os.mkfifo(to)
                _copy_attributes(f"{source}/{entry.name}", to)
    _copy_attributes(source + "/.", target)


def _copy_attributes(source: str, target: str) -> None:
    status = Path(source).stat()
    os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)  # after chown, which takes set-id bits and file capabilities away
