"""Tar files of a checkpoint that have only an empty folder, which is the usual case. Blocks."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from images.archives.files import BoundedTarInfo

_LARGEST = 10_240  # bytes: a header, the end, and the padding of tar files
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_empty_folder(archive: Path, folder: Path) -> bool:
    """Whether a tar file has only the folder itself. Then ``folder`` gets its owner and mode.

    False for any other file, also for a broken one.
    """
    descriptor = os.open(archive, _FILE)
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > _LARGEST:
            return False
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as members:
                found = members.getmembers()
        except (tarfile.TarError, ValueError, EOFError):
            return False
    if [member.name for member in found] not in ([], ["."]) or any(not member.isdir() for member in found):
        return False
    if any(member.pax_headers for member in found):
        return False
    for member in found:
        target = os.open(folder, _FOLDER)
        try:
            os.fchown(target, member.uid, member.gid)
            os.fchmod(target, member.mode & 0o7777)
        finally:
            os.close(target)
    return True
