"""Removing trees without making anybody wait: they are renamed into one folder, which is emptied in the background."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
from pathlib import Path

from host import processes
from host.errors import PodkeelError
from host.threads import in_long_thread

_log = logging.getLogger("podkeel.images")

_FEW = 64  # entries that are cheaper to remove on a thread than by starting rm


class Trash:
    """A folder on the same file system as what is thrown into it; what a crash leaves in it goes at the next start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = itertools.count()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

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
        """Wait until all that was thrown in is gone."""
        await self._idle.wait()

    def throw(self, path: Path) -> bool:
        """Move ``path`` into the folder (one rename; call it on a thread, then ``wake``); False if it is not there."""
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
        """Let the emptying begin."""
        self._idle.clear()
        self._wake.set()

    async def _empty(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while large := await in_long_thread(_remove_small, self._folder):
                    await processes.run(["rm", "-rf", "--one-file-system", "--", *large])
            except (PodkeelError, OSError) as error:
                _log.error("%s could not be emptied: %s", self._folder, error)
            if not self._wake.is_set():
                self._idle.set()


def _remove_small(folder: Path) -> list[str]:
    """Remove what has few entries; returns the rest, at most a command line's worth."""
    large = []
    for path in folder.iterdir():
        if _count(path) <= _FEW:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        else:
            large.append(str(path))
    return large[:500]


def _count(path: Path) -> int:
    total = 0
    pending = [path]
    while pending and total <= _FEW:
        current = pending.pop()
        if current.is_symlink() or not current.is_dir():
            total += 1
            continue
        with os.scandir(current) as listing:
            for entry in listing:
                total += 1
                if total > _FEW:
                    break
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
    return total
