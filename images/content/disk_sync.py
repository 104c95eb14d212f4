"""Writing a file system to its disk, once for all callers that wait for it at the same time."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from pathlib import Path

from host.concurrency.threads import in_long_thread
from host.errors import NoSpaceError, PodkeelError


class DiskSync:
    """Writes the file system of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = asyncio.Lock()
        self._begun = 0
        self._last_good = 0

    async def flush(self) -> None:
        """Return once all that was written before the call is on the disk.

        Raises NoSpaceError if there is no room for it, PodkeelError if it cannot be written.
        """
        before = self._begun
        async with self._lock:
            if self._last_good > before:
                return  # one that began after the call has ended well meanwhile
            self._begun += 1
            try:
                await in_long_thread(sync_file_system, self._folder)
            except OSError as error:
                kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else PodkeelError
                raise kind(f"{self._folder} could not be written to the disk: {error.strerror}") from error
            self._last_good = self._begun


def sync_file_system(folder: Path) -> None:
    """Write what the file system of ``folder`` has in memory to its disk (syncfs(2)); blocks until it is done."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
