"""Resolves paths of a container before it exists, through links in its image and in the volumes mounted so far."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from host import libc
from host.errors import InvalidArgumentError

# Mounts there hide the image's files. They belong to the kernel or the OCI runtime, so they have no foreign links.
_KERNEL_FOLDERS = ("/proc", "/sys")
_HIDDEN_FOLDERS = (*_KERNEL_FOLDERS, "/dev")
_BELOW_KERNEL = tuple(f"{folder}/" for folder in _KERNEL_FOLDERS)
_BELOW_HIDDEN = tuple(f"{folder}/" for folder in _HIDDEN_FOLDERS)
# Links into /proc that every /dev has.
_LINKS_OF_DEV = ("/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/core")
_BELOW_LINKS_OF_DEV = tuple(f"{link}/" for link in _LINKS_OF_DEV)
_MAX_TURNS = 128
_MAX_BYTES = 4096  # PATH_MAX
_MAX_NAME_LENGTH = 255  # NAME_MAX
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Place:
    """A resolved path.

    ``path`` has no links. ``link`` is the last link that was followed, empty if there was none. ``of_kernel``: it is in
    /proc or /sys, behind a link of /dev into them, or in such a file system elsewhere. ``in_volume``: it is below a
    mount, which others may change at any time. ``exists`` and ``is_folder`` describe what exists already.
    ``blocked_by`` is a file in the path, below which nothing can exist.
    """

    path: str
    link: str
    of_kernel: bool
    in_volume: bool
    exists: bool
    is_folder: bool = False
    blocked_by: str = ""


@dataclass(frozen=True, slots=True)
class _Turn:
    """The names to follow instead, and the link that leads there, if it is a link."""

    names: list[str]
    link: str = ""


@dataclass(slots=True)
class ContainerPaths:
    """The files of a future container: its root file system, and the mounts in it so far.

    Every step uses a descriptor and follows no link implicitly, so no link leads out of ``rootfs``. If a volume changes
    meanwhile, the answer was correct at some moment.
    """

    rootfs: Path
    _sources: dict[str, str] = field(default_factory=dict)

    def add(self, destination: str, source: str) -> None:
        """Record that ``source``, a path of the host, is mounted at ``destination``, which has no links."""
        self._sources[destination] = source

    def resolve(self, path: str) -> Place:
        """Resolve ``path``. Missing parts stay as they are written.

        Raises InvalidArgumentError for links that lead to each other, and for names that no file can have.
        """
        hidden = path in _HIDDEN_FOLDERS or path.startswith(_BELOW_HIDDEN)
        if hidden and "/." not in path and not self._is_in_volume(path):  # the usual case
            return Place(path, "", _is_of_kernel(path, -1), False, False)
        names, link = path.split("/"), ""
        for _ in range(_MAX_TURNS):
            step = self._walk(names)
            if isinstance(step, Place):
                return replace(step, link=step.link or link) if link else step
            names, link = step.names, step.link or link
            if sum(len(name) + 1 for name in names) > _MAX_BYTES:
                break
        raise InvalidArgumentError(f"{path} leads through too many links: use an image without them")

    def _is_in_volume(self, path: str) -> bool:
        return any(path.startswith(place) for place in self._sources)

    def _walk(self, names: list[str]) -> Place | _Turn:
        """Follow ``names`` from the root to the end, or to the first name that must be replaced.

        A folder's own .. may lead elsewhere if something is mounted on it. So the walk begins again at the root.
        """
        path, blocked_by, entered, in_volume = "", "", False, False
        names = [name for name in names if name not in ("", ".")]
        folder = self._root(names[0] if names else "")
        try:
            for index, name in enumerate(names):
                rest = names[index + 1 :]
                if name == "..":
                    return _Turn(names[: max(index - 1, 0)] + rest)
                path, in_volume = f"{path}/{name}", entered
                if path in self._sources:
                    folder, entered = _replace(folder, _open(self._sources[path])), True
                elif path in _HIDDEN_FOLDERS:
                    folder = _replace(folder, -1)
                else:
                    child = _open(name, folder)
                    if (target := _target(child)) is not None:
                        os.close(child)
                        if libc.is_kernel_filesystem(folder):
                            return Place(
                                path, path, True, in_volume, True
                            )  # it may lead anywhere, regardless of its text
                        above = [] if target.startswith("/") else names[:index]
                        return _Turn([*above, *target.split("/"), *rest], path)
                    if child < 0 <= folder and not _is_folder(folder):
                        blocked_by = path.rpartition("/")[0]
                    folder = _replace(folder, child)
            of_kernel = _is_of_kernel(path, folder)
            return Place(path or "/", "", of_kernel, in_volume, folder >= 0, _is_folder(folder), blocked_by)
        finally:
            _replace(folder, -1)

    def _root(self, first: str) -> int:
        if f"/{first}" in _HIDDEN_FOLDERS:
            return -1  # its files do not matter
        return os.open(self.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def destination(self, path: str, what: str) -> Place:
        """The real destination of a mount or device at ``path``.

        Raises InvalidArgumentError if links lead it to the root or over files of the kernel's file systems: OCI
        runtimes read and write these to confine the process (CVE-2019-16884). ``what`` names it.
        """
        place = self.resolve(path)
        if place.link and (place.of_kernel or place.path in ("/", "/dev")):
            raise InvalidArgumentError(
                f"{what} {path}: the link {place.link} leads to {place.path}: use an image without this link, "
                "or another path"
            )
        if not _is_text(place.path):
            raise InvalidArgumentError(
                f"{what} {path}: a link leads to a name that is not UTF-8: use an image without it"
            )
        names = place.path.encode().split(b"/")
        if len(place.path.encode()) >= _MAX_BYTES or max(map(len, names)) > _MAX_NAME_LENGTH:
            raise InvalidArgumentError(
                f"{what} {path[:200]!r} is longer than {_MAX_BYTES - 1} bytes, "
                f"or a name in it than {_MAX_NAME_LENGTH}: use a shorter path"
            )
        return place


def _replace(old: int, new: int) -> int:
    if old >= 0:
        os.close(old)
    return new


def _open(name: str, folder: int | None = None) -> int:
    """Open the file; -1 if it does not exist or cannot be opened."""
    if folder is not None and folder < 0:
        return -1
    try:
        return os.open(name, _LOOK, dir_fd=folder)
    except OSError:
        return -1


def _target(descriptor: int) -> str | None:
    """The target of a symbolic link; empty if it cannot be read. None if the file is no link or does not exist."""
    if descriptor < 0 or not stat.S_ISLNK(os.fstat(descriptor).st_mode):
        return None
    try:
        return os.readlink("", dir_fd=descriptor)
    except OSError:
        return ""  # a link of a process that the agent may not inspect


def _is_folder(descriptor: int) -> bool:
    return descriptor >= 0 and stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_of_kernel(path: str, descriptor: int) -> bool:
    named = path in _KERNEL_FOLDERS or path.startswith(_BELOW_KERNEL) or is_link_of_dev(path)
    return named or libc.is_kernel_filesystem(descriptor)


def is_link_of_dev(path: str) -> bool:
    """Whether ``path`` leads into /proc by one of the links that a container's /dev has, such as /dev/fd."""
    return path in _LINKS_OF_DEV or path.startswith(_BELOW_LINKS_OF_DEV)
