"""Whether a checkpoint has all the memory that it says its processes have. Blocks."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from host.errors import InvalidArgumentError, UnsupportedError
from proto.criu.v1 import images_pb2
from runtime.checkpoint.restore import criu_images

_NAME = re.compile(r"pagemap-(shmem-)?\d+\.img")
_IN_PARENT, _PRESENT = 1, 4
_MAX_ENTRIES = 4_000_000
_PAGE = os.sysconf("SC_PAGE_SIZE")


def check_memory(folder: Path) -> None:
    """Raise InvalidArgumentError for a file of memory that is too short: CRIU would read beyond its end for ever.

    Raises UnsupportedError for memory that is in another checkpoint.
    """
    for path in sorted(folder.iterdir()):
        if _NAME.fullmatch(path.name):
            _check(folder, path)


def _check(folder: Path, path: Path) -> None:
    # The first entry is another message, whose only field means the address in those that follow.
    found = criu_images.entries(path, images_pb2.Pagemap, most=_MAX_ENTRIES)
    head = next(found, None)
    if head is None:
        return
    pages = 0
    for entry in found:
        if entry.in_parent or entry.flags & _IN_PARENT:
            raise UnsupportedError("a part of the checkpoint's memory is in an earlier checkpoint")
        if not entry.HasField("flags") or entry.flags & _PRESENT:
            pages += entry.nr_pages or entry.compat_nr_pages
    name = f"pages-{head.vaddr}.img"
    if pages and _size(folder / name) < pages * _PAGE:
        raise InvalidArgumentError(f"the checkpoint's {name} is cut off: {path.name} says that it has {pages} pages")


def _size(path: Path) -> int:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
