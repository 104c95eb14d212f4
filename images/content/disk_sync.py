"""Flushes a file system to its disk, once for all callers that wait for it at the same time."""

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
    """Flushes the file system of ``folder``. ``ahead`` flushes early, with at least ``pause`` seconds in between."""

    def __init__(self, folder: Path, pause: float = _PAUSE) -> None:
        self._folder = folder
        self._pause = pause
        self._lock = asyncio.Lock()
        self._begun = 0
        self._last_good = 0
        self._writers = 0
        self._writing: asyncio.Task[None] | None = None

    async def flush(self) -> None:
        """Return once everything that was written before the call is on the disk.

        Raises NoSpaceError if the disk is full, PodkeelError if it cannot be written.
        """
        before = self._begun
        async with self._lock:
            if self._last_good > before:
                return  # a flush that began after this call has succeeded
            self._begun += 1
            try:
                await in_long_thread(sync_file_system, self._folder)
            except OSError as error:
                kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else PodkeelError
                raise kind(f"{self._folder} could not be written to the disk: {error.strerror}") from error
            self._last_good = self._begun

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Flush again and again during the block; used on the loop.

        Then the flush after a large layer has little left to write. Flushing ahead takes half of the time at most. Its
        errors are ignored; the later ``flush`` raises them.
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
    """Write what the kernel has in memory for the file system of ``folder`` to its disk (syncfs(2)); blocks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
