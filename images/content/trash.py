"""Removing trees without making anybody wait: they are renamed into one folder, which is emptied in the background."""

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
LOOK_SECONDS = 5.0
ROOM = 0.2  # the part of the disk that is to be free, or what is thrown away makes room at once
_FEW = 64  # entries that are cheaper to remove on a thread than by starting a process
_WORKER = (sys.executable, "-I", "-S", "-c", WORKER, str(Path(__file__).parents[__name__.count(".")]))


class _Left(msgspec.Struct):
    """The rest in the folder: how many files could not be removed, the first of them, and whether there are more."""

    failures: int = 0
    messages: list[str] = msgspec.field(default_factory=list)
    more: bool = False


class Trash:
    """A folder on the same file system as what is moved into it. The next start deletes what a crash leaves in it."""

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
        self._next_look: asyncio.TimerHandle | None = None
        self._control = -1
        self._paused = False

    def start(self) -> None:
        """Begin to empty the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._task = asyncio.create_task(self._empty(), name="trash")
        self.wake()

    async def close(self) -> None:
        """Stop emptying; the rest waits for the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def emptied(self) -> None:
        """Wait until all that was thrown in is gone; ``held`` does not count meanwhile."""
        self._waiting += 1
        self._tell_worker()
        try:
            await self._idle.wait()
        finally:
            self._waiting -= 1
            self._tell_worker()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Leave the disk to others: large trees are not removed until the block ends.

        This counts for two minutes, and not while the disk is short of room.
        """
        self._holders += 1
        if self._holders == 1:
            self.held_until = time.monotonic() + HELD_SECONDS
            self._look()
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0 and self._next_look is not None:
                self._next_look.cancel()
            self._tell_worker()

    def _look(self) -> None:
        self._tell_worker()
        self._next_look = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _tell_worker(self) -> None:
        """Make the process that removes large trees pause or continue."""
        if self._control < 0:
            return
        pause = self._holders > 0 and not self._waiting and time.monotonic() < self.held_until and self._has_room()
        if pause != self._paused:
            self._paused = pause
            with contextlib.suppress(BrokenPipeError):  # it has ended
                os.write(self._control, PAUSE if pause else CONTINUE)

    def _has_room(self) -> bool:
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return False  # then nothing is to wait either
        return status.f_bavail > ROOM * status.f_blocks and status.f_favail >= ROOM * status.f_files

    def throw(self, path: Path) -> bool:
        """Move ``path`` into the folder (one rename; call it on a thread, then ``wake``); False if it is missing."""
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
        """Allow the emptying to begin."""
        self._idle.clear()
        self._wake.set()

    async def _empty(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                small = await in_long_thread(_remove_small, self._folder)
                self._log_left(await self._remove_large() if small.more else small)
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
            self._tell_worker()
            descriptors = {WORKER_FOLDER: folder, WORKER_CONTROL: orders}
            done = await processes.run(_WORKER, descriptors=descriptors, environment={})
        return msgspec.json.decode(done.stdout, type=_Left)

    def end_control(self) -> None:
        """Close the pipe to the process that removes large trees, which then ends, as after the agent's death."""
        os.close(self._control)
        self._control = -1

    def _log_left(self, left: _Left) -> None:
        """Log what could not be removed, each thing once."""
        for sentence in left.messages:
            if sentence not in self._logged:
                _log.error("trash: %s/%s: the next removal or start tries again", self._folder, sentence)
        if left.failures > len(left.messages) and self._failures != left.failures:
            _log.error("trash: %s: %d files could not be removed", self._folder, left.failures)
        self._logged, self._failures = frozenset(left.messages), left.failures


def _remove_small(path: Path) -> _Left:
    """Remove what has few entries; ``more`` says that there is something that has many."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _remove_small_in(folder)
    finally:
        os.close(folder)


def _remove_small_in(folder: int) -> _Left:
    left = _Left()
    for name in os.listdir(folder):
        removal = Removal(_FEW)
        try:
            removal.remove(folder, name)
        except OutOfBudgetError:
            left.more = True
        left.failures += removal.failures
        left.messages += removal.messages[: MAX_MESSAGES - len(left.messages)]
    return left
