"""Space that is kept for the next start, in the run and the data folder: it has to work also when they are full."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from host.errors import LimitError
from runtime.namespaces.pinned import remove_whatever

_FILES = 64  # as many inodes are kept
_FILE_BYTES = 16 * 1024
_SHORT_BYTES = 64 * 1024
_SHORT_FILES = 16

_log = logging.getLogger("podkeel.agent")


class Reserve:
    """Files in ``folders`` that reserve the space: released when a start begins, made again once it is over.

    Those in the first folder are also released for containers that are stopped while it is full.
    """

    def __init__(self, *folders: Path) -> None:
        self._folders = folders

    def release(self) -> None:
        """Release the space. Blocks."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                remove_whatever(folder)

    def release_if_short(self) -> None:
        """Release that of the first folder if there is hardly any other: conmon is about to record how a container
        ended.
        """
        folder = self._folders[0]
        with contextlib.suppress(OSError):
            room = os.statvfs(folder)
            if room.f_bavail * room.f_frsize < _SHORT_BYTES or (room.f_files and room.f_favail < _SHORT_FILES):
                _log.warning("folder %s: is full, free some space", folder.parent)
                remove_whatever(folder)

    def keep(self) -> None:
        """Reserve the space; a folder that is too full for it is logged. Blocks."""
        for folder in self._folders:
            try:
                _fill(folder)
            except OSError as error:
                _log.warning("folder %s: is nearly full, free some space: %s", folder.parent, error.strerror)


def _fill(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    for number in range(_FILES):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, _FILE_BYTES)
        finally:
            os.close(file)


def require_room(folder: Path) -> None:
    """Raise LimitError if nothing can be written to the file system of ``folder``. Blocks."""
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
