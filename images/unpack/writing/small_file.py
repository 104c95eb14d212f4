"""Making a new file of which everything is known."""

# Names are bytes, which pathlib does not take.
# ruff: noqa: PTH108
from __future__ import annotations

import os
import stat

TYPE_CHECKING = False  # as type checkers know it, without importing typing
if TYPE_CHECKING:
    from typing import TypeAlias

    # Path, content, mode, time in nanoseconds; user and group, or None if they are right from the start.
    SmallFile: TypeAlias = tuple[bytes, bytes | memoryview, int, int, tuple[int, int] | None]

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
SET_IDS = stat.S_ISUID | stat.S_ISGID


def make_file(file: SmallFile) -> None:
    """Make the file. Raises OSError, and then nothing is left of it."""
    name, content, mode, mtime, owner = file
    descriptor = os.open(name, NEW_FILE, mode)
    try:
        if content:
            written = os.write(descriptor, content)
            while written < len(content):
                written += os.write(descriptor, content[written:])
        if owner is not None:
            os.fchown(descriptor, *owner)
            if mode & SET_IDS:
                os.fchmod(descriptor, mode)
        os.utime(descriptor, ns=(mtime, mtime))
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(descriptor)


def failed_files(batch: list[SmallFile]) -> list[int]:
    """Make the files of ``batch``; the places in it of those that could not be made."""
    failed = []
    for place, file in enumerate(batch):
        try:
            make_file(file)
        except (OSError, ValueError, OverflowError):
            failed.append(place)
    return failed
