"""Writing a file system to its disk, once for all callers that wait for it at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from host.concurrency.threads import in_long_thread
from host.errors import NoSpaceError, PodkeelError

_PAUSE = 1.0  # seconds


class DiskSync:
    """Writes the file system of ``folder``; ahead of a flush with at least ``pause`` seconds between two times."""

    def __init__(self, folder: Path, pause: float = _PAUSE) -> None:
        self._folder = folder
        self._pause = pause
        self._lock = asyncio.Lock()
        self._begun = 0
        self._last_good = 0
        self._writers = 0
        self._writing: asyncio.Task[None] | None = None

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

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """During the block, write to the disk what is there so far, again and again; used on the loop.

        A flush after a large layer has little left to write then. It takes half of the time at most, and its errors are
        left for the flush to raise.
        """
        self._writers += 1
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write_ahead())
        try:
            yield
        finally:
            self._writers -= 1
            if not self._writers and self._writing is not None:
                self._writing.cancel()
                self._writing = None

    async def _write_ahead(self) -> None:
        pause = self._pause
        while True:
            await asyncio.sleep(pause)
            begin = time.monotonic()
            with contextlib.suppress(PodkeelError):
                await self.flush()
            pause = max(self._pause, time.monotonic() - begin)


def sync_file_system(folder: Path) -> None:
    """Write what the file system of ``folder`` has in memory to its disk (syncfs(2)); blocks until it is done."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
