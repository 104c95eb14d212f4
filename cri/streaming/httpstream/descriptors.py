"""Waiting for and moving bytes through non-blocking descriptors: pipes, terminals and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable

READ_SIZE = 256 * 1024
_PIPE_SIZE = 256 * 1024
# Seconds without output after which reading stops, once the process has ended and others keep the pipe open.
_SILENCE_AFTER_EXIT = 0.05


def prepare(descriptor: int) -> None:
    """Make a descriptor non-blocking and, if it is a pipe, large enough that few calls move much."""
    os.set_blocking(descriptor, False)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        # Refused past the user's share of pipe memory; then the pipe works as it is.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)


class OutputReader:
    """Reads a descriptor to its end, or, once its process has ended, until no more bytes arrive."""

    def __init__(self, descriptor: int, read_size: int = READ_SIZE) -> None:
        self._descriptor = descriptor
        self._read_size = read_size
        self._loop = asyncio.get_running_loop()
        self._process_ended = False
        self._ready: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """The next bytes; b"" at the end."""
        # A writer that always has data must not keep the loop from other tasks.
        await asyncio.sleep(0)
        silent = False
        while True:
            try:
                return os.read(self._descriptor, self._read_size)
            except BlockingIOError:
                if silent:
                    return b""
            except OSError as error:
                # A terminal whose other side is closed, or a socket whose peer vanished.
                if error.errno in (errno.EIO, errno.ECONNRESET):
                    return b""
                raise
            silent = not await self._wait()

    def process_ended(self) -> None:
        """The process has ended: from now on, a time without output is the end.

        A child may hold the descriptor open for ever.
        """
        self._process_ended = True
        self._wake()

    async def _wait(self) -> bool:
        """Wait for input; False if none has come in the time allowed after the end of the process."""
        was_ended = self._process_ended
        self._ready = self._loop.create_future()
        self._loop.add_reader(self._descriptor, self._wake)
        try:
            async with asyncio.timeout(_SILENCE_AFTER_EXIT if was_ended else None):
                await self._ready
        except TimeoutError:
            return False
        finally:
            self._loop.remove_reader(self._descriptor)
            self._ready = None
        return True

    def _wake(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)


async def write_all(descriptor: int, data: bytes, *, step: int = 1 << 30) -> None:
    """Write all of ``data`` in pieces of at most ``step`` bytes, waiting for room; raises OSError (EPIPE…)."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view[:step]) :]
        except BlockingIOError:
            await _writable(descriptor)


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(descriptor, _settle(ready))
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _settle(future: asyncio.Future[None]) -> Callable[[], None]:
    def settle() -> None:
        if not future.done():
            future.set_result(None)

    return settle
