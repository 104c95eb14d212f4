"""Waiting for changes in folders (inotify(7))."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_IN_CLOSE_WRITE = 0x8
_IN_MOVED_FROM = 0x40
_IN_MOVED_TO = 0x80
_IN_CREATE = 0x100
_IN_DELETE = 0x200
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800
_ANY_CHANGE = (
    _IN_CLOSE_WRITE | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
)

_libc = ctypes.CDLL(None, use_errno=True)


async def wait_until_exists(path: Path, timeout: float) -> bool:
    """Wait until ``path`` exists, at most ``timeout`` seconds; its folder exists. Returns whether it does."""
    return await wait_for_entries(path.parent, path.exists, timeout)


async def wait_for_entries(folder: Path, condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until ``condition`` holds, which is asked again when entries of ``folder`` come or are renamed.

    At most ``timeout`` seconds; returns whether it holds.
    """
    descriptor = _open()
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def ready() -> None:
        os.read(descriptor, 65536)
        changed.set()

    try:
        _watch(descriptor, folder, _IN_CREATE | _IN_MOVED_TO)
        loop.add_reader(descriptor, ready)
        async with asyncio.timeout(timeout):
            while not condition():
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return condition()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return True


class FolderWatch:
    """Notices that entries of a folder come, go or are written, also while the folder itself does not exist.

    While it does not, its nearest existing ancestor is watched. Raises OSError when the kernel allows no more watches.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = _open()
        self._watched: tuple[Path, int] | None = None
        self._changed = asyncio.Event()
        try:
            self._follow()
            asyncio.get_running_loop().add_reader(self._descriptor, self._ready)
        except BaseException:
            os.close(self._descriptor)
            raise

    async def wait(self) -> None:
        """Wait until something may have changed since this was last waited for."""
        await self._changed.wait()
        self._changed.clear()

    def close(self) -> None:
        """Stop watching."""
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _ready(self) -> None:
        os.read(self._descriptor, 65536)
        self._follow()
        self._changed.set()

    def _follow(self) -> None:
        """Watch the folder or its nearest existing ancestor; what appears meanwhile is seen before this returns."""
        while True:
            target = next(path for path in (self._folder, *self._folder.parents) if path.is_dir())
            try:
                number = _watch(self._descriptor, target, _ANY_CHANGE)
            except FileNotFoundError:
                continue
            if self._watched is not None and self._watched[1] != number:
                # Fails when the folder that was watched is gone, and its watch with it.
                _libc.inotify_rm_watch(self._descriptor, self._watched[1])
            self._watched = (target, number)
            if target == self._folder or not self._next_towards(target).is_dir():
                return

    def _next_towards(self, ancestor: Path) -> Path:
        return ancestor / self._folder.relative_to(ancestor).parts[0]


def _open() -> int:
    descriptor: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    return descriptor


def _watch(descriptor: int, folder: Path, events: int) -> int:
    number: int = _libc.inotify_add_watch(descriptor, os.fsencode(folder), events)
    if number < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch", str(folder))
    return number
