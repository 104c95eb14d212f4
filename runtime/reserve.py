"""Reserves space for the next start in the run and the data folder: a start must work when they are full."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from host.errors import LimitError
from runtime.namespaces.pinned import remove_path

_FILES = 64  # this also reserves inodes
_FILE_BYTES = 16 * 1024
_SHORT_BYTES = 64 * 1024
_SHORT_FILES = 16

_log = logging.getLogger("podkeel.agent")


class Reserve:
    """Files in ``folders`` that reserve the space. They are deleted when a start begins, and written again after it.

    Those in the first folder are also deleted for containers that are stopped while it is full.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders

    def release(self) -> None:
        """Release the space. Blocks."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                remove_path(folder)

    def release_if_short(self) -> None:
        """Release the space of the first folder if it is nearly full, because conmon is about to record the end of a
        container.
        """
        folder = self._folders[0]
        with contextlib.suppress(OSError):
            room = os.statvfs(folder)
            if room.f_bavail * room.f_frsize < _SHORT_BYTES or (room.f_files and room.f_favail < _SHORT_FILES):
                _log.warning("folder %s: full: free some space", folder.parent)
                remove_path(folder)

    def keep(self) -> None:
        """Reserve the space. A folder that is too full is logged. Blocks."""
        for folder in self._folders:
            try:
                _fill(folder)
            except OSError as error:
                _log.warning("folder %s: nearly full: free some space: %s", folder.parent, error.strerror)


def _fill(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    for number in range(_FILES):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, _FILE_BYTES)
        finally:
            os.close(file)


def require_room(folder: Path) -> None:
    """Raise LimitError if the file system of ``folder`` is full. Blocks."""
    probe = folder / f".room-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        raise LimitError(
            f"folder {folder}: nothing can be written there ({error.strerror}): free some space and start again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
