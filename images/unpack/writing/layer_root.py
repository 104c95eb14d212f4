"""Paths inside the folder that a layer is written to, which is the root and the working folder of the process.

Runs in the unpack worker. No path can lead out of the root, as nothing else is mounted. This module handles paths that
are longer than the kernel accepts, and links to missing files.
"""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH115
from __future__ import annotations

import errno
import os
import stat

from images.unpack.tar.headers import TarError, shown

MAX_NAME_LENGTH = 32 << 10
MAX_PARTS = 1024
_MAX_PATH_LENGTH = 4000  # PATH_MAX is 4096
_MAX_LINKS = 255
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # ELOOP: behind a loop of links


def is_clean(name: bytes) -> bool:
    """Whether ``name`` is short, relative and without empty, ``.`` or ``..`` parts. Almost all names are."""
    return (
        b"/." not in name
        and b"//" not in name
        and name[:1] not in b"./"
        and name[-1:] != b"/"
        and len(name) < MAX_PARTS
    )


def clean(name: bytes) -> bytes:
    """``name`` relative to the root, without empty, ``.`` and ``..`` parts. TarError if it leads out of the root.

    An empty name means the root, as in containerd.
    """
    if len(name) > MAX_NAME_LENGTH:
        raise TarError(f"{shown(name)} has a name of {len(name)} bytes, the longest may have {MAX_NAME_LENGTH}")
    name = name.removeprefix(b"./")
    if is_clean(name):
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not parts:
                raise TarError(f"{shown(name)} leads out of the layer with '..'")
            parts.pop()
        elif part not in (b"", b"."):
            parts.append(part)
    if len(parts) > MAX_PARTS:
        raise TarError(f"{shown(name)} is {len(parts)} folders deep, at most {MAX_PARTS} are allowed")
    return b"/".join(parts)


class LayerRoot:
    """Allows system calls with paths of any length, by changing the working folder until the rest is short enough."""

    def __init__(self) -> None:
        self.away = False

    def near(self, path: bytes) -> bytes:
        """The path to pass to the kernel for ``path`` (relative to the root), valid until the next call of this.

        The root is ``.``. Raises OSError if the path is too long and a folder in it is missing.
        """
        if self.away:
            os.chdir("/")
            self.away = False
        while len(path) > _MAX_PATH_LENGTH:
            cut = path.rfind(b"/", 0, _MAX_PATH_LENGTH)
            if cut <= 0:
                break  # one component is too long: the kernel raises the error
            os.chdir(path[:cut])
            self.away = True
            path = path[cut + 1 :]
        return path or b"."

    def link(self, target: bytes, path: bytes) -> None:
        """Make ``path`` a hard link to ``target``. Raises OSError."""
        if len(target) <= _MAX_PATH_LENGTH and len(path) <= _MAX_PATH_LENGTH:
            self.near(b"")
            os.link(target, path, follow_symlinks=False)
            return
        folder, _, base = target.rpartition(b"/")
        descriptor = os.open(self.near(folder), os.O_PATH | os.O_DIRECTORY)
        try:
            os.link(base, self.near(path), src_dir_fd=descriptor, follow_symlinks=False)
        finally:
            os.close(descriptor)

    def kind(self, path: bytes) -> int:
        """The file type bits of the file at ``path``; 0 if there is none."""
        try:
            return stat.S_IFMT(os.lstat(self.near(path)).st_mode)
        except OSError as error:
            if error.errno not in MISSING:
                raise
            return 0

    def resolve(self, path: bytes) -> tuple[bytes, int]:
        """Follow all links in ``path``. Returns the result, and how many of its parts exist.

        The target of a link need not exist. Raises TarError for a loop of links.
        """
        done: list[bytes] = []
        there: int | None = None
        pending = path.split(b"/")[::-1]
        links = 0
        while pending:
            part = pending.pop()
            if part == b"..":
                if done:
                    done.pop()
                if there is not None and len(done) <= there:
                    there = None
                continue
            if part in (b"", b"."):
                continue
            done.append(part)
            if there is not None:
                continue
            try:
                target = os.readlink(self.near(b"/".join(done)))
            except (FileNotFoundError, NotADirectoryError):
                there = len(done) - 1
                continue
            except OSError as error:
                if error.errno != errno.EINVAL:  # EINVAL: this is not a link
                    raise
                continue
            links += 1
            if links > _MAX_LINKS:
                raise TarError(f"{shown(path)} is behind a loop of symbolic links")
            done = [] if target.startswith(b"/") else done[:-1]
            pending += target.split(b"/")[::-1]
        return b"/".join(done), len(done) if there is None else there
