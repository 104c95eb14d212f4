"""Opens files below a folder whose content is not trusted, without following any link out of it (openat2(2))."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host import libc
from host.errors import InvalidArgumentError

FILE_LIMIT = 1024 * 1024


@contextmanager
def locate(root: Path, inside: str) -> Iterator[int]:
    """An O_PATH descriptor of ``inside``. ``root`` is ``/`` for ``..`` and every link. Raises OSError if missing."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = open_in_root(folder, inside)
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_in_root(folder: int, inside: str, *, flags: int = 0, follow_links: bool = True) -> int:
    """As ``locate``, below a descriptor ``folder`` and with more of open(2)'s ``flags``. The caller closes it.

    Links of processes in /proc, which lead anywhere, are never followed. Raises OSError: ELOOP for these links, and for
    all links without ``follow_links``.
    """
    links = libc.RESOLVE_NO_MAGICLINKS if follow_links else libc.RESOLVE_NO_SYMLINKS
    name = os.fsencode(inside.lstrip("/") or ".")
    return libc.openat2(folder, name, os.O_PATH | flags, libc.RESOLVE_IN_ROOT | links)


def read_file(root: Path, inside: str) -> bytes:
    """The content of a regular file below ``root``; empty if there is none.

    Raises InvalidArgumentError if it is larger than 1 MiB: no valid file of this kind is.
    """
    try:
        with locate(root, inside) as descriptor:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return b""
            with open(f"/proc/self/fd/{descriptor}", "rb", buffering=0) as file:
                content = file.read(min(status.st_size, FILE_LIMIT) + 1)  # not more, because read allocates as much
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise InvalidArgumentError(f"{inside} of the image cannot be read: {error.strerror}") from error
    if len(content) > FILE_LIMIT:
        raise InvalidArgumentError(f"{inside} of the image is larger than {FILE_LIMIT} bytes: use another image")
    return content
