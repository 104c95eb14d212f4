"""Removes trees in the background: they are renamed into one folder, and a worker empties it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from host import processes
from host.concurrency.threads import acquired, in_long_thread
from host.errors import PodkeelError
from host.files.removal import (
    CONTINUE,
    MAX_MESSAGES,
    PAUSE,
    WORKER,
    WORKER_CONTROL,
    WORKER_FOLDER,
    OutOfBudgetError,
    Removal,
)

_log = logging.getLogger("podkeel.images")

HELD_SECONDS = 120.0
CHECK_SECONDS = 5.0
MIN_FREE = 0.2  # part of the disk; with less than this free, the trash is emptied at once
_MAX_ON_THREAD = 64  # removing so many entries on a thread is cheaper than starting a process
_WORKER = (sys.executable, "-I", "-S", "-c", WORKER, str(Path(__file__).parents[__name__.count(".")]))


class _Left(msgspec.Struct):
    """What stayed in the folder: the number of failures, the first of them, and whether large trees are left."""

    failures: int = 0
    messages: list[str] = msgspec.field(default_factory=list)
    more: bool = False


class Trash:
    """A folder on the same file system as the files moved into it. What a crash leaves, the next start deletes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = itertools.count()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._logged: frozenset[str] = frozenset()
        self._failures = 0
        self._holders = 0
        self._waiting = 0
        self.held_until = 0.0
        self._next_check: asyncio.TimerHandle | None = None
        self._control = -1
        self._paused = False

    def start(self) -> None:
        """Start the task that empties the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._task = asyncio.create_task(self._empty(), name="trash")
        self.wake()

    async def close(self) -> None:
        """Stop emptying the folder. The next start deletes the rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def emptied(self) -> None:
        """Wait until everything in the folder is deleted. Overrides ``held`` while it waits."""
        self._waiting += 1
        self._order_worker()
        try:
            await self._idle.wait()
        finally:
            self._waiting -= 1
            self._order_worker()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Pause the removal of large trees during the block, so that others can use the disk.

        The pause ends after two minutes, and while the disk is short of space.
        """
        self._holders += 1
        if self._holders == 1:
            self.held_until = time.monotonic() + HELD_SECONDS
            self._check_again()
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0 and self._next_check is not None:
                self._next_check.cancel()
            self._order_worker()

    def _check_again(self) -> None:
        self._order_worker()
        self._next_check = asyncio.get_running_loop().call_later(CHECK_SECONDS, self._check_again)

    def _order_worker(self) -> None:
        """Order the worker, which removes large trees, to pause or to continue."""
        if self._control < 0:
            return
        pause = self._holders > 0 and not self._waiting and time.monotonic() < self.held_until and self._has_space()
        if pause != self._paused:
            self._paused = pause
            with contextlib.suppress(BrokenPipeError):  # the worker has ended
                os.write(self._control, PAUSE if pause else CONTINUE)

    def _has_space(self) -> bool:
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return False  # then do not pause either
        return status.f_bavail > MIN_FREE * status.f_blocks and status.f_favail >= MIN_FREE * status.f_files

    def throw(self, path: Path) -> bool:
        """Rename ``path`` into the folder; call it on a thread, then call ``wake``. False if ``path`` is missing."""
        while True:
            target = self._folder / f"{os.getpid()}-{next(self._names)}"
            if not os.path.lexists(target):
                break
        try:
            path.rename(target)
        except FileNotFoundError:
            return False
        return True

    def wake(self) -> None:
        """Start emptying the folder."""
        self._idle.clear()
        self._wake.set()

    async def _empty(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                small = await in_long_thread(_remove_small, self._folder)
                self._log_failures(await self._remove_large() if small.more else small)
            except (PodkeelError, OSError) as error:
                _log.error("trash: %s: cannot be emptied: %s", self._folder, error)
            if not self._wake.is_set():
                self._idle.set()

    async def _remove_large(self) -> _Left:
        with contextlib.ExitStack() as stack:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            folder = await acquired(in_long_thread, lambda: os.open(self._folder, flags), os.close)
            stack.callback(os.close, folder)
            orders, self._control = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, orders)
            stack.callback(self.end_control)
            self._paused = False
            self._order_worker()
            descriptors = {WORKER_FOLDER: folder, WORKER_CONTROL: orders}
            done = await processes.run(_WORKER, descriptors=descriptors, environment={})
        return msgspec.json.decode(done.stdout, type=_Left)

    def end_control(self) -> None:
        """Close the pipe to the worker, which then ends. The agent's death has the same effect."""
        os.close(self._control)
        self._control = -1

    def _log_failures(self, left: _Left) -> None:
        """Log what could not be removed, each failure once."""
        for sentence in left.messages:
            if sentence not in self._logged:
                _log.error("trash: %s/%s: the next removal or start tries again", self._folder, sentence)
        if left.failures > len(left.messages) and self._failures != left.failures:
            _log.error("trash: %s: %d files could not be removed", self._folder, left.failures)
        self._logged, self._failures = frozenset(left.messages), left.failures


def _remove_small(path: Path) -> _Left:
    """Remove the entries with few files. ``more`` in the result says that large ones are left."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _remove_small_in(folder)
    finally:
        os.close(folder)


def _remove_small_in(folder: int) -> _Left:
    left = _Left()
    for name in os.listdir(folder):
        removal = Removal(_MAX_ON_THREAD)
        try:
            removal.remove(folder, name)
        except OutOfBudgetError:
            left.more = True
        left.failures += removal.failures
        left.messages += removal.messages[: MAX_MESSAGES - len(left.messages)]
    return left
