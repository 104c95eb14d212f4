"""Opens files of a layer by path, without following links or leaving the layer. Paths may have any length."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host import libc

_MAX_PATH_LENGTH = 4000  # PATH_MAX is 4096
_RESOLVE = libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_BENEATH


@contextmanager
def opened_beneath(root: Path | int, name: bytes, flags: int) -> Iterator[int]:
    """Open ``name`` (empty: the root itself) below the folder ``root`` for the block, and provide the descriptor.

    Raises OSError: any of open(2), ELOOP for a path through a symbolic link, EXDEV for a path that leads out.
    """
    folder = os.dup(root) if isinstance(root, int) else os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while len(name) > _MAX_PATH_LENGTH:
            cut = name.rfind(b"/", 0, _MAX_PATH_LENGTH)
            if cut <= 0:
                break  # one component is too long: the kernel raises the error
            folder, old = libc.openat2(folder, name[:cut], os.O_PATH | os.O_DIRECTORY, _RESOLVE), folder
            os.close(old)
            name = name[cut + 1 :]
        descriptor = libc.openat2(folder, name or b".", flags | os.O_NOFOLLOW, _RESOLVE)
    finally:
        os.close(folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
