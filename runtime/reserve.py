"""Space of the run folder that is kept for the next start, which has to work also when the folder is full."""

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
    """Files in ``folder`` that reserve the space: released when a start begins, made again once it is over.

    They are also released for containers that are stopped while the folder is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def release(self) -> None:
        """Release the space. Blocks."""
        with contextlib.suppress(OSError):
            remove_whatever(self._folder)

    def release_if_short(self) -> None:
        """Release the space if there is hardly any other: conmon is about to record how a container ended."""
        with contextlib.suppress(OSError):
            room = os.statvfs(self._folder)
            if room.f_bavail * room.f_frsize < _SHORT_BYTES or (room.f_files and room.f_favail < _SHORT_FILES):
                _log.warning("run folder %s: is full, free some space", self._folder.parent)
                self.release()

    def keep(self) -> None:
        """Reserve the space; a folder that is too full for it is logged. Blocks."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            for number in range(_FILES):
                file = os.open(self._folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(file, 0, _FILE_BYTES)
                finally:
                    os.close(file)
        except OSError as error:
            _log.warning("run folder %s: is nearly full, free some space: %s", self._folder.parent, error.strerror)


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
